//! Floats of eight bits, E4M3: `w s`. Codes: bytes. Scales: `s` of the row or of the square of 128 by 128, f32, once for
//! every 128 weights.

use super::{Decode, Parts, SCALED, push_plane, word};
use cubecl::prelude::*;
use marlin_tensor::Weight;

pub(crate) struct Fp8;

pub(super) fn split(weight: &Weight, parts: &mut Parts) {
    let columns = weight.in_features;
    let scales = weight.part("scale");
    // One scale a row, or rows of those of squares.
    let grid = scales.and_then(|s| s.shape().get(1).copied());
    let scales = scales.map_or(&[][..], |s| s.bytes());
    for (row, codes) in weight.parts[0].1.bytes().chunks_exact(columns).enumerate() {
        let mut padded = codes.to_vec();
        padded.resize(columns.next_multiple_of(SCALED), 0);
        push_plane(&mut parts.codes, &padded, 8);
        let scale = |block| grid.map_or(row, |width| row / SCALED * width + block);
        parts.scales.extend((0..padded.len() / SCALED).map(|b| word(scales, 4 * scale(b))));
    }
}

/// The value of seven bits without a sign.
#[cube]
pub(super) fn e4m3(bits: u32) -> f32 {
    // The exponents differ by 120; the smallest are multiples of 1/512.
    let normal = f32::reinterpret((bits + 960u32) << 20u32);
    select(bits < 8u32, f32::cast_from(bits) * 0.001953125, normal)
}

#[cube]
impl Decode for Fp8 {
    fn eight(
        codes: &[u32],
        _high: &[u32],
        scales: &[u32],
        _supers: &[u32],
        unit: u32,
    ) -> Array<f32> {
        let mut out = Array::<f32>::new(8usize);
        let s = f32::reinterpret(scales[(unit / 16) as usize]);
        #[unroll]
        for w in 0..2u32 {
            let word = codes[(unit * 2 + w) as usize];
            #[unroll]
            for j in 0..4u32 {
                let code = word >> (j * 8);
                let magnitude = u32::reinterpret(e4m3(code & 127u32));
                // Seven ones are NaN.
                let bits = select(code & 127u32 == 127u32, 0x7fc00000u32, magnitude);
                out[(w * 4 + j) as usize] = f32::reinterpret(bits | ((code & 128u32) << 24u32)) * s;
            }
        }
        out
    }
}
