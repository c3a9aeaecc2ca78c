//! Integers of four bits in groups of 128, 64 or 32: `d (q - z)`. Codes: nibbles. Scales: `d`, f16, and `z` above
//! it, of every group in one word.

use super::{Decode, Parts, half, low_f16, push_plane};
use cubecl::prelude::*;

/// Bytes of a block before its codes.
pub(super) const HEAD: usize = 3;

pub(super) fn split(block: &[u8], parts: &mut Parts) {
    put_scale(block, parts);
    let codes: Vec<u8> = block[HEAD..].iter().flat_map(|b| [b & 15, b >> 4]).collect();
    push_plane(&mut parts.codes, &codes, 4);
}

/// Scale and zero point of a block.
pub(super) fn put_scale(block: &[u8], parts: &mut Parts) {
    parts.scales.push(u32::from(half(block, 0)) | u32::from(block[2]) << 16);
}

/// The eight weights of `unit`, of which a group has `units`.
#[cube]
fn eight(codes: &[u32], scales: &[u32], unit: u32, #[comptime] units: u32) -> Array<f32> {
    let mut out = Array::<f32>::new(8usize);
    let word = codes[unit as usize];
    let scale = scales[(unit / units) as usize];
    let d = low_f16(scale & 0xffffu32);
    let z = f32::cast_from(scale >> 16u32);
    #[unroll]
    for j in 0..8u32 {
        let q = (word >> (j * 4)) & 15u32;
        out[j as usize] = d * (f32::cast_from(q) - z);
    }
    out
}

macro_rules! int4 {
    ($name:ident, $units:tt) => {
        pub(crate) struct $name;

        #[cube]
        impl Decode for $name {
            fn eight(
                codes: &[u32],
                _high: &[u32],
                scales: &[u32],
                _supers: &[u32],
                unit: u32,
            ) -> Array<f32> {
                eight(codes, scales, unit, $units)
            }
        }
    };
}

int4!(Int4G128, 16u32);
int4!(Int4G64, 8u32);
int4!(Int4G32, 4u32);
