//! Row-major float weights, read in place from the mapped file: F32, F16, BF16, and E4M3 under scales.
//!
//! Rows of answers: dot products along the row. Rows of prompts: panels, transposed in registers.

// One index runs over several arrays of registers.
#![allow(clippy::needless_range_loop)]

use super::isa::{FloatIsa, Isa, Job};
use super::panel::{self, Bands, DEPTH, Panel};
use super::tile::BAND;
use crate::ColumnBand;
use crate::kernel::RowKind;
use crate::pool::ahead::read_on;
use marlin_quant::fp8::E4M3;
use std::marker::PhantomData;

/// Output rows multiplied together.
const TOGETHER: usize = 4;

/// An element type.
pub(crate) trait Element: Send + Sync + 'static {
    /// Identifier of the weight format.
    const ID: &'static str;
    /// Bytes of an element.
    const BYTES: usize;
    /// Rows and inputs under one scale; `None` where elements are the weights.
    const BLOCK: Option<[usize; 2]> = None;
    /// `LANES` elements from `p`; of elements under scales, [`PART`] of each.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load<S: Isa>(s: S, p: *const u8) -> S::F;
    /// One element, or that part of it.
    fn scalar(bytes: &[u8]) -> f32;
}

/// What loads make of an element under a scale: E4M3 bits shifted to where a half has them.
const PART: f32 = 1.0 / 256.0;

/// IEEE single precision.
pub(crate) struct F32;
/// IEEE half precision.
pub(crate) struct F16;
/// bfloat16.
pub(crate) struct Bf16;
/// Eight bits, four of them exponent: one scale a row, or one for `BLOCK` rows of as many inputs.
pub(crate) struct E4m3<const BLOCK: usize>;

impl Element for F32 {
    const ID: &'static str = "f32";
    const BYTES: usize = 4;

    #[inline(always)]
    unsafe fn load<S: Isa>(s: S, p: *const u8) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load_f32(p.cast()) }
    }

    fn scalar(bytes: &[u8]) -> f32 {
        f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }
}

impl Element for F16 {
    const ID: &'static str = "f16";
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<S: Isa>(s: S, p: *const u8) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load_f16(p) }
    }

    fn scalar(bytes: &[u8]) -> f32 {
        half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
    }
}

impl Element for Bf16 {
    const ID: &'static str = "bf16";
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<S: Isa>(s: S, p: *const u8) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load_bf16(p) }
    }

    fn scalar(bytes: &[u8]) -> f32 {
        half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
    }
}

impl<const BLOCK: usize> Element for E4m3<BLOCK> {
    const ID: &'static str = if BLOCK == 1 { "fp8" } else { "fp8_block128" };
    const BYTES: usize = 1;
    const BLOCK: Option<[usize; 2]> = match BLOCK {
        1 => Some([1, usize::MAX]),
        _ => Some([BLOCK, BLOCK]),
    };

    #[inline(always)]
    unsafe fn load<S: Isa>(s: S, p: *const u8) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load_e4m3(p) }
    }

    fn scalar(bytes: &[u8]) -> f32 {
        E4M3[usize::from(bytes[0])] * PART
    }
}

/// Scales of a matrix of `E`, down and across.
pub(crate) fn scale_grid<E: Element>(out_features: usize, in_features: usize) -> [usize; 2] {
    E::BLOCK.map_or([0, 0], |[rows, inputs]| {
        [out_features.div_ceil(rows), in_features.div_ceil(inputs)]
    })
}

/// Rows of `in_features` elements, one after another.
pub(crate) struct Rows<'a, E> {
    bytes: &'a [u8],
    /// Of the whole matrix, of which these rows begin with `first`.
    scales: &'a [f32],
    first: usize,
    in_features: usize,
    out_features: usize,
    element: PhantomData<E>,
}

impl<'a, E: Element> Rows<'a, E> {
    /// Views `bytes` as a matrix of `in_features` columns.
    pub(crate) fn new(bytes: &'a [u8], in_features: usize) -> Self {
        let out_features = bytes.len() / (in_features * E::BYTES);
        assert_eq!(bytes.len(), out_features * in_features * E::BYTES, "whole rows");
        Self { bytes, scales: &[], first: 0, in_features, out_features, element: PhantomData }
    }

    /// The same as rows from `first` on of a matrix with `scales`.
    pub(crate) fn with_scales(self, scales: &'a [f32], first: usize) -> Self {
        Self { scales, first, ..self }
    }

    /// What loaded elements of `row` from `input` on are multiplied by.
    #[inline(always)]
    pub(crate) fn scale(&self, row: usize, input: usize) -> f32 {
        let Some([rows, inputs]) = E::BLOCK else { return 1.0 };
        let across = self.in_features.div_ceil(inputs);
        self.scales[(self.first + row) / rows * across + input / inputs] / PART
    }

    /// Rows.
    pub(crate) fn out_features(&self) -> usize {
        self.out_features
    }

    /// One row.
    pub(crate) fn row(&self, row: usize) -> &'a [u8] {
        let bytes = self.in_features * E::BYTES;
        &self.bytes[row * bytes..(row + 1) * bytes]
    }
}

impl<E: Element> Bands for Rows<'_, E> {
    fn in_features(&self) -> usize {
        self.in_features
    }

    fn fill(&self, isa: FloatIsa, band: usize, start: usize, len: usize, out: &mut Panel) {
        assert!(len <= DEPTH && start + len <= self.in_features);
        assert!(band * BAND < self.out_features);
        isa.enter(Transpose { rows: self, band, start, len, out });
    }
}

/// Inputs `start .. start + len` of a band to f32, input by input.
struct Transpose<'a, 'b, E> {
    rows: &'a Rows<'b, E>,
    band: usize,
    start: usize,
    len: usize,
    out: &'a mut Panel,
}

impl<E: Element> Job for Transpose<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let Self { rows, band, start, len, out } = self;
        let whole = len / S::LANES * S::LANES;
        let out = out.0.as_mut_ptr();
        for part in 0..BAND / S::LANES {
            let first = band * BAND + part * S::LANES;
            // Rows behind the last read the last one: their sums are dropped.
            let row = |i: usize| (first + i).min(rows.out_features - 1);
            let mut tile = [s.zero(); 16];
            for k in (0..whole).step_by(S::LANES) {
                // SAFETY: `start + k + LANES` inputs exist in each row and `k + LANES` in `out`.
                unsafe {
                    for (i, t) in tile[..S::LANES].iter_mut().enumerate() {
                        let at = (row(i) * rows.in_features + start + k) * E::BYTES;
                        let loaded = E::load(s, rows.bytes.as_ptr().add(at));
                        *t = scaled::<E, S>(s, loaded, rows.scale(row(i), start + k));
                    }
                    s.transpose(&mut tile[..S::LANES]);
                    for (i, &t) in tile[..S::LANES].iter().enumerate() {
                        s.store_f32(out.add((k + i) * BAND + part * S::LANES), t);
                    }
                }
            }
            for k in whole..len {
                for i in 0..S::LANES {
                    let value = E::scalar(&rows.row(row(i))[(start + k) * E::BYTES..]);
                    let value = value * rows.scale(row(i), start + k);
                    // SAFETY: `k < len` inputs fit `out`.
                    unsafe { out.add(k * BAND + part * S::LANES + i).write(value) };
                }
            }
        }
    }
}

/// Loaded elements times what they are to be multiplied by.
#[inline(always)]
fn scaled<E: Element, S: Isa>(s: S, loaded: S::F, scale: f32) -> S::F {
    if E::BLOCK.is_some() { s.mul(loaded, s.splat(scale)) } else { loaded }
}

/// All of `weights` times all rows of `x`, on this thread.
pub(crate) fn multiply<E: Element>(
    isa: FloatIsa,
    weights: Rows<'_, E>,
    x: &[f32],
    rows: usize,
    kind: RowKind,
    out: &mut ColumnBand<'_>,
) {
    assert_eq!(x.len(), rows * weights.in_features);
    match kind {
        RowKind::Decode => isa.enter(MultiplyRows { weights, x, rows, out }),
        RowKind::Prompt => {
            let bands = 0..weights.out_features.div_ceil(BAND);
            panel::multiply(isa, &weights, x, rows, bands, out);
        }
    }
}

/// All of `weights` times all rows of `x`; weights are read once.
struct MultiplyRows<'a, 'b, E> {
    weights: Rows<'a, E>,
    x: &'a [f32],
    rows: usize,
    out: &'a mut ColumnBand<'b>,
}

impl<E: Element> Job for MultiplyRows<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Isa>(mut self, s: S) {
        let out_features = self.weights.out_features;
        let mut first = 0;
        while out_features - first >= TOGETHER {
            self.all_rows::<S, TOGETHER>(s, first);
            first += TOGETHER;
        }
        while first < out_features {
            self.all_rows::<S, 1>(s, first);
            first += 1;
        }
    }
}

impl<E: Element> MultiplyRows<'_, '_, E> {
    /// Output rows `first .. first + N` times all activation rows.
    #[inline(always)]
    fn all_rows<S: Isa, const N: usize>(&mut self, s: S, first: usize) {
        let mut row = 0;
        while self.rows - row >= 4 {
            self.dot::<S, 4, N>(s, row, first);
            row += 4;
        }
        if self.rows - row >= 2 {
            self.dot::<S, 2, N>(s, row, first);
            row += 2;
        }
        if self.rows - row == 1 {
            self.dot::<S, 1, N>(s, row, first);
        }
    }

    /// Output rows `first .. first + N` times activation rows `row .. row + R`.
    #[inline(always)]
    fn dot<S: Isa, const R: usize, const N: usize>(&mut self, s: S, row: usize, first: usize) {
        let depth = self.weights.in_features;
        let whole = depth / S::LANES * S::LANES;
        let x = &self.x[row * depth..(row + R) * depth];
        let w = &self.weights.bytes[first * depth * E::BYTES..(first + N) * depth * E::BYTES];
        let mut acc = [[s.zero(); R]; N];
        let block = E::BLOCK.map_or(depth, |[_, inputs]| inputs.min(depth));
        for start in (0..whole).step_by(block) {
            let mut scales = [0.0; N];
            for n in 0..N {
                scales[n] = self.weights.scale(first + n, start);
            }
            let mut k = start;
            while k < whole.min(start + block) {
                // The rows lie one behind the other.
                read_on(w.as_ptr().wrapping_add(N * k * E::BYTES), N * S::LANES * E::BYTES);
                // SAFETY: `k + LANES <= depth`, and both slices hold whole rows.
                unsafe {
                    let mut xs = [s.zero(); R];
                    for r in 0..R {
                        xs[r] = s.load_f32(x.as_ptr().add(r * depth + k));
                    }
                    for n in 0..N {
                        let w = E::load(s, w.as_ptr().add((n * depth + k) * E::BYTES));
                        let w = scaled::<E, S>(s, w, scales[n]);
                        for r in 0..R {
                            acc[n][r] = s.fma(w, xs[r], acc[n][r]);
                        }
                    }
                }
                k += S::LANES;
            }
        }
        if whole < depth {
            self.rest(s, row, first, &mut acc);
        }
        if N > 1 && (R * N).is_multiple_of(S::LANES) {
            // As many sums at once as a register has lanes, in the order of each alone.
            let together = S::LANES / N;
            for part in (0..R).step_by(together) {
                let mut sums = [s.zero(); 16];
                for r in 0..together {
                    for n in 0..N {
                        sums[r * N + n] = acc[n][part + r];
                    }
                }
                let sums = &mut sums[..S::LANES];
                s.transpose(sums);
                let mut half = S::LANES / 2;
                while half > 0 {
                    for i in 0..half {
                        sums[i] = s.add(sums[i], sums[i + half]);
                    }
                    half /= 2;
                }
                let mut totals = [0.0f32; 16];
                // SAFETY: a register has at most 16 lanes.
                unsafe { s.store_f32(totals.as_mut_ptr(), sums[0]) };
                for r in 0..together {
                    let out = &mut self.out.row(row + part + r)[first..first + N];
                    out.copy_from_slice(&totals[r * N..][..N]);
                }
            }
            return;
        }
        for n in 0..N {
            for r in 0..R {
                self.out.row(row + r)[first + n] = s.sum(acc[n][r]);
            }
        }
    }

    /// Adds the inputs behind the last whole register, as one that ends in zeros.
    #[inline(always)]
    fn rest<S: Isa, const R: usize, const N: usize>(
        &self,
        s: S,
        row: usize,
        first: usize,
        acc: &mut [[S::F; R]; N],
    ) {
        let depth = self.weights.in_features;
        let whole = depth / S::LANES * S::LANES;
        let mut xs = [s.zero(); R];
        for r in 0..R {
            let mut x = [0.0f32; 16];
            let from = &self.x[(row + r) * depth..][whole..depth];
            x[..from.len()].copy_from_slice(from);
            // SAFETY: a register has at most 16 lanes.
            xs[r] = unsafe { s.load_f32(x.as_ptr()) };
        }
        for n in 0..N {
            let mut w = [0u8; 16 * 4];
            let from = &self.weights.row(first + n)[whole * E::BYTES..];
            w[..from.len()].copy_from_slice(from);
            // SAFETY: an element has at most four bytes.
            let w = unsafe { E::load(s, w.as_ptr()) };
            let w = scaled::<E, S>(s, w, self.weights.scale(first + n, whole));
            for r in 0..R {
                acc[n][r] = s.fma(w, xs[r], acc[n][r]);
            }
        }
    }
}
