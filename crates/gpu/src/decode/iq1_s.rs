//! IQ1_S: `d (2 s + 1) (p ± ⅛)`, `p` a point of a grid. Codes: lower bytes of the points' numbers. High: of every 32
//! weights, four times three upper bits, `s` and the sign of the shift, 16 bits. Scales: `d` of every 256, f16. Supers: the
//! points.

use super::{Decode, Parts, byte, half, half_bits, low_f16, push_plane, put_half};
use cubecl::prelude::*;

pub(crate) struct Iq1S;

pub(super) fn split(block: &[u8; 50], parts: &mut Parts, i: usize) {
    put_half(&mut parts.scales, i, half(block, 0));
    push_plane(&mut parts.codes, &block[2..34], 8);
    (0..8).for_each(|g| put_half(&mut parts.high, g, half(block, 34 + 2 * g)));
}

/// Point `index` under the scale `dl`, an eighth up, or down where `down` is not zero.
#[cube]
pub(super) fn point(points: &[u32], index: u32, dl: f32, down: u32) -> Array<f32> {
    let mut out = Array::<f32>::new(8usize);
    let digits = half_bits(points, index);
    let shift = select(down == 0u32, 0.125f32, -0.125f32);
    #[unroll]
    for j in 0..8u32 {
        let digit = (digits >> (j * 2)) & 3u32;
        out[j as usize] = dl * (f32::cast_from(digit) - 1.0 + shift);
    }
    out
}

#[cube]
impl Decode for Iq1S {
    fn eight(codes: &[u32], high: &[u32], scales: &[u32], supers: &[u32], unit: u32) -> Array<f32> {
        let word = half_bits(high, unit / 4);
        let index = byte(codes, unit) | (((word >> (unit % 4 * 3)) & 7u32) << 8u32);
        let scale = ((word >> 12u32) & 7u32) * 2u32 + 1u32;
        let dl = low_f16(half_bits(scales, unit / 32)) * f32::cast_from(scale);
        point(supers, index, dl, word & 0x8000u32)
    }
}
