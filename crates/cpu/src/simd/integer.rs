//! Integer kernels: quantized activations times repacked blocks.
//!
//! Few rows: a group's columns are unpacked into registers and multiplied with all of them at once. More
//! rows: a chunk of a band is unpacked into cache, then read as the same kind of [`Source`] by the same
//! inner loop, rows outermost. That loop knows of a format only whether it has offsets, how many
//! scales a group has and how large quants are, so it is compiled once for many formats.

// One index runs over several arrays of registers.
#![allow(clippy::needless_range_loop)]

use super::isa::{IntegerIsa, Isa, Job};
use super::panel::write_band;
use super::quantized::{Quantized, Record};
use super::tile::{BAND, Band, Format, GROUP, Layout, Scales, Source, Tiles};
use crate::ColumnBand;
use std::ops::Range;

/// Groups unpacked at a time for many rows: 8 kB of quants and their scales.
const CHUNK: usize = 16;
/// Quantized activations multiplied with all bands before the next ones: half a second-level cache.
const CACHED_ROW_BYTES: usize = 768 << 10;
/// Fewest of them, so that unpacking a band stays a small part of the work.
const FEWEST_ROWS: usize = 64;

/// Rows up to which unpacking in registers, once for eight of them, beats unpacking into cache.
const FEW_ROWS: usize = 8;

/// A repacked matrix without its format.
pub(crate) trait Blocks: Sync {
    /// Shape of the format.
    fn layout(&self) -> &'static Layout;
    /// Groups per row.
    fn groups(&self) -> usize;
    /// `out = bands · x` for up to [`FEW_ROWS`] rows; `out` starts with the first band.
    fn few_rows(
        &self,
        isa: IntegerIsa,
        x: &Quantized,
        bands: Range<usize>,
        out: &mut ColumnBand<'_>,
    );
    /// Unpacks groups `groups` (at most [`CHUNK`]) of band `band`.
    fn unpack(&self, isa: IntegerIsa, band: usize, groups: Range<usize>, out: &mut Unpacked);
}

impl<F: Format> Blocks for Tiles<F> {
    fn layout(&self) -> &'static Layout {
        &F::LAYOUT
    }

    fn groups(&self) -> usize {
        Tiles::groups(self)
    }

    fn few_rows(
        &self,
        isa: IntegerIsa,
        x: &Quantized,
        bands: Range<usize>,
        out: &mut ColumnBand<'_>,
    ) {
        assert!(x.rows() <= FEW_ROWS && x.groups() == Tiles::groups(self));
        isa.enter(Few { tiles: self, x, bands, out });
    }

    fn unpack(&self, isa: IntegerIsa, band: usize, groups: Range<usize>, out: &mut Unpacked) {
        assert!(groups.len() <= CHUNK && groups.end <= Tiles::groups(self));
        isa.enter(Unpack { band: self.band(band), groups, out });
    }
}

/// Output rows `bands` of `weights` times all rows of `x`, written to `out`, whose first column is
/// that of the first band.
pub(crate) fn multiply(
    isa: IntegerIsa,
    weights: &dyn Blocks,
    x: &Quantized,
    bands: Range<usize>,
    out: &mut ColumnBand<'_>,
) {
    if x.rows() <= FEW_ROWS {
        return weights.few_rows(isa, x, bands, out);
    }
    let block = (CACHED_ROW_BYTES / x.row_bytes()).max(FEWEST_ROWS).next_multiple_of(8);
    let mut sums = vec![0.0f32; block.min(x.rows()) * BAND];
    let mut chunk = Unpacked::new();
    let groups = weights.groups();
    for first_row in (0..x.rows()).step_by(block) {
        let rows = first_row..x.rows().min(first_row + block);
        let sums = &mut sums[..rows.len() * BAND];
        for band in bands.clone() {
            sums.fill(0.0);
            for start in (0..groups).step_by(CHUNK) {
                let range = start..groups.min(start + CHUNK);
                weights.unpack(isa, band, range.clone(), &mut chunk);
                chunk.multiply(isa, weights.layout(), range, x, rows.clone(), sums);
            }
            let at = (band - bands.start) * BAND;
            for (row, sums) in rows.clone().zip(sums.chunks_exact(BAND)) {
                write_band(&mut out.row(row)[at..], sums);
            }
        }
    }
}

/// [`Blocks::few_rows`].
struct Few<'a, 'b, F> {
    tiles: &'a Tiles<F>,
    x: &'a Quantized,
    bands: Range<usize>,
    out: &'a mut ColumnBand<'b>,
}

impl<F: Format> Job for Few<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Isa>(mut self, s: S) {
        for band in self.bands.clone() {
            let mut row = 0;
            while row < self.x.rows() {
                row += match self.x.rows() - row {
                    // More sums than eight registers wide would not fit the registers.
                    8.. if S::LANES == BAND => self.rows::<S, 8>(s, band, row),
                    4.. => self.rows::<S, 4>(s, band, row),
                    2.. => self.rows::<S, 2>(s, band, row),
                    _ => self.rows::<S, 1>(s, band, row),
                };
            }
        }
    }
}

impl<F: Format> Few<'_, '_, F> {
    /// Rows `row .. row + R` of one band; returns `R`.
    #[inline(always)]
    fn rows<S: Isa, const R: usize>(&mut self, s: S, band: usize, row: usize) -> usize {
        let (groups, tile) = (self.tiles.groups(), self.tiles.band(band));
        let mut sums = [[0.0; BAND]; R];
        // SAFETY: `few_rows` checked the groups, the caller the rows; `sums` holds `R` bands.
        unsafe {
            let sums = sums.as_flattened_mut();
            match F::LAYOUT.subs() {
                1 => few_rows::<S, _, 1, R>(s, tile, 0, groups, self.x, row, sums),
                _ => few_rows::<S, _, 2, R>(s, tile, 0, groups, self.x, row, sums),
            }
        }
        let at = (band - self.bands.start) * BAND;
        for (r, sums) in sums.iter().enumerate() {
            write_band(&mut self.out.row(row + r)[at..], sums);
        }
        R
    }
}

/// The inner loop, rows `row .. row + R`, all sums in registers.
///
/// `sums[r] += source · x[row + r]` over `groups` groups from `first` on in `x`.
///
/// # Safety
/// `source` must hold `groups` groups, `x` those from `first` on in each of the rows, `sums`
/// `[R, BAND]`.
#[inline(always)]
unsafe fn few_rows<S: Isa, T: Source, const SUBS: usize, const R: usize>(
    s: S,
    source: T,
    first: usize,
    groups: usize,
    x: &Quantized,
    row: usize,
    sums: &mut [f32],
) {
    let l = T::LAYOUT;
    for part in 0..BAND / S::LANES {
        // SAFETY: the caller vouches for all ranges.
        unsafe {
            let out = sums.as_mut_ptr().add(part * S::LANES);
            let mut acc = [s.zero(); R];
            let mut records = [Record::<SUBS>(std::ptr::null()); R];
            for r in 0..R {
                acc[r] = s.load_f32(out.add(r * BAND));
                records[r] = Record(x.at(row + r, first));
            }
            for group in 0..groups {
                source.fetch_ahead(group);
                let q = source.quants(s, group, part);
                for sub in 0..SUBS {
                    let (scale, offset) = source.scales(s, group, sub, part);
                    let columns = 8 / SUBS;
                    let q = &q[sub * columns..(sub + 1) * columns];
                    for r in 0..R {
                        let x = records[r];
                        let start = s.splat_i32(x.start(sub));
                        let dot = s.dot(l.quant_bits, start, q, x.quants(sub));
                        let scale = s.mul(scale, s.splat(x.scale()));
                        acc[r] = s.fma(s.to_f32(dot), scale, acc[r]);
                        if l.has_offset() {
                            acc[r] = s.fma(offset, s.splat(x.sum(sub)), acc[r]);
                        }
                    }
                }
                for r in 0..R {
                    records[r] = records[r].next();
                }
            }
            for r in 0..R {
                s.store_f32(out.add(r * BAND), acc[r]);
            }
        }
    }
}

/// A chunk of a band with one byte a quant and f32 scales.
#[repr(C, align(64))]
pub(crate) struct Unpacked {
    quants: [[u8; 512]; CHUNK],
    /// Per group and sub-block: scale, then offset.
    scales: [[[[f32; BAND]; 2]; 2]; CHUNK],
}

impl Unpacked {
    fn new() -> Box<Self> {
        Box::new(Self { quants: [[0; 512]; CHUNK], scales: [[[[0.0; BAND]; 2]; 2]; CHUNK] })
    }

    /// `sums += chunk · x` for groups `groups` and rows `rows` of `x`; `sums: [rows, BAND]`.
    fn multiply(
        &self,
        isa: IntegerIsa,
        layout: &Layout,
        groups: Range<usize>,
        x: &Quantized,
        rows: Range<usize>,
        sums: &mut [f32],
    ) {
        assert!(groups.len() <= CHUNK && groups.end <= x.groups());
        assert!(rows.end <= x.rows() && sums.len() == rows.len() * BAND);
        macro_rules! multiply {
            ($subs:literal, $offset:literal, $bits:literal) => {{
                let chunk = Chunk::<$subs, $offset, $bits>(self);
                isa.enter(MultiplyChunk { chunk, groups, x, rows, sums })
            }};
        }
        // Quants of fewer bits may be treated as having more, at some cost on AVX2.
        match (layout.subs(), layout.has_offset(), layout.quant_bits) {
            (1, false, ..=4) => multiply!(1, false, 4),
            (1, false, ..=6) => multiply!(1, false, 6),
            (1, false, _) => multiply!(1, false, 8),
            (1, true, _) => multiply!(1, true, 5),
            (_, false, _) => multiply!(2, false, 6),
            (_, true, _) => multiply!(2, true, 4),
        }
    }
}

/// [`Blocks::unpack`].
struct Unpack<'a, 'b, F> {
    band: Band<'a, F>,
    groups: Range<usize>,
    out: &'b mut Unpacked,
}

impl<F: Format> Job for Unpack<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        for (i, group) in self.groups.enumerate() {
            let (quants, scales) = (&mut self.out.quants[i], &mut self.out.scales[i]);
            for part in 0..BAND / S::LANES {
                // SAFETY: `unpack` checked the groups; columns are 64 bytes of which one register
                // is written, scales 16 floats likewise.
                unsafe {
                    let q = self.band.quants(s, group, part);
                    let to = quants.as_mut_ptr().add(part * S::LANES * 4);
                    for (j, &q) in q.iter().enumerate() {
                        s.store(to.add(64 * j), q);
                    }
                    for sub in 0..F::LAYOUT.subs() {
                        let (scale, offset) = self.band.scales(s, group, sub, part);
                        let [a, b] = &mut scales[sub];
                        s.store_f32(a.as_mut_ptr().add(part * S::LANES), scale);
                        s.store_f32(b.as_mut_ptr().add(part * S::LANES), offset);
                    }
                }
            }
        }
    }
}

/// A chunk times all rows of `x`.
struct MultiplyChunk<'a, const SUBS: usize, const OFFSET: bool, const QUANT_BITS: u32> {
    chunk: Chunk<'a, SUBS, OFFSET, QUANT_BITS>,
    groups: Range<usize>,
    x: &'a Quantized,
    rows: Range<usize>,
    sums: &'a mut [f32],
}

impl<const SUBS: usize, const OFFSET: bool, const QUANT_BITS: u32> Job
    for MultiplyChunk<'_, SUBS, OFFSET, QUANT_BITS>
{
    type Output = ();

    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let (chunk, x) = (self.chunk, self.x);
        let (first, groups) = (self.groups.start, self.groups.len());
        let (mut row, mut sums) = (self.rows.start, self.sums);
        // SAFETY: `multiply` checked the ranges; rows `row .. row + R` are below the end.
        unsafe {
            if S::LANES == BAND {
                while self.rows.end - row >= 8 {
                    few_rows::<S, _, SUBS, 8>(s, chunk, first, groups, x, row, sums);
                    (row, sums) = (row + 8, &mut sums[8 * BAND..]);
                }
            }
            while self.rows.end - row >= 4 {
                few_rows::<S, _, SUBS, 4>(s, chunk, first, groups, x, row, sums);
                (row, sums) = (row + 4, &mut sums[4 * BAND..]);
            }
            if self.rows.end - row >= 2 {
                few_rows::<S, _, SUBS, 2>(s, chunk, first, groups, x, row, sums);
                (row, sums) = (row + 2, &mut sums[2 * BAND..]);
            }
            if self.rows.end - row == 1 {
                few_rows::<S, _, SUBS, 1>(s, chunk, first, groups, x, row, sums);
            }
        }
    }
}

/// [`Unpacked`] as a [`Source`] of any format with these properties.
#[derive(Clone, Copy)]
struct Chunk<'a, const SUBS: usize, const OFFSET: bool, const QUANT_BITS: u32>(&'a Unpacked);

impl<const SUBS: usize, const OFFSET: bool, const QUANT_BITS: u32> Source
    for Chunk<'_, SUBS, OFFSET, QUANT_BITS>
{
    const LAYOUT: Layout = Layout {
        bytes: 0,
        block: GROUP,
        sub_block: GROUP / SUBS,
        bits: 8,
        table: None,
        quant_bits: QUANT_BITS,
        zero: 0,
        scales: if OFFSET { Scales::HalfOffset } else { Scales::Half },
    };

    #[inline(always)]
    unsafe fn quants<S: Isa>(self, s: S, group: usize, part: usize) -> [S::I; 8] {
        let mut q = [s.splat_u8(0); 8];
        // SAFETY: the caller keeps `group` below `CHUNK`.
        unsafe {
            let base = self.0.quants.as_ptr().add(group).cast::<u8>().add(part * S::LANES * 4);
            for (j, q) in q.iter_mut().enumerate() {
                *q = s.load(base.add(64 * j));
            }
        }
        q
    }

    #[inline(always)]
    unsafe fn scales<S: Isa>(self, s: S, group: usize, sub: usize, part: usize) -> (S::F, S::F) {
        // SAFETY: the caller keeps `group` below `CHUNK` and `sub` below 2.
        unsafe {
            let pair = self.0.scales.as_ptr().add(group).cast::<f32>().add(sub * 2 * BAND);
            let scale = pair.add(part * S::LANES);
            (s.load_f32(scale), s.load_f32(scale.add(BAND)))
        }
    }
}
