//! Q5_1: `d q + m`. Codes: nibbles, with the fifth bits in a plane of single bits. Scales: `d` and `m`
//! of every 32 weights, f16 in one word.

use super::{Decode, Parts, low_f16, nibbles, push_plane, word};
use cubecl::prelude::*;

pub(crate) struct Q5_1;

pub(super) fn split(block: &[u8; 24], parts: &mut Parts, _: usize) {
    parts.scales.push(word(block, 0));
    parts.high.push(word(block, 4));
    push_plane(&mut parts.codes, &nibbles(&block[8..]), 4);
}

#[cube]
impl Decode for Q5_1 {
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
        let scale = scales[(unit / 4) as usize];
        let d = low_f16(scale & 0xffffu32);
        let m = low_f16(scale >> 16u32);
        #[unroll]
        for j in 0..8u32 {
            let q = ((word >> (j * 4)) & 15u32) | (((bits >> j) & 1u32) << 4u32);
            out[j as usize] = d * f32::cast_from(q) + m;
        }
        out
    }
}
