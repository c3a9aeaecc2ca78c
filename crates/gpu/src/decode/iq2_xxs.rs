//! IQ2_XXS: `± d (½ + s) ¼ p`, `p` a point of a grid. Codes: the points' numbers, bytes. High: of every 32 weights four
//! times seven signs, and `s` above them. Scales: `d` of every 256, f16. Supers: the points.

use super::{Decode, Parts, byte, half, half_bits, low_f16, put_half, signed, word};
use cubecl::prelude::*;

pub(crate) struct Iq2Xxs;

pub(super) fn split(block: &[u8; 66], parts: &mut Parts, i: usize) {
    put_half(&mut parts.scales, i, half(block, 0));
    for group in block[2..].chunks_exact(8) {
        parts.codes.push(word(group, 0));
        parts.high.push(word(group, 4));
    }
}

/// The low seven bits and the one that makes their number even.
#[cube]
pub(super) fn even_signs(bits: u32) -> u32 {
    let seven = bits & 127u32;
    seven | ((seven.count_ones() & 1u32) << 7u32)
}

/// Point `index` under the scale `db`.
#[cube]
pub(super) fn point(points: &[u32], index: u32, signs: u32, db: f32) -> Array<f32> {
    let mut out = Array::<f32>::new(8usize);
    let digits = half_bits(points, index);
    #[unroll]
    for j in 0..8u32 {
        let digit = (digits >> (j * 2)) & 3u32;
        // 8, 25 or 43.
        let coordinate = digit * 17u32 + 8u32 + (digit >> 1u32);
        out[j as usize] = signed(db * f32::cast_from(coordinate), signs, j);
    }
    out
}

#[cube]
impl Decode for Iq2Xxs {
    fn eight(codes: &[u32], high: &[u32], scales: &[u32], supers: &[u32], unit: u32) -> Array<f32> {
        let word = high[(unit / 4) as usize];
        let d = low_f16(half_bits(scales, unit / 32));
        let db = d * (0.5 + f32::cast_from(word >> 28u32)) * 0.25;
        point(supers, byte(codes, unit), even_signs(word >> (unit % 4 * 7)), db)
    }
}
