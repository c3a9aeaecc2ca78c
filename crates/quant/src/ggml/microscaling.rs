//! Four-bit floats (E2M1: 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives) under shared scales.
//!
//! * MXFP4, 17 bytes for 32 weights: one E8M0 scale byte (a power of two), 16 bytes of nibbles;
//!   byte `i` holds weight `i` low and weight `i + 16` high.
//! * NVFP4, 36 bytes for 64 weights: four unsigned E4M3 scales, then for each of the four groups
//!   of 16 weights eight bytes; byte `i` holds weight `i` low and weight `i + 8` high.
//!
//! Codes are looked up doubled, as integers, and scales halved; the product is the same.

use super::{Blocks, decode_each, pack_each};
use marlin_checkpoint::GgmlType;

/// OCP microscaling.
pub static MXFP4: Blocks = Blocks {
    id: "mxfp4",
    ggml_type: GgmlType::Mxfp4,
    decode: |data, out| decode_each(data, out, decode_mxfp4),
    pack: Some(|values, data| pack_each(values, data, pack_mxfp4)),
};

/// NVIDIA's variant with finer scales, without its per-tensor scale ([`super::NVFP4_SCALED`]).
pub static NVFP4: Blocks = Blocks {
    id: "nvfp4",
    ggml_type: GgmlType::Nvfp4,
    decode: |data, out| decode_each(data, out, decode_nvfp4),
    pack: None,
};

/// Twice the E2M1 value of a code. Negative zero reads as zero.
const E2M1_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

fn decode_mxfp4(block: &[u8; 17], out: &mut [f32; 32]) {
    let d = half_e8m0(block[0]);
    for (i, &b) in block[1..].iter().enumerate() {
        out[i] = d * e2m1_doubled(b & 15);
        out[i + 16] = d * e2m1_doubled(b >> 4);
    }
}

fn decode_nvfp4(block: &[u8; 36], out: &mut [f32; 64]) {
    let (scales, codes) = block.split_at(4);
    let groups = codes.chunks_exact(8).zip(out.chunks_exact_mut(16));
    for (&scale, (codes, out)) in scales.iter().zip(groups) {
        let d = half_e4m3_unsigned(scale);
        for (i, &b) in codes.iter().enumerate() {
            out[i] = d * e2m1_doubled(b & 15);
            out[i + 8] = d * e2m1_doubled(b >> 4);
        }
    }
}

fn e2m1_doubled(code: u8) -> f32 {
    f32::from(E2M1_DOUBLED[usize::from(code)])
}

/// `2^(x - 128)`, half the E8M0 value. 255, a NaN in the OCP text, is 2^127 here as in ggml.
fn half_e8m0(x: u8) -> f32 {
    // The two smallest are subnormal.
    f32::from_bits(if x < 2 { 0x0020_0000 << x } else { u32::from(x - 1) << 23 })
}

/// Half the unsigned E4M3 value; the top bit is ignored and 0x7F is zero, as in ggml.
fn half_e4m3_unsigned(x: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(x >> 3 & 15), f32::from(x & 7));
    match (x, exponent) {
        (0x7F, _) => 0.0,
        (_, 0) => mantissa / 1024.0,
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 8),
    }
}

fn pack_mxfp4(values: &[f32; 32], block: &mut [u8; 17]) {
    let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    // The largest code is 6 = 1.5 * 2^2.
    let scale = if largest > 0.0 { (largest.log2().floor() + 125.0) as u8 } else { 0 };
    let d = half_e8m0(scale);
    block[0] = scale;
    let code = |v: f32| {
        let error = |q: u8| (d * e2m1_doubled(q) - v).abs();
        (1..16).fold(0, |best, q| if error(q) < error(best) { q } else { best })
    };
    for (i, b) in block[1..].iter_mut().enumerate() {
        *b = code(values[i]) | code(values[i + 16]) << 4;
    }
}
