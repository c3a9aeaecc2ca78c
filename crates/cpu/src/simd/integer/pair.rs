//! Two registers of columns at a time: an activation that was loaded is used twice, so that products and not loads are
//! what takes the time.

// One index runs over several arrays of registers.
#![allow(clippy::needless_range_loop)]

use super::Chunk;
use super::sums::Sums;
use crate::simd::isa::Isa;
use crate::simd::quantized::{Quantized, Record, Seconds};
use crate::simd::tile::BAND;
use std::array;
use std::ops::Range;

/// Registers of columns multiplied together.
pub(crate) const PAIR: usize = 2;

/// Unpacked quants of a group as two registers of columns, and their scales.
pub(crate) struct Group<const SUBS: usize> {
    /// Bits of the largest quant.
    pub bits: u32,
    /// Quants: eight registers of columns, 64 bytes from one to the next.
    pub quants: [*const u8; PAIR],
    /// Scales of each sub-block, a register, 128 bytes from one to the next.
    pub scales: [*const f32; PAIR],
    /// Whether offsets follow, 64 bytes behind the scales.
    pub offsets: bool,
}

impl<const SUBS: usize> Group<SUBS> {
    /// [`Isa::add_products`] in terms of its other instructions.
    ///
    /// # Safety
    /// Quants, scales and records must be there.
    #[inline(always)]
    pub(crate) unsafe fn add_products<S: Isa, const R: usize>(
        &self,
        s: S,
        x: &[Record<SUBS>; R],
        sums: &mut [[S::F; PAIR]; R],
    ) {
        let columns = 8 / SUBS;
        for sub in 0..SUBS {
            // SAFETY: the caller's.
            unsafe {
                let mut dots = [[s.splat_i32(0); PAIR]; R];
                for r in 0..R {
                    dots[r] = [s.splat_i32(x[r].start(sub)); PAIR];
                }
                for j in sub * columns..(sub + 1) * columns {
                    let w =
                        [s.load(self.quants[0].add(64 * j)), s.load(self.quants[1].add(64 * j))];
                    for r in 0..R {
                        let x = x[r].quants(0).add(4 * j);
                        for b in 0..PAIR {
                            dots[r][b] = s.dot(self.bits, dots[r][b], &[w[b]], x);
                        }
                    }
                }
                let at = |b: usize| self.scales[b].add(sub * 2 * BAND);
                let scales = [s.load_f32(at(0)), s.load_f32(at(1))];
                for r in 0..R {
                    let (scale, sum) = (s.splat(x[r].scale()), s.splat(x[r].sum(sub)));
                    for b in 0..PAIR {
                        let scale = s.mul(scales[b], scale);
                        sums[r][b] = s.fma(s.to_f32(dots[r][b]), scale, sums[r][b]);
                        if self.offsets {
                            let offset = s.load_f32(at(b).add(BAND));
                            sums[r][b] = s.fma(offset, sum, sums[r][b]);
                        }
                    }
                }
            }
        }
    }
}

/// Two bands in registers that hold a whole one, or the halves of one.
#[derive(Clone, Copy)]
pub(super) struct Pair<C> {
    pub chunks: [C; PAIR],
    pub parts: [usize; PAIR],
}

impl<const SUBS: usize, const OFFSET: bool, const BITS: u32> Pair<Chunk<'_, SUBS, OFFSET, BITS>> {
    /// Rows `rows` over `groups` groups, from `first` on in `x`.
    ///
    /// # Safety
    /// The chunks must hold `groups` groups, `x` those from `first` on in each of the rows; `sums` whole bands
    /// of each, side by side.
    #[inline(always)]
    pub(super) unsafe fn all_rows<S: Isa>(
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
                    6.. if S::LANES == BAND => self.rows::<S, 6>(s, first, groups, x, row, sums),
                    4.. => self.rows::<S, 4>(s, first, groups, x, row, sums),
                    2.. => self.rows::<S, 2>(s, first, groups, x, row, sums),
                    _ => self.rows::<S, 1>(s, first, groups, x, row, sums),
                };
            }
        }
    }

    /// Rows `row .. row + R`; returns `R`.
    ///
    /// # Safety
    /// As [`all_rows`](Self::all_rows).
    #[inline(always)]
    pub(super) unsafe fn rows<S: Isa, const R: usize>(
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
    unsafe fn add_group<S: Isa, const R: usize>(
        self,
        s: S,
        group: usize,
        records: &[Record<SUBS>; R],
        sums: &mut [[S::F; PAIR]; R],
    ) {
        // SAFETY: the caller's.
        unsafe {
            let place = |b: usize| self.chunks[b].place(group, self.parts[b] * S::LANES);
            let ((quants0, scales0), (quants1, scales1)) = (place(0), place(1));
            let group = Group::<SUBS> {
                bits: BITS,
                quants: [quants0, quants1],
                scales: [scales0, scales1],
                offsets: OFFSET,
            };
            s.add_products(&group, records, sums);
        }
    }
}
