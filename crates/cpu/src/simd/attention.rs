//! Causal attention over paged caches, blocked, with an online softmax in f32.
//!
//! The query rows of one sequence that share a key/value head are the rows of one matrix
//! `[tokens * heads_per_kv, key_head_dim]`, which is cut into tiles. A tile walks the visible
//! positions in steps, each a product with the keys, an exponential, and a product with the
//! values, both done per run of consecutive cache slots, so an f32 cache is used where it lies and
//! others are widened; over rows that are cached rotated, so are the queries, and the outputs turned
//! back. The tokens of answers are tiles of their own, whose positions are divided into parts for
//! threads to share; parts are combined by their maxima and totals. Where steps and parts begin
//! depends on the position alone, so a row's result does not depend on what else is computed, nor on
//! the number of threads.

mod decode;

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::dense::{Matrix, accumulate, products, weighted_sums};
use super::elementwise::{add_scaled, exponentials, softcap};
use super::single;
use crate::cache::{Elements, Layer, rotate};
use crate::memory::{Arena, Buffer, grown};
use crate::reference::first_visible;
use crate::{Level, Pool};
use marlin_tensor::{AttentionParams, BatchSequence};
use std::cell::Cell;
use std::ops::Range;
use std::sync::OnceLock;

/// Most rows of a tile.
const TILE: usize = 60;
/// Key elements of a step: with the queries and scores they stay in the first-level cache.
const STEP_ELEMENTS: usize = 1 << 14;
/// Positions of a part.
const PART: usize = 128;
/// Multiplications below which a second thread costs more than it brings.
const WORTH_A_THREAD: usize = 1 << 15;

/// Rows of a tile on AMX.
#[cfg(target_arch = "x86_64")]
const ROUNDED_TILE: usize = 256;

/// Memory of a task, kept by its thread.
#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    single: decode::Scratch,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Read-only arguments of one call.
pub(crate) struct Attention<'a> {
    pub(crate) level: Level,
    /// Whether queries, keys and values may be rounded to bf16.
    pub(crate) rounding: bool,
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
    /// Tasks this tile is divided into.
    parts: usize,
}

/// What a task finds over its positions, per row of its tile.
struct Part {
    /// `Σ e^(score - max) value`: `[rows, value_head_dim]`.
    sums: Buffer,
    /// Largest score, and `Σ e^(score - max)`.
    softmax: Vec<(f32, f32)>,
}

/// Where tiles write their own parts: start and elements.
struct Output(*mut f32, usize);

// SAFETY: every tile writes its own rows and heads.
unsafe impl Sync for Output {}

impl Attention<'_> {
    /// [`reference::attention`](crate::reference::attention); relative error about 1e-6.
    pub(crate) fn run(&self, sequences: &[BatchSequence], out: &mut [f32], pool: &Pool) {
        let work: usize = sequences.iter().map(|s| self.work(s)).sum();
        let threads = pool.available_threads().min(1 + work / WORTH_A_THREAD);
        let tiles = self.tiles(sequences, threads);
        let tasks: Vec<(&Tile, usize)> =
            tiles.iter().flat_map(|tile| (0..tile.parts).map(move |part| (tile, part))).collect();
        let results: Vec<OnceLock<Part>> = tasks.iter().map(|_| OnceLock::new()).collect();
        let out = Output(out.as_mut_ptr(), out.len());
        let task = |i: usize| {
            let (tile, part) = tasks[i];
            let result = self.part(tile, part);
            match tile.parts {
                1 => self.combine(tile, &[&result], &out),
                _ => drop(results[i].set(result)),
            }
        };
        match threads {
            1 => (0..tasks.len()).for_each(task),
            _ => pool.run(tasks.len(), task),
        }
        let mut results = results.iter();
        for tile in &tiles {
            let parts: Vec<&Part> =
                results.by_ref().take(tile.parts).filter_map(OnceLock::get).collect();
            if tile.parts > 1 {
                assert_eq!(parts.len(), tile.parts, "every task ran");
                self.combine(tile, &parts, &out);
            }
        }
    }

    /// Writes the outputs of `tile`, divided by their totals.
    fn combine(&self, tile: &Tile, parts: &[&Part], out: &Output) {
        let dv = self.params.value_head_dim;
        for (i, row) in tile.rows.clone().enumerate() {
            let (token, head) = self.token_and_head(tile, row);
            let at = (tile.sequence.first_row + token) * self.params.num_heads + head;
            assert!((at + 1) * dv <= out.1, "outputs of the heads");
            // SAFETY: inside the output; tiles have no row and head in common.
            let out = unsafe { std::slice::from_raw_parts_mut(out.0.add(at * dv), dv) };
            let max = parts.iter().map(|p| p.softmax[i].0).fold(f32::NEG_INFINITY, f32::max);
            let share = |part: &Part| (part.softmax[i].0 - max).exp();
            let total: f32 = parts.iter().map(|p| p.softmax[i].1 * share(p)).sum();
            for (n, part) in parts.iter().enumerate() {
                let (sums, factor) = (&part.sums[i * dv..][..dv], share(part) / total);
                match n {
                    0 => out.iter_mut().zip(sums).for_each(|(o, s)| *o = s * factor),
                    _ => add_scaled(self.level, out, sums, factor),
                }
            }
            if self.layer.is_rotated() {
                rotate(out);
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
        let mut tiles = Vec::new();
        for sequence in sequences {
            let rows = sequence.rows * self.group();
            for kv_head in 0..self.params.num_kv_heads {
                // Late rows see most: the long tasks go first.
                let height = self.height(sequence, threads);
                for start in (0..rows).step_by(height).rev() {
                    let rows = start..rows.min(start + height);
                    let mut tile = Tile { sequence, kv_head, rows, parts: 1 };
                    if sequence.decode {
                        // Long contexts are shared; the softmax of a part is one step.
                        let positions = self.positions(&tile);
                        tile.parts = positions.end.div_ceil(PART) - positions.start / PART;
                    }
                    tiles.push(tile);
                }
            }
        }
        tiles
    }

    /// Rows of a tile of `sequence`.
    fn height(&self, sequence: &BatchSequence, threads: usize) -> usize {
        if sequence.decode {
            // One token, or an even share of its heads.
            let group = self.group();
            let shares = (1..=group).find(|n| group.is_multiple_of(*n) && group / n <= TILE);
            return group / shares.unwrap_or(group);
        }
        #[cfg(target_arch = "x86_64")]
        if self.amx(sequence).is_some() {
            let rows = sequence.rows * self.group() * self.params.num_kv_heads;
            let height = (rows / (4 * threads)).next_multiple_of(32);
            return height.clamp(32, ROUNDED_TILE);
        }
        let _ = (sequence, threads, self.rounding);
        TILE
    }

    /// Proof that the rows of `sequence` are multiplied as bf16 tiles.
    #[cfg(target_arch = "x86_64")]
    fn amx(&self, sequence: &BatchSequence) -> Option<amx::Amx> {
        let wanted = self.rounding && !sequence.decode;
        (wanted && amx::fits(self.layer, self.params)).then(|| amx::Amx::new(self.level)).flatten()
    }

    /// Position of the token of row `row` of a tile's matrix.
    fn position(&self, tile: &Tile, row: usize) -> usize {
        tile.sequence.context_len - tile.sequence.rows + row / self.group()
    }

    /// Positions that some row of `tile` sees.
    fn positions(&self, tile: &Tile) -> Range<usize> {
        let first = self.position(tile, tile.rows.start);
        let last = self.position(tile, tile.rows.end - 1);
        first_visible(first, self.params.window)..last + 1
    }

    /// Attends the rows of `tile` over part `part` of its positions.
    fn part(&self, tile: &Tile, part: usize) -> Part {
        let mut scratch = SCRATCH.take();
        let result = self.attend(tile, part, &mut scratch);
        SCRATCH.set(scratch);
        result
    }

    fn attend(&self, tile: &Tile, part: usize, scratch: &mut Scratch) -> Part {
        let p = self.params;
        let (dk, dv, rows) = (p.key_head_dim, p.value_head_dim, tile.rows.len());
        let all = self.positions(tile);
        let positions = match tile.parts {
            1 => all,
            _ => {
                let first = all.start / PART + part;
                all.start.max(first * PART)..all.end.min((first + 1) * PART)
            }
        };
        let Scratch { queries, single } = scratch;
        let queries = grown(queries, rows * dk, 0.0);
        for (row, query) in tile.rows.clone().zip(queries.chunks_exact_mut(dk)) {
            let (token, head) = self.token_and_head(tile, row);
            let from = ((tile.sequence.first_row + token) * p.num_heads + head) * dk;
            let from = &self.queries[from..from + dk];
            query.iter_mut().zip(from).for_each(|(to, from)| *to = from * p.scale);
            if self.layer.is_rotated() {
                rotate(query);
            }
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(amx) = self.amx(tile.sequence) {
            let mut sums = self.arena.take(rows * dv);
            let mut softmax = vec![(0.0, 0.0); rows];
            let positions: Vec<usize> =
                tile.rows.clone().map(|row| self.position(tile, row)).collect();
            let attend = amx::Attend {
                amx,
                level: self.level,
                layer: self.layer,
                params: p,
                block_table: &tile.sequence.block_table,
                kv_head: tile.kv_head,
                queries,
                positions: &positions,
            };
            attend.run(&mut sums, &mut softmax);
            return Part { sums, softmax };
        }
        let simple = tile.sequence.decode && !self.layer.is_latent();
        if simple && single::fits(self.layer.block_size, dv) {
            match (&self.layer.keys, &self.layer.values) {
                (Elements::F16(keys), Elements::F16(values)) => {
                    return self.single(tile, queries, keys, values, positions, single);
                }
                (Elements::Quantized(keys), Elements::Quantized(values)) => {
                    return self.single_quantized(tile, queries, keys, values, positions, single);
                }
                _ => {}
            }
        }
        let Layer { keys, values, block_size, .. } = self.layer;
        let (latent, block_size) = (self.layer.is_latent(), *block_size);
        let transposed = self.layer.has_transposed_keys();
        let mut step_len = (STEP_ELEMENTS / dk).clamp(32, 128) / 32 * 32;
        if transposed {
            // Transposed keys are widened by whole blocks.
            step_len = (step_len / block_size).max(1) * block_size;
        }

        let mut sums = self.arena.zeros(rows * dv);
        let mut scores = self.arena.take(rows * step_len);
        let mut wide_keys = self.arena.take(step_len * dk);
        let mut wide_values = self.arena.take(if latent { 0 } else { step_len * dv });
        let mut softmax = vec![(f32::NEG_INFINITY, 0.0f32); rows];
        let mut next = positions.start;
        while next < positions.end {
            let start = next;
            next = ((start / step_len + 1) * step_len).min(positions.end);
            let step = start..next;
            if !transposed {
                self.widen(keys, tile, &step, dk, &mut wide_keys);
            }
            for run in self.runs(tile, step.clone()) {
                let queries = Matrix::new(queries, rows, dk, dk);
                let scores = &mut scores[run.position - start..];
                if !transposed {
                    let keys = self.stored(keys, tile, &run, start, dk, &wide_keys);
                    let keys = Matrix::new(keys, run.len, dk, dk);
                    products(self.level, queries, keys, scores, step_len);
                } else {
                    let block = self.block(keys, tile, &run, &mut wide_keys);
                    let keys =
                        Matrix::new(&block[run.slot % block_size..], dk, run.len, block_size);
                    weighted_sums(self.level, queries, keys, scores, step_len);
                }
            }
            for (i, (max, total)) in softmax.iter_mut().enumerate() {
                let scores = &mut scores[i * step_len..][..step.len()];
                let position = self.position(tile, tile.rows.start + i);
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
                    sums[i * dv..][..dv].iter_mut().for_each(|o| *o *= shrink);
                    *max = new_max;
                }
                *total += sum;
            }
            if !latent {
                self.widen(values, tile, &step, dv, &mut wide_values);
            }
            for run in self.runs(tile, step) {
                let values = match latent {
                    true => self.stored(keys, tile, &run, start, dk, &wide_keys),
                    false => self.stored(values, tile, &run, start, dv, &wide_values),
                };
                let values = Matrix::new(values, run.len, dv, if latent { dk } else { dv });
                let weights = &scores[run.position - start..];
                let weights = Matrix::new(weights, rows, run.len, step_len);
                accumulate(self.level, weights, values, &mut sums, dv);
            }
        }
        Part { sums, softmax }
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

    /// Widens the keys or values of a step into `wide: [positions, dim]`, unless they are f32.
    fn widen(
        &self,
        from: &Elements,
        tile: &Tile,
        step: &Range<usize>,
        dim: usize,
        wide: &mut [f32],
    ) {
        if matches!(from, Elements::F32(_)) {
            return;
        }
        for run in self.runs(tile, step.clone()) {
            let at = self.layer.at(run.slot, tile.kv_head, dim);
            let wide = &mut wide[(run.position - step.start) * dim..][..run.len * dim];
            from.read(self.level, at, wide);
        }
    }

    /// The transposed keys of a run's block, `[key_head_dim, block_size]`, in the cache or `wide`.
    fn block<'b>(
        &self,
        from: &'b Elements,
        tile: &Tile,
        run: &Run,
        wide: &'b mut [f32],
    ) -> &'b [f32] {
        let dk = self.params.key_head_dim;
        let len = dk * self.layer.block_size;
        let at = self.layer.block_at(run.slot / self.layer.block_size, tile.kv_head, dk);
        match from {
            Elements::F32(e) => &e[at..at + len],
            _ => {
                from.read(self.level, at, &mut wide[..len]);
                &wide[..len]
            }
        }
    }

    /// The keys or values of a run: in the cache, or in `wide`, which begins at `start`.
    fn stored<'b>(
        &self,
        from: &'b Elements,
        tile: &Tile,
        run: &Run,
        start: usize,
        dim: usize,
        wide: &'b [f32],
    ) -> &'b [f32] {
        match from {
            Elements::F32(e) => &e[self.layer.at(run.slot, tile.kv_head, dim)..][..run.len * dim],
            _ => &wide[(run.position - start) * dim..][..run.len * dim],
        }
    }
}

/// Consecutive positions in consecutive slots.
struct Run {
    position: usize,
    slot: usize,
    len: usize,
}
