//! Q2_K: `d s q - dmin m`. Codes: pairs. Scales: `s | m << 4` of every 16 weights, bytes. Supers: `d` and
//! `dmin` of every 256, f16 in one word.

use super::{Decode, Parts, low_f16, push_plane, word};
use cubecl::prelude::*;

pub(crate) struct Q2K;

pub(super) fn split(block: &[u8; 84], parts: &mut Parts, _: usize) {
    let codes: [u8; 256] = std::array::from_fn(|i| two_bits(&block[16..80], i));
    push_plane(&mut parts.codes, &codes, 2);
    push_plane(&mut parts.scales, &block[..16], 8);
    parts.supers.push(word(block, 80));
}

/// Code `i` of 64 bytes: half `h`, pair `s`, byte `b` is weight `128 h + 32 s + b`.
pub(super) fn two_bits(bytes: &[u8], i: usize) -> u8 {
    (bytes[i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4))) & 3
}

#[cube]
impl Decode for Q2K {
    fn eight(
        codes: &[u32],
        _high: &[u32],
        scales: &[u32],
        supers: &[u32],
        unit: u32,
    ) -> Array<f32> {
        let mut out = Array::<f32>::new(8usize);
        let pairs = codes[(unit / 2) as usize] >> ((unit % 2) * 16);
        let scale = scales[(unit / 8) as usize] >> ((unit / 2 % 4) * 8);
        let super_scale = supers[(unit / 32) as usize];
        let dl = low_f16(super_scale & 0xffffu32) * f32::cast_from(scale & 15u32);
        let ml = low_f16(super_scale >> 16u32) * f32::cast_from((scale >> 4u32) & 15u32);
        #[unroll]
        for j in 0..8u32 {
            let q = (pairs >> (j * 2)) & 3u32;
            out[j as usize] = dl * f32::cast_from(q) - ml;
        }
        out
    }
}
