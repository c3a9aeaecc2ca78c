//! Q5_K: `d s q - dmin m`. As Q4_K, with the fifth bits in a plane of single bits.

use super::q4_k::{codes, put_scales};
use super::{Decode, Parts, half_bits, low_f16, push_plane, word};
use cubecl::prelude::*;

pub(crate) struct Q5K;

pub(super) fn split(block: &[u8; 176], parts: &mut Parts, _: usize) {
    parts.supers.push(word(block, 0));
    put_scales(&block[4..16], parts);
    push_plane(&mut parts.codes, &codes(&block[48..]), 4);
    let bits: [u8; 256] = std::array::from_fn(|i| (block[16 + i % 32] >> (i / 32)) & 1);
    push_plane(&mut parts.high, &bits, 1);
}

#[cube]
impl Decode for Q5K {
    fn eight(codes: &[u32], high: &[u32], scales: &[u32], supers: &[u32], unit: u32) -> Array<f32> {
        let mut out = Array::<f32>::new(8usize);
        let word = codes[unit as usize];
        let bits = high[(unit / 4) as usize] >> ((unit % 4) * 8);
        let scale = half_bits(scales, unit / 4);
        let super_scale = supers[(unit / 32) as usize];
        let dl = low_f16(super_scale & 0xffffu32) * f32::cast_from(scale & 255u32);
        let ml = low_f16(super_scale >> 16u32) * f32::cast_from(scale >> 8u32);
        #[unroll]
        for j in 0..8u32 {
            let q = ((word >> (j * 4)) & 15u32) | (((bits >> j) & 1u32) << 4u32);
            out[j as usize] = dl * f32::cast_from(q) - ml;
        }
        out
    }
}
