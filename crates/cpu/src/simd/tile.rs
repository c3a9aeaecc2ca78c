//! Block-quantized matrices repacked for one-pass kernels, at the size they had on disk.
//!
//! Sixteen output rows form a band. Inside a band 32 consecutive inputs form a group, and a group
//! is eight 64-byte columns: column `j` holds inputs `4 j .. 4 j + 4` of all sixteen rows, four
//! bytes a row. One AVX-512 register (two AVX2 registers) is thus a column, a 32-bit lane is an
//! output row, and `vpdpbusd` against a broadcast of four activations needs no horizontal sum.
//!
//! Quants are unsigned, cut into planes of whole columns, so that a group of `b`-bit quants takes
//! `64 b` bytes:
//!
//! | plane | columns | content of byte column `v` |
//! | --- | --- | --- |
//! | 8 bits | 8 | column `v` |
//! | 4 bits | 4 | low nibble: column `v`, high nibble: column `v + 4` |
//! | 2 bits | 2 | bits `2 s, 2 s + 1`: column `4 v + s` |
//! | 1 bit | 1 | bit `j`: column `j` |
//!
//! Quants that are points of a lattice have other planes ([`Points`]).
//! 6 bits are planes 4 and 2, 5 bits 4 and 1, 3 bits 2 and 1, low bits first. All groups of a
//! band come first, its scales follow, block by block: two stream a task.

use super::isa::Isa;
use super::points::Points;
use super::region::Piece;
use crate::pool::ahead::read_on;
use std::marker::PhantomData;

/// Output rows of a band.
pub(crate) const BAND: usize = 16;
/// Inputs of a group.
pub(crate) const GROUP: usize = 32;

/// How the scales of a block are stored. A weight is `scale * (quant - zero) + offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scales {
    /// One f16 scale a block.
    Half,
    /// One f16 scale and one f16 offset a block.
    HalfOffset,
    /// One word a block: the upper 24 bits of an f32 scale and below them an unsigned zero point. The
    /// offset is what [`Layout::zero`] is off that.
    ScaleZero,
    /// One power of two a block, `2^(byte - 128)`.
    Exponent,
    /// f16 `d`; scale of a sub-block: `d * i8`.
    Sub,
    /// f16 `d` and `m`; scale `d * u8`, offset `m * u8`.
    SubOffset,
    /// The same with scale and offset in the low and high nibble of one byte.
    SubNibbles,
    /// f16 `d`; scales of two sub-blocks in one byte, `d * (2 n + 1)`, the first in the low nibble.
    SubOdd,
    /// One number of type E4M3 a sub-block, without a sign.
    E4m3,
}

/// Shape of a block format.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    /// Bytes of a block on disk.
    pub bytes: usize,
    /// Inputs of a block: 32, 64, 128 or 256.
    pub block: usize,
    /// Inputs that share a scale: 16 or 32.
    pub sub_block: usize,
    /// Stored bits of a quant: columns of a group.
    pub bits: u32,
    /// Points that stand for coordinates, if they do.
    pub points: Option<Points>,
    /// Maps a stored 4-bit quant to an unsigned one.
    pub table: Option<&'static [u8; 16]>,
    /// Bits of the largest unsigned quant, after `table`.
    pub quant_bits: u32,
    /// What to subtract from the unsigned quant.
    pub zero: i32,
    /// Scale storage.
    pub scales: Scales,
    /// What stored scales are multiples of.
    pub unit: f32,
}

impl Layout {
    /// Scales per group of 32 inputs.
    pub(crate) const fn subs(&self) -> usize {
        GROUP / self.sub_block
    }

    /// Whether weights have an offset.
    pub(crate) const fn has_offset(&self) -> bool {
        use Scales::{HalfOffset, ScaleZero, SubNibbles, SubOffset};
        matches!(self.scales, HalfOffset | ScaleZero | SubOffset | SubNibbles)
    }

    /// Bytes of a band of rows of `in_features` inputs.
    fn band_bytes(&self, in_features: usize) -> usize {
        let quants = in_features / GROUP * self.group_bytes();
        (quants + in_features / self.block * self.scale_bytes()).next_multiple_of(64)
    }

    /// Bytes of the matrix in bands.
    pub(crate) fn bytes(&self, out_features: usize, in_features: usize) -> usize {
        out_features.div_ceil(BAND) * self.band_bytes(in_features)
    }

    /// Bytes of one group of quants in a band.
    const fn group_bytes(&self) -> usize {
        64 * self.bits as usize
    }

    /// Bytes before the sub-block scales in the scales of one block of a band.
    const fn header_bytes(&self) -> usize {
        match self.scales {
            Scales::Half | Scales::Sub | Scales::SubOdd => 2 * BAND,
            Scales::HalfOffset | Scales::ScaleZero => 4 * BAND,
            Scales::SubOffset | Scales::SubNibbles => 4 * BAND,
            Scales::Exponent => BAND,
            Scales::E4m3 => 0,
        }
    }

    /// Bytes of one sub-block's scale and offset in a band.
    const fn sub_bytes(&self) -> usize {
        match self.scales {
            Scales::Half | Scales::HalfOffset | Scales::ScaleZero | Scales::Exponent => 0,
            Scales::Sub | Scales::SubNibbles | Scales::E4m3 => BAND,
            Scales::SubOdd => BAND / 2,
            Scales::SubOffset => 2 * BAND,
        }
    }

    /// Bytes of the scales of one block of a band, before what belongs to its points.
    const fn own_scale_bytes(&self) -> usize {
        self.header_bytes() + self.block / self.sub_block * self.sub_bytes()
    }

    /// Bytes of the scales of one block of a band.
    const fn scale_bytes(&self) -> usize {
        match &self.points {
            Some(points) => self.own_scale_bytes() + points.high_bytes(),
            None => self.own_scale_bytes(),
        }
    }
}

/// One block taken apart.
pub(crate) struct Block {
    /// Stored quants, unsigned, in input order; of points their signs.
    pub quants: [u8; 256],
    /// Points, in input order.
    pub points: [u16; 64],
    /// Scale of the block: f16 bits, the exponent byte, or the upper half of a word of scale and zero point.
    pub d: u16,
    /// Offset of the block: f16 bits, or the lower half of that word.
    pub m: u16,
    /// Scale per sub-block.
    pub scales: [u8; 16],
    /// Offset per sub-block.
    pub offsets: [u8; 16],
}

/// A block format that can be repacked into bands.
pub(crate) trait Format: Send + Sync + 'static {
    /// Identifier, equal to the weight's.
    const ID: &'static str;
    /// Its shape.
    const LAYOUT: Layout;
    /// Takes `block` (`LAYOUT.bytes` long) apart.
    fn explode(block: &[u8], out: &mut Block);
}

/// A matrix of format `F` in bands.
pub(crate) struct Tiles<F> {
    /// Output rows.
    pub out_features: usize,
    /// Inputs per row, a multiple of 32.
    pub in_features: usize,
    data: Piece,
    band_bytes: usize,
    format: PhantomData<F>,
}

impl<F: Format> Tiles<F> {
    /// Repacks `bytes`, the rows' blocks one after another.
    ///
    /// # Panics
    /// When the length is not what the shape needs: weights are checked where they are loaded.
    pub(crate) fn new(bytes: &[u8], out_features: usize, in_features: usize) -> Self {
        let l = F::LAYOUT;
        let blocks = in_features / l.block;
        assert_eq!(blocks * l.block, in_features, "whole blocks");
        assert_eq!(bytes.len(), out_features * blocks * l.bytes, "blocks fill the matrix");
        let quant_bytes = in_features / GROUP * l.group_bytes();
        let band_bytes = l.band_bytes(in_features);
        let mut data = Piece::zeroed(l.bytes(out_features, in_features));
        for (band, tile) in data.chunks_exact_mut(band_bytes.max(1)).enumerate() {
            let (quants, scales) = tile.split_at_mut(quant_bytes);
            for row in 0..BAND.min(out_features - band * BAND) {
                let start = (band * BAND + row) * blocks * l.bytes;
                let stored = &bytes[start..start + blocks * l.bytes];
                repack_row::<F>(stored, row, quants, scales);
            }
        }
        Self { out_features, in_features, data, band_bytes, format: PhantomData }
    }

    /// Bands, the last one padded with zeros.
    pub(crate) fn bands(&self) -> usize {
        self.out_features.div_ceil(BAND)
    }

    /// Groups per band.
    pub(crate) fn groups(&self) -> usize {
        self.in_features / GROUP
    }

    /// All bands.
    pub(crate) fn stored(&self) -> &[u8] {
        &self.data
    }

    /// Bytes it occupies.
    pub(crate) fn bytes(&self) -> u64 {
        self.data.len() as u64
    }

    /// One band.
    #[inline(always)]
    pub(crate) fn band(&self, band: usize) -> Band<'_, F> {
        assert!(band < self.bands());
        // SAFETY: the band's bytes lie inside `data`.
        let base = unsafe { self.data.as_ptr().add(band * self.band_bytes) };
        Band { base, groups: self.groups(), tiles: PhantomData }
    }
}

/// Writes one output row of a band.
fn repack_row<F: Format>(stored: &[u8], row: usize, quants: &mut [u8], scales: &mut [u8]) {
    let l = F::LAYOUT;
    let mut block =
        Block { quants: [0; 256], points: [0; 64], d: 0, m: 0, scales: [0; 16], offsets: [0; 16] };
    let groups_per_block = l.block / GROUP;
    for (b, stored) in stored.chunks_exact(l.bytes).enumerate() {
        F::explode(stored, &mut block);
        for g in 0..groups_per_block {
            let at = (b * groups_per_block + g) * l.group_bytes();
            let group = &mut quants[at..at + l.group_bytes()];
            if let Some(points) = l.points {
                let high = &mut scales[b * l.scale_bytes() + l.own_scale_bytes()..];
                let (first, signs) = (g * points.count(), &block.quants[g * GROUP..]);
                points.repack(&block.points[first..], signs, (row, g), group, high);
                continue;
            }
            let (words, _) = block.quants[g * GROUP..(g + 1) * GROUP].as_chunks::<4>();
            let mut columns = [0u32; 8];
            for (c, w) in columns.iter_mut().zip(words) {
                *c = u32::from_le_bytes(*w);
            }
            repack_group(l.bits, &columns, row, group);
        }
        let scales = &mut scales[b * l.scale_bytes()..(b + 1) * l.scale_bytes()];
        match l.scales {
            Scales::E4m3 => {}
            Scales::Exponent => scales[row] = block.d as u8,
            Scales::ScaleZero => {
                let word = u32::from(block.d) << 16 | u32::from(block.m);
                scales[4 * row..4 * row + 4].copy_from_slice(&word.to_le_bytes());
            }
            _ => scales[2 * row..2 * row + 2].copy_from_slice(&block.d.to_le_bytes()),
        }
        if l.has_offset() && l.scales != Scales::ScaleZero {
            let at = 2 * BAND + 2 * row;
            scales[at..at + 2].copy_from_slice(&block.m.to_le_bytes());
        }
        if l.sub_bytes() > 0 {
            let scales = &mut scales[l.header_bytes()..l.own_scale_bytes()];
            if l.scales == Scales::SubOdd {
                for (pair, two) in scales.chunks_exact_mut(BAND).zip(block.scales.chunks_exact(2)) {
                    pair[row] = two[0] | two[1] << 4;
                }
                continue;
            }
            let subs = scales.chunks_exact_mut(l.sub_bytes());
            for ((sub, &s), &o) in subs.zip(&block.scales).zip(&block.offsets) {
                match l.scales {
                    Scales::SubNibbles => sub[row] = s | o << 4,
                    Scales::SubOffset => (sub[row], sub[BAND + row]) = (s, o),
                    _ => sub[row] = s,
                }
            }
        }
    }
}

/// Writes the eight 4-byte columns of one row and group into its planes.
fn repack_group(bits: u32, columns: &[u32; 8], row: usize, group: &mut [u8]) {
    let mut planes = group.chunks_exact_mut(64);
    let mut put = |word: u32| {
        let plane = planes.next().expect("a group has `bits` planes");
        plane[4 * row..4 * row + 4].copy_from_slice(&word.to_le_bytes());
    };
    let mut low = 0;
    if bits == 8 {
        return columns.iter().for_each(|&c| put(c));
    }
    if bits & 4 != 0 {
        (0..4).for_each(|v| put(columns[v] & 0x0f0f_0f0f | (columns[v + 4] & 0x0f0f_0f0f) << 4));
        low = 4;
    }
    if bits & 2 != 0 {
        let two = |c: u32| (c >> low) & 0x0303_0303;
        (0..2).for_each(|v| {
            put((0..4).fold(0, |word, s| word | two(columns[4 * v + s]) << (2 * s)));
        });
        low += 2;
    }
    if bits & 1 != 0 {
        put((0..8).fold(0, |word, j| word | ((columns[j] >> low) & 0x0101_0101) << j));
    }
}

/// Where a kernel reads quants and scales from: a band, or a chunk of one already unpacked.
/// `part` selects the lanes when a register holds fewer than sixteen.
pub(crate) trait Source: Copy {
    /// Shape of the format.
    const LAYOUT: Layout;
    /// Unsigned quants of group `group`, one register a column.
    ///
    /// # Safety
    /// `group` and `part` must be in range.
    unsafe fn quants<S: Isa>(self, s: S, group: usize, part: usize) -> [S::I; 8];
    /// Scale and offset of sub-block `sub` of group `group`.
    ///
    /// # Safety
    /// `group`, `sub` and `part` must be in range.
    unsafe fn scales<S: Isa>(self, s: S, group: usize, sub: usize, part: usize) -> (S::F, S::F);
    /// Starts to fetch what comes some way behind group `group`, where that may not be in a cache yet.
    #[inline(always)]
    fn fetch_ahead(self, _group: usize) {}
}

/// One band of [`Tiles`].
pub(crate) struct Band<'a, F> {
    base: *const u8,
    groups: usize,
    tiles: PhantomData<&'a Tiles<F>>,
}

impl<F> Clone for Band<'_, F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<F> Copy for Band<'_, F> {}

impl<F: Format> Source for Band<'_, F> {
    const LAYOUT: Layout = F::LAYOUT;

    #[inline(always)]
    unsafe fn quants<S: Isa>(self, s: S, group: usize, part: usize) -> [S::I; 8] {
        let l = F::LAYOUT;
        // SAFETY: the caller keeps `group` and `part` in range; a group has `bits` columns.
        unsafe {
            let base = self.base.add(group * l.group_bytes() + part * S::LANES * 4);
            let mut q = match &l.points {
                Some(points) => {
                    let (block, inside) = (group / (l.block / GROUP), group % (l.block / GROUP));
                    let at = self.groups * l.group_bytes() + block * l.scale_bytes();
                    let high = self.base.add(at + l.own_scale_bytes() + part * S::LANES * 4);
                    points.unpack(s, base, high, inside)
                }
                None => unpack(s, l.bits, base),
            };
            if let Some(table) = l.table {
                for q in &mut q {
                    *q = s.lookup(table, *q);
                }
            }
            q
        }
    }

    #[inline(always)]
    fn fetch_ahead(self, group: usize) {
        let l = F::LAYOUT;
        // Bands lie one behind the other, so a group's share of all its bytes is where the reader will be.
        let bytes = l.group_bytes() + l.scale_bytes() * GROUP / l.block;
        read_on(self.base.wrapping_add(group * bytes), bytes);
    }

    #[inline(always)]
    unsafe fn scales<S: Isa>(self, s: S, group: usize, sub: usize, part: usize) -> (S::F, S::F) {
        let l = F::LAYOUT;
        let per_block = l.block / GROUP;
        let (block, inside) = (group / per_block, group % per_block);
        // SAFETY: the caller keeps the indices in range; the offsets follow `Layout`.
        unsafe {
            let at = self.groups * l.group_bytes() + block * l.scale_bytes();
            let header = self.base.add(at);
            let half = |i: usize| header.add(2 * (i * BAND + part * S::LANES));
            let at = (inside * l.subs() + sub) * l.sub_bytes();
            let bytes = header.add(l.header_bytes() + at + part * S::LANES);
            let (scale, offset) = match l.scales {
                Scales::Half => (s.load_f16(half(0)), s.zero()),
                Scales::HalfOffset => (s.load_f16(half(0)), s.load_f16(half(1))),
                Scales::ScaleZero => {
                    let (scale, zero) = s.load_scale_zero(header.add(4 * part * S::LANES));
                    (scale, s.mul(scale, s.sub(s.splat(l.zero as f32), zero)))
                }
                Scales::Exponent => (s.load_e8m0(header.add(part * S::LANES)), s.zero()),
                Scales::SubOdd => {
                    let pair = header.add(l.header_bytes() + inside * BAND + part * S::LANES);
                    let (low, high) = s.load_nibbles(pair);
                    let (n, d) = (if sub == 0 { low } else { high }, s.load_f16(half(0)));
                    (s.mul(d, s.add(s.add(n, n), s.splat(1.0))), s.zero())
                }
                Scales::E4m3 => (s.load_ue4m3(bytes), s.zero()),
                Scales::Sub => (s.mul(s.load_f16(half(0)), s.load_i8(bytes)), s.zero()),
                Scales::SubOffset => (
                    s.mul(s.load_f16(half(0)), s.load_u8(bytes)),
                    s.mul(s.load_f16(half(1)), s.load_u8(bytes.add(BAND))),
                ),
                Scales::SubNibbles => {
                    let (low, high) = s.load_nibbles(bytes);
                    (s.mul(s.load_f16(half(0)), low), s.mul(s.load_f16(half(1)), high))
                }
            };
            (if l.unit == 1.0 { scale } else { s.mul(scale, s.splat(l.unit)) }, offset)
        }
    }
}

/// The eight columns of a group from its planes at `base`, each column 64 bytes apart.
///
/// # Safety
/// `bits` columns must be readable.
#[inline(always)]
unsafe fn unpack<S: Isa>(s: S, bits: u32, base: *const u8) -> [S::I; 8] {
    // SAFETY: planes are `bits` columns of 64 bytes, of which this reads one register each.
    unsafe {
        let mut q = [s.splat_u8(0); 8];
        let mut plane = 0;
        let mut low = 0;
        if bits == 8 {
            for (v, q) in q.iter_mut().enumerate() {
                *q = s.load(base.add(64 * v));
            }
            return q;
        }
        if bits & 4 != 0 {
            let mask = s.splat_u8(15);
            for v in 0..4 {
                let both = s.load(base.add(64 * v));
                q[v] = s.and(both, mask);
                q[v + 4] = s.and(s.shift16(both, 4), mask);
            }
            (plane, low) = (4, 4);
        }
        if bits & 2 != 0 {
            let mask = s.splat_u8(3 << low);
            for v in 0..2 {
                let four = s.load(base.add(64 * (plane + v)));
                for i in 0..4 {
                    let two = s.and(s.shift16(four, 2 * i as i32 - low), mask);
                    q[4 * v + i] = if low == 0 { two } else { s.or(q[4 * v + i], two) };
                }
            }
            plane += 2;
            low += 2;
        }
        if bits & 1 != 0 {
            let mask = s.splat_u8(1 << low);
            let eight = s.load(base.add(64 * plane));
            for (j, q) in q.iter_mut().enumerate() {
                *q = s.or(*q, s.and(s.shift16(eight, j as i32 - low), mask));
            }
        }
        q
    }
}

/// Weights `group` of a band as f32, `out: [32, 16]`, input by input.
///
/// # Safety
/// `group` must be in range and `out` hold 512 floats.
#[inline(always)]
pub(crate) unsafe fn expand<S: Isa, T: Source>(s: S, source: T, group: usize, out: *mut f32) {
    let l = T::LAYOUT;
    for part in 0..BAND / S::LANES {
        // SAFETY: the caller vouches for `group` and `out`.
        unsafe {
            let q = source.quants(s, group, part);
            let zero = s.splat(l.zero as f32);
            for sub in 0..l.subs() {
                let (scale, offset) = source.scales(s, group, sub, part);
                let columns = 8 / l.subs();
                for j in sub * columns..(sub + 1) * columns {
                    for b in 0..4 {
                        let q = s.sub(s.byte_to_f32(q[j], b), zero);
                        let w = s.mul(q, scale);
                        let w = if l.has_offset() { s.add(w, offset) } else { w };
                        s.store_f32(out.add((4 * j + b as usize) * BAND + part * S::LANES), w);
                    }
                }
            }
        }
    }
}
