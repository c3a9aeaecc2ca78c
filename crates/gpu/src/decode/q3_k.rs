//! Q3_K: `d (s - 32) (q - 4)`. Codes: pairs, with the third bits in a plane of single bits. Scales: `s` of every
//! 16 weights, bytes. Supers: `d` of every 256, f16.

use super::q2_k::two_bits;
use super::{Decode, Parts, half, half_bits, low_f16, push_plane, put_half};
use cubecl::prelude::*;

pub(crate) struct Q3K;

pub(super) fn split(block: &[u8; 110], parts: &mut Parts, i: usize) {
    let codes: [u8; 256] = std::array::from_fn(|i| two_bits(&block[32..96], i));
    push_plane(&mut parts.codes, &codes, 2);
    let bits: [u8; 256] = std::array::from_fn(|i| (block[i % 32] >> (i / 32)) & 1);
    push_plane(&mut parts.high, &bits, 1);
    // Low nibbles in bytes 0-7, upper pairs in bytes 8-11, four groups apart.
    let scales: [u8; 16] = std::array::from_fn(|g| {
        let low = (block[96 + g % 8] >> (4 * (g / 8))) & 15;
        low | ((block[104 + g % 4] >> (2 * (g / 4))) & 3) << 4
    });
    push_plane(&mut parts.scales, &scales, 8);
    put_half(&mut parts.supers, i, half(block, 108));
}

#[cube]
impl Decode for Q3K {
    fn eight(codes: &[u32], high: &[u32], scales: &[u32], supers: &[u32], unit: u32) -> Array<f32> {
        let mut out = Array::<f32>::new(8usize);
        let pairs = codes[(unit / 2) as usize] >> ((unit % 2) * 16);
        let bits = high[(unit / 4) as usize] >> ((unit % 4) * 8);
        let scale = (scales[(unit / 8) as usize] >> ((unit / 2 % 4) * 8)) & 255u32;
        let dl = low_f16(half_bits(supers, unit / 32)) * (f32::cast_from(scale) - 32.0);
        #[unroll]
        for j in 0..8u32 {
            let q = ((pairs >> (j * 2)) & 3u32) | (((bits >> j) & 1u32) << 2u32);
            out[j as usize] = dl * (f32::cast_from(q) - 4.0);
        }
        out
    }
}
