//! Superblocks of 256 with quantized scales: Q2_K to Q6_K.

use super::u16_at;
use crate::simd::tile::{Block, Format, Layout, Scales};

/// `d * s * q - m * o`, sub-blocks of 16: 16 bytes of scale and offset nibbles, 64 bytes of
/// quants, d, m.
pub(crate) struct Q2K;
/// `d * (s - 32) * (q - 4)`, sub-blocks of 16: 32 bytes of high bits, 64 bytes of low bits,
/// 12 bytes of 6-bit scales, d.
pub(crate) struct Q3K;
/// `d * s * q - m * o`, sub-blocks of 32: d, m, 12 bytes of 6-bit scales and offsets, 128 bytes of
/// nibbles.
pub(crate) struct Q4K;
/// The same with 32 bytes of fifth bits before the nibbles.
pub(crate) struct Q5K;
/// `d * s * (q - 32)`, sub-blocks of 16: 128 bytes of low nibbles, 64 bytes of high bits, 16
/// signed scales, d.
pub(crate) struct Q6K;

const fn superblock(
    bytes: usize,
    sub_block: usize,
    bits: u32,
    zero: i32,
    scales: Scales,
) -> Layout {
    let (points, table, unit) = (None, None, 1.0);
    Layout {
        bytes,
        block: 256,
        sub_block,
        bits,
        points,
        table,
        quant_bits: bits,
        zero,
        scales,
        unit,
    }
}

/// Half-precision bits with the sign flipped: offsets are stored to be subtracted.
fn negated(bits: u16) -> u16 {
    bits ^ 0x8000
}

/// 64 bytes to 256 2-bit values: 32 bytes hold bits of four runs of 32.
fn two_bits(bytes: &[u8], out: &mut [u8; 256]) {
    for (half, bytes) in bytes.chunks_exact(32).enumerate() {
        for shift in 0..4 {
            let run = &mut out[128 * half + 32 * shift..][..32];
            for (q, b) in run.iter_mut().zip(bytes) {
                *q = b >> (2 * shift) & 3;
            }
        }
    }
}

/// Adds bit `i` of each of 32 bytes to run `i` of 32 values.
fn high_bits(bytes: &[u8], shift: u32, out: &mut [u8; 256]) {
    for (i, run) in out.chunks_exact_mut(32).enumerate() {
        for (q, b) in run.iter_mut().zip(bytes) {
            *q |= (b >> i & 1) << shift;
        }
    }
}

/// Eight 6-bit scales and eight 6-bit offsets from 12 bytes.
fn six_bits(bytes: &[u8], out: &mut Block) {
    for i in 0..4 {
        (out.scales[i], out.offsets[i]) = (bytes[i] & 63, bytes[i + 4] & 63);
        out.scales[i + 4] = bytes[i + 8] & 15 | bytes[i] >> 6 << 4;
        out.offsets[i + 4] = bytes[i + 8] >> 4 | bytes[i + 4] >> 6 << 4;
    }
}

/// 128 bytes to 256 nibbles: 32 bytes hold the low nibbles of one run of 32, then the high of the next.
fn nibble_runs(bytes: &[u8], out: &mut [u8; 256]) {
    for (bytes, out) in bytes.chunks_exact(32).zip(out.chunks_exact_mut(64)) {
        super::nibbles(bytes, out);
    }
}

impl Format for Q2K {
    const ID: &'static str = "q2_k";
    const LAYOUT: Layout = superblock(84, 16, 2, 0, Scales::SubNibbles);

    fn explode(block: &[u8], out: &mut Block) {
        for (i, b) in block[..16].iter().enumerate() {
            (out.scales[i], out.offsets[i]) = (b & 15, b >> 4);
        }
        two_bits(&block[16..80], &mut out.quants);
        (out.d, out.m) = (u16_at(block, 80), negated(u16_at(block, 82)));
    }
}

impl Format for Q3K {
    const ID: &'static str = "q3_k";
    const LAYOUT: Layout = superblock(110, 16, 3, 4, Scales::Sub);

    fn explode(block: &[u8], out: &mut Block) {
        two_bits(&block[32..96], &mut out.quants);
        high_bits(&block[..32], 2, &mut out.quants);
        let packed = &block[96..108];
        for i in 0..16 {
            let low = packed[i % 8] >> (4 * (i / 8)) & 15;
            let high = packed[8 + i % 4] >> (2 * (i / 4)) & 3;
            out.scales[i] = (low | high << 4).wrapping_sub(32);
        }
        out.d = u16_at(block, 108);
    }
}

impl Format for Q4K {
    const ID: &'static str = "q4_k";
    const LAYOUT: Layout = superblock(144, 32, 4, 0, Scales::SubOffset);

    fn explode(block: &[u8], out: &mut Block) {
        (out.d, out.m) = (u16_at(block, 0), negated(u16_at(block, 2)));
        six_bits(&block[4..16], out);
        nibble_runs(&block[16..144], &mut out.quants);
    }
}

impl Format for Q5K {
    const ID: &'static str = "q5_k";
    const LAYOUT: Layout = superblock(176, 32, 5, 0, Scales::SubOffset);

    fn explode(block: &[u8], out: &mut Block) {
        (out.d, out.m) = (u16_at(block, 0), negated(u16_at(block, 2)));
        six_bits(&block[4..16], out);
        nibble_runs(&block[48..176], &mut out.quants);
        high_bits(&block[16..48], 4, &mut out.quants);
    }
}

impl Format for Q6K {
    const ID: &'static str = "q6_k";
    const LAYOUT: Layout = superblock(210, 16, 6, 32, Scales::Sub);

    fn explode(block: &[u8], out: &mut Block) {
        for half in 0..2 {
            let low = &block[64 * half..][..64];
            let high = &block[128 + 32 * half..][..32];
            let q = &mut out.quants[128 * half..][..128];
            super::nibbles(low, q);
            for (i, run) in q.chunks_exact_mut(32).enumerate() {
                for (q, b) in run.iter_mut().zip(high) {
                    *q |= (b >> (2 * i) & 3) << 4;
                }
            }
        }
        out.scales.copy_from_slice(&block[192..208]);
        out.d = u16_at(block, 208);
    }
}
