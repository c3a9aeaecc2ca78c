//! I-quants: groups of four or eight weights are points of a small lattice subset ([`grids`]),
//! and IQ4 codes index a table of sixteen levels. `d` is a half-precision super-scale.
//!
//! | type | bytes / weights | point index | weight |
//! | --- | --- | --- | --- |
//! | IQ1_S | 50 / 256 | 11 bits for 8 | `d (2 s + 1) (p ± ⅛)`, s per 32 |
//! | IQ1_M | 56 / 256 | 11 bits for 8 | `d (2 s + 1) (p ± ⅛)`, s per 16, shift per 8 |
//! | IQ2_XXS | 66 / 256 | 8 bits for 8 | `± d (½ + s) ¼ p`, s per 32 |
//! | IQ2_XS | 74 / 256 | 9 bits for 8 | `± d (½ + s) ¼ p`, s per 16 |
//! | IQ2_S | 82 / 256 | 10 bits for 8 | `± d (½ + s) ¼ p`, s per 16 |
//! | IQ3_XXS | 98 / 256 | 8 bits for 4 | `± d (½ + s) ½ p`, s per 32 |
//! | IQ3_S | 110 / 256 | 9 bits for 4 | `± d (2 s + 1) p`, s per 32 |
//! | IQ4_NL | 18 / 32 | – | `d L[q]` |
//! | IQ4_XS | 136 / 256 | – | `d (s - 32) L[q]`, s per 32 |
//!
//! Signs are one bit a weight, lowest first. The XXS and XS types store seven of eight: the
//! eighth makes the number of minus signs even.

use super::grids;
use super::{Blocks, decode_each, f16_at, nibble, u16_at, u32_at};
use half::f16;
use marlin_checkpoint::GgmlType;

/// One bit and a half.
pub static IQ1_S: Blocks = Blocks {
    id: "iq1_s",
    ggml_type: GgmlType::Iq1S,
    decode: |data, out| decode_each(data, out, decode_iq1_s),
    pack: None,
};

/// IQ1_S with finer scales.
pub static IQ1_M: Blocks = Blocks {
    id: "iq1_m",
    ggml_type: GgmlType::Iq1M,
    decode: |data, out| decode_each(data, out, decode_iq1_m),
    pack: None,
};

/// Two bits, 256 points.
pub static IQ2_XXS: Blocks = Blocks {
    id: "iq2_xxs",
    ggml_type: GgmlType::Iq2Xxs,
    decode: |data, out| decode_each(data, out, decode_iq2_xxs),
    pack: None,
};

/// Two bits, 512 points.
pub static IQ2_XS: Blocks = Blocks {
    id: "iq2_xs",
    ggml_type: GgmlType::Iq2Xs,
    decode: |data, out| decode_each(data, out, decode_iq2_xs),
    pack: None,
};

/// Two bits, 1024 points.
pub static IQ2_S: Blocks = Blocks {
    id: "iq2_s",
    ggml_type: GgmlType::Iq2S,
    decode: |data, out| decode_each(data, out, decode_iq2_s),
    pack: None,
};

/// Three bits, 256 points.
pub static IQ3_XXS: Blocks = Blocks {
    id: "iq3_xxs",
    ggml_type: GgmlType::Iq3Xxs,
    decode: |data, out| decode_each(data, out, decode_iq3_xxs),
    pack: None,
};

/// Three bits, 512 points.
pub static IQ3_S: Blocks = Blocks {
    id: "iq3_s",
    ggml_type: GgmlType::Iq3S,
    decode: |data, out| decode_each(data, out, decode_iq3_s),
    pack: None,
};

/// Four bits, uneven levels, in the layout of Q4_0.
pub static IQ4_NL: Blocks = Blocks {
    id: "iq4_nl",
    ggml_type: GgmlType::Iq4Nl,
    decode: |data, out| decode_each(data, out, decode_iq4_nl),
    pack: None,
};

/// Four bits, uneven levels, six-bit scales.
pub static IQ4_XS: Blocks = Blocks {
    id: "iq4_xs",
    ggml_type: GgmlType::Iq4Xs,
    decode: |data, out| decode_each(data, out, decode_iq4_xs),
    pack: None,
};

/// Coordinates of the two-bit grids.
const IQ2_COORDINATES: [f32; 3] = [8.0, 25.0, 43.0];
/// Coordinates of IQ3_XXS's grid.
const IQ3_XXS_COORDINATES: [f32; 8] = [4.0, 12.0, 20.0, 28.0, 36.0, 44.0, 52.0, 62.0];
/// Shift of every coordinate of the one-bit types.
const IQ1_SHIFT: f32 = 0.125;
/// Levels of the four-bit types.
pub const IQ4_LEVELS: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// d, 32 low index bytes, eight words: four three-bit upper indices, scale, sign of the shift.
fn decode_iq1_s(block: &[u8; 50], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    for (k, out) in out.chunks_exact_mut(8).enumerate() {
        let word = u16_at(block, 34 + k / 4 * 2);
        let index = usize::from(block[2 + k]) | usize::from(word >> (3 * (k % 4)) & 7) << 8;
        let dl = d * f32::from(2 * (word >> 12 & 7) + 1);
        iq1_point(out, index, dl, word & 0x8000 != 0);
    }
}

/// 32 low index bytes, 32 nibbles of three upper index bits and the sign of the shift, four words
/// of four three-bit scales; the top nibbles of the words are the bits of d, lowest first.
fn decode_iq1_m(block: &[u8; 56], out: &mut [f32; 256]) {
    let words: [u16; 4] = std::array::from_fn(|i| u16_at(block, 48 + 2 * i));
    let bits = words.iter().enumerate().fold(0, |bits, (i, w)| bits | (w >> 12) << (4 * i));
    let d = f16::from_bits(bits).to_f32();
    for (k, out) in out.chunks_exact_mut(8).enumerate() {
        let high = nibble(&block[32..48], k);
        let index = usize::from(block[k]) | usize::from(high & 7) << 8;
        let scale = words[k / 8] >> (3 * (k / 2 % 4)) & 7;
        iq1_point(out, index, d * f32::from(2 * scale + 1), high & 8 != 0);
    }
}

fn iq1_point(out: &mut [f32], index: usize, dl: f32, shift_down: bool) {
    let shift = if shift_down { -IQ1_SHIFT } else { IQ1_SHIFT };
    for (i, x) in out.iter_mut().enumerate() {
        let digit = grids::IQ1[index] >> (2 * i) & 3;
        *x = dl * (f32::from(digit) - 1.0 + shift);
    }
}

/// d, then for each 32 weights four index bytes and a word: four seven-bit signs, scale on top.
fn decode_iq2_xxs(block: &[u8; 66], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    for (k, out) in out.chunks_exact_mut(8).enumerate() {
        let group = &block[2 + k / 4 * 8..][..8];
        let word = u32_at(group, 4);
        let db = d * (0.5 + (word >> 28) as f32) * 0.25;
        let signs = even_signs(word >> (7 * (k % 4)));
        iq2_point(out, grids::IQ2_XXS[usize::from(group[k % 4])], signs, db);
    }
}

/// d, 32 words of nine index bits and seven signs, sixteen scale nibbles.
fn decode_iq2_xs(block: &[u8; 74], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    for (k, out) in out.chunks_exact_mut(8).enumerate() {
        let word = u16_at(block, 2 + 2 * k);
        let db = d * (0.5 + f32::from(nibble(&block[66..], k / 2))) * 0.25;
        let signs = even_signs(u32::from(word >> 9));
        iq2_point(out, grids::IQ2_XS[usize::from(word & 511)], signs, db);
    }
}

/// d, 32 low index bytes, 32 sign bytes, 32 upper index pairs, sixteen scale nibbles.
fn decode_iq2_s(block: &[u8; 82], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    for (k, out) in out.chunks_exact_mut(8).enumerate() {
        let high = block[66 + k / 4] >> (2 * (k % 4)) & 3;
        let index = usize::from(block[2 + k]) | usize::from(high) << 8;
        let db = d * (0.5 + f32::from(nibble(&block[74..], k / 2))) * 0.25;
        iq2_point(out, grids::IQ2_S[index], block[34 + k], db);
    }
}

fn iq2_point(out: &mut [f32], point: u16, signs: u8, db: f32) {
    for (i, x) in out.iter_mut().enumerate() {
        *x = db * IQ2_COORDINATES[usize::from(point >> (2 * i) & 3)] * sign(signs, i);
    }
}

/// d, 64 index bytes, eight words: four seven-bit signs, scale on top.
fn decode_iq3_xxs(block: &[u8; 98], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    for (k, out) in out.chunks_exact_mut(8).enumerate() {
        let word = u32_at(block, 66 + k / 4 * 4);
        let db = d * (0.5 + (word >> 28) as f32) * 0.5;
        let signs = even_signs(word >> (7 * (k % 4)));
        for (i, x) in out.iter_mut().enumerate() {
            let point = grids::IQ3_XXS[usize::from(block[2 + 2 * k + i / 4])];
            let digit = point >> (3 * (i % 4)) & 7;
            *x = db * IQ3_XXS_COORDINATES[usize::from(digit)] * sign(signs, i);
        }
    }
}

/// d, 64 low index bytes, 64 upper index bits, 32 sign bytes, eight scale nibbles.
fn decode_iq3_s(block: &[u8; 110], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    for (k, out) in out.chunks_exact_mut(8).enumerate() {
        let db = d * f32::from(1 + 2 * nibble(&block[106..], k / 4));
        for (i, x) in out.iter_mut().enumerate() {
            let j = 2 * k + i / 4;
            let high = block[66 + j / 8] >> (j % 8) & 1;
            let point = grids::IQ3_S[usize::from(block[2 + j]) | usize::from(high) << 8];
            let digit = point >> (3 * (i % 4)) & 7;
            *x = db * f32::from(1 + 2 * digit) * sign(block[74 + k], i);
        }
    }
}

/// d, 16 bytes: weight `i` low, weight `i + 16` high.
fn decode_iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    iq4_levels(out, &block[2..], f16_at(block, 0));
}

/// d, eight upper scale pairs, eight lower scale nibbles, then IQ4_NL's codes per 32 weights.
fn decode_iq4_xs(block: &[u8; 136], out: &mut [f32; 256]) {
    let (d, high) = (f16_at(block, 0), u16_at(block, 2));
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let scale = nibble(&block[4..8], group) | ((high >> (2 * group) & 3) as u8) << 4;
        iq4_levels(out, &block[8 + 16 * group..][..16], d * f32::from(scale as i8 - 32));
    }
}

fn iq4_levels(out: &mut [f32], codes: &[u8], d: f32) {
    for (i, b) in codes.iter().enumerate() {
        out[i] = d * f32::from(IQ4_LEVELS[usize::from(b & 15)]);
        out[i + 16] = d * f32::from(IQ4_LEVELS[usize::from(b >> 4)]);
    }
}

/// The low seven bits and the bit that makes their number even.
fn even_signs(bits: u32) -> u8 {
    let bits = (bits & 127) as u8;
    bits | ((bits.count_ones() & 1) as u8) << 7
}

fn sign(signs: u8, i: usize) -> f32 {
    if signs >> i & 1 == 0 { 1.0 } else { -1.0 }
}
