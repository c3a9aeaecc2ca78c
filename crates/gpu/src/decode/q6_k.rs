//! Q6_K: `d s (q - 32)`. Codes: nibbles, with the upper bits in a plane of pairs. Scales: `s` of every 16
//! weights, signed bytes. Supers: `d` of every 256, f16.

use super::q2_k::two_bits;
use super::{Decode, Parts, half, half_bits, low_f16, push_plane, put_half};
use cubecl::prelude::*;

pub(crate) struct Q6K;

pub(super) fn split(block: &[u8; 210], parts: &mut Parts, i: usize) {
    // Weights 64 apart share a byte of low nibbles.
    let low: [u8; 256] =
        std::array::from_fn(|i| (block[i / 128 * 64 + i % 64] >> (4 * (i / 64 % 2))) & 15);
    push_plane(&mut parts.codes, &low, 4);
    let pairs: [u8; 256] = std::array::from_fn(|i| two_bits(&block[128..192], i));
    push_plane(&mut parts.high, &pairs, 2);
    push_plane(&mut parts.scales, &block[192..208], 8);
    put_half(&mut parts.supers, i, half(block, 208));
}

#[cube]
impl Decode for Q6K {
    fn eight(codes: &[u32], high: &[u32], scales: &[u32], supers: &[u32], unit: u32) -> Array<f32> {
        let mut out = Array::<f32>::new(8usize);
        let word = codes[unit as usize];
        let pairs = high[(unit / 2) as usize] >> ((unit % 2) * 16);
        let scale = ((scales[(unit / 8) as usize] >> ((unit / 2 % 4) * 8)) & 255u32) ^ 128u32;
        let dl = low_f16(half_bits(supers, unit / 32)) * (f32::cast_from(scale) - 128.0);
        #[unroll]
        for j in 0..8u32 {
            let q = ((word >> (j * 4)) & 15u32) | (((pairs >> (j * 2)) & 3u32) << 4u32);
            out[j as usize] = dl * (f32::cast_from(q) - 32.0);
        }
        out
    }
}
