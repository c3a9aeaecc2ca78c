//! Integer kernels: quantized activations times repacked blocks.
//!
//! Few rows: a group's columns are unpacked into registers and multiplied with all of them at once. More
//! rows: chunks of two bands are unpacked into cache, then read as the same kind of [`Source`], rows outermost.
//! Registers of sixteen lanes multiply both bands with every activation that is loaded, so that products and
//! not loads are what takes the time. These loops know of a format only whether it has offsets, how many
//! scales a group has and how large quants are, so they are compiled once for many formats.

// One index runs over several arrays of registers.
#![allow(clippy::needless_range_loop)]

mod pair;
mod sums;

use super::isa::{IntegerIsa, Isa, Job};
use super::panel::write_band;
use super::quantized::{Quantized, Record, Seconds};
use super::tile::{BAND, Band, Format, GROUP, Layout, Scales, Source, Tiles};
use crate::ColumnBand;
pub(crate) use pair::Group;
use pair::{PAIR, Pair};
use std::array;
use std::ops::Range;
use sums::Sums;

/// Groups unpacked at a time for many rows: of two bands 20 kB of quants and 10 of scales, in the first-level cache.
const CHUNK: usize = 20;
/// Quantized activations multiplied with all bands before the next ones: half a second-level cache.
const CACHED_ROW_BYTES: usize = 768 << 10;
/// Fewest rows of them, so that unpacking a band stays a small part of the work.
const FEWEST_ROWS: usize = 64;

/// Rows up to which unpacking in registers, once for eight of them, beats unpacking into cache.
const FEW_ROWS: usize = 8;
/// Groups of a band that one pass after another reads.
const BLOCK: usize = 32;
/// Most registers that a column takes.
const PARTS: usize = 2;

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
    let mut chunks = [Unpacked::new(), Unpacked::new()];
    let groups = weights.groups();
    // Chunks of about one length.
    let chunk = groups.div_ceil(groups.div_ceil(CHUNK).max(1)).max(1);
    for first_row in (0..x.rows()).step_by(block) {
        let rows = first_row..x.rows().min(first_row + block);
        for band in bands.clone().step_by(PAIR) {
            let together = PAIR.min(bands.end - band);
            let at = (band - bands.start) * BAND;
            let width = (out.row(first_row).len() - at).min(together * BAND);
            // Sums lie where they belong, unless that has no room for whole bands.
            let mut edge = Vec::new();
            let (sums, stride) = match width == together * BAND {
                true => (out.row(first_row)[at..].as_mut_ptr(), out.stride()),
                false => {
                    edge.resize(rows.len() * together * BAND, 0.0);
                    (edge.as_mut_ptr(), together * BAND)
                }
            };
            for start in (0..groups).step_by(chunk) {
                let range = start..groups.min(start + chunk);
                for (i, chunk) in chunks[..together].iter_mut().enumerate() {
                    weights.unpack(isa, band + i, range.clone(), chunk);
                }
                let (chunks, rows) = (&chunks[..together], rows.clone());
                let sums = Sums { at: sums, stride, add: start > 0 };
                // SAFETY: whole bands of all rows lie there.
                unsafe { multiply_chunks(isa, chunks, weights.layout(), range, x, rows, sums) };
            }
            for (row, edge) in rows.clone().zip(edge.chunks_exact(together * BAND)) {
                out.row(row)[at..].copy_from_slice(&edge[..width]);
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
    fn run<S: Isa>(self, s: S) {
        let (rows, groups) = (self.x.rows(), self.tiles.groups());
        // A band is read from memory once: what several passes need of it they read while it is in a cache.
        let passes = rows > S::WHOLE_ROWS || !rows.is_power_of_two();
        let step = if passes { BLOCK } else { groups.max(1) };
        let mut sums = [[0.0; BAND]; FEW_ROWS];
        let at = sums.as_flattened_mut().as_mut_ptr();
        for band in self.bands.clone() {
            let tile = self.tiles.band(band);
            for start in (0..groups).step_by(step) {
                let groups = start..groups.min(start + step);
                let depth = Depth { x: self.x, first: 0, groups };
                let sums = Sums { at, stride: BAND, add: start > 0 };
                // SAFETY: `few_rows` checked groups and rows; there are `FEW_ROWS` bands of sums.
                unsafe {
                    match F::LAYOUT.subs() {
                        1 => all_rows::<S, _, 1>(s, tile, depth, 0..rows, sums),
                        _ => all_rows::<S, _, 2>(s, tile, depth, 0..rows, sums),
                    }
                }
            }
            let column = (band - self.bands.start) * BAND;
            for (r, sums) in sums[..rows].iter().enumerate() {
                write_band(&mut self.out.row(r)[column..], sums);
            }
        }
    }
}

/// What a source is multiplied with: its groups `groups`, of which number 0 is group `first` of `x`.
#[derive(Clone)]
struct Depth<'a> {
    x: &'a Quantized,
    first: usize,
    groups: Range<usize>,
}

/// Some groups of `source` times rows `rows`.
///
/// # Safety
/// As [`few_rows`].
#[inline(always)]
unsafe fn all_rows<S: Isa, T: Source, const SUBS: usize>(
    s: S,
    source: T,
    depth: Depth<'_>,
    rows: Range<usize>,
    sums: Sums,
) {
    let mut row = rows.start;
    while row < rows.end {
        let depth = depth.clone();
        // SAFETY: the caller's; rows `row ..` exist.
        unsafe {
            let sums = sums.from(row - rows.start, 0);
            row += match S::ROWS.min(rows.end - row) {
                8.. => in_parts::<S, T, SUBS, 8>(s, source, depth, row, sums),
                4.. => in_parts::<S, T, SUBS, 4>(s, source, depth, row, sums),
                2.. => in_parts::<S, T, SUBS, 2>(s, source, depth, row, sums),
                _ => in_parts::<S, T, SUBS, 1>(s, source, depth, row, sums),
            };
        }
    }
}

/// [`few_rows`] of a whole band, in as many passes as registers call for.
///
/// # Safety
/// As [`few_rows`].
#[inline(always)]
unsafe fn in_parts<S: Isa, T: Source, const SUBS: usize, const R: usize>(
    s: S,
    source: T,
    depth: Depth<'_>,
    row: usize,
    sums: Sums,
) -> usize {
    let parts = BAND / S::LANES;
    // SAFETY: the caller's.
    unsafe {
        if R <= S::WHOLE_ROWS {
            few_rows::<S, T, SUBS, R>(s, source, depth, (0, parts), row, sums);
        } else {
            for part in 0..parts {
                let (depth, sums) = (depth.clone(), sums.from(0, part * S::LANES));
                few_rows::<S, T, SUBS, R>(s, source, depth, (part, 1), row, sums);
            }
        }
    }
    R
}

/// The inner loop, rows `row .. row + R`, all sums in registers.
///
/// `sums[r] = source · x[row + r]` over `depth`, for `parts` registers of a column from `start` on.
///
/// # Safety
/// `source` must hold the groups, `x` those in each of the rows, `sums` a band in each of `R`.
#[inline(always)]
unsafe fn few_rows<S: Isa, T: Source, const SUBS: usize, const R: usize>(
    s: S,
    source: T,
    Depth { x, first, groups }: Depth<'_>,
    (start, parts): (usize, usize),
    row: usize,
    sums: Sums,
) {
    // SAFETY: the caller vouches for all ranges.
    unsafe {
        let seconds = Seconds::<SUBS, R>::new(x, row);
        let mut acc = [[s.zero(); R]; PARTS];
        let mut records = [Record::<SUBS>(std::ptr::null()); R];
        for r in 0..R {
            for part in 0..parts {
                acc[part][r] = sums.from(0, part * S::LANES).begin(s, r);
            }
            records[r] = Record(x.at(row + r, first + groups.start));
        }
        for group in groups {
            if row == 0 && start == 0 {
                source.fetch_ahead(group);
            }
            let flags = seconds.flags(first + group);
            for part in 0..parts {
                let (acc, part) = (&mut acc[part], start + part);
                let q = source.quants(s, group, part);
                add_group(s, source, group, part, &q, &records, acc);
                if !flags.none() {
                    for r in 0..R {
                        if flags.has(r) {
                            let second = [seconds.record(flags, r)];
                            let acc = array::from_mut(&mut acc[r]);
                            add_group(s, source, group, part, &q, &second, acc);
                        }
                    }
                }
            }
            for r in 0..R {
                records[r] = records[r].next();
            }
        }
        for r in 0..R {
            for part in 0..parts {
                sums.from(0, part * S::LANES).end(s, r, acc[part][r]);
            }
        }
    }
}

/// Adds the products of group `group`, of which `q` are the quants, with one record of each row.
///
/// # Safety
/// As [`few_rows`].
#[inline(always)]
unsafe fn add_group<S: Isa, T: Source, const SUBS: usize, const R: usize>(
    s: S,
    source: T,
    group: usize,
    part: usize,
    q: &[S::I; 8],
    records: &[Record<SUBS>; R],
    acc: &mut [S::F; R],
) {
    let l = T::LAYOUT;
    for sub in 0..SUBS {
        // SAFETY: the caller's.
        unsafe {
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
}

/// `sums = chunks · x` for groups `groups` and rows `rows` of `x`, one or two bands side by side.
///
/// # Safety
/// There must be room for whole bands of the rows at `sums`.
unsafe fn multiply_chunks(
    isa: IntegerIsa,
    chunks: &[Box<Unpacked>],
    layout: &Layout,
    groups: Range<usize>,
    x: &Quantized,
    rows: Range<usize>,
    sums: Sums,
) {
    assert!(
        groups.len() <= CHUNK && groups.end <= x.groups() && (1..=PAIR).contains(&chunks.len())
    );
    assert!(rows.end <= x.rows());
    macro_rules! multiply {
        ($subs:literal, $offset:literal, $bits:literal) => {{
            let first = Chunk::<$subs, $offset, $bits>(&chunks[0]);
            let second = chunks.get(1).map(|chunk| Chunk(chunk));
            isa.enter(MultiplyChunks { first, second, groups, x, rows, sums })
        }};
    }
    // Quants of fewer bits may be treated as having more, at some cost on AVX2.
    match (layout.subs(), layout.has_offset(), layout.quant_bits) {
        (1, false, ..=4) => multiply!(1, false, 4),
        (1, false, ..=6) => multiply!(1, false, 6),
        (1, false, 7) => multiply!(1, false, 7),
        (1, false, _) => multiply!(1, false, 8),
        (1, true, ..=4) => multiply!(1, true, 4),
        (1, true, 5) => multiply!(1, true, 5),
        (1, true, _) => multiply!(1, true, 8),
        (_, false, 7) => multiply!(2, false, 7),
        (_, false, _) => multiply!(2, false, 6),
        (_, true, _) => multiply!(2, true, 4),
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

/// Chunks of one or two bands times all rows of `x`.
struct MultiplyChunks<'a, const SUBS: usize, const OFFSET: bool, const QUANT_BITS: u32> {
    first: Chunk<'a, SUBS, OFFSET, QUANT_BITS>,
    second: Option<Chunk<'a, SUBS, OFFSET, QUANT_BITS>>,
    groups: Range<usize>,
    x: &'a Quantized,
    rows: Range<usize>,
    sums: Sums,
}

impl<const SUBS: usize, const OFFSET: bool, const QUANT_BITS: u32> Job
    for MultiplyChunks<'_, SUBS, OFFSET, QUANT_BITS>
{
    type Output = ();

    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let (x, first, groups, rows) = (self.x, self.groups.start, self.groups.len(), self.rows);
        let chunks = [Some(self.first), self.second];
        // SAFETY: `multiply_chunks` checked the ranges, its caller vouches for the sums.
        unsafe {
            if let (Some(second), true) = (self.second, S::PAIRS && S::LANES == BAND) {
                let pair = Pair { chunks: [self.first, second], parts: [0, 0] };
                return pair.all_rows(s, first, groups, x, rows, self.sums);
            }
            for (i, chunk) in chunks.into_iter().flatten().enumerate() {
                let sums = self.sums.from(0, i * BAND);
                match S::PAIRS && S::LANES < BAND {
                    true => {
                        let pair = Pair { chunks: [chunk; PAIR], parts: [0, 1] };
                        pair.all_rows(s, first, groups, x, rows.clone(), sums);
                    }
                    false => {
                        let depth = Depth { x, first, groups: 0..groups };
                        all_rows::<S, _, SUBS>(s, chunk, depth, rows.clone(), sums)
                    }
                }
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
        points: None,
        table: None,
        quant_bits: QUANT_BITS,
        zero: 0,
        scales: if OFFSET { Scales::HalfOffset } else { Scales::Half },
        unit: 1.0,
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

impl<const SUBS: usize, const OFFSET: bool, const QUANT_BITS: u32>
    Chunk<'_, SUBS, OFFSET, QUANT_BITS>
{
    /// Where quants and scales of group `group` lie, from output `lane` on.
    ///
    /// # Safety
    /// They must be in range.
    #[inline(always)]
    unsafe fn place(self, group: usize, lane: usize) -> (*const u8, *const f32) {
        // SAFETY: the caller keeps `group` below `CHUNK` and `lane` below `BAND`.
        unsafe {
            let quants = self.0.quants.as_ptr().add(group).cast::<u8>();
            let scales = self.0.scales.as_ptr().add(group).cast::<f32>();
            (quants.add(4 * lane), scales.add(lane))
        }
    }
}
