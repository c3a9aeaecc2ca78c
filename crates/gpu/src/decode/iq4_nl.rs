//! IQ4_NL: `d L[q]`. Codes: nibbles. Scales: `d` of every 32 weights, f16. Supers: the levels `L`, f32.

use super::{Decode, Parts, each, half, half_bits, low_f16, nibbles, push_plane, put_half};
use cubecl::prelude::*;
use marlin_quant::IQ4_LEVELS;
use marlin_tensor::Weight;

pub(crate) struct Iq4Nl;

/// Words that the levels take: another matrix may begin after them on every device.
const LEVELS: usize = 64;

pub(super) fn split(weight: &Weight, parts: &mut Parts) {
    each(weight, parts, |block: &[u8; 18], parts, i| {
        put_half(&mut parts.scales, i, half(block, 0));
        push_plane(&mut parts.codes, &nibbles(&block[2..]), 4);
    });
    parts.supers = levels();
}

pub(super) fn levels() -> Vec<u32> {
    let mut words: Vec<u32> = IQ4_LEVELS.iter().map(|&level| f32::from(level).to_bits()).collect();
    words.resize(LEVELS, 0);
    words
}

/// Eight codes under the scale `d`.
#[cube]
pub(super) fn eight(word: u32, d: f32, levels: &[u32]) -> Array<f32> {
    let mut out = Array::<f32>::new(8usize);
    #[unroll]
    for j in 0..8u32 {
        let q = (word >> (j * 4)) & 15u32;
        out[j as usize] = d * f32::reinterpret(levels[q as usize]);
    }
    out
}

#[cube]
impl Decode for Iq4Nl {
    fn eight(
        codes: &[u32],
        _high: &[u32],
        scales: &[u32],
        supers: &[u32],
        unit: u32,
    ) -> Array<f32> {
        eight(codes[unit as usize], low_f16(half_bits(scales, unit / 4)), supers)
    }
}
