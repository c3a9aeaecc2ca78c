//! Integers of four bits in groups of 128, 64 or 32: `d (q - z)`. Codes: nibbles. Scales: `d` of every group, the
//! upper 24 bits of an f32, and `z` below them.

use super::{Decode, Parts, push_plane, word};
use cubecl::prelude::*;

/// Bytes of a block before its codes.
pub(super) const HEAD: usize = 4;

pub(super) fn split(block: &[u8], parts: &mut Parts) {
    parts.scales.push(word(block, 0));
    let codes: Vec<u8> = block[HEAD..].iter().flat_map(|b| [b & 15, b >> 4]).collect();
    push_plane(&mut parts.codes, &codes, 4);
}

/// The eight weights of `unit`, of which a group has `units`.
#[cube]
fn eight(codes: &[u32], scales: &[u32], unit: u32, #[comptime] units: u32) -> Array<f32> {
    let mut out = Array::<f32>::new(8usize);
    let word = codes[unit as usize];
    let scale = scales[(unit / units) as usize];
    let d = f32::reinterpret(scale & 0xffffff00u32);
    let z = f32::cast_from(scale & 255u32);
    #[unroll]
    for j in 0..8u32 {
        let q = (word >> (j * 4)) & 15u32;
        out[j as usize] = d * (f32::cast_from(q) - z);
    }
    out
}

/// Formats of one number of bits, each with the units of its groups; the module says what `eight` of a unit are.
macro_rules! in_groups {
    ($($name:ident: $units:tt),+) => {$(
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
    )+};
}
pub(super) use in_groups;

in_groups!(Int4G128: 16u32, Int4G64: 8u32, Int4G32: 4u32);
