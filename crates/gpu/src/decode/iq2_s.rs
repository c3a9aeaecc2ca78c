//! IQ2_S: `± d (½ + s) ¼ p`, as IQ2_XXS. Codes: the lower byte of a point's number and eight signs, 16 bits. High: of every
//! 32 weights four pairs of upper bits, and `s` of its halves above them, 16 bits. Scales: `d` of every 256, f16. Supers:
//! the points.

use super::iq2_xxs::point;
use super::{Decode, Parts, half, half_bits, low_f16, put_half};
use cubecl::prelude::*;

pub(crate) struct Iq2S;

pub(super) fn split(block: &[u8; 82], parts: &mut Parts, i: usize) {
    put_half(&mut parts.scales, i, half(block, 0));
    let two = |low: usize, high: usize| u16::from_le_bytes([block[low], block[high]]);
    (0..32).for_each(|k| put_half(&mut parts.codes, k, two(2 + k, 34 + k)));
    (0..8).for_each(|g| put_half(&mut parts.high, g, two(66 + g, 74 + g)));
}

#[cube]
impl Decode for Iq2S {
    fn eight(codes: &[u32], high: &[u32], scales: &[u32], supers: &[u32], unit: u32) -> Array<f32> {
        let bits = half_bits(codes, unit);
        let group = half_bits(high, unit / 4);
        let index = (bits & 255u32) | (((group >> (unit % 4 * 2)) & 3u32) << 8u32);
        let scale = (group >> (unit / 2 % 2 * 4 + 8)) & 15u32;
        let d = low_f16(half_bits(scales, unit / 32));
        let db = d * (0.5 + f32::cast_from(scale)) * 0.25;
        point(supers, index, bits >> 8u32, db)
    }
}
