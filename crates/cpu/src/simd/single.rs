//! Attention of one token's query rows over the f16 blocks of one key/value head: scores of many
//! positions, and the sum of their values, each in one pass over the cache.
//!
//! Keys lie transposed, so a register is neighbouring positions of one column and scores need no sum
//! inside one; values lie as rows. What is widened serves all rows that share the head. No step is worth a
//! call of its own here, which is why this is not made of the products that prompts use.
// Other processors run the scalar bodies until someone writes their registers.
#![cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code))]
// One index runs over several arrays of registers.
#![allow(clippy::needless_range_loop)]

use super::vector::{Lanes, Work, run};
use crate::Level;
use half::f16;

/// Most query rows taken together.
const ROWS: usize = 4;
/// Registers of values taken together.
const WIDE: usize = 4;

/// Blocks of a cache, as one sequence sees them.
#[derive(Clone, Copy)]
pub(crate) struct Blocks<'a> {
    /// The array.
    pub elements: &'a [u16],
    /// Where the head begins in each block of the positions asked for.
    pub starts: &'a [usize],
    /// Positions of a block.
    pub block_size: usize,
    /// Columns.
    pub dim: usize,
}

/// Whether the sizes are whole registers of eight lanes, positions also of sixteen.
pub(crate) fn fits(block_size: usize, value_dim: usize) -> bool {
    block_size.is_multiple_of(16) && value_dim.is_multiple_of(8)
}

/// `scores[row][i * block_size + slot] = queries[row] · keys[block i][slot]`; `queries: [rows, dim]`, `scores`
/// `[rows, blocks * block_size]`, `keys` `[dim][block_size]` in each block.
pub(crate) fn scores(level: Level, queries: &[f32], keys: Blocks, scores: &mut [f32]) {
    let rows = queries.len() / keys.dim;
    assert_eq!(
        scores.len(),
        rows * keys.starts.len() * keys.block_size,
        "a score for every position"
    );
    check(&keys);
    run(level, Scores { queries, keys, scores });
}

/// `sums[row] = Σ weights[row][position - first] * values[position]` over the `count` positions from slot `first` of
/// the first block on; `weights` has rows of `stride`, of which those positions begin at `first`; `sums: [rows, dim]`, `values`
/// `[block_size][dim]` in each block.
pub(crate) fn sums(
    level: Level,
    weights: (&[f32], usize),
    positions: std::ops::Range<usize>,
    values: Blocks,
    sums: &mut [f32],
) {
    let rows = sums.len() / values.dim;
    let (weights, stride) = weights;
    assert!(
        positions.end <= stride && weights.len() == rows * stride,
        "a weight for every position"
    );
    assert!(positions.end <= values.starts.len() * values.block_size, "positions of the blocks");
    check(&values);
    let level = if values.dim.is_multiple_of(16) { level } else { level.min(Level::Avx2) };
    run(level, Sums { weights, stride, positions, values, sums });
}

fn check(blocks: &Blocks) {
    let len = blocks.block_size * blocks.dim;
    let inside = |start: &usize| start + len <= blocks.elements.len();
    assert!(blocks.starts.iter().all(inside), "blocks inside the cache");
    assert!(fits(blocks.block_size, 0), "whole registers");
}

struct Scores<'a> {
    queries: &'a [f32],
    keys: Blocks<'a>,
    scores: &'a mut [f32],
}

impl Work for Scores<'_> {
    fn scalar(self) {
        let Blocks { elements, starts, block_size, dim } = self.keys;
        let stride = starts.len() * block_size;
        for (query, scores) in
            self.queries.chunks_exact(dim).zip(self.scores.chunks_exact_mut(stride))
        {
            for (start, scores) in starts.iter().zip(scores.chunks_exact_mut(block_size)) {
                scores.fill(0.0);
                for (keys, q) in elements[*start..].chunks_exact(block_size).zip(query) {
                    let keys = keys.iter().map(|k| f16::from_bits(*k).to_f32());
                    scores.iter_mut().zip(keys).for_each(|(s, k)| *s += q * k);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(mut self) {
        let rows = self.queries.len() / self.keys.dim;
        let mut row = 0;
        // SAFETY: rows `row .. row + R` exist.
        unsafe {
            while rows - row >= ROWS {
                self.rows::<L, ROWS>(row);
                row += ROWS;
            }
            match rows - row {
                3 => self.rows::<L, 3>(row),
                2 => self.rows::<L, 2>(row),
                1 => self.rows::<L, 1>(row),
                _ => {}
            }
        }
    }
}

impl Scores<'_> {
    #[inline(always)]
    unsafe fn rows<L: Lanes, const R: usize>(&mut self, row: usize) {
        let blocks = self.keys.starts.len();
        let mut block = 0;
        // SAFETY: the caller's; blocks `block .. block + B` exist.
        unsafe {
            // Two blocks at once, so that sums do not wait for themselves.
            while blocks - block >= 2 {
                self.blocks::<L, R, 2>(row, block);
                block += 2;
            }
            if blocks > block {
                self.blocks::<L, R, 1>(row, block);
            }
        }
    }

    #[inline(always)]
    unsafe fn blocks<L: Lanes, const R: usize, const B: usize>(
        &mut self,
        row: usize,
        block: usize,
    ) {
        let Blocks { elements, starts, block_size, dim } = self.keys;
        let stride = starts.len() * block_size;
        let mut slot = 0;
        while slot < block_size {
            // SAFETY: `scores` checked blocks, rows and columns; a block is whole registers.
            unsafe {
                let mut acc = [[L::splat(0.0); R]; B];
                let mut keys = [std::ptr::null::<u16>(); B];
                for b in 0..B {
                    keys[b] = elements.as_ptr().add(starts[block + b] + slot);
                }
                let mut query = [std::ptr::null::<f32>(); R];
                for r in 0..R {
                    query[r] = self.queries.as_ptr().add((row + r) * dim);
                }
                for d in 0..dim {
                    for b in 0..B {
                        let k = L::load_f16(keys[b].add(d * block_size));
                        for r in 0..R {
                            acc[b][r] = L::fma(L::splat(query[r].add(d).read()), k, acc[b][r]);
                        }
                    }
                }
                for b in 0..B {
                    for r in 0..R {
                        let at = (row + r) * stride + (block + b) * block_size + slot;
                        L::store(self.scores.as_mut_ptr().add(at), acc[b][r]);
                    }
                }
            }
            slot += L::N;
        }
    }
}

struct Sums<'a> {
    weights: &'a [f32],
    stride: usize,
    positions: std::ops::Range<usize>,
    values: Blocks<'a>,
    sums: &'a mut [f32],
}

impl Work for Sums<'_> {
    fn scalar(self) {
        let Blocks { elements, starts, block_size, dim } = self.values;
        for (weights, sums) in
            self.weights.chunks_exact(self.stride).zip(self.sums.chunks_exact_mut(dim))
        {
            sums.fill(0.0);
            for position in self.positions.clone() {
                let at = starts[position / block_size] + position % block_size * dim;
                let values = elements[at..at + dim].iter().map(|v| f16::from_bits(*v).to_f32());
                sums.iter_mut().zip(values).for_each(|(s, v)| *s += weights[position] * v);
            }
        }
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(mut self) {
        let rows = self.sums.len() / self.values.dim;
        let mut row = 0;
        // SAFETY: rows `row .. row + R` exist.
        unsafe {
            while rows - row >= ROWS {
                self.rows::<L, ROWS>(row);
                row += ROWS;
            }
            match rows - row {
                3 => self.rows::<L, 3>(row),
                2 => self.rows::<L, 2>(row),
                1 => self.rows::<L, 1>(row),
                _ => {}
            }
        }
    }
}

impl Sums<'_> {
    #[inline(always)]
    unsafe fn rows<L: Lanes, const R: usize>(&mut self, row: usize) {
        let dim = self.values.dim;
        let mut column = 0;
        // SAFETY: the caller's; columns are whole registers.
        unsafe {
            while dim - column >= WIDE * L::N {
                self.columns::<L, R, WIDE>(row, column);
                column += WIDE * L::N;
            }
            while dim - column >= L::N {
                self.columns::<L, R, 1>(row, column);
                column += L::N;
            }
        }
    }

    #[inline(always)]
    unsafe fn columns<L: Lanes, const R: usize, const C: usize>(
        &mut self,
        row: usize,
        column: usize,
    ) {
        let Blocks { elements, starts, block_size, dim } = self.values;
        // SAFETY: `sums` checked blocks, rows and weights; the caller keeps the columns inside.
        unsafe {
            let mut acc = [[L::splat(0.0); C]; R];
            for position in self.positions.clone() {
                let at = starts[position / block_size] + position % block_size * dim + column;
                let value = elements.as_ptr().add(at);
                let mut v = [L::splat(0.0); C];
                for c in 0..C {
                    v[c] = L::load_f16(value.add(c * L::N));
                }
                for r in 0..R {
                    let w = L::splat(
                        self.weights.as_ptr().add((row + r) * self.stride + position).read(),
                    );
                    for c in 0..C {
                        acc[r][c] = L::fma(w, v[c], acc[r][c]);
                    }
                }
            }
            for r in 0..R {
                for c in 0..C {
                    let to = self.sums.as_mut_ptr().add((row + r) * dim + column + c * L::N);
                    L::store(to, acc[r][c]);
                }
            }
        }
    }
}
