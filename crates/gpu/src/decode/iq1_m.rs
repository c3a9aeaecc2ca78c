//! IQ1_M: `d (2 s + 1) (p ± ⅛)`, as IQ1_S. Codes: lower bytes of the points' numbers. High: of every eight weights three
//! upper bits and the sign of the shift, nibbles. Scales: two words of every 256, as stored: `s` of every 16 weights in
//! four times twelve bits, whose upper nibbles are the bits of `d`. Supers: the points.

use super::iq1_s::point;
use super::{Decode, Parts, byte, half_bits, low_f16, push_plane, word};
use cubecl::prelude::*;

pub(crate) struct Iq1M;

pub(super) fn split(block: &[u8; 56], parts: &mut Parts, _: usize) {
    push_plane(&mut parts.codes, &block[..32], 8);
    push_plane(&mut parts.high, &block[32..48], 8);
    parts.scales.extend([word(block, 48), word(block, 52)]);
}

#[cube]
impl Decode for Iq1M {
    fn eight(codes: &[u32], high: &[u32], scales: &[u32], supers: &[u32], unit: u32) -> Array<f32> {
        let bits = high[(unit / 8) as usize] >> (unit % 8 * 4);
        let index = byte(codes, unit) | ((bits & 7u32) << 8u32);
        let first = scales[(unit / 32 * 2) as usize];
        let second = scales[(unit / 32 * 2 + 1) as usize];
        let low = ((first >> 12u32) & 15u32) | ((first >> 28u32) << 4u32);
        let d = low | ((second >> 4u32) & 0xf00u32) | ((second >> 16u32) & 0xf000u32);
        let scale = (half_bits(scales, unit / 8) >> (unit / 2 % 4 * 3)) & 7u32;
        let dl = low_f16(d) * f32::cast_from(scale * 2u32 + 1u32);
        point(supers, index, dl, bits & 8u32)
    }
}
