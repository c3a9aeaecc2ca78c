//! f32: a word is a weight. Rows are padded with zeros to whole units.

use super::{Decode, Parts, UNIT, word};
use cubecl::prelude::*;
use marlin_tensor::Weight;

pub(crate) struct F32;

pub(super) fn split(weight: &Weight, parts: &mut Parts) {
    let columns = weight.in_features;
    for row in weight.parts[0].1.bytes().chunks_exact(4 * columns) {
        parts.codes.extend((0..columns).map(|i| word(row, 4 * i)));
        parts.codes.resize(parts.codes.len().next_multiple_of(UNIT), 0);
    }
}

#[cube]
impl Decode for F32 {
    fn eight(
        codes: &[u32],
        _high: &[u32],
        _scales: &[u32],
        _supers: &[u32],
        unit: u32,
    ) -> Array<f32> {
        let mut out = Array::<f32>::new(8usize);
        #[unroll]
        for j in 0..8u32 {
            out[j as usize] = f32::reinterpret(codes[(unit * 8 + j) as usize]);
        }
        out
    }
}
