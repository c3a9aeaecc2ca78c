//! Q4_0: `d (q - 8)`. Codes: nibbles. Scales: `d` of every 32 weights, f16.

use super::{Decode, Parts, half, half_bits, low_f16, nibbles, push_plane, put_half};
use cubecl::prelude::*;

pub(crate) struct Q4_0;

pub(super) fn split(block: &[u8; 18], parts: &mut Parts, i: usize) {
    put_half(&mut parts.scales, i, half(block, 0));
    push_plane(&mut parts.codes, &nibbles(&block[2..]), 4);
}

#[cube]
impl Decode for Q4_0 {
    fn eight(
        codes: &[u32],
        _high: &[u32],
        scales: &[u32],
        _supers: &[u32],
        unit: u32,
    ) -> Array<f32> {
        let mut out = Array::<f32>::new(8usize);
        let word = codes[unit as usize];
        let d = low_f16(half_bits(scales, unit / 4));
        #[unroll]
        for j in 0..8u32 {
            let q = (word >> (j * 4)) & 15u32;
            out[j as usize] = d * (f32::cast_from(q) - 8.0);
        }
        out
    }
}
