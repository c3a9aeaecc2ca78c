//! Ternary blocks of 256, `d * (q - 1)`: TQ1_0, TQ2_0.

use super::u16_at;
use crate::simd::tile::{Block, Format, Layout, Scales};

/// 52 bytes of base-3 digits, d; held as two bits a quant.
pub(crate) struct Tq1_0;
/// 64 bytes of 2-bit quants, d.
pub(crate) struct Tq2_0;

/// Bytes, the quant of their first digit and digits a byte: digits of a run of bytes follow each other, the highest
/// first.
const RUNS: [(std::ops::Range<usize>, usize, u32); 3] =
    [(0..32, 0, 5), (32..48, 160, 5), (48..52, 240, 4)];

impl Format for Tq1_0 {
    const ID: &'static str = "tq1_0";
    const LAYOUT: Layout = Layout { bytes: 54, ..Tq2_0::LAYOUT };

    fn explode(block: &[u8], out: &mut Block) {
        for (bytes, first, digits) in RUNS {
            let runs = out.quants[first..].chunks_exact_mut(bytes.len());
            for (digit, run) in (0..digits).zip(runs) {
                for (q, b) in run.iter_mut().zip(&block[bytes.clone()]) {
                    // A byte is a fraction of 256; what is left of it behind the higher digits, times three.
                    *q = ((u16::from(b.wrapping_mul(3u8.pow(digit))) * 3) >> 8) as u8;
                }
            }
        }
        out.d = u16_at(block, 52);
    }
}

impl Format for Tq2_0 {
    const ID: &'static str = "tq2_0";
    const LAYOUT: Layout = Layout {
        bytes: 66,
        block: 256,
        sub_block: 32,
        bits: 2,
        points: None,
        table: None,
        quant_bits: 2,
        zero: 1,
        scales: Scales::Half,
        unit: 1.0,
    };

    fn explode(block: &[u8], out: &mut Block) {
        for (half, bytes) in block[..64].chunks_exact(32).enumerate() {
            for i in 0..4 {
                let run = &mut out.quants[128 * half + 32 * i..][..32];
                for (q, b) in run.iter_mut().zip(bytes) {
                    *q = b >> (2 * i) & 3;
                }
            }
        }
        out.d = u16_at(block, 64);
    }
}
