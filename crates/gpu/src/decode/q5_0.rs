//! Q5_0: `d (q - 16)`. Codes: nibbles, with the fifth bits in a plane of single bits. Scales: `d` of
//! every 32 weights, f16.

use super::{Decode, Parts, half, half_bits, low_f16, nibbles, push_plane, put_half, word};
use cubecl::prelude::*;

pub(crate) struct Q5_0;

pub(super) fn split(block: &[u8; 22], parts: &mut Parts, i: usize) {
    put_half(&mut parts.scales, i, half(block, 0));
    parts.high.push(word(block, 2));
    push_plane(&mut parts.codes, &nibbles(&block[6..]), 4);
}

#[cube]
impl Decode for Q5_0 {
    fn eight(
        codes: &[u32],
        high: &[u32],
        scales: &[u32],
        _supers: &[u32],
        unit: u32,
    ) -> Array<f32> {
        let mut out = Array::<f32>::new(8usize);
        let word = codes[unit as usize];
        let bits = high[(unit / 4) as usize] >> ((unit % 4) * 8);
        let d = low_f16(half_bits(scales, unit / 4));
        #[unroll]
        for j in 0..8u32 {
            let q = ((word >> (j * 4)) & 15u32) | (((bits >> j) & 1u32) << 4u32);
            out[j as usize] = d * (f32::cast_from(q) - 16.0);
        }
        out
    }
}
