//! Integers under a scale and a zero point per block, both in one word: int4_g128 to int8_g32.

use super::u16_at;
use crate::simd::tile::{Block, Format, Layout, Scales};

/// `d (q - z)`, blocks of `GROUP`: z, d, pairs of nibbles.
pub(crate) struct Int4<const GROUP: usize>;
/// `d (q - z)`, blocks of `GROUP`: z, d, bytes.
pub(crate) struct Int8<const GROUP: usize>;

/// Bytes before the codes.
const HEAD: usize = 4;

const fn layout(group: usize, bits: u32) -> Layout {
    Layout {
        bytes: HEAD + group * bits as usize / 8,
        block: group,
        sub_block: 32,
        bits,
        points: None,
        table: None,
        quant_bits: bits,
        // The zero point of symmetric weights, which then have an offset of exactly 0.
        zero: 1 << (bits - 1),
        scales: Scales::ScaleZero,
        unit: 1.0,
    }
}

impl<const GROUP: usize> Format for Int4<GROUP> {
    const ID: &'static str = match GROUP {
        128 => "int4_g128",
        64 => "int4_g64",
        _ => "int4_g32",
    };
    const LAYOUT: Layout = layout(GROUP, 4);

    fn explode(block: &[u8], out: &mut Block) {
        (out.d, out.m) = (u16_at(block, 2), u16_at(block, 0));
        let pairs = out.quants[..GROUP].as_chunks_mut::<2>().0;
        for (pair, b) in pairs.iter_mut().zip(&block[HEAD..]) {
            *pair = [b & 15, b >> 4];
        }
    }
}

impl<const GROUP: usize> Format for Int8<GROUP> {
    const ID: &'static str = match GROUP {
        128 => "int8_g128",
        _ => "int8_g32",
    };
    const LAYOUT: Layout = layout(GROUP, 8);

    fn explode(block: &[u8], out: &mut Block) {
        (out.d, out.m) = (u16_at(block, 2), u16_at(block, 0));
        out.quants[..GROUP].copy_from_slice(&block[HEAD..]);
    }
}
