//! The block formats that have kernels: how each stored block comes apart. Layouts are
//! those of the decoders in `marlin_quant`, which define the values.

mod integer;
mod k_quants;
mod lattice;
mod legacy;
mod table;
mod ternary;

pub(crate) use integer::{Int4, Int8};
pub(crate) use k_quants::{Q2K, Q3K, Q4K, Q5K, Q6K};
pub(crate) use lattice::{Iq1M, Iq1S, Iq2S, Iq2Xs, Iq2Xxs, Iq3S, Iq3Xxs};
pub(crate) use legacy::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
pub(crate) use table::{Iq4Nl, Iq4Xs, Mxfp4, Nvfp4};
pub(crate) use ternary::{Tq1_0, Tq2_0};

use super::tile::{Layout, Scales};

/// Little-endian 16 bits at `at`.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Sixteen bytes to 32 values: low nibbles, then high nibbles.
fn nibbles(bytes: &[u8], out: &mut [u8]) {
    let (low, high) = out.split_at_mut(bytes.len());
    for ((b, l), h) in bytes.iter().zip(low).zip(high) {
        (*l, *h) = (b & 15, b >> 4);
    }
}

/// A 32-input block of unsigned quants.
const fn legacy(bytes: usize, bits: u32, zero: i32, scales: Scales) -> Layout {
    let (points, table, unit) = (None, None, 1.0);
    Layout {
        bytes,
        block: 32,
        sub_block: 32,
        bits,
        points,
        table,
        quant_bits: bits,
        zero,
        scales,
        unit,
    }
}
