//! IQ2_XS: `± d (½ + s) ¼ p`, as IQ2_XXS. Codes: nine bits of a point's number and seven signs, 16 bits. High: `s` of every
//! 16 weights, nibbles. Scales: `d` of every 256, f16. Supers: the points.

use super::iq2_xxs::{even_signs, point};
use super::{Decode, Parts, half, half_bits, low_f16, push_plane, put_half};
use cubecl::prelude::*;

pub(crate) struct Iq2Xs;

pub(super) fn split(block: &[u8; 74], parts: &mut Parts, i: usize) {
    put_half(&mut parts.scales, i, half(block, 0));
    push_plane(&mut parts.codes, &block[2..66], 8);
    push_plane(&mut parts.high, &block[66..], 8);
}

#[cube]
impl Decode for Iq2Xs {
    fn eight(codes: &[u32], high: &[u32], scales: &[u32], supers: &[u32], unit: u32) -> Array<f32> {
        let bits = half_bits(codes, unit);
        let scale = (high[(unit / 16) as usize] >> (unit / 2 % 8 * 4)) & 15u32;
        let d = low_f16(half_bits(scales, unit / 32));
        let db = d * (0.5 + f32::cast_from(scale)) * 0.25;
        point(supers, bits & 511u32, even_signs(bits >> 9u32), db)
    }
}
