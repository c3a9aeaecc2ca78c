//! Activations as 8-bit integers, one scale per 32: `x ≈ scale * q`, `scale = max|x| / 127`.
//!
//! The rounding error of an activation is at most `scale / 2`, so that of a dot product is at
//! most `Σ_groups max|x| / 254 * Σ|w|`. Beside the integers lies what kernels need of their sums:
//! with weights `s * (q_w - zero) + o`, a group's product is one integer dot product that starts
//! at `-zero * Σ q`, times both scales, plus `o * scale * Σ q`.
//!
//! A group is one record of 4-byte words, so that a kernel needs one pointer a row:
//! eight words of quants, the scale, then per sub-block the start, then per sub-block the sum.
//!
//! Most of a row's error comes from a few groups with outliers, which have the largest steps. A group of whose
//! row's squares one input holds more than a ninth therefore has a second record: what rounding took off, rounded
//! again. That depends on the row alone, and there can be no more than eight of them. They follow the row's other
//! records; a table says of every group which rows have one, so that it costs a group without any one load.

use super::isa::{IntegerIsa, Isa, Job};
use super::tile::{GROUP, Layout};
use crate::Pool;
use std::sync::atomic::{AtomicU8, Ordering};

/// Word of the scale in a record.
const SCALE: usize = 8;
/// Rows quantized by one task.
const ROWS_PER_TASK: usize = 16;
/// An input whose square is more than this part of its row's gives its group a second record. Perplexity with a
/// lower one is hardly better, and products of prompts take longer.
const OUTLIER: f32 = 1.0 / 9.0;
/// Second records of a row: fewer than nine inputs can hold a ninth each.
const SECONDS: usize = 8;
/// A second record of a group that has none.
static NOTHING: [u32; record(2)] = [0; record(2)];

/// Rows of quantized activations, `subs` sums a group.
pub(crate) struct Quantized {
    words: Vec<u32>,
    /// `[groups, rows]`: which of a row's second records a group has, from 1; 0 if none. Then eight more bytes.
    table: Vec<AtomicU8>,
    rows: usize,
    groups: usize,
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
        let groups = columns / GROUP;
        let row_words = (groups + SECONDS) * record(subs);
        let rows = x.len() / columns;
        let mut words = vec![0; rows * row_words];
        let mut table = Vec::new();
        table.resize_with(groups * rows + SECONDS, AtomicU8::default);
        pool.run_chunks(&mut words, ROWS_PER_TASK * row_words, |i, piece| {
            let first = i * ROWS_PER_TASK;
            let x = &x[first * columns..][..piece.len() / row_words * columns];
            let table = (&table[first..], rows);
            isa.enter(Quantize { x, groups, zero, subs, table, out: piece });
        });
        Self { words, table, rows, groups, row_words, subs, zero }
    }

    /// Whether these are rows of `columns` for weights of `layout`.
    pub(crate) fn suits(&self, isa: IntegerIsa, columns: usize, layout: &Layout) -> bool {
        (self.subs, self.zero, self.groups) == (layout.subs(), zero(isa, layout), columns / GROUP)
    }

    /// Bytes per row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.row_words * 4
    }

    /// Groups per row.
    pub(crate) fn groups(&self) -> usize {
        self.groups
    }

    /// Rows.
    pub(crate) fn rows(&self) -> usize {
        self.rows
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

/// The second records of `R` rows, at most eight.
pub(crate) struct Seconds<'a, const SUBS: usize, const R: usize> {
    x: &'a Quantized,
    row: usize,
}

/// Which of `R` rows have a second record of a group: a byte each.
#[derive(Clone, Copy)]
pub(crate) struct Flags<const R: usize>(u64);

impl<const R: usize> Flags<R> {
    /// Whether none has.
    #[inline(always)]
    pub(crate) fn none(self) -> bool {
        self.0 == 0
    }

    /// Whether more than half have.
    #[inline(always)]
    pub(crate) fn most(self) -> bool {
        let any = self.0 | self.0 >> 1 | self.0 >> 2 | self.0 >> 3;
        2 * (any & 0x0101_0101_0101_0101).count_ones() as usize > R
    }

    #[inline(always)]
    fn number(self, r: usize) -> usize {
        (self.0 >> (8 * r) & 255) as usize
    }

    /// Whether row `r` has.
    #[inline(always)]
    pub(crate) fn has(self, r: usize) -> bool {
        self.number(r) != 0
    }
}

impl<'a, const SUBS: usize, const R: usize> Seconds<'a, SUBS, R> {
    /// Those of rows `row .. row + R`, with `SUBS` sums a group.
    #[inline(always)]
    pub(crate) fn new(x: &'a Quantized, row: usize) -> Self {
        Self { x, row }
    }

    /// Which rows have one of `group`.
    ///
    /// # Safety
    /// Rows and group must exist.
    #[inline(always)]
    pub(crate) unsafe fn flags(&self, group: usize) -> Flags<R> {
        let at = group * self.x.rows + self.row;
        // SAFETY: the table has eight bytes from there; nobody writes it any more.
        let flags = unsafe { self.x.table.as_ptr().add(at).cast::<u64>().read_unaligned() };
        Flags(u64::from_le(flags) & (u64::MAX >> (64 - 8 * R)))
    }

    /// The record of row `row + r` that is in `flags`; zeros if it has none.
    ///
    /// # Safety
    /// `flags` must be of these rows.
    #[inline(always)]
    pub(crate) unsafe fn record(&self, flags: Flags<R>, r: usize) -> Record<SUBS> {
        match flags.number(r) {
            0 => Record(NOTHING.as_ptr()),
            number => Record(self.x.at(self.row + r, self.x.groups + number - 1)),
        }
    }
}

struct Quantize<'a> {
    x: &'a [f32],
    groups: usize,
    zero: i32,
    subs: usize,
    /// From the first of these rows on, and how many rows it has.
    table: (&'a [AtomicU8], usize),
    out: &'a mut [u32],
}

impl Job for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let Self { groups, zero, subs, .. } = self;
        let (table, rows) = self.table;
        let words = (groups + SECONDS) * record(subs);
        let x = self.x.chunks_exact(groups * GROUP);
        for (row, (x, out)) in x.zip(self.out.chunks_exact_mut(words)).enumerate() {
            let (records, seconds) = out.split_at_mut(groups * record(subs));
            let mut squares = s.zero();
            for (x, out) in x.chunks_exact(GROUP).zip(records.chunks_exact_mut(record(subs))) {
                squares = quantize(s, x, zero, subs, squares, out);
            }
            let largest = (OUTLIER * s.sum(squares)).sqrt() / 127.0;
            let outliers = records
                .chunks_exact(record(subs))
                .enumerate()
                .filter(|(_, first)| f32::from_bits(first[SCALE]) > largest);
            let seconds = seconds.chunks_exact_mut(record(subs));
            for (number, ((group, first), second)) in outliers.zip(seconds).enumerate() {
                let rest = rest(&x[group * GROUP..][..GROUP], first);
                quantize(s, &rest, zero, subs, s.zero(), second);
                table[group * rows + row].store(number as u8 + 1, Ordering::Relaxed);
            }
        }
    }
}

/// What rounding took off the inputs `x` of a group.
#[inline(always)]
fn rest(x: &[f32], record: &[u32]) -> [f32; GROUP] {
    let scale = f32::from_bits(record[SCALE]);
    let quant = |i: usize| record[i / 4].to_le_bytes()[i % 4] as i8;
    std::array::from_fn(|i| x[i] - scale * f32::from(quant(i)))
}

/// Writes the record of a group; returns `squares` with its squares added.
#[inline(always)]
fn quantize<S: Isa>(
    s: S,
    x: &[f32],
    zero: i32,
    subs: usize,
    mut squares: S::F,
    out: &mut [u32],
) -> S::F {
    assert!(x.len() == GROUP && out.len() >= record(subs));
    // SAFETY: `x` holds 32 floats, of which each step reads `LANES`; `out` begins with 32
    // bytes of quants, of which each step writes `LANES`.
    unsafe {
        let mut largest = s.zero();
        for i in (0..GROUP).step_by(S::LANES) {
            let v = s.load_f32(x.as_ptr().add(i));
            largest = s.max_abs(v, largest);
            squares = s.fma(v, v, squares);
        }
        let largest = s.max(largest);
        let scale = largest / 127.0;
        let inverse = if scale > 0.0 { 127.0 / largest } else { 0.0 };
        // A group so small that its inverse overflows counts as zero.
        let inverse = s.splat(if inverse.is_finite() { inverse } else { 0.0 });
        out[SCALE] = scale.to_bits();
        let (quants, sums) = (out.as_mut_ptr().cast::<i8>(), SCALE + 1);
        let sub_block = GROUP / subs;
        for sub in 0..subs {
            let mut total = s.splat_i32(0);
            for i in (sub * sub_block..(sub + 1) * sub_block).step_by(S::LANES) {
                let v = s.mul(s.load_f32(x.as_ptr().add(i)), inverse);
                total = s.add_i32(total, s.store_i8(quants.add(i), v));
            }
            let total = s.sum_i32(total);
            out[sums + sub] = (-zero * total) as u32;
            out[sums + subs + sub] = (scale * total as f32).to_bits();
        }
    }
    squares
}
