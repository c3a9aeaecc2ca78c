//! Attention of many query rows: scores and sums as bf16 products, the softmax between them in f32.
//!
//! Keys and values of a step of positions are converted to tiles once and used by all rows, 32 at
//! a time: scores, exponentials, their rounding to bf16, and the product with the values stay in
//! the first two levels of cache. Queries, keys, values and softmax numerators are rounded to bf16, at most
//! 2⁻⁸ of each.

use super::pack::{interleave, narrow, narrowed, pack_rows, transpose};
use super::product::{Block, sums};
use super::{Amx, DEPTH, Part, ROWS, Tile};
use crate::Level;
use crate::cache::{Elements, Layer};
use crate::memory::grown;
use crate::reference::first_visible;
use crate::simd::avx512::Avx512;
use crate::simd::elementwise::softcap;
use crate::simd::float::{Bf16, Element, F16, F32};
use crate::simd::isa::Isa;
use crate::simd::vector::{Avx512 as Lanes512, exp};
use marlin_tensor::AttentionParams;
use std::arch::x86_64::*;
use std::cell::Cell;
use std::ops::Range;

/// Query rows of a step of the product: two tiles.
const PAIR: usize = 2 * ROWS;
/// Positions converted at a time.
const STEP: usize = 256;

/// Query rows that share a key/value head of one sequence.
pub(crate) struct Attend<'a> {
    pub amx: Amx,
    pub level: Level,
    pub layer: &'a Layer,
    pub params: &'a AttentionParams,
    pub block_table: &'a [u32],
    pub kv_head: usize,
    /// Scaled queries, `[rows, key_head_dim]`.
    pub queries: &'a [f32],
    /// Position of every row's token, ascending.
    pub positions: &'a [usize],
}

/// Memory of a call, kept by the thread.
#[derive(Default)]
struct Scratch {
    queries: Vec<Tile>,
    keys: Vec<Tile>,
    values: Vec<Tile>,
    weights: Vec<Tile>,
    scores: Vec<f32>,
    sums: Vec<f32>,
    /// Rows of a quantized cache.
    wide: [Vec<f32>; 2],
}

/// An element type.
#[derive(Clone, Copy)]
enum Kind {
    F32,
    F16,
    Bf16,
}

/// Keys or values as they lie.
struct Stored<'a> {
    bytes: *const u8,
    /// Element where the first column of a position is.
    at: &'a dyn Fn(usize) -> usize,
    /// Elements from one column to the next.
    apart: usize,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Whether a cache layer of this shape can be read as tiles.
pub(crate) fn fits(layer: &Layer, params: &AttentionParams) -> bool {
    layer.block_size.is_multiple_of(ROWS)
        && params.key_head_dim.is_multiple_of(2)
        && params.value_head_dim.is_multiple_of(ROWS)
}

impl Attend<'_> {
    /// Fills `out: [rows, value_head_dim]` with `Σ e^(score - max) value` and `softmax` with each
    /// row's largest score and `Σ e^(score - max)`.
    pub(crate) fn run(&self, out: &mut [f32], softmax: &mut [(f32, f32)]) {
        let p = self.params;
        let (dk, dv, rows) = (p.key_head_dim, p.value_head_dim, self.positions.len());
        let (padded, wide) = (rows.next_multiple_of(PAIR), dv.next_multiple_of(PAIR));
        let (depth, across) = (dk.div_ceil(DEPTH), wide / ROWS);
        let mut scratch = SCRATCH.take();
        let queries = grown(&mut scratch.queries, padded / ROWS * depth, Tile::ZERO);
        for (i, tiles) in queries.chunks_exact_mut(depth).enumerate() {
            let x = &self.queries[(i * ROWS * dk).min(rows * dk)..rows.min((i + 1) * ROWS) * dk];
            // SAFETY: `amx` proves the features; `depth` tiles cover a query.
            unsafe { pack_rows(self.amx, Part::Nearest, x, dk, 0, tiles) };
        }
        let queries = &*queries;
        let keys = grown(&mut scratch.keys, STEP / ROWS * depth, Tile::ZERO);
        let values = grown(&mut scratch.values, STEP / DEPTH * across, Tile::ZERO);
        let weights = grown(&mut scratch.weights, 2 * STEP / DEPTH, Tile::ZERO);
        let scores = grown(&mut scratch.scores, PAIR * STEP, 0.0);
        let totals = grown(&mut scratch.sums, padded * wide, 0.0);
        totals.fill(0.0);
        softmax.fill((f32::NEG_INFINITY, 0.0));

        let Range { start: begin, end } = self.seen(0..rows);
        let engine = self.amx.engine();
        for start in (begin / STEP * STEP..end).step_by(STEP) {
            let step = start..end.min(start + STEP);
            self.fill(&step, &mut scratch.wide, (depth, keys), (across, values));
            for first in (0..rows).step_by(PAIR) {
                let last = rows.min(first + PAIR);
                let seen = self.seen(first..last);
                let high = seen.end.min(step.end);
                if high <= step.start || seen.start >= step.end {
                    continue;
                }
                let columns = (high - start).next_multiple_of(DEPTH);
                let queries = &queries[first / ROWS * depth..][..2 * depth];
                let scores = &mut scores[..PAIR * columns];
                for column in (0..columns / ROWS).step_by(2) {
                    let block = Block {
                        a: [queries.as_ptr(), queries[depth..].as_ptr()],
                        b: [keys[column * depth..].as_ptr(), keys[(column + 1) * depth..].as_ptr()],
                        len: depth,
                    };
                    // SAFETY: each pointer has `depth` tiles; scores hold 32 rows of `columns`.
                    unsafe {
                        let to = scores.as_mut_ptr().add(column * ROWS);
                        sums::<2, 2, false>(&engine, &[block], 1, to, columns, false);
                    }
                }
                let totals = &mut totals[first * wide..][..PAIR * wide];
                let softmax = &mut softmax[first..last];
                let len = columns / DEPTH;
                let weights = &mut weights[..2 * len];
                self.soften(first..last, &(start..high), scores, weights, totals, softmax);
                for column in (0..across).step_by(2) {
                    let block = Block {
                        a: [weights.as_ptr(), weights[len..].as_ptr()],
                        b: [values[column..].as_ptr(), values[column + 1..].as_ptr()],
                        len,
                    };
                    // SAFETY: weights have `len` tiles each, values one in every `across`; totals hold
                    // 32 rows of `wide`.
                    unsafe {
                        let to = totals.as_mut_ptr().add(column * ROWS);
                        sums::<2, 2, false>(&engine, &[block], across, to, wide, true);
                    }
                }
            }
        }
        drop(engine);
        for (to, from) in out.chunks_exact_mut(dv).zip(totals.chunks_exact(wide)) {
            to.copy_from_slice(&from[..dv]);
        }
        SCRATCH.set(scratch);
    }

    /// Positions that some of `rows` see; there is at least one row.
    fn seen(&self, rows: Range<usize>) -> Range<usize> {
        let low = first_visible(self.positions[rows.start], self.params.window);
        low..self.positions[rows.end - 1] + 1
    }

    /// Scores of rows `rows` over `positions` to softmax numerators, two rows of tiles, zero where a row sees
    /// nothing; shrinks earlier sums to a new maximum.
    fn soften(
        &self,
        rows: Range<usize>,
        positions: &Range<usize>,
        scores: &mut [f32],
        weights: &mut [Tile],
        totals: &mut [f32],
        softmax: &mut [(f32, f32)],
    ) {
        let (columns, wide) = (scores.len() / PAIR, totals.len() / PAIR);
        let lines = scores.chunks_exact_mut(columns).zip(totals.chunks_exact_mut(wide));
        let len = columns / DEPTH;
        let mut present = self.positions[rows].iter().zip(softmax);
        for (r, (line, sums)) in lines.enumerate() {
            let tiles = &mut weights[r / ROWS * len..][..len];
            let Some((&position, (max, total))) = present.next() else {
                // SAFETY: `amx` proves the features.
                unsafe { numerators(self.amx, line, 0..0, 0.0, tiles, r % ROWS) };
                continue;
            };
            let low = first_visible(position, self.params.window);
            let low = low.clamp(positions.start, positions.end) - positions.start;
            let high = (position + 1).clamp(positions.start, positions.end) - positions.start;
            let seen = low..high.max(low);
            if let Some(cap) = self.params.softcap {
                softcap(self.level, &mut line[seen.clone()], cap);
            }
            // SAFETY: `amx` proves the features.
            let (sum, new_max) = unsafe { numerators(self.amx, line, seen, *max, tiles, r % ROWS) };
            if new_max > *max {
                let shrink = (*max - new_max).exp();
                *total *= shrink;
                sums.iter_mut().for_each(|s| *s *= shrink);
                *max = new_max;
            }
            *total += sum;
        }
    }

    /// Keys and values of `step` to tiles.
    fn fill(
        &self,
        step: &Range<usize>,
        wide: &mut [Vec<f32>; 2],
        (depth, keys): (usize, &mut [Tile]),
        (across, values): (usize, &mut [Tile]),
    ) {
        let (layer, dk) = (self.layer, self.params.key_head_dim);
        let [wide_keys, wide_values] = wide;
        let (key_bytes, key_kind) = self.stored(&layer.keys, step, wide_keys);
        let (value_bytes, value_kind, pitch) = match layer.is_latent() {
            true => (key_bytes, key_kind, dk),
            false => {
                let (bytes, kind) = self.stored(&layer.values, step, wide_values);
                (bytes, kind, self.params.value_head_dim)
            }
        };
        let (size, head, slot) = (layer.block_size, self.kv_head, |p| self.slot(p));
        let rows_of = |pitch: usize| {
            move |position: usize| match layer.is_rotated() {
                true => (position - step.start) * pitch,
                false => layer.at(slot(position), head, pitch),
            }
        };
        let transposed = |p: usize| layer.block_at(slot(p) / size, head, dk) + slot(p) % size;
        let key_rows = rows_of(dk);
        let key = match layer.has_transposed_keys() {
            true => Stored { bytes: key_bytes, at: &transposed, apart: size },
            false => Stored { bytes: key_bytes, at: &key_rows, apart: 1 },
        };
        let value = Stored { bytes: value_bytes, at: &rows_of(pitch), apart: 1 };
        // SAFETY: `amx` proves the features; positions up to the step's end are stored, sixteen at a time.
        unsafe {
            match key_kind {
                Kind::F32 => self.fill_keys::<F32>(&key, step, depth, keys),
                Kind::F16 => self.fill_keys::<F16>(&key, step, depth, keys),
                Kind::Bf16 => self.fill_keys::<Bf16>(&key, step, depth, keys),
            }
            match value_kind {
                Kind::F32 => self.fill_values::<F32>(&value, step, across, values),
                Kind::F16 => self.fill_values::<F16>(&value, step, across, values),
                Kind::Bf16 => self.fill_values::<Bf16>(&value, step, across, values),
            }
        }
    }

    /// Where the elements of an array lie: in the cache or, if it is quantized, the rows of `step` in `wide`.
    fn stored(
        &self,
        elements: &Elements,
        step: &Range<usize>,
        wide: &mut Vec<f32>,
    ) -> (*const u8, Kind) {
        let rows = match elements {
            Elements::F32(e) => return (e.as_ptr().cast(), Kind::F32),
            Elements::F16(e) => return (e.as_ptr().cast(), Kind::F16),
            Elements::BF16(e) => return (e.as_ptr().cast(), Kind::Bf16),
            Elements::Quantized(rows) => rows,
        };
        let columns = rows.columns();
        let wide = grown(wide, STEP * columns, 0.0);
        let used = step.len().next_multiple_of(ROWS);
        for (i, wide) in wide[..used * columns].chunks_exact_mut(ROWS * columns).enumerate() {
            let slot = self.slot(step.start + i * ROWS);
            rows.read(self.level, self.layer.at(slot, self.kv_head, columns), wide);
        }
        (wide.as_ptr().cast(), Kind::F32)
    }

    fn slot(&self, position: usize) -> usize {
        let size = self.layer.block_size;
        self.block_table[position / size] as usize * size + position % size
    }

    /// Tiles `[16 positions][depth]`: pairs of columns by position.
    ///
    /// # Safety
    /// `stored` must hold the keys of `step`, sixteen at a time.
    #[target_feature(
        enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"
    )]
    unsafe fn fill_keys<E: Element>(
        &self,
        stored: &Stored,
        step: &Range<usize>,
        depth: usize,
        out: &mut [Tile],
    ) {
        let dk = self.params.key_head_dim;
        // SAFETY: `amx` implies the features.
        let s = unsafe { Avx512::<true>::new() };
        let used = (step.len()).next_multiple_of(DEPTH) / ROWS;
        for (i, tiles) in out.chunks_exact_mut(depth).take(used).enumerate() {
            let position = step.start + i * ROWS;
            if position >= step.end {
                tiles.fill(Tile::ZERO);
                continue;
            }
            let at = (stored.at)(position);
            if stored.apart == 1 {
                for (t, tile) in tiles.iter_mut().enumerate() {
                    let mut pairs = [_mm512_setzero_ps(); ROWS];
                    for (r, pairs) in pairs.iter_mut().enumerate() {
                        let at = at + r * dk + t * DEPTH;
                        // SAFETY: sixteen rows from this position on have `dk` columns each.
                        *pairs = unsafe {
                            narrow::<E>(
                                s,
                                Part::Nearest,
                                stored.bytes.add(at * E::BYTES),
                                dk - t * DEPTH,
                                1.0,
                            )
                        };
                    }
                    transpose(s, &mut pairs, tile);
                }
                continue;
            }
            for (t, tile) in tiles.iter_mut().enumerate() {
                for (r, row) in tile.0.chunks_exact_mut(16).enumerate() {
                    let column = t * DEPTH + 2 * r;
                    if column >= dk {
                        row.fill(0);
                        continue;
                    }
                    // SAFETY: columns `column` and the next exist, and sixteen positions side by side.
                    unsafe {
                        let p = stored.bytes.add((at + column * stored.apart) * E::BYTES);
                        let next = p.add(stored.apart * E::BYTES);
                        let pair = interleave(E::load(s, p), E::load(s, next));
                        _mm512_store_si512(row.as_mut_ptr().cast(), pair);
                    }
                }
            }
        }
    }

    /// Tiles `[32 positions][across]`: pairs of positions by column. Positions behind the step are
    /// zero, whatever lies there.
    ///
    /// # Safety
    /// `stored` must hold the values of `step`.
    #[target_feature(
        enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"
    )]
    unsafe fn fill_values<E: Element>(
        &self,
        stored: &Stored,
        step: &Range<usize>,
        across: usize,
        out: &mut [Tile],
    ) {
        let dv = self.params.value_head_dim;
        // SAFETY: `amx` implies the features.
        let s = unsafe { Avx512::<true>::new() };
        for pair_of in 0..step.len().next_multiple_of(DEPTH) / 2 {
            let position = step.start + 2 * pair_of;
            let (tile, row) = (pair_of / ROWS * across, pair_of % ROWS * 16);
            let first = (position < step.end).then(|| (stored.at)(position));
            let second = (position + 1 < step.end).then(|| (stored.at)(position + 1));
            for column in 0..across {
                let mut values = [s.zero(); 2];
                for (value, at) in values.iter_mut().zip([first, second]) {
                    if let Some(at) = at.filter(|_| column * ROWS < dv) {
                        // SAFETY: sixteen columns of a stored position.
                        *value = unsafe {
                            E::load(s, stored.bytes.add((at + column * ROWS) * E::BYTES))
                        };
                    }
                }
                let row = &mut out[tile + column].0[row..row + 16];
                // SAFETY: sixteen words.
                unsafe {
                    let pair = interleave(values[0], values[1]);
                    _mm512_store_si512(row.as_mut_ptr().cast(), pair);
                }
            }
        }
    }
}

/// `e^(score - max)` of the scores `seen` of a row, rounded to bf16, and zeros for the others, to row `row` of `tiles`; returns
/// their sum and `max`, the largest of them and `floor`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn numerators(
    _: Amx,
    scores: &[f32],
    seen: Range<usize>,
    floor: f32,
    tiles: &mut [Tile],
    row: usize,
) -> (f32, f32) {
    let lanes = |register: usize| {
        let before = |end: usize| (1u32 << end.saturating_sub(16 * register).min(16)) - 1;
        (before(seen.end) & !before(seen.start)) as u16
    };
    let registers = scores.as_chunks::<16>().0;
    // SAFETY: a register is sixteen scores, or words of a row of a tile.
    unsafe {
        let load = |register: usize| _mm512_loadu_ps(registers[register].as_ptr());
        let mut max = _mm512_set1_ps(floor);
        for register in seen.start / 16..seen.end.div_ceil(16) {
            // The second is what comes out when one is not a number: such scores stay visible.
            max = _mm512_mask_max_ps(max, lanes(register), max, load(register));
        }
        let max = _mm512_reduce_max_ps(max);
        let (shift, mut sum) = (_mm512_set1_ps(max), _mm512_setzero_ps());
        for (i, tile) in tiles.iter_mut().enumerate() {
            let mut pair = [_mm512_setzero_ps(); 2];
            for (half, numerators) in pair.iter_mut().enumerate() {
                let (register, lanes) = (2 * i + half, lanes(2 * i + half));
                if lanes != 0 {
                    let e = exp::<Lanes512>(_mm512_sub_ps(load(register), shift));
                    *numerators = _mm512_maskz_mov_ps(lanes, e);
                    sum = _mm512_add_ps(sum, *numerators);
                }
            }
            let [low, high] = pair;
            _mm512_storeu_si512(tile.0[16 * row..].as_mut_ptr().cast(), narrowed(low, high));
        }
        (_mm512_reduce_add_ps(sum), max)
    }
}
