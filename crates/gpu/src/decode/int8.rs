//! Integers of eight bits in groups of 128 or 32: `d (q - z)`. Codes: bytes. Scales: as four bits have them.

use super::int4::{HEAD, in_groups};
use super::{Decode, Parts, push_plane, word};
use cubecl::prelude::*;

pub(super) fn split(block: &[u8], parts: &mut Parts) {
    parts.scales.push(word(block, 0));
    push_plane(&mut parts.codes, &block[HEAD..], 8);
}

/// The eight weights of `unit`, of which a group has `units`.
#[cube]
fn eight(codes: &[u32], scales: &[u32], unit: u32, #[comptime] units: u32) -> Array<f32> {
    let mut out = Array::<f32>::new(8usize);
    let scale = scales[(unit / units) as usize];
    let d = f32::reinterpret(scale & 0xffffff00u32);
    let z = f32::cast_from(scale & 255u32);
    #[unroll]
    for w in 0..2u32 {
        let word = codes[(unit * 2 + w) as usize];
        #[unroll]
        for j in 0..4u32 {
            let q = (word >> (j * 8)) & 255u32;
            out[(w * 4 + j) as usize] = d * (f32::cast_from(q) - z);
        }
    }
    out
}

in_groups!(Int8G128: 16u32, Int8G32: 4u32);
