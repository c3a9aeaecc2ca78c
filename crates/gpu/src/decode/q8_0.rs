//! Q8_0: `d q`. Codes: bytes, signed. Scales: `d` of every 32 weights, f16.

use super::{Decode, Parts, half, half_bits, low_f16, push_plane, put_half};
use cubecl::prelude::*;

pub(crate) struct Q8_0;

pub(super) fn split(block: &[u8; 34], parts: &mut Parts, i: usize) {
    put_half(&mut parts.scales, i, half(block, 0));
    push_plane(&mut parts.codes, &block[2..], 8);
}

#[cube]
impl Decode for Q8_0 {
    fn eight(
        codes: &[u32],
        _high: &[u32],
        scales: &[u32],
        _supers: &[u32],
        unit: u32,
    ) -> Array<f32> {
        let mut out = Array::<f32>::new(8usize);
        let d = low_f16(half_bits(scales, unit / 4));
        #[unroll]
        for w in 0..2u32 {
            let word = codes[(unit * 2 + w) as usize];
            #[unroll]
            for j in 0..4u32 {
                // The sign bit flipped is an offset of 128.
                let q = ((word >> (j * 8)) & 255u32) ^ 128u32;
                out[(w * 4 + j) as usize] = d * (f32::cast_from(q) - 128.0);
            }
        }
        out
    }
}
