//! Quants that are points of a lattice: what is stored is a point's index, its coordinates are in a table.
//!
//! A group of 32 inputs has four points of eight inputs, or eight of four. Columns of indices come first, byte `k` of
//! a lane being point `k` (`4 + k` in the second column) of an output row; then, unless signs are of whole
//! points, a column of a bit an input, as planes of one bit are. What an index has above eight bits
//! lies with the scales of a block, column after column of all points' `high_bits` bits: a byte has
//! those of the same point of as many groups as fit, the first in the lowest bits.
//!
//! A quant is the coordinate and above it the sign, which a [`Layout`](super::tile::Layout) then maps by its table.

use super::isa::Isa;
use super::tile::{BAND, GROUP};

/// How points are stored.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Points {
    /// Coordinates of every point: two bits each of eight, or four bits each of four, the first lowest.
    pub table: &'static [u16],
    /// Inputs of a point: 8 or 4.
    pub inputs: usize,
    /// Bits above the lowest eight: of the index, and if there is one more, the sign of the whole point.
    pub high_bits: usize,
}

/// Groups of a block.
const GROUPS: usize = 256 / GROUP;

impl Points {
    /// Points of a group.
    pub(crate) const fn count(&self) -> usize {
        GROUP / self.inputs
    }

    /// Columns of indices of a group.
    const fn columns(&self) -> usize {
        self.count() / 4
    }

    /// Groups whose high bits share a column.
    const fn together(&self) -> usize {
        8 / self.high_bits
    }

    /// Bytes of the high bits of a block of a band.
    pub(crate) const fn high_bytes(&self) -> usize {
        self.columns() * self.high_bits * GROUPS / 8 * 4 * BAND
    }

    /// Bit of a quant that is its sign: above two bits of coordinate, or three.
    const fn sign_at(&self) -> usize {
        if self.inputs == 8 { 2 } else { 3 }
    }

    /// Whether a point has one sign.
    const fn has_sign(&self) -> bool {
        (self.table.len() >> 8) << 1 == 1 << self.high_bits
    }

    /// Writes one output row of group `inside` of a block: its points, and bits of `signs`.
    pub(crate) fn repack(
        &self,
        points: &[u16],
        signs: &[u8],
        (row, inside): (usize, usize),
        group: &mut [u8],
        high: &mut [u8],
    ) {
        for (p, &point) in points[..self.count()].iter().enumerate() {
            let at = p / 4 * 4 * BAND + 4 * row + p % 4;
            group[at] = point as u8;
            if self.high_bits > 0 {
                let column = inside / self.together() * self.columns() * 4 * BAND;
                let shift = inside % self.together() * self.high_bits;
                high[column + at] |= ((point >> 8) as u8) << shift;
            }
        }
        if !self.has_sign() {
            let plane = &mut group[self.columns() * 4 * BAND..];
            for (i, sign) in signs[..GROUP].iter().enumerate() {
                plane[4 * row + i % 4] |= (sign & 1) << (i / 4);
            }
        }
    }

    /// The eight columns of group `inside` of a block from its columns at `group`, and those of the block at `high`.
    ///
    /// # Safety
    /// They must be readable; this reads one register of each.
    #[inline(always)]
    pub(crate) unsafe fn unpack<S: Isa>(
        &self,
        s: S,
        group: *const u8,
        high: *const u8,
        inside: usize,
    ) -> [S::I; 8] {
        let mut q = [s.splat_u8(0); 8];
        let sign_at = self.sign_at();
        // SAFETY: the caller's.
        unsafe {
            for column in 0..self.columns() {
                let low = s.load(group.add(column * 4 * BAND));
                let mut high_bits = s.splat_u8(0);
                if self.high_bits > 0 {
                    let at = inside / self.together() * self.columns() + column;
                    let shift = inside % self.together() * self.high_bits;
                    let shifted = s.shift16(s.load(high.add(at * 4 * BAND)), shift as i32);
                    high_bits = s.and(shifted, s.splat_u8((1 << self.high_bits) - 1));
                }
                let index_bits = s.splat_u8((self.table.len() / 256 - 1) as u8);
                // Points 0 and 2, points 1 and 3.
                let found = s.points(self.table, low, s.and(high_bits, index_bits));
                for p in 0..4 {
                    let (found, word) = (found[p % 2], p / 2);
                    if self.inputs == 4 {
                        q[4 * column + p] = fours(s, found, word);
                        continue;
                    }
                    for half in 0..2 {
                        q[2 * p + half] = twos(s, found, 2 * word + half);
                    }
                    if self.has_sign() {
                        let bit = self.high_bits as i32 - 1 - sign_at as i32;
                        let signs = s.and(s.shift16(high_bits, bit), s.splat_u8(1 << sign_at));
                        let sign = s.shuffle(signs, &[p as u8; 4]);
                        q[2 * p] = s.or(q[2 * p], sign);
                        q[2 * p + 1] = s.or(q[2 * p + 1], sign);
                    }
                }
            }
            if !self.has_sign() {
                let signs = s.load(group.add(self.columns() * 4 * BAND));
                let mask = s.splat_u8(1 << sign_at);
                for (j, q) in q.iter_mut().enumerate() {
                    *q = s.or(*q, s.and(s.shift16(signs, j as i32 - sign_at as i32), mask));
                }
            }
        }
        q
    }
}

/// The pairs of bits of byte `byte` of every lane, one a byte.
#[inline(always)]
fn twos<S: Isa>(s: S, v: S::I, byte: usize) -> S::I {
    let v = s.shuffle(v, &[byte as u8; 4]);
    let v = upper(s, 0xffff_0000_u32, s.shift16(v, 4), v);
    s.and(upper(s, 0xff00_ff00, s.shift16(v, 2), v), s.splat_u8(3))
}

/// The fours of bits of word `word` of every lane, one a byte.
#[inline(always)]
fn fours<S: Isa>(s: S, v: S::I, word: usize) -> S::I {
    let (low, high) = (2 * word as u8, 2 * word as u8 + 1);
    let v = s.shuffle(v, &[low, low, high, high]);
    s.and(upper(s, 0xff00_ff00, s.shift16(v, 4), v), s.splat_u8(15))
}

/// [`Isa::points`] by loads of single entries: `n` bytes of `low` and `high`.
pub(crate) fn load_entries(
    table: &[u16],
    [low, high]: &[[u8; 64]; 2],
    n: usize,
    words: &mut [[u16; 32]; 2],
) {
    let last = table.len() - 1;
    for i in 0..n / 2 {
        for (odd, words) in words.iter_mut().enumerate() {
            let at = 2 * i + odd;
            words[i] = table[(usize::from(low[at]) | usize::from(high[at]) << 8) & last];
        }
    }
}

/// Bits of `upper` where `mask` has them, of `lower` elsewhere.
#[inline(always)]
fn upper<S: Isa>(s: S, mask: u32, upper: S::I, lower: S::I) -> S::I {
    let (mask, rest) = (s.splat_i32(mask as i32), s.splat_i32(!mask as i32));
    s.or(s.and(upper, mask), s.and(lower, rest))
}
