//! Ternary blocks of 256 weights `d q`, `q` in -1, 0, 1, with one half-precision scale at the end.
//!
//! TQ2_0 (66 bytes): two bits a weight, as in Q2_K: half `h`, bit pair `s`, byte `i` of 32 is
//! weight `128 h + 32 s + i`.
//!
//! TQ1_0 (54 bytes): a byte is a fraction `b / 256` whose base-3 digits, most significant first,
//! are five weights (the last four bytes hold four). Digits are read by multiplying modulo 256
//! by a power of three and taking the integer part of three times the remaining fraction. Digit
//! `k` of bytes 0-31 is weight `32 k + i`, of bytes 32-47 weight `160 + 16 k + i`, of bytes 48-51
//! weight `240 + 4 k + i`.

use super::{Blocks, decode_each, f16_at, pack_each, put_f16};
use marlin_checkpoint::GgmlType;

/// Base-3 digits.
pub static TQ1_0: Blocks = Blocks {
    id: "tq1_0",
    ggml_type: GgmlType::Tq1_0,
    decode: |data, out| decode_each(data, out, decode_tq1_0),
    pack: Some(|values, data| pack_each(values, data, pack_tq1_0)),
};

/// Two bits a weight.
pub static TQ2_0: Blocks = Blocks {
    id: "tq2_0",
    ggml_type: GgmlType::Tq2_0,
    decode: |data, out| decode_each(data, out, decode_tq2_0),
    pack: Some(|values, data| pack_each(values, data, pack_tq2_0)),
};

/// Bytes and the weights of their first digit: `(bytes, first weight, digits)`.
const TQ1_0_RUNS: [(std::ops::Range<usize>, usize, u32); 3] =
    [(0..32, 0, 5), (32..48, 160, 5), (48..52, 240, 4)];

fn decode_tq1_0(block: &[u8; 54], out: &mut [f32; 256]) {
    let d = f16_at(block, 52);
    for (bytes, first, digits) in TQ1_0_RUNS {
        let stride = bytes.len();
        for (i, &b) in block[bytes].iter().enumerate() {
            for k in 0..digits {
                let fraction = b.wrapping_mul(3u8.pow(k));
                let digit = (u16::from(fraction) * 3) >> 8;
                out[first + k as usize * stride + i] = d * (f32::from(digit) - 1.0);
            }
        }
    }
}

fn decode_tq2_0(block: &[u8; 66], out: &mut [f32; 256]) {
    let d = f16_at(block, 64);
    for (run, out) in out.chunks_exact_mut(32).enumerate() {
        for (x, b) in out.iter_mut().zip(&block[run / 4 * 32..]) {
            let q = (b >> (2 * (run % 4))) & 3;
            *x = d * (f32::from(q) - 1.0);
        }
    }
}

fn pack_tq1_0(values: &[f32; 256], block: &mut [u8; 54]) {
    let (d, codes) = codes(values);
    put_f16(block, 52, d);
    for (bytes, first, digits) in TQ1_0_RUNS {
        let stride = bytes.len();
        for (i, b) in block[bytes].iter_mut().enumerate() {
            let number: u16 = (0..digits)
                .map(|k| u16::from(codes[first + k as usize * stride + i]) * 3u16.pow(4 - k))
                .sum();
            // Rounded up, so that truncation while reading gives back every digit.
            *b = (number * 256).div_ceil(243) as u8;
        }
    }
}

fn pack_tq2_0(values: &[f32; 256], block: &mut [u8; 66]) {
    let (d, codes) = codes(values);
    block[..64].fill(0);
    put_f16(block, 64, d);
    for (n, q) in codes.into_iter().enumerate() {
        block[n / 128 * 32 + n % 32] |= q << (2 * (n / 32 % 4));
    }
}

/// The largest magnitude, and each weight rounded to a multiple of it, plus one.
fn codes(values: &[f32; 256]) -> (f32, [u8; 256]) {
    let d = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    (d, values.map(|v| ((v * inverse).round() + 1.0) as u8))
}
