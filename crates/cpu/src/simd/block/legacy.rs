//! Blocks of 32 with a half-precision scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

use super::{legacy, nibbles, u16_at};
use crate::simd::tile::{Block, Format, Layout, Scales};

/// `d * (q - 8)`: d, 16 bytes of nibbles.
pub(crate) struct Q4_0;
/// `d * q + m`: d, m, 16 bytes of nibbles.
pub(crate) struct Q4_1;
/// `d * (q - 16)`: d, 32 fifth bits, 16 bytes of nibbles.
pub(crate) struct Q5_0;
/// `d * q + m`: d, m, 32 fifth bits, 16 bytes of nibbles.
pub(crate) struct Q5_1;
/// `d * q`: d, 32 signed bytes.
pub(crate) struct Q8_0;

/// Adds the fifth bits, one of a little-endian word per value.
fn fifth_bits(bits: &[u8], out: &mut [u8]) {
    let bits = u32::from_le_bytes([bits[0], bits[1], bits[2], bits[3]]);
    for (i, q) in out.iter_mut().enumerate() {
        *q |= ((bits >> i & 1) as u8) << 4;
    }
}

impl Format for Q4_0 {
    const ID: &'static str = "q4_0";
    const LAYOUT: Layout = legacy(18, 4, 8, Scales::Half);

    fn explode(block: &[u8], out: &mut Block) {
        out.d = u16_at(block, 0);
        nibbles(&block[2..18], &mut out.quants[..32]);
    }
}

impl Format for Q4_1 {
    const ID: &'static str = "q4_1";
    const LAYOUT: Layout = legacy(20, 4, 0, Scales::HalfOffset);

    fn explode(block: &[u8], out: &mut Block) {
        (out.d, out.m) = (u16_at(block, 0), u16_at(block, 2));
        nibbles(&block[4..20], &mut out.quants[..32]);
    }
}

impl Format for Q5_0 {
    const ID: &'static str = "q5_0";
    const LAYOUT: Layout = legacy(22, 5, 16, Scales::Half);

    fn explode(block: &[u8], out: &mut Block) {
        out.d = u16_at(block, 0);
        nibbles(&block[6..22], &mut out.quants[..32]);
        fifth_bits(&block[2..6], &mut out.quants[..32]);
    }
}

impl Format for Q5_1 {
    const ID: &'static str = "q5_1";
    const LAYOUT: Layout = legacy(24, 5, 0, Scales::HalfOffset);

    fn explode(block: &[u8], out: &mut Block) {
        (out.d, out.m) = (u16_at(block, 0), u16_at(block, 2));
        nibbles(&block[8..24], &mut out.quants[..32]);
        fifth_bits(&block[4..8], &mut out.quants[..32]);
    }
}

impl Format for Q8_0 {
    const ID: &'static str = "q8_0";
    const LAYOUT: Layout = legacy(34, 8, 128, Scales::Half);

    fn explode(block: &[u8], out: &mut Block) {
        out.d = u16_at(block, 0);
        for (q, b) in out.quants.iter_mut().zip(&block[2..34]) {
            *q = b ^ 0x80;
        }
    }
}
