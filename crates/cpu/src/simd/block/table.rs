//! Blocks whose quants index a table: IQ4_NL, IQ4_XS, MXFP4, NVFP4.

use super::{nibbles, u16_at};
use crate::simd::tile::{Block, Format, Layout, Scales};

/// `d * table[q]`: d, 16 bytes of nibbles.
pub(crate) struct Iq4Nl;
/// `d * (s - 32) * table[q]`, sub-blocks of 32: d, 16 high scale bits, 32 low scale bits, 128
/// bytes of nibbles.
pub(crate) struct Iq4Xs;
/// `2^(e - 128) * table[q]`: e, 16 bytes of nibbles.
pub(crate) struct Mxfp4;
/// `s * table[q]`, 64 a block in sub-blocks of 16: four s of type E4M3, four times 8 bytes of nibbles.
pub(crate) struct Nvfp4;

/// The non-linear levels of IQ4, plus 128.
static IQ4: [u8; 16] = [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241];

/// Twice the values of FP4 (E2M1), plus 12.
static FP4: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

impl Format for Iq4Nl {
    const ID: &'static str = "iq4_nl";
    const LAYOUT: Layout = Layout {
        bytes: 18,
        block: 32,
        sub_block: 32,
        bits: 4,
        points: None,
        table: Some(&IQ4),
        quant_bits: 8,
        zero: 128,
        scales: Scales::Half,
        unit: 1.0,
    };

    fn explode(block: &[u8], out: &mut Block) {
        out.d = u16_at(block, 0);
        nibbles(&block[2..18], &mut out.quants[..32]);
    }
}

impl Format for Iq4Xs {
    const ID: &'static str = "iq4_xs";
    const LAYOUT: Layout = Layout { bytes: 136, block: 256, scales: Scales::Sub, ..Iq4Nl::LAYOUT };

    fn explode(block: &[u8], out: &mut Block) {
        out.d = u16_at(block, 0);
        let high = u16_at(block, 2);
        for i in 0..8 {
            let low = block[4 + i / 2] >> (4 * (i % 2)) & 15;
            out.scales[i] = (low | ((high >> (2 * i) & 3) as u8) << 4).wrapping_sub(32);
            nibbles(&block[8 + 16 * i..][..16], &mut out.quants[32 * i..][..32]);
        }
    }
}

impl Format for Mxfp4 {
    const ID: &'static str = "mxfp4";
    const LAYOUT: Layout = Layout {
        bytes: 17,
        table: Some(&FP4),
        quant_bits: 5,
        zero: 12,
        scales: Scales::Exponent,
        ..Iq4Nl::LAYOUT
    };

    fn explode(block: &[u8], out: &mut Block) {
        out.d = block[0].into();
        nibbles(&block[1..17], &mut out.quants[..32]);
    }
}

impl Format for Nvfp4 {
    const ID: &'static str = "nvfp4";
    const LAYOUT: Layout = Layout {
        bytes: 36,
        block: 64,
        sub_block: 16,
        scales: Scales::E4m3,
        // The table is doubled, and scales are read as a 256th.
        unit: 128.0,
        ..Mxfp4::LAYOUT
    };

    fn explode(block: &[u8], out: &mut Block) {
        let (scales, codes) = block.split_at(4);
        for (scale, &stored) in out.scales.iter_mut().zip(scales) {
            // The sign is ignored, but what is no number elsewhere is zero without one.
            *scale = if stored == 0x7f { 0 } else { stored & 0x7f };
        }
        for (codes, quants) in codes.chunks_exact(8).zip(out.quants.chunks_exact_mut(16)) {
            nibbles(codes, quants);
        }
    }
}
