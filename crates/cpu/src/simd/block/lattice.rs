//! Superblocks of 256 whose quants are points of a lattice under signs: IQ1_S to IQ3_S. In all of them d comes first but in IQ1_M.

use super::u16_at;
use crate::simd::points::Points;
use crate::simd::tile::{Block, Format, Layout, Scales};
use marlin_quant::grids;

/// `d (2 s + 1) (p ± ⅛)`, sub-blocks of 32: 32 low index bytes, eight words of four three-bit upper indices, s, the
/// sign of the shift.
pub(crate) struct Iq1S;
/// The same in sub-blocks of 16, a shift for eight: 32 low index bytes, 32 nibbles of upper index and sign, four words of
/// four s and a fourth of d.
pub(crate) struct Iq1M;
/// `± d (2 s + 1) p / 8`, sub-blocks of 32: eight times four index bytes and a word of four times seven signs, s.
pub(crate) struct Iq2Xxs;
/// The same in sub-blocks of 16: 32 words of nine index bits and seven signs, sixteen nibbles of s.
pub(crate) struct Iq2Xs;
/// The same: 32 low index bytes, 32 bytes of signs, 32 pairs of upper index bits, sixteen nibbles of s.
pub(crate) struct Iq2S;
/// `± d (2 s + 1) p / 4`, sub-blocks of 32: 64 index bytes, eight words of four times seven signs, s.
pub(crate) struct Iq3Xxs;
/// `± d (2 s + 1) p`, sub-blocks of 32: 64 low index bytes, 64 upper index bits, 32 bytes of signs, eight nibbles of s.
pub(crate) struct Iq3S;

/// Eight times p ± 1, plus 9.
static IQ1: [u8; 16] = [0, 8, 16, 0, 2, 10, 18, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// ± p, plus 43.
static IQ2: [u8; 16] = [51, 68, 86, 0, 35, 18, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// ± p, plus 62.
static IQ3_XXS: [u8; 16] = [66, 74, 82, 90, 98, 106, 114, 124, 58, 50, 42, 34, 26, 18, 10, 0];
/// ± p, plus 15.
static IQ3_S: [u8; 16] = [16, 18, 20, 22, 24, 26, 28, 30, 14, 12, 10, 8, 6, 4, 2, 0];

/// Points of four coordinates of three bits with four bits for each.
const fn spread<const N: usize>(points: &[u16; N]) -> [u16; N] {
    let mut out = [0; N];
    let mut i = 0;
    while i < N {
        let p = points[i];
        out[i] = p & 7 | (p & 0o70) << 1 | (p & 0o700) << 2 | (p & 0o7000) << 3;
        i += 1;
    }
    out
}

static IQ3_XXS_POINTS: [u16; 256] = spread(&grids::IQ3_XXS);
static IQ3_S_POINTS: [u16; 512] = spread(&grids::IQ3_S);

const IQ2_XXS: Layout = Layout {
    bytes: 66,
    block: 256,
    sub_block: 32,
    bits: 2,
    points: Some(Points { table: &grids::IQ2_XXS, inputs: 8, high_bits: 0 }),
    table: Some(&IQ2),
    quant_bits: 7,
    zero: 43,
    scales: Scales::Sub,
    unit: 0.125,
};

/// Seven signs, and the one that makes the number of minus signs even.
fn even(bits: u32) -> u8 {
    let bits = (bits & 127) as u8;
    bits | ((bits.count_ones() & 1) as u8) << 7
}

/// Signs of point `k` of eight inputs.
fn put_signs(out: &mut Block, k: usize, signs: u8) {
    for (i, q) in out.quants[8 * k..8 * k + 8].iter_mut().enumerate() {
        *q = signs >> i & 1;
    }
}

/// Four times seven signs and s of each 32 inputs, from `words`.
fn put_words(out: &mut Block, words: impl Iterator<Item = u32>) {
    for (g, word) in words.enumerate() {
        (0..4).for_each(|k| put_signs(out, 4 * g + k, even(word >> (7 * k))));
        out.scales[g] = odd((word >> 28) as u8);
    }
}

/// `2 s + 1`.
fn odd(s: u8) -> u8 {
    2 * s + 1
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

/// Nibble `i` of `bytes`.
fn nibble(bytes: &[u8], i: usize) -> u8 {
    bytes[i / 2] >> (4 * (i % 2)) & 15
}

impl Format for Iq1S {
    const ID: &'static str = "iq1_s";
    const LAYOUT: Layout = Layout {
        bytes: 50,
        bits: 1,
        points: Some(Points { table: &grids::IQ1, inputs: 8, high_bits: 4 }),
        table: Some(&IQ1),
        quant_bits: 5,
        zero: 9,
        ..IQ2_XXS
    };

    fn explode(block: &[u8], out: &mut Block) {
        out.d = u16_at(block, 0);
        for k in 0..32 {
            let word = u16_at(block, 34 + k / 4 * 2);
            // A shift upwards is the sign.
            let high = word >> (3 * (k % 4)) & 7 | (!word >> 15) << 3;
            out.points[k] = u16::from(block[2 + k]) | high << 8;
            out.scales[k / 4] = odd((word >> 12 & 7) as u8);
        }
    }
}

impl Format for Iq1M {
    const ID: &'static str = "iq1_m";
    const LAYOUT: Layout =
        Layout { bytes: 56, sub_block: 16, scales: Scales::SubOdd, ..Iq1S::LAYOUT };

    fn explode(block: &[u8], out: &mut Block) {
        out.d = 0;
        for i in 0..4 {
            let word = u16_at(block, 48 + 2 * i);
            out.d |= (word >> 12) << (4 * i);
            (0..4).for_each(|j| out.scales[4 * i + j] = (word >> (3 * j) & 7) as u8);
        }
        for k in 0..32 {
            let high = u16::from(nibble(&block[32..48], k) ^ 8);
            out.points[k] = u16::from(block[k]) | high << 8;
        }
    }
}

impl Format for Iq2Xxs {
    const ID: &'static str = "iq2_xxs";
    const LAYOUT: Layout = IQ2_XXS;

    fn explode(block: &[u8], out: &mut Block) {
        out.d = u16_at(block, 0);
        for k in 0..32 {
            out.points[k] = block[2 + k / 4 * 8 + k % 4].into();
        }
        put_words(out, (0..8).map(|g| u32_at(block, 6 + 8 * g)));
    }
}

impl Format for Iq2Xs {
    const ID: &'static str = "iq2_xs";
    const LAYOUT: Layout = Layout {
        bytes: 74,
        points: Some(Points { table: &grids::IQ2_XS, inputs: 8, high_bits: 1 }),
        ..Iq2S::LAYOUT
    };

    fn explode(block: &[u8], out: &mut Block) {
        out.d = u16_at(block, 0);
        for k in 0..32 {
            let word = u16_at(block, 2 + 2 * k);
            out.points[k] = word & 511;
            put_signs(out, k, even(u32::from(word >> 9)));
        }
        (0..16).for_each(|i| out.scales[i] = nibble(&block[66..], i));
    }
}

impl Format for Iq2S {
    const ID: &'static str = "iq2_s";
    const LAYOUT: Layout = Layout {
        bytes: 82,
        sub_block: 16,
        points: Some(Points { table: &grids::IQ2_S, inputs: 8, high_bits: 2 }),
        scales: Scales::SubOdd,
        ..IQ2_XXS
    };

    fn explode(block: &[u8], out: &mut Block) {
        out.d = u16_at(block, 0);
        for k in 0..32 {
            let high = u16::from(block[66 + k / 4] >> (2 * (k % 4)) & 3);
            out.points[k] = u16::from(block[2 + k]) | high << 8;
            put_signs(out, k, block[34 + k]);
        }
        (0..16).for_each(|i| out.scales[i] = nibble(&block[74..], i));
    }
}

impl Format for Iq3Xxs {
    const ID: &'static str = "iq3_xxs";
    const LAYOUT: Layout = Layout {
        bytes: 98,
        bits: 3,
        points: Some(Points { table: &IQ3_XXS_POINTS, inputs: 4, high_bits: 0 }),
        table: Some(&IQ3_XXS),
        zero: 62,
        unit: 0.25,
        ..IQ2_XXS
    };

    fn explode(block: &[u8], out: &mut Block) {
        out.d = u16_at(block, 0);
        out.points.iter_mut().zip(&block[2..66]).for_each(|(p, &b)| *p = b.into());
        put_words(out, (0..8).map(|g| u32_at(block, 66 + 4 * g)));
    }
}

impl Format for Iq3S {
    const ID: &'static str = "iq3_s";
    const LAYOUT: Layout = Layout {
        bytes: 110,
        points: Some(Points { table: &IQ3_S_POINTS, inputs: 4, high_bits: 1 }),
        table: Some(&IQ3_S),
        quant_bits: 5,
        zero: 15,
        unit: 1.0,
        ..Iq3Xxs::LAYOUT
    };

    fn explode(block: &[u8], out: &mut Block) {
        out.d = u16_at(block, 0);
        for (j, point) in out.points.iter_mut().enumerate() {
            let high = u16::from(block[66 + j / 8] >> (j % 8) & 1);
            *point = u16::from(block[2 + j]) | high << 8;
        }
        (0..32).for_each(|k| put_signs(out, k, block[74 + k]));
        (0..8).for_each(|g| out.scales[g] = odd(nibble(&block[106..], g)));
    }
}
