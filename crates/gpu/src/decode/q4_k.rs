//! Q4_K: `d s q - dmin m`. Codes: nibbles. Scales: `s | m << 8` of every 32 weights, 16 bits. Supers: `d` and `dmin`
//! of every 256, f16 in one word.

use super::{Decode, Parts, half_bits, low_f16, push_plane, put_half, word};
use cubecl::prelude::*;

pub(crate) struct Q4K;

pub(super) fn split(block: &[u8; 144], parts: &mut Parts, _: usize) {
    parts.supers.push(word(block, 0));
    put_scales(&block[4..16], parts);
    push_plane(&mut parts.codes, &codes(&block[16..]), 4);
}

/// Six-bit scales and minima of eight groups. Groups 0-3 have theirs in the low six bits of bytes 0-3 and
/// 4-7; groups 4-7 have low nibbles in bytes 8-11 and the upper pair on top of those.
pub(super) fn put_scales(bytes: &[u8], parts: &mut Parts) {
    for g in 0..8 {
        let (s, m) = match g < 4 {
            true => (bytes[g] & 63, bytes[g + 4] & 63),
            false => (
                bytes[g + 4] & 15 | (bytes[g - 4] >> 6) << 4,
                bytes[g + 4] >> 4 | (bytes[g] >> 6) << 4,
            ),
        };
        put_half(&mut parts.scales, g, u16::from_le_bytes([s, m]));
    }
}

/// Byte `i` of the 32 of pair `p` is weight `64 p + i` low, `64 p + 32 + i` high.
pub(super) fn codes(bytes: &[u8]) -> [u8; 256] {
    std::array::from_fn(|i| (bytes[i / 64 * 32 + i % 32] >> (4 * (i / 32 % 2))) & 15)
}

#[cube]
impl Decode for Q4K {
    fn eight(
        codes: &[u32],
        _high: &[u32],
        scales: &[u32],
        supers: &[u32],
        unit: u32,
    ) -> Array<f32> {
        let mut out = Array::<f32>::new(8usize);
        let word = codes[unit as usize];
        let scale = half_bits(scales, unit / 4);
        let super_scale = supers[(unit / 32) as usize];
        let dl = low_f16(super_scale & 0xffffu32) * f32::cast_from(scale & 255u32);
        let ml = low_f16(super_scale >> 16u32) * f32::cast_from(scale >> 8u32);
        #[unroll]
        for j in 0..8u32 {
            let q = (word >> (j * 4)) & 15u32;
            out[j as usize] = dl * f32::cast_from(q) - ml;
        }
        out
    }
}
