//! K-quants: super-blocks of 256 weights, cut into groups whose scales are integers under
//! half-precision super-scales `d` and, where there is a minimum, `dmin`.
//!
//! | type | bytes | groups | weight | layout |
//! | --- | --- | --- | --- | --- |
//! | Q2_K | 84 | 16 of 16 | `d s q - dmin m` | 16 × (s, m) nibbles, 64 × four codes, d, dmin |
//! | Q3_K | 110 | 16 of 16 | `d (s - 32) (q - 4)` | 32 high bits, 64 × four codes, 12 scale bytes, d |
//! | Q4_K | 144 | 8 of 32 | `d s q - dmin m` | d, dmin, 12 scale bytes, 128 × two codes |
//! | Q5_K | 176 | 8 of 32 | `d s q - dmin m` | d, dmin, 12 scale bytes, 32 high bits, 128 × two codes |
//! | Q6_K | 210 | 16 of 16 | `d s (q - 32)` | 128 low nibbles, 64 high pairs, 16 signed s, d |
//!
//! Two-bit codes: half `h`, bit pair `s`, byte `i` of 32 is weight `128 h + 32 s + i`. Nibbles of
//! Q4_K and Q5_K: byte `i` of the 32 of pair `p` is weight `64 p + i` low, `64 p + 32 + i` high.
//! High bits of Q3_K and Q5_K: bit `b` of byte `i` is weight `32 b + i`.

use super::k_pack;
use super::{Blocks, decode_each, f16_at, nibble, pack_each};
use marlin_checkpoint::GgmlType;

/// Two bits.
pub static Q2_K: Blocks = Blocks {
    id: "q2_k",
    ggml_type: GgmlType::Q2K,
    decode: |data, out| decode_each(data, out, decode_q2_k),
    pack: Some(|values, data| pack_each(values, data, k_pack::q2_k)),
};

/// Three bits.
pub static Q3_K: Blocks = Blocks {
    id: "q3_k",
    ggml_type: GgmlType::Q3K,
    decode: |data, out| decode_each(data, out, decode_q3_k),
    pack: Some(|values, data| pack_each(values, data, k_pack::q3_k)),
};

/// Four bits.
pub static Q4_K: Blocks = Blocks {
    id: "q4_k",
    ggml_type: GgmlType::Q4K,
    decode: |data, out| decode_each(data, out, decode_q4_k),
    pack: Some(|values, data| pack_each(values, data, k_pack::q4_k)),
};

/// Five bits.
pub static Q5_K: Blocks = Blocks {
    id: "q5_k",
    ggml_type: GgmlType::Q5K,
    decode: |data, out| decode_each(data, out, decode_q5_k),
    pack: Some(|values, data| pack_each(values, data, k_pack::q5_k)),
};

/// Six bits.
pub static Q6_K: Blocks = Blocks {
    id: "q6_k",
    ggml_type: GgmlType::Q6K,
    decode: |data, out| decode_each(data, out, decode_q6_k),
    pack: Some(|values, data| pack_each(values, data, k_pack::q6_k)),
};

fn decode_q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(block, 80), f16_at(block, 82));
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let scales = block[group];
        let (dl, ml) = (d * f32::from(scales & 15), dmin * f32::from(scales >> 4));
        for (x, q) in out.iter_mut().zip(two_bits(&block[16..80], group)) {
            *x = dl * f32::from(q) - ml;
        }
    }
}

fn decode_q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let (high, scales, d) = (&block[..32], &block[96..108], f16_at(block, 108));
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let dl = d * f32::from(q3_k_scale(scales, group) as i8 - 32);
        let high = &high[group % 2 * 16..][..16];
        for ((x, low), high) in out.iter_mut().zip(two_bits(&block[32..96], group)).zip(high) {
            let q = low | (high >> (group / 2) & 1) << 2;
            *x = dl * f32::from(q as i8 - 4);
        }
    }
}

fn decode_q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(block, 0), f16_at(block, 2));
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (s, m) = scale_and_min(&block[4..16], group);
        let (dl, ml) = (d * f32::from(s), dmin * f32::from(m));
        let codes = &block[16 + group / 2 * 32..][..32];
        for (x, b) in out.iter_mut().zip(codes) {
            *x = dl * f32::from((b >> (4 * (group % 2))) & 15) - ml;
        }
    }
}

fn decode_q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(block, 0), f16_at(block, 2));
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (s, m) = scale_and_min(&block[4..16], group);
        let (dl, ml) = (d * f32::from(s), dmin * f32::from(m));
        let codes = &block[48 + group / 2 * 32..][..32];
        for ((x, low), high) in out.iter_mut().zip(codes).zip(&block[16..48]) {
            let q = (low >> (4 * (group % 2))) & 15 | (high >> group & 1) << 4;
            *x = dl * f32::from(q) - ml;
        }
    }
}

fn decode_q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = f16_at(block, 208);
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let dl = d * f32::from(block[192 + group] as i8);
        // Weights 64 apart, four groups, share a byte of low nibbles.
        let low = &block[group / 8 * 64 + group % 4 * 16..][..16];
        let shift = 4 * (group / 4 % 2);
        for ((x, low), high) in out.iter_mut().zip(low).zip(two_bits(&block[128..192], group)) {
            let q = (low >> shift) & 15 | high << 4;
            *x = dl * f32::from(q as i8 - 32);
        }
    }
}

/// The two-bit codes of a group of 16 weights.
fn two_bits(bytes: &[u8], group: usize) -> impl Iterator<Item = u8> {
    let shift = 2 * (group / 2 % 4);
    bytes[group / 8 * 32 + group % 2 * 16..][..16].iter().map(move |b| (b >> shift) & 3)
}

/// Six-bit scale of Q3_K: low nibbles in bytes 0-7 (groups 0-7 low, 8-15 high), upper pairs in
/// bytes 8-11, four groups apart.
fn q3_k_scale(scales: &[u8], group: usize) -> u8 {
    let low = (scales[group % 8] >> (4 * (group / 8))) & 15;
    let high = (scales[8 + group % 4] >> (2 * (group / 4))) & 3;
    low | high << 4
}

/// Six-bit scale and minimum of Q4_K and Q5_K. Groups 0-3 have theirs in the low six bits of
/// bytes 0-3 and 4-7; groups 4-7 have low nibbles in bytes 8-11 and the upper pair on top of those.
fn scale_and_min(scales: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        return (scales[group] & 63, scales[group + 4] & 63);
    }
    let low = &scales[group + 4..=group + 4];
    let s = nibble(low, 0) | (scales[group - 4] >> 6) << 4;
    let m = nibble(low, 1) | (scales[group] >> 6) << 4;
    (s, m)
}
