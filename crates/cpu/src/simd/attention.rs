//! Causal attention over paged caches, blocked, with an online softmax in f32.
//!
//! The query rows of one sequence that share a key/value head are the rows of one matrix
//! `[tokens * heads_per_kv, key_head_dim]`, which is cut into tiles; a tile is a task. It walks
//! the visible positions in steps, each a product with the keys, an exponential, and a product
//! with the values, both done per run of consecutive cache slots, so keys of an f32 cache are
//! used where they lie. Tiles of one head read the same keys, so few large tiles are best; they
//! are cut smaller only to give every thread one.

use super::dense::{Matrix, accumulate, products};
use super::elementwise::{exponentials, softcap};
use crate::cache::{Elements, Layer};
use crate::memory::{Arena, Buffer};
use crate::reference::first_visible;
use crate::{Level, Pool};
use marlin_tensor::{AttentionParams, BatchSequence};
use std::ops::Range;
use std::sync::OnceLock;

/// Most rows of a tile.
const TILE: usize = 64;
/// Positions between two updates of the running maximum.
const STEP: usize = 256;
/// Multiplications below which a second thread costs more than it brings.
const WORTH_A_THREAD: usize = 1 << 17;

/// Read-only arguments of one call.
pub(crate) struct Attention<'a> {
    pub(crate) level: Level,
    pub(crate) params: &'a AttentionParams,
    pub(crate) layer: &'a Layer,
    pub(crate) queries: &'a [f32],
    pub(crate) arena: &'a Arena,
}

/// Rows `rows` of the matrix of one sequence and key/value head.
struct Tile<'a> {
    sequence: &'a BatchSequence,
    kv_head: usize,
    rows: Range<usize>,
}

impl Attention<'_> {
    /// [`reference::attention`](crate::reference::attention); relative error about 1e-6.
    pub(crate) fn run(&self, sequences: &[BatchSequence], out: &mut [f32], pool: &Pool) {
        let tiles = self.tiles(sequences, pool.available_threads());
        let (heads, dv) = (self.params.num_heads, self.params.value_head_dim);
        // A tile's outputs are scattered over rows and heads, so it hands back its own block.
        let results: Vec<OnceLock<Buffer>> = tiles.iter().map(|_| OnceLock::new()).collect();
        let task = |i: usize| {
            let _ = results[i].set(self.tile(&tiles[i]));
        };
        let work: usize = sequences.iter().map(|s| self.work(s)).sum();
        match work < WORTH_A_THREAD {
            true => (0..tiles.len()).for_each(task),
            false => pool.run(tiles.len(), task),
        }
        for (tile, result) in tiles.iter().zip(&results) {
            let block = result.get().expect("every task ran");
            for (row, values) in tile.rows.clone().zip(block.chunks_exact(dv)) {
                let (token, head) = self.token_and_head(tile, row);
                out[((tile.sequence.first_row + token) * heads + head) * dv..][..dv]
                    .copy_from_slice(values);
            }
        }
    }

    fn group(&self) -> usize {
        self.params.num_heads / self.params.num_kv_heads
    }

    /// Token of the sequence in this pass, and head, of row `row` of a tile's matrix.
    fn token_and_head(&self, tile: &Tile, row: usize) -> (usize, usize) {
        (row / self.group(), tile.kv_head * self.group() + row % self.group())
    }

    /// About how many multiplications `sequence` takes.
    fn work(&self, sequence: &BatchSequence) -> usize {
        let p = self.params;
        let window = p.window.map_or(usize::MAX, |w| w as usize);
        let visible = sequence.context_len.min(window.saturating_add(sequence.rows));
        sequence.rows * p.num_heads * visible * (p.key_head_dim + p.value_head_dim)
    }

    fn tiles<'s>(&self, sequences: &'s [BatchSequence], threads: usize) -> Vec<Tile<'s>> {
        let group = self.group();
        let pairs = sequences.len() * self.params.num_kv_heads;
        let mut tiles = Vec::new();
        for sequence in sequences {
            let rows = sequence.rows * group;
            let wanted = threads.min(1 + self.work(sequence) / WORTH_A_THREAD);
            let size = rows.div_ceil(wanted.div_ceil(pairs)).clamp(1, TILE);
            for kv_head in 0..self.params.num_kv_heads {
                // Late rows see most: the long tasks go first.
                for start in (0..rows).step_by(size).rev() {
                    let rows = start..rows.min(start + size);
                    tiles.push(Tile { sequence, kv_head, rows });
                }
            }
        }
        tiles
    }

    /// Attends the rows of `tile`: `[rows, value_head_dim]`.
    fn tile(&self, tile: &Tile) -> Buffer {
        let p = self.params;
        let (dk, dv, rows) = (p.key_head_dim, p.value_head_dim, tile.rows.len());
        let mut queries = self.arena.take(rows * dk);
        for (row, query) in tile.rows.clone().zip(queries.chunks_exact_mut(dk)) {
            let (token, head) = self.token_and_head(tile, row);
            let from = ((tile.sequence.first_row + token) * p.num_heads + head) * dk;
            let from = &self.queries[from..from + dk];
            query.iter_mut().zip(from).for_each(|(to, from)| *to = from * p.scale);
        }
        let before = tile.sequence.context_len - tile.sequence.rows;
        let position = |row: usize| before + (tile.rows.start + row) / self.group();
        let (first, last) = (first_visible(position(0), p.window), position(rows - 1));

        let mut out = self.arena.zeros(rows * dv);
        let mut scores = self.arena.take(rows * STEP);
        let mut scratch = self.arena.take(STEP * dk.max(dv));
        let mut running = vec![(f32::NEG_INFINITY, 0.0f32); rows];
        for start in (first..last + 1).step_by(STEP) {
            let step = start..(start + STEP).min(last + 1);
            for run in self.runs(tile, step.clone()) {
                let keys = self.read(false, tile.kv_head, &run, &mut scratch);
                let queries = Matrix::new(&queries, rows, dk, dk);
                let scores = &mut scores[run.position - start..];
                products(self.level, queries, keys, scores, STEP);
            }
            for (row, (max, total)) in running.iter_mut().enumerate() {
                let scores = &mut scores[row * STEP..][..step.len()];
                let position = position(row);
                // Positions of this step that the row sees.
                let low = first_visible(position, p.window).clamp(start, step.end) - start;
                let high = (position + 1).clamp(start, step.end) - start;
                scores[..low].fill(0.0);
                scores[high..].fill(0.0);
                if low == high {
                    continue;
                }
                let scores = &mut scores[low..high];
                if let Some(cap) = p.softcap {
                    softcap(self.level, scores, cap);
                }
                let (sum, new_max) = exponentials(self.level, scores, *max);
                if new_max > *max {
                    let shrink = (*max - new_max).exp();
                    *total *= shrink;
                    out[row * dv..][..dv].iter_mut().for_each(|o| *o *= shrink);
                    *max = new_max;
                }
                *total += sum;
            }
            for run in self.runs(tile, step) {
                let values = self.read(true, tile.kv_head, &run, &mut scratch);
                let weights = &scores[run.position - start..];
                let weights = Matrix::new(weights, rows, run.len, STEP);
                accumulate(self.level, weights, values, &mut out);
            }
        }
        for (out, (_, total)) in out.chunks_exact_mut(dv).zip(&running) {
            let inverse = 1.0 / total;
            out.iter_mut().for_each(|o| *o *= inverse);
        }
        out
    }

    /// Cuts positions into runs of consecutive slots.
    fn runs(&self, tile: &Tile, positions: Range<usize>) -> impl Iterator<Item = Run> {
        let size = self.layer.block_size;
        let blocks = positions.start / size..positions.end.div_ceil(size);
        blocks.map(move |i| {
            let position = positions.start.max(i * size);
            let end = positions.end.min((i + 1) * size);
            let slot = tile.sequence.block_table[i] as usize * size + position % size;
            Run { position, slot, len: end - position }
        })
    }

    /// The keys or values of a run, widened into `scratch` when the cache is not f32.
    fn read<'b>(
        &'b self,
        values: bool,
        kv_head: usize,
        run: &Run,
        scratch: &'b mut [f32],
    ) -> Matrix<'b> {
        let spec = &self.layer.spec;
        let stored = values && spec.value_head_dim > 0;
        let (elements, dim) = match stored {
            true => (&self.layer.values, spec.value_head_dim),
            false => (&self.layer.keys, spec.key_head_dim),
        };
        let columns = if values { self.params.value_head_dim } else { dim };
        let at = self.layer.at(run.slot, kv_head, dim);
        let len = run.len * dim;
        let floats = match elements {
            Elements::F32(e) => &e[at..at + len],
            _ => {
                elements.read(self.level, at, &mut scratch[..len]);
                &scratch[..len]
            }
        };
        Matrix::new(floats, run.len, columns, dim)
    }
}

/// Consecutive positions in consecutive slots.
struct Run {
    position: usize,
    slot: usize,
    len: usize,
}
