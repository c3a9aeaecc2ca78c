//! f16: a word is two weights. Rows are padded with zeros to whole units.

use super::{Decode, Parts, UNIT, half, put_half};
use cubecl::prelude::*;
use marlin_tensor::Weight;

pub(crate) struct F16;

/// Also that of bf16.
pub(super) fn split(weight: &Weight, parts: &mut Parts) {
    let columns = weight.in_features;
    for row in weight.parts[0].1.bytes().chunks_exact(2 * columns) {
        for i in 0..columns.next_multiple_of(UNIT) {
            let value = if i < columns { half(row, 2 * i) } else { 0 };
            put_half(&mut parts.codes, i, value);
        }
    }
}

#[cube]
impl Decode for F16 {
    fn eight(
        codes: &[u32],
        _high: &[u32],
        _scales: &[u32],
        _supers: &[u32],
        unit: u32,
    ) -> Array<f32> {
        let mut out = Array::<f32>::new(8usize);
        #[unroll]
        for j in 0..4u32 {
            let pair = Vector::<half::f16, Const<2>>::reinterpret(codes[(unit * 4 + j) as usize]);
            out[(j * 2) as usize] = f32::cast_from(pair.extract(0usize));
            out[(j * 2 + 1) as usize] = f32::cast_from(pair.extract(1usize));
        }
        out
    }
}
