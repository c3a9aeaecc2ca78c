//! bf16: a word is two weights, each the upper half of an f32.

use super::Decode;
use cubecl::prelude::*;

pub(crate) struct Bf16;

#[cube]
impl Decode for Bf16 {
    fn eight(
        codes: &[u32],
        _high: &[u32],
        _scales: &[u32],
        _supers: &[u32],
        unit: u32,
    ) -> Array<f32> {
        let mut out = Array::<f32>::new(8usize);
        #[unroll]
        for j in 0..4u32 {
            let pair = codes[(unit * 4 + j) as usize];
            out[(j * 2) as usize] = f32::reinterpret(pair << 16u32);
            out[(j * 2 + 1) as usize] = f32::reinterpret(pair & 0xffff0000u32);
        }
        out
    }
}
