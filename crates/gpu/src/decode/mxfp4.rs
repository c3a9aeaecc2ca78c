//! MXFP4: `d q`, `q` being E2M1 doubled and `d` half a power of two. Codes: nibbles. Scales: the exponent of every 32
//! weights, bytes.

use super::{Decode, Parts, byte, nibbles, push_plane, put_byte};
use cubecl::prelude::*;

pub(crate) struct Mxfp4;

pub(super) fn split(block: &[u8; 17], parts: &mut Parts, i: usize) {
    put_byte(&mut parts.scales, i, block[0]);
    push_plane(&mut parts.codes, &nibbles(&block[1..]).map(no_minus_zero), 4);
}

/// Negative zero reads as zero.
pub(super) fn no_minus_zero(code: u8) -> u8 {
    if code == 8 { 0 } else { code }
}

/// Twice the E2M1 value of the low four bits: magnitudes are the digits of a number.
#[cube]
pub(super) fn e2m1_doubled(code: u32) -> f32 {
    let magnitude = f32::cast_from((0xc8643210u32 >> ((code & 7u32) * 4u32)) & 15u32);
    f32::reinterpret(u32::reinterpret(magnitude) | ((code & 8u32) << 28u32))
}

#[cube]
impl Decode for Mxfp4 {
    fn eight(
        codes: &[u32],
        _high: &[u32],
        scales: &[u32],
        _supers: &[u32],
        unit: u32,
    ) -> Array<f32> {
        let mut out = Array::<f32>::new(8usize);
        let word = codes[unit as usize];
        let exponent = byte(scales, unit / 4);
        // The two smallest are subnormal.
        let bits = select(exponent < 2u32, 0x200000u32 << exponent, (exponent - 1u32) << 23u32);
        let d = f32::reinterpret(bits);
        #[unroll]
        for j in 0..8u32 {
            out[j as usize] = d * e2m1_doubled(word >> (j * 4));
        }
        out
    }
}
