//! Two registers of columns at a time: an activation that was loaded is used twice, so that products and not loads are
//! what takes the time.

// One index runs over several arrays of registers.
#![allow(clippy::needless_range_loop)]

use super::sums::Sums;
use crate::simd::isa::Isa;
use crate::simd::quantized::{Quantized, Record, Seconds};
use crate::simd::tile::{BAND, Source};
use std::array;
use std::hint::black_box;
use std::ops::Range;

/// Registers of columns multiplied together.
pub(super) const PAIR: usize = 2;

/// A source whose columns can be read one by one.
pub(super) trait Columns: Source {
    /// Column `column` of the [`quants`](Source::quants).
    ///
    /// # Safety
    /// `group`, `part` and `column` must be in range.
    unsafe fn column<S: Isa>(self, s: S, group: usize, part: usize, column: usize) -> S::I;
}

/// Two bands in registers that hold a whole one, or the halves of one.
#[derive(Clone, Copy)]
pub(super) struct Pair<T> {
    pub sources: [T; PAIR],
    pub parts: [usize; PAIR],
}

impl<T: Columns> Pair<T> {
    /// Rows `rows` over `groups` groups, from `first` on in `x`.
    ///
    /// # Safety
    /// The sources must hold `groups` groups, `x` those from `first` on in each of the rows; `sums` whole bands
    /// of each, side by side.
    #[inline(always)]
    pub(super) unsafe fn all_rows<S: Isa, const SUBS: usize>(
        self,
        s: S,
        first: usize,
        groups: usize,
        x: &Quantized,
        rows: Range<usize>,
        sums: Sums,
    ) {
        let mut row = rows.start;
        while row < rows.end {
            // SAFETY: the caller's.
            unsafe {
                let sums = sums.from(row - rows.start, 0);
                row += match rows.end - row {
                    6.. if S::LANES == BAND => {
                        self.rows::<S, SUBS, 6>(s, first, groups, x, row, sums)
                    }
                    4.. => self.rows::<S, SUBS, 4>(s, first, groups, x, row, sums),
                    2.. => self.rows::<S, SUBS, 2>(s, first, groups, x, row, sums),
                    _ => self.rows::<S, SUBS, 1>(s, first, groups, x, row, sums),
                };
            }
        }
    }

    /// Rows `row .. row + R`; returns `R`.
    ///
    /// # Safety
    /// As [`all_rows`](Self::all_rows).
    #[inline(always)]
    pub(super) unsafe fn rows<S: Isa, const SUBS: usize, const R: usize>(
        self,
        s: S,
        first: usize,
        groups: usize,
        x: &Quantized,
        row: usize,
        sums: Sums,
    ) -> usize {
        // SAFETY: the caller vouches for all ranges.
        unsafe {
            let seconds = Seconds::<SUBS, R>::new(x, row);
            let mut acc = [[s.zero(); PAIR]; R];
            let mut records = [Record::<SUBS>(std::ptr::null()); R];
            for r in 0..R {
                for b in 0..PAIR {
                    acc[r][b] = sums.from(0, b * S::LANES).begin(s, r);
                }
                records[r] = Record(x.at(row + r, first));
            }
            for group in 0..groups {
                self.add_group(s, group, &records, &mut acc);
                let flags = seconds.flags(first + group);
                if !flags.none() {
                    // What is reached by a number lies in memory: a copy, here only.
                    let mut sums = acc;
                    if flags.most() {
                        let mut second = records;
                        for r in 0..R {
                            second[r] = seconds.record(flags, r);
                        }
                        self.add_group(s, group, &second, &mut sums);
                    } else {
                        for r in 0..R {
                            if flags.has(r) {
                                let second = [seconds.record(flags, r)];
                                self.add_group(s, group, &second, array::from_mut(&mut sums[r]));
                            }
                        }
                    }
                    acc = sums;
                }
                for record in &mut records {
                    *record = record.next();
                }
            }
            for r in 0..R {
                for b in 0..PAIR {
                    sums.from(0, b * S::LANES).end(s, r, acc[r][b]);
                }
            }
        }
        R
    }

    /// Adds the products of group `group` with one record of each row.
    ///
    /// # Safety
    /// As [`all_rows`](Self::all_rows).
    #[inline(always)]
    unsafe fn add_group<S: Isa, const SUBS: usize, const R: usize>(
        self,
        s: S,
        group: usize,
        records: &[Record<SUBS>; R],
        acc: &mut [[S::F; PAIR]; R],
    ) {
        let (l, columns) = (T::LAYOUT, 8 / SUBS);
        let together = S::together(l.quant_bits).min(columns);
        let Self { sources, parts } = self;
        // SAFETY: the caller's.
        unsafe {
            for sub in 0..SUBS {
                let mut dots = [[s.splat_i32(0); PAIR]; R];
                for r in 0..R {
                    dots[r] = [s.splat_i32(records[r].start(sub)); PAIR];
                }
                for block in (sub * columns..(sub + 1) * columns).step_by(together) {
                    let mut added = if S::WORDS { [[s.splat_i32(0); PAIR]; R] } else { dots };
                    let mut end = block + together;
                    if S::WORDS && together > 2 {
                        // Of a loop that it can unroll the compiler makes one row after the other, which loads
                        // everything twice.
                        end = black_box(end);
                    }
                    for j in block..end {
                        let w = [
                            sources[0].column(s, group, parts[0], j),
                            sources[1].column(s, group, parts[1], j),
                        ];
                        for r in 0..R {
                            let x = records[r].quants(0).add(4 * j);
                            for b in 0..PAIR {
                                added[r][b] = s.add_column(l.quant_bits, added[r][b], w[b], x);
                            }
                        }
                    }
                    for r in 0..R {
                        for b in 0..PAIR {
                            dots[r][b] = match S::WORDS {
                                true => s.add_i32(dots[r][b], s.widen(added[r][b])),
                                false => added[r][b],
                            };
                        }
                    }
                }
                let scales = [
                    sources[0].scales(s, group, sub, parts[0]),
                    sources[1].scales(s, group, sub, parts[1]),
                ];
                for r in 0..R {
                    let (scale, sum) = (s.splat(records[r].scale()), s.splat(records[r].sum(sub)));
                    for b in 0..PAIR {
                        let scale = s.mul(scales[b].0, scale);
                        acc[r][b] = s.fma(s.to_f32(dots[r][b]), scale, acc[r][b]);
                        if l.has_offset() {
                            acc[r][b] = s.fma(scales[b].1, sum, acc[r][b]);
                        }
                    }
                }
            }
        }
    }
}
