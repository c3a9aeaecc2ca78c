//! The first generation: blocks of 32 with one half-precision scale `d`, and for the `_1` types
//! a minimum `m`.
//!
//! | type | bytes | layout | weight |
//! | --- | --- | --- | --- |
//! | Q4_0 | 18 | d, 16 × two nibbles | `d (q - 8)` |
//! | Q4_1 | 20 | d, m, 16 × two nibbles | `d q + m` |
//! | Q5_0 | 22 | d, 32 high bits, 16 × two nibbles | `d (q - 16)` |
//! | Q5_1 | 24 | d, m, 32 high bits, 16 × two nibbles | `d q + m` |
//! | Q8_0 | 34 | d, 32 signed bytes | `d q` |
//!
//! Byte `i` of the nibbles holds weight `i` in its low half and weight `i + 16` in its high half.
//! Packers round to nearest exactly as the `gguf` package does.

use super::{Blocks, decode_each, f16_at, pack_each, put_f16, u32_at};
use marlin_checkpoint::GgmlType;

/// Four bits, symmetric.
pub static Q4_0: Blocks = Blocks {
    id: "q4_0",
    ggml_type: GgmlType::Q4_0,
    decode: |data, out| decode_each(data, out, decode_q4_0),
    pack: Some(|values, data| pack_each(values, data, pack_q4_0)),
};

/// Four bits with a minimum.
pub static Q4_1: Blocks = Blocks {
    id: "q4_1",
    ggml_type: GgmlType::Q4_1,
    decode: |data, out| decode_each(data, out, decode_q4_1),
    pack: Some(|values, data| pack_each(values, data, pack_q4_1)),
};

/// Five bits, symmetric.
pub static Q5_0: Blocks = Blocks {
    id: "q5_0",
    ggml_type: GgmlType::Q5_0,
    decode: |data, out| decode_each(data, out, decode_q5_0),
    pack: Some(|values, data| pack_each(values, data, pack_q5_0)),
};

/// Five bits with a minimum.
pub static Q5_1: Blocks = Blocks {
    id: "q5_1",
    ggml_type: GgmlType::Q5_1,
    decode: |data, out| decode_each(data, out, decode_q5_1),
    pack: Some(|values, data| pack_each(values, data, pack_q5_1)),
};

/// Eight bits, symmetric.
pub static Q8_0: Blocks = Blocks {
    id: "q8_0",
    ggml_type: GgmlType::Q8_0,
    decode: |data, out| decode_each(data, out, decode_q8_0),
    pack: Some(|values, data| pack_each(values, data, pack_q8_0)),
};

fn decode_q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    for (i, q) in nibbles(&block[2..]).into_iter().enumerate() {
        out[i] = d * f32::from(q as i8 - 8);
    }
}

fn decode_q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    for (i, q) in nibbles(&block[4..]).into_iter().enumerate() {
        out[i] = d * f32::from(q) + m;
    }
}

fn decode_q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    for (i, q) in five_bits(u32_at(block, 2), &block[6..]).into_iter().enumerate() {
        out[i] = d * f32::from(q as i8 - 16);
    }
}

fn decode_q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    for (i, q) in five_bits(u32_at(block, 4), &block[8..]).into_iter().enumerate() {
        out[i] = d * f32::from(q) + m;
    }
}

fn decode_q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    for (x, &q) in out.iter_mut().zip(&block[2..]) {
        *x = d * f32::from(q as i8);
    }
}

fn nibbles(bytes: &[u8]) -> [u8; 32] {
    std::array::from_fn(|i| (bytes[i % 16] >> (4 * (i / 16))) & 15)
}

fn five_bits(high: u32, bytes: &[u8]) -> [u8; 32] {
    let mut q = nibbles(bytes);
    for (i, q) in q.iter_mut().enumerate() {
        *q |= ((high >> i) as u8 & 1) << 4;
    }
    q
}

fn pack_q4_0(values: &[f32; 32], block: &mut [u8; 18]) {
    let (d, codes) = symmetric_codes(values, 8);
    put_f16(block, 0, d);
    put_nibbles(&mut block[2..], &codes);
}

fn pack_q4_1(values: &[f32; 32], block: &mut [u8; 20]) {
    let (d, m, codes) = affine_codes(values, 15);
    put_f16(block, 0, d);
    put_f16(block, 2, m);
    put_nibbles(&mut block[4..], &codes);
}

fn pack_q5_0(values: &[f32; 32], block: &mut [u8; 22]) {
    let (d, codes) = symmetric_codes(values, 16);
    put_f16(block, 0, d);
    block[2..6].copy_from_slice(&high_bits(&codes).to_le_bytes());
    put_nibbles(&mut block[6..], &codes);
}

fn pack_q5_1(values: &[f32; 32], block: &mut [u8; 24]) {
    let (d, m, codes) = affine_codes(values, 31);
    put_f16(block, 0, d);
    put_f16(block, 2, m);
    block[4..8].copy_from_slice(&high_bits(&codes).to_le_bytes());
    put_nibbles(&mut block[8..], &codes);
}

fn pack_q8_0(values: &[f32; 32], block: &mut [u8; 34]) {
    let d = values.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0;
    let inverse = reciprocal(d);
    put_f16(block, 0, d);
    for (q, v) in block[2..].iter_mut().zip(values) {
        *q = (v * inverse).round() as i8 as u8;
    }
}

/// Scale and codes `0 ..= 2 half - 1` centred on `half`. The scale takes the sign that puts the
/// value of largest magnitude on code 0, the end with one more step.
fn symmetric_codes(values: &[f32; 32], half: u8) -> (f32, [u8; 32]) {
    let larger = |m: f32, &v: &f32| if v.abs() > m.abs() { v } else { m };
    let largest = values.iter().fold(values[0], larger);
    let d = largest / -f32::from(half);
    let inverse = reciprocal(d);
    let centre = f32::from(half) + 0.5;
    // Casts saturate, which is the clip at zero.
    let code = |v: f32| ((v * inverse + centre) as u8).min(2 * half - 1);
    (d, values.map(code))
}

/// Scale, minimum and codes `0 ..= levels`.
fn affine_codes(values: &[f32; 32], levels: u8) -> (f32, f32, [u8; 32]) {
    let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let min = values.iter().copied().fold(f32::INFINITY, f32::min);
    let d = (max - min) / f32::from(levels);
    let inverse = reciprocal(d);
    (d, min, values.map(|v| (((v - min) * inverse + 0.5) as u8).min(levels)))
}

/// `1 / d`, and 0 for 0.
fn reciprocal(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn put_nibbles(bytes: &mut [u8], codes: &[u8; 32]) {
    for (i, b) in bytes.iter_mut().enumerate() {
        *b = (codes[i] & 15) | (codes[i + 16] << 4);
    }
}

fn high_bits(codes: &[u8; 32]) -> u32 {
    codes.iter().enumerate().fold(0, |bits, (i, &q)| bits | (u32::from(q) >> 4) << i)
}
