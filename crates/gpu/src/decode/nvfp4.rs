//! NVFP4: `d q s`, `q` being E2M1 doubled. Codes: nibbles. Scales: `d` of every 16 weights, half an unsigned E4M3,
//! bytes. Supers: `s` of the matrix or expert, f32, once for every 128 weights; one where there is none.

use super::fp8::e4m3;
use super::mxfp4::{e2m1_doubled, no_minus_zero};
use super::{Decode, Parts, SCALED, byte, push_plane};
use cubecl::prelude::*;
use marlin_tensor::Weight;

pub(crate) struct Nvfp4;

/// Bytes and weights of a stored block.
const BLOCK: (usize, usize) = (36, 64);

pub(super) fn split(weight: &Weight, parts: &mut Parts) {
    let padded = weight.in_features.next_multiple_of(SCALED);
    let row_bytes = weight.in_features / BLOCK.1 * BLOCK.0;
    let factors = weight.part("scale").map(|scale| scale.bytes());
    for (row, blocks) in weight.parts[0].1.bytes().chunks_exact(row_bytes).enumerate() {
        let mut codes = vec![0; padded];
        let mut scales = vec![0; padded / 16];
        for (i, block) in blocks.as_chunks::<{ BLOCK.0 }>().0.iter().enumerate() {
            // The top bit is ignored, but without it what would be NaN is zero.
            let scale = |b: &u8| if *b == 127 { 0 } else { b & 127 };
            scales[4 * i..][..4].iter_mut().zip(block).for_each(|(s, b)| *s = scale(b));
            for (n, code) in codes[BLOCK.1 * i..][..BLOCK.1].iter_mut().enumerate() {
                // Weights eight apart share a byte.
                let byte = block[4 + n / 16 * 8 + n % 8];
                *code = no_minus_zero((byte >> (4 * (n / 8 % 2))) & 15);
            }
        }
        push_plane(&mut parts.codes, &codes, 4);
        push_plane(&mut parts.scales, &scales, 8);
        let factor = factors.map_or(1f32.to_bits(), |bytes| super::word(bytes, 4 * row));
        parts.supers.extend(std::iter::repeat_n(factor, padded / SCALED));
    }
}

#[cube]
impl Decode for Nvfp4 {
    fn eight(
        codes: &[u32],
        _high: &[u32],
        scales: &[u32],
        supers: &[u32],
        unit: u32,
    ) -> Array<f32> {
        let mut out = Array::<f32>::new(8usize);
        let word = codes[unit as usize];
        let d = e4m3(byte(scales, unit / 2)) * 0.5;
        let s = f32::reinterpret(supers[(unit / 16) as usize]);
        #[unroll]
        for j in 0..8u32 {
            out[j as usize] = d * e2m1_doubled(word >> (j * 4)) * s;
        }
        out
    }
}
