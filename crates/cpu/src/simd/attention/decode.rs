//! One token of an answer over some positions: few enough for one step, over blocks of halves.

use super::{Attention, Part, Tile};
use crate::cache::Rows;
use crate::memory::grown;
use crate::simd::elementwise::{exponentials, narrow_f16, softcap};
use crate::simd::scatter::transpose_f16;
use crate::simd::single::{self, Blocks};
use std::ops::Range;

/// Rows that are transposed together, and the least multiple of positions in a block.
const TOGETHER: usize = 16;

/// Memory of a task, kept by its thread.
#[derive(Default)]
pub(super) struct Scratch {
    scores: Vec<f32>,
    key_starts: Vec<usize>,
    value_starts: Vec<usize>,
    /// Blocks of a quantized cache, as halves.
    key_blocks: Vec<u16>,
    value_blocks: Vec<u16>,
    wide: Vec<f32>,
}

impl Attention<'_> {
    /// The rows `queries` of `tile` over a cache of halves.
    pub(super) fn single(
        &self,
        tile: &Tile,
        queries: &[f32],
        keys: &[u16],
        values: &[u16],
        positions: Range<usize>,
        scratch: &mut Scratch,
    ) -> Part {
        let Scratch { scores, key_starts, value_starts, .. } = scratch;
        let table = self.table(tile, &positions);
        let starts = |dim: usize| {
            table.iter().map(move |b| self.layer.block_at(*b as usize, tile.kv_head, dim))
        };
        refill(key_starts, starts(self.params.key_head_dim));
        refill(value_starts, starts(self.params.value_head_dim));
        self.over_blocks(queries, (keys, key_starts), (values, value_starts), positions, scores)
    }

    /// [`single`](Self::single) over a quantized cache, whose blocks become blocks of halves first.
    pub(super) fn single_quantized(
        &self,
        tile: &Tile,
        queries: &[f32],
        keys: &Rows,
        values: &Rows,
        positions: Range<usize>,
        scratch: &mut Scratch,
    ) -> Part {
        let Scratch { scores, key_starts, value_starts, key_blocks, value_blocks, wide } = scratch;
        let (dk, dv) = (self.params.key_head_dim, self.params.value_head_dim);
        let (layer, level, size) = (self.layer, self.level, self.layer.block_size);
        let table = self.table(tile, &positions);
        let key_blocks = grown(key_blocks, table.len() * size * dk, 0);
        let value_blocks = grown(value_blocks, table.len() * size * dv, 0);
        let wide = grown(wide, size * dk.max(dv), 0.0);
        let mut left = positions.end - positions.start / size * size;
        let blocks =
            key_blocks.chunks_exact_mut(size * dk).zip(value_blocks.chunks_exact_mut(size * dv));
        for (block, (key_block, value_block)) in table.iter().zip(blocks) {
            let at = |dim: usize| layer.block_at(*block as usize, tile.kv_head, dim);
            // Rows behind the last position are read with the others and not used.
            let rows = left.min(size).next_multiple_of(TOGETHER);
            left -= left.min(size);
            keys.read(level, at(dk), &mut wide[..rows * dk]);
            for first in (0..rows).step_by(TOGETHER) {
                let (from, to) = (&wide[first * dk..], &mut key_block[first..]);
                transpose_f16(level, from, dk, (TOGETHER, dk), to, size);
            }
            values.read(level, at(dv), &mut wide[..rows * dv]);
            narrow_f16(level, &wide[..rows * dv], &mut value_block[..rows * dv]);
        }
        let starts = |len: usize| (0..table.len()).map(move |i| i * len);
        refill(key_starts, starts(size * dk));
        refill(value_starts, starts(size * dv));
        let (keys, values) = ((&*key_blocks, &**key_starts), (&*value_blocks, &**value_starts));
        self.over_blocks(queries, keys, values, positions, scores)
    }

    /// The blocks that hold `positions`.
    fn table<'t>(&self, tile: &'t Tile, positions: &Range<usize>) -> &'t [u32] {
        let size = self.layer.block_size;
        &tile.sequence.block_table[positions.start / size..positions.end.div_ceil(size)]
    }

    /// Rows over `positions`: arrays of keys and values, and where the blocks of these positions begin in them.
    fn over_blocks(
        &self,
        queries: &[f32],
        (keys, key_starts): (&[u16], &[usize]),
        (values, value_starts): (&[u16], &[usize]),
        positions: Range<usize>,
        scores: &mut Vec<f32>,
    ) -> Part {
        let (p, block_size) = (self.params, self.layer.block_size);
        let (dk, dv) = (p.key_head_dim, p.value_head_dim);
        let rows = queries.len() / dk;
        let first = positions.start % block_size;
        let seen = first..first + positions.len();
        let stride = key_starts.len() * block_size;
        let scores = grown(scores, rows * stride, 0.0);
        let keys = Blocks { elements: keys, starts: key_starts, block_size, dim: dk };
        let values = Blocks { elements: values, starts: value_starts, block_size, dim: dv };
        single::scores(self.level, queries, keys, scores);
        let soften = |scores: &mut [f32]| {
            let scores = &mut scores[seen.clone()];
            if let Some(cap) = p.softcap {
                softcap(self.level, scores, cap);
            }
            let (total, max) = exponentials(self.level, scores, f32::NEG_INFINITY);
            (max, total)
        };
        let softmax = scores.chunks_exact_mut(stride).map(soften).collect();
        let mut sums = self.arena.take(rows * dv);
        single::sums(self.level, (scores, stride), seen.clone(), values, &mut sums);
        Part { sums, softmax }
    }
}

fn refill(to: &mut Vec<usize>, from: impl Iterator<Item = usize>) {
    to.clear();
    to.extend(from);
}
