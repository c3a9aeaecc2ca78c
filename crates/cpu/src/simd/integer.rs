//! Integer kernels: quantized activations times repacked blocks.
//!
//! One row: a group's columns are unpacked into registers and multiplied at once. More rows: a
//! chunk of a band is unpacked into cache, then read as the same kind of [`Source`] by the same
//! inner loop, rows outermost. That loop knows of a format only whether it has offsets, how many
//! scales a group has and how large quants are, so it is compiled once for many formats.

// One index runs over several arrays of registers.
#![allow(clippy::needless_range_loop)]

use super::isa::{Isa, Job};
use super::quantized::{Quantized, Record};
use super::tile::{BAND, Band, Format, GROUP, Layout, Scales, Source, Tiles};
use crate::ColumnBand;
use std::ops::Range;

/// Groups unpacked at a time for many rows: 8 kB of quants and their scales.
const CHUNK: usize = 16;

/// Output rows `bands` of `tiles` times all rows of `x`.
pub(crate) struct Multiply<'a, 'b, F> {
    pub tiles: &'a Tiles<F>,
    pub x: &'a Quantized,
    pub rows: usize,
    pub bands: Range<usize>,
    pub out: &'a mut ColumnBand<'b>,
}

impl<F: Format> Job for Multiply<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        match self.rows {
            1 => self.one_row(s),
            _ => self.many_rows(s),
        }
    }
}

impl<F: Format> Multiply<'_, '_, F> {
    #[inline(always)]
    fn one_row<S: Isa>(self, s: S) {
        let groups = self.tiles.groups();
        assert!(self.x.rows() == 1 && self.x.groups() == groups);
        let mut out = self.out.row(0).chunks_mut(BAND);
        for band in self.bands {
            let tile = self.tiles.band(band);
            let mut sums = [0.0; BAND];
            // SAFETY: `groups` are those of the band and of the row; `sums` holds a band.
            unsafe {
                match F::LAYOUT.subs() {
                    1 => few_rows::<S, _, 1, 1>(s, tile, 0, groups, self.x, 0, &mut sums),
                    _ => few_rows::<S, _, 2, 1>(s, tile, 0, groups, self.x, 0, &mut sums),
                }
            }
            let out = out.next().expect("a band of output");
            out.copy_from_slice(&sums[..out.len()]);
        }
    }

    #[inline(always)]
    fn many_rows<S: Isa>(self, s: S) {
        let mut sums = vec![0.0f32; self.rows * BAND];
        let mut chunk = Unpacked::new();
        let first = self.bands.start * BAND;
        let groups = self.tiles.groups();
        for band in self.bands {
            let tile = self.tiles.band(band);
            sums.fill(0.0);
            for start in (0..groups).step_by(CHUNK) {
                let len = CHUNK.min(groups - start);
                // SAFETY: the groups are in the band and at most `CHUNK`.
                unsafe { chunk.fill::<S, F>(s, tile, start, len) };
                chunk.multiply(s, &F::LAYOUT, start, len, self.x, &mut sums);
            }
            let at = band * BAND - first;
            for (row, sums) in sums.chunks_exact(BAND).enumerate() {
                let out = &mut self.out.row(row)[at..];
                let width = out.len().min(BAND);
                out[..width].copy_from_slice(&sums[..width]);
            }
        }
    }
}

/// The inner loop, rows `row .. row + R`, all sums in registers.
///
/// `sums[row] += source · x[row]` over `groups` groups from `first` on in `x`.
///
/// # Safety
/// `source` must hold `groups` groups, `x` those from `first` on in each of the rows, `sums`
/// `[rows, BAND]`.
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
            let out = sums.as_mut_ptr().add(row * BAND + part * S::LANES);
            let mut acc = [s.zero(); R];
            let mut records = [Record::<SUBS>(std::ptr::null()); R];
            for r in 0..R {
                acc[r] = s.load_f32(out.add(r * BAND));
                records[r] = Record(x.at(row + r, first));
            }
            for group in 0..groups {
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
struct Unpacked {
    quants: [[u8; 512]; CHUNK],
    /// Per group and sub-block: scale, then offset.
    scales: [[[[f32; BAND]; 2]; 2]; CHUNK],
}

impl Unpacked {
    fn new() -> Box<Self> {
        Box::new(Self { quants: [[0; 512]; CHUNK], scales: [[[[0.0; BAND]; 2]; 2]; CHUNK] })
    }

    /// `sums += chunk · x` over `groups` groups from `first` on in `x`.
    #[inline(always)]
    fn multiply<S: Isa>(
        &self,
        s: S,
        layout: &Layout,
        first: usize,
        groups: usize,
        x: &Quantized,
        sums: &mut [f32],
    ) {
        assert!(groups <= CHUNK && first + groups <= x.groups());
        assert!(sums.len() == x.rows() * BAND);
        macro_rules! multiply {
            ($subs:literal, $offset:literal, $bits:literal) => {{
                let chunk = Chunk::<$subs, $offset, $bits>(self);
                s.enter(MultiplyChunk { chunk, first, groups, x, sums })
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

    /// Unpacks groups `start .. start + len` of `band`.
    ///
    /// # Safety
    /// The groups must be in the band and at most `CHUNK`.
    #[inline(always)]
    unsafe fn fill<S: Isa, F: Format>(
        &mut self,
        s: S,
        band: Band<'_, F>,
        start: usize,
        len: usize,
    ) {
        for i in 0..len {
            for part in 0..BAND / S::LANES {
                // SAFETY: the group is in range; columns are 64 bytes of which one register is
                // written, scales 16 floats likewise.
                unsafe {
                    let q = band.quants(s, start + i, part);
                    let to = self.quants[i].as_mut_ptr().add(part * S::LANES * 4);
                    for (j, &q) in q.iter().enumerate() {
                        s.store(to.add(64 * j), q);
                    }
                    for sub in 0..F::LAYOUT.subs() {
                        let (scale, offset) = band.scales(s, start + i, sub, part);
                        let [a, b] = &mut self.scales[i][sub];
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
    first: usize,
    groups: usize,
    x: &'a Quantized,
    sums: &'a mut [f32],
}

impl<const SUBS: usize, const OFFSET: bool, const QUANT_BITS: u32> Job
    for MultiplyChunk<'_, SUBS, OFFSET, QUANT_BITS>
{
    type Output = ();

    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let Self { chunk, first, groups, x, sums } = self;
        let rows = sums.len() / BAND;
        let mut row = 0;
        // SAFETY: `multiply` checked the ranges; rows `row .. row + R` are below `rows`.
        unsafe {
            if S::LANES == BAND {
                while rows - row >= 8 {
                    few_rows::<S, _, SUBS, 8>(s, chunk, first, groups, x, row, sums);
                    row += 8;
                }
            }
            while rows - row >= 4 {
                few_rows::<S, _, SUBS, 4>(s, chunk, first, groups, x, row, sums);
                row += 4;
            }
            if rows - row >= 2 {
                few_rows::<S, _, SUBS, 2>(s, chunk, first, groups, x, row, sums);
                row += 2;
            }
            if rows - row == 1 {
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
