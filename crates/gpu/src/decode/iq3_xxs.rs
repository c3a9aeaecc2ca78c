//! IQ3_XXS: `± d (½ + s) ½ p`, `p` a point of a grid, of four weights. Codes: the points' numbers, bytes. High: of every 32
//! weights four times seven signs, and `s` above them. Scales: `d` of every 256, f16. Supers: the points.

use super::iq2_xxs::even_signs;
use super::{Decode, Parts, half, half_bits, low_f16, push_plane, put_half, signed, word};
use cubecl::prelude::*;

pub(crate) struct Iq3Xxs;

pub(super) fn split(block: &[u8; 98], parts: &mut Parts, i: usize) {
    put_half(&mut parts.scales, i, half(block, 0));
    push_plane(&mut parts.codes, &block[2..66], 8);
    parts.high.extend((0..8).map(|g| word(block, 66 + 4 * g)));
}

#[cube]
impl Decode for Iq3Xxs {
    fn eight(codes: &[u32], high: &[u32], scales: &[u32], supers: &[u32], unit: u32) -> Array<f32> {
        let mut out = Array::<f32>::new(8usize);
        let two = half_bits(codes, unit);
        let word = high[(unit / 4) as usize];
        let signs = even_signs(word >> (unit % 4 * 7));
        let d = low_f16(half_bits(scales, unit / 32));
        let db = d * (0.5 + f32::cast_from(word >> 28u32)) * 0.5;
        #[unroll]
        for p in 0..2u32 {
            let digits = half_bits(supers, (two >> (p * 8)) & 255u32);
            #[unroll]
            for j in 0..4u32 {
                let digit = (digits >> (j * 3)) & 7u32;
                // 4, 12, 20 … 52, and 62.
                let coordinate = digit * 8u32 + 4u32 + ((digit + 1u32) >> 3u32) * 2u32;
                let value = db * f32::cast_from(coordinate);
                out[(p * 4 + j) as usize] = signed(value, signs, comptime!(p * 4 + j));
            }
        }
        out
    }
}
