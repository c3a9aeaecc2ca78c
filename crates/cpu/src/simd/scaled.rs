//! A repacked matrix under one more factor per row: outputs are multiplied by it.

use super::kernels::Tiled;
use super::tile::Format;
use crate::kernel::{Inputs, Prepared, RowKind};
use crate::{ColumnBand, Kernel, Level, Pool};
use marlin_tensor::Weight;
use std::ops::Range;

pub(super) struct Scaled<F> {
    inner: Tiled<F>,
    scale: Vec<f32>,
}

impl<F: Format> Scaled<F> {
    /// Repacks `weight`; `None` when its parts are not what the format calls for, or the level is not
    /// supported.
    pub(super) fn new(weight: &Weight, level: Level, float_activations: bool) -> Option<Self> {
        let scale = weight.part("scale")?.to_f32().ok()?;
        let inner = Tiled::new(weight, level, float_activations)?;
        (scale.len() == weight.out_features).then_some(Self { inner, scale })
    }

    /// Name of its path.
    pub(super) fn name_of(level: Level, float_activations: bool) -> String {
        format!("{}, rows scaled", Tiled::<F>::name_of(level, float_activations))
    }
}

fn scale(outputs: &mut [f32], scale: &[f32]) {
    outputs.iter_mut().zip(scale).for_each(|(o, s)| *o *= s);
}

impl<F: Format> Kernel for Scaled<F> {
    fn name(&self) -> String {
        format!("{}, rows scaled", self.inner.name())
    }

    fn bytes(&self) -> u64 {
        self.inner.bytes() + size_of_val(&*self.scale) as u64
    }

    fn in_features(&self) -> usize {
        self.inner.in_features()
    }

    fn out_features(&self) -> usize {
        self.inner.out_features()
    }

    fn matmul(&self, x: &[f32], rows: usize, kind: RowKind, out: &mut [f32], pool: &Pool) {
        self.inner.matmul(x, rows, kind, out, pool);
        out.chunks_exact_mut(self.scale.len().max(1)).for_each(|out| scale(out, &self.scale));
    }

    fn stored(&self) -> &[u8] {
        self.inner.stored()
    }

    fn part_columns(&self) -> Option<usize> {
        self.inner.part_columns()
    }

    fn prepare(&self, x: &[f32], ready: Option<&Prepared>, pool: &Pool) -> Prepared {
        self.inner.prepare(x, ready, pool)
    }

    fn part(&self, inputs: Inputs<'_>, columns: Range<usize>, out: &mut ColumnBand<'_>) {
        self.inner.part(inputs, columns.clone(), out);
        for row in 0..inputs.rows {
            scale(&mut out.row(row)[..columns.len()], &self.scale[columns.clone()]);
        }
    }
}
