//! f32 matrix product over panels: weights of a band and up to [`DEPTH`] inputs as f32, input by
//! input, `[depth, 16]`, filled from whatever the weights are stored as and then multiplied with
//! all rows. A panel stays in the first-level cache, sums stay in registers.

// One index runs over several arrays of registers.
#![allow(clippy::needless_range_loop)]

use super::isa::{FloatIsa, Isa, Job};
use super::tile::{BAND, Band, Format, GROUP, Tiles, expand};
use crate::ColumnBand;
use std::ops::Range;

/// Inputs per panel; a multiple of every group.
pub(crate) const DEPTH: usize = 256;

/// One panel; row `k` is input `k` of sixteen outputs.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct Panel(pub [f32; DEPTH * BAND]);

/// A matrix that can be read as panels.
pub(crate) trait Bands: Sync {
    /// Inputs.
    fn in_features(&self) -> usize;
    /// Fills `out` with inputs `start .. start + len` of band `band`, `start` being a multiple of
    /// [`DEPTH`] and `len` at most that. Values of output rows behind the last are arbitrary.
    fn fill(&self, isa: FloatIsa, band: usize, start: usize, len: usize, out: &mut Panel);
}

impl<F: Format> Bands for Tiles<F> {
    fn in_features(&self) -> usize {
        self.in_features
    }

    fn fill(&self, isa: FloatIsa, band: usize, start: usize, len: usize, out: &mut Panel) {
        assert!(len <= DEPTH && start + len <= self.in_features);
        let groups = start / GROUP..(start + len) / GROUP;
        isa.enter(Expand { band: self.band(band), groups, out });
    }
}

/// Groups of a band to f32.
struct Expand<'a, 'b, F> {
    band: Band<'a, F>,
    groups: Range<usize>,
    out: &'b mut Panel,
}

impl<F: Format> Job for Expand<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        for (group, out) in self.groups.zip(self.out.0.chunks_exact_mut(GROUP * BAND)) {
            // SAFETY: `fill` checked the groups; `out` holds one.
            unsafe { expand(s, self.band, group, out.as_mut_ptr()) };
        }
    }
}

/// Registers of a panel row that the inner loop keeps: two bands, or two halves of one.
const WIDE: usize = 2;

/// Output rows `bands` of `weights` times all rows of `x`, written to `out`, whose first column is
/// that of the first band.
pub(crate) fn multiply(
    isa: FloatIsa,
    weights: &dyn Bands,
    x: &[f32],
    rows: usize,
    bands: Range<usize>,
    out: &mut ColumnBand<'_>,
) {
    let depth = weights.in_features();
    assert_eq!(x.len(), rows * depth);
    let lanes = isa.lanes();
    let together = WIDE * lanes / BAND;
    let width = together * BAND;
    let mut panels = vec![Panel([0.0; DEPTH * BAND]); together];
    let mut sums = vec![0.0f32; rows * width];
    for band in bands.clone().step_by(together) {
        sums.fill(0.0);
        for start in (0..depth).step_by(DEPTH) {
            let len = DEPTH.min(depth - start);
            for (i, panel) in panels.iter_mut().enumerate().take(bands.end - band) {
                weights.fill(isa, band + i, start, len, panel);
            }
            let base = panels.as_ptr().cast::<f32>();
            // The second register: the next band, or the second half of the band.
            let second = if together > 1 { DEPTH * BAND } else { lanes };
            // SAFETY: the offset is inside `panels`; `start` is inside the first row of `x`.
            let (second, x) = unsafe { (base.add(second), x.as_ptr().add(start)) };
            let panel = [base, second];
            isa.enter(Chunk { panel, len, x, stride: depth, rows, sums: sums.as_mut_ptr() });
        }
        let at = (band - bands.start) * BAND;
        for (row, sums) in sums.chunks_exact(width).enumerate() {
            let out = &mut out.row(row)[at..];
            let n = (bands.end - band).min(together);
            for (out, sums) in out.chunks_mut(BAND).zip(sums.chunks_exact(BAND)).take(n) {
                write_band(out, sums);
            }
        }
    }
}

/// Copies a band of sums, or the part of it that exists.
#[inline]
pub(crate) fn write_band(out: &mut [f32], sums: &[f32]) {
    match (out.first_chunk_mut::<BAND>(), sums.first_chunk::<BAND>()) {
        (Some(out), Some(sums)) => *out = *sums,
        _ => out.copy_from_slice(&sums[..out.len()]),
    }
}

/// Panels against all activations. Panels hold `len` inputs, `x` `rows` rows of them `stride`
/// apart, `sums` `[rows, WIDE * LANES]`. Knows nothing of the format: compiled once a level.
#[derive(Clone, Copy)]
struct Chunk {
    panel: [*const f32; WIDE],
    len: usize,
    x: *const f32,
    stride: usize,
    rows: usize,
    sums: *mut f32,
}

impl Job for Chunk {
    type Output = ();

    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let rows = self.rows;
        let mut row = 0;
        // SAFETY: rows `row .. row + R` are below `rows`; pointers hold what the type says.
        unsafe {
            // As many sums as leave registers for weights and an input.
            while S::LANES == BAND && rows - row >= 8 {
                self.few_rows::<S, 8>(s, row);
                row += 8;
            }
            while S::LANES < BAND && rows - row >= 6 {
                self.few_rows::<S, 6>(s, row);
                row += 6;
            }
            while rows - row >= 4 {
                self.few_rows::<S, 4>(s, row);
                row += 4;
            }
            if rows - row >= 2 {
                self.few_rows::<S, 2>(s, row);
                row += 2;
            }
            if rows - row == 1 {
                self.few_rows::<S, 1>(s, row);
            }
        }
    }
}

impl Chunk {
    /// Rows `row .. row + R`; one sum per output, so that it is the same for any `R`.
    ///
    /// # Safety
    /// The rows must exist.
    #[inline(always)]
    unsafe fn few_rows<S: Isa, const R: usize>(self, s: S, row: usize) {
        // SAFETY: the caller vouches for all ranges.
        unsafe {
            let mut acc = [[s.zero(); WIDE]; R];
            let mut x = [std::ptr::null::<f32>(); R];
            for r in 0..R {
                x[r] = self.x.add((row + r) * self.stride);
            }
            for k in 0..self.len {
                step::<S, R>(s, self.panel, k, &x, &mut acc);
            }
            for r in 0..R {
                for half in 0..WIDE {
                    let out = self.sums.add(((row + r) * WIDE + half) * S::LANES);
                    s.store_f32(out, s.add(s.load_f32(out), acc[r][half]));
                }
            }
        }
    }
}

/// Adds the products of input `k`.
///
/// # Safety
/// Input `k` must exist in the panels and in every row of `x`.
#[inline(always)]
unsafe fn step<S: Isa, const R: usize>(
    s: S,
    panel: [*const f32; WIDE],
    k: usize,
    x: &[*const f32; R],
    acc: &mut [[S::F; WIDE]; R],
) {
    // SAFETY: the caller's.
    unsafe {
        let w = [s.load_f32(panel[0].add(k * BAND)), s.load_f32(panel[1].add(k * BAND))];
        for r in 0..R {
            let x = s.splat(x[r].add(k).read());
            for half in 0..WIDE {
                acc[r][half] = s.fma(w[half], x, acc[r][half]);
            }
        }
    }
}
