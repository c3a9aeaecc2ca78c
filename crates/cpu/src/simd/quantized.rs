//! Activations as 8-bit integers, one scale per 32: `x ≈ scale * q`, `scale = max|x| / 127`.
//!
//! The rounding error of an activation is at most `scale / 2`, so that of a dot product is at
//! most `Σ_groups max|x| / 254 * Σ|w|`. Beside the integers lies what kernels need of their sums:
//! with weights `s * (q_w - zero) + o`, a group's product is one integer dot product that starts
//! at `-zero * Σ q`, times both scales, plus `o * scale * Σ q`.
//!
//! A group is one record of 4-byte words, so that a kernel needs one pointer a row:
//! eight words of quants, the scale, then per sub-block the start, then per sub-block the sum.

use super::isa::{IntegerIsa, Isa, Job};
use super::tile::{GROUP, Layout};
use crate::Pool;

/// Word of the scale in a record.
const SCALE: usize = 8;
/// Rows quantized by one task.
const ROWS_PER_TASK: usize = 16;

/// Rows of quantized activations, `subs` sums a group.
pub(crate) struct Quantized {
    words: Vec<u32>,
    row_words: usize,
    subs: usize,
    zero: i32,
}

/// Words of a record.
const fn record(subs: usize) -> usize {
    SCALE + 1 + 2 * subs
}

/// What sums are of. Where bytes are multiplied as signed numbers their zero of 128 is already gone.
fn zero(isa: IntegerIsa, layout: &Layout) -> i32 {
    match layout.quant_bits == 8 && isa.signed_bytes() {
        true => layout.zero - 128,
        false => layout.zero,
    }
}

impl Quantized {
    /// Quantizes `x: [rows, columns]` for weights of `layout`.
    pub(crate) fn new(
        isa: IntegerIsa,
        x: &[f32],
        columns: usize,
        layout: &Layout,
        pool: &Pool,
    ) -> Self {
        let (subs, zero) = (layout.subs(), zero(isa, layout));
        let row_words = columns / GROUP * record(subs);
        let mut words = vec![0; x.len() / columns * row_words];
        pool.run_chunks(&mut words, ROWS_PER_TASK * row_words, |i, piece| {
            let x = &x[i * ROWS_PER_TASK * columns..][..piece.len() / row_words * columns];
            isa.enter(Quantize { x, zero, subs, out: piece });
        });
        Self { words, row_words, subs, zero }
    }

    /// Whether these are rows of `columns` for weights of `layout`.
    pub(crate) fn suits(&self, isa: IntegerIsa, columns: usize, layout: &Layout) -> bool {
        (self.subs, self.zero, self.groups()) == (layout.subs(), zero(isa, layout), columns / GROUP)
    }

    /// Bytes per row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.row_words * 4
    }

    /// Groups per row.
    pub(crate) fn groups(&self) -> usize {
        self.row_words / record(self.subs)
    }

    /// Rows.
    pub(crate) fn rows(&self) -> usize {
        self.words.len() / self.row_words
    }

    /// The record of group `group` of `row`.
    #[inline(always)]
    pub(crate) fn at(&self, row: usize, group: usize) -> *const u32 {
        // SAFETY: callers keep `row` and `group` in range; a pointer just past the end is allowed.
        unsafe { self.words.as_ptr().add(row * self.row_words + group * record(self.subs)) }
    }
}

/// Reads of one record.
#[derive(Clone, Copy)]
pub(crate) struct Record<const SUBS: usize>(pub *const u32);

impl<const SUBS: usize> Record<SUBS> {
    /// Quants of sub-block `sub`.
    #[inline(always)]
    pub(crate) unsafe fn quants(self, sub: usize) -> *const i8 {
        // SAFETY: the caller holds a whole record.
        unsafe { self.0.add(sub * SCALE / SUBS).cast() }
    }

    /// Activation scale.
    #[inline(always)]
    pub(crate) unsafe fn scale(self) -> f32 {
        // SAFETY: the caller holds a whole record.
        unsafe { self.0.add(SCALE).cast::<f32>().read() }
    }

    /// Start of the integer dot product of sub-block `sub`.
    #[inline(always)]
    pub(crate) unsafe fn start(self, sub: usize) -> i32 {
        // SAFETY: the caller holds a whole record.
        unsafe { self.0.add(SCALE + 1 + sub).cast::<i32>().read() }
    }

    /// Sum of the activations of sub-block `sub`.
    #[inline(always)]
    pub(crate) unsafe fn sum(self, sub: usize) -> f32 {
        // SAFETY: the caller holds a whole record.
        unsafe { self.0.add(SCALE + 1 + SUBS + sub).cast::<f32>().read() }
    }

    /// The next record of the row.
    #[inline(always)]
    pub(crate) unsafe fn next(self) -> Self {
        // SAFETY: the caller stays in the row or just behind it.
        Self(unsafe { self.0.add(record(SUBS)) })
    }
}

struct Quantize<'a> {
    x: &'a [f32],
    zero: i32,
    subs: usize,
    out: &'a mut [u32],
}

impl Job for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let records = self.out.chunks_exact_mut(record(self.subs));
        for (x, out) in self.x.chunks_exact(GROUP).zip(records) {
            // SAFETY: `x` holds 32 floats, of which each step reads `LANES`; `out` begins with 32
            // bytes of quants, of which each step writes `LANES`.
            unsafe {
                let mut largest = s.zero();
                for i in (0..GROUP).step_by(S::LANES) {
                    largest = s.max_abs(s.load_f32(x.as_ptr().add(i)), largest);
                }
                let largest = s.max(largest);
                let scale = largest / 127.0;
                let inverse = if scale > 0.0 { 127.0 / largest } else { 0.0 };
                // A group so small that its inverse overflows counts as zero.
                let inverse = s.splat(if inverse.is_finite() { inverse } else { 0.0 });
                out[SCALE] = scale.to_bits();
                let (quants, sums) = (out.as_mut_ptr().cast::<i8>(), SCALE + 1);
                let sub_block = GROUP / self.subs;
                for sub in 0..self.subs {
                    let mut total = s.splat_i32(0);
                    for i in (sub * sub_block..(sub + 1) * sub_block).step_by(S::LANES) {
                        let v = s.mul(s.load_f32(x.as_ptr().add(i)), inverse);
                        total = s.add_i32(total, s.store_i8(quants.add(i), v));
                    }
                    let total = s.sum_i32(total);
                    out[sums + sub] = (-self.zero * total) as u32;
                    out[sums + self.subs + sub] = (scale * total as f32).to_bits();
                }
            }
        }
    }
}
