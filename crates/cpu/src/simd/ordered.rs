//! A repacked matrix whose inputs stand in another order: the inputs of a call are put into it first.

use super::kernels::Tiled;
use super::tile::Format;
use crate::kernel::{Inputs, Prepared, RowKind};
use crate::{ColumnBand, Kernel, Level, Pool};
use marlin_quant::integer::blocks_and_order;
use marlin_tensor::Weight;
use std::ops::Range;
use std::sync::Arc;

/// Rows put into order by one task.
const ROWS_PER_TASK: usize = 16;

pub(super) struct Ordered<F> {
    inner: Tiled<F>,
    order: Arc<[u32]>,
}

/// Inputs in order, and what the matrix made of them.
struct Gathered {
    order: Arc<[u32]>,
    x: Arc<[f32]>,
    inner: Prepared,
}

impl<F: Format> Ordered<F> {
    /// Repacks `weight`; `None` when its parts are not what the format calls for, or the level is not
    /// supported.
    pub(super) fn new(weight: &Weight, level: Level, float_activations: bool) -> Option<Self> {
        let (blocks, order) = blocks_and_order(weight).ok()?;
        let inner = Tiled::new(&blocks, level, float_activations)?;
        Some(Self { inner, order: order.into() })
    }

    /// Name of its path.
    pub(super) fn name_of(level: Level, float_activations: bool) -> String {
        format!("{}, inputs reordered", Tiled::<F>::name_of(level, float_activations))
    }

    fn gather(&self, x: &[f32], pool: &Pool) -> Vec<f32> {
        let k = self.order.len();
        let mut gathered = vec![0.0; x.len()];
        pool.run_chunks(&mut gathered, ROWS_PER_TASK * k, |i, piece| {
            let rows = x[i * ROWS_PER_TASK * k..].chunks_exact(k);
            for (x, out) in rows.zip(piece.chunks_exact_mut(k)) {
                out.iter_mut().zip(&*self.order).for_each(|(o, &input)| *o = x[input as usize]);
            }
        });
        gathered
    }
}

impl<F: Format> Kernel for Ordered<F> {
    fn name(&self) -> String {
        format!("{}, inputs reordered", self.inner.name())
    }

    fn bytes(&self) -> u64 {
        self.inner.bytes() + size_of_val(&*self.order) as u64
    }

    fn in_features(&self) -> usize {
        self.inner.in_features()
    }

    fn out_features(&self) -> usize {
        self.inner.out_features()
    }

    fn matmul(&self, x: &[f32], rows: usize, kind: RowKind, out: &mut [f32], pool: &Pool) {
        self.inner.matmul(&self.gather(x, pool), rows, kind, out, pool);
    }

    fn stored(&self) -> &[u8] {
        self.inner.stored()
    }

    fn part_columns(&self) -> Option<usize> {
        self.inner.part_columns()
    }

    fn parts_of_prompts(&self) -> bool {
        self.inner.parts_of_prompts()
    }

    fn prepare(&self, x: &[f32], ready: Option<&Prepared>, pool: &Pool) -> Prepared {
        // Matrices over one input have mostly one order.
        let ready = ready.and_then(|r| r.downcast_ref::<Gathered>());
        let ready = ready.filter(|r| r.order == self.order);
        let x = ready.map_or_else(|| self.gather(x, pool).into(), |r| Arc::clone(&r.x));
        let inner = self.inner.prepare(&x, ready.map(|r| &r.inner), pool);
        Arc::new(Gathered { order: Arc::clone(&self.order), x, inner })
    }

    fn part(&self, inputs: Inputs<'_>, columns: Range<usize>, out: &mut ColumnBand<'_>) {
        let prepared = inputs.prepared.downcast_ref::<Gathered>();
        let Gathered { x, inner, .. } = prepared.expect("inputs this kernel prepared");
        self.inner.part(Inputs { x, prepared: inner, ..inputs }, columns, out);
    }
}
