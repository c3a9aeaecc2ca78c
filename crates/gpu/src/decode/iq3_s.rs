//! IQ3_S: `± d (2 s + 1) p`, `p` a point of a grid, of four weights. Codes: of every 32 weights the lower bytes of the
//! points' numbers, two words, and the signs, a third. High: of every 32 weights the upper bits, and `s` above them, 16
//! bits. Scales: `d` of every 256, f16. Supers: the points.

use super::{Decode, Parts, half, half_bits, low_f16, put_half, signed, word};
use cubecl::prelude::*;

pub(crate) struct Iq3S;

pub(super) fn split(block: &[u8; 110], parts: &mut Parts, i: usize) {
    put_half(&mut parts.scales, i, half(block, 0));
    for g in 0..8 {
        let low = 2 + 8 * g;
        parts.codes.extend([word(block, low), word(block, low + 4), word(block, 74 + 4 * g)]);
        let scale = (block[106 + g / 2] >> (4 * (g % 2))) & 15;
        put_half(&mut parts.high, g, u16::from_le_bytes([block[66 + g], scale]));
    }
}

#[cube]
impl Decode for Iq3S {
    fn eight(codes: &[u32], high: &[u32], scales: &[u32], supers: &[u32], unit: u32) -> Array<f32> {
        let mut out = Array::<f32>::new(8usize);
        let group = unit / 4 * 3;
        let low = codes[(group + unit % 4 / 2) as usize] >> (unit % 2 * 16);
        let signs = codes[(group + 2) as usize] >> (unit % 4 * 8);
        let bits = half_bits(high, unit / 4);
        let scale = (bits >> 8u32) * 2u32 + 1u32;
        let db = low_f16(half_bits(scales, unit / 32)) * f32::cast_from(scale);
        #[unroll]
        for p in 0..2u32 {
            let upper = (bits >> (unit % 4 * 2 + p)) & 1u32;
            let digits = half_bits(supers, ((low >> (p * 8)) & 255u32) | (upper << 8u32));
            #[unroll]
            for j in 0..4u32 {
                let digit = (digits >> (j * 3)) & 7u32;
                let value = db * f32::cast_from(digit * 2u32 + 1u32);
                out[(p * 4 + j) as usize] = signed(value, signs, comptime!(p * 4 + j));
            }
        }
        out
    }
}
