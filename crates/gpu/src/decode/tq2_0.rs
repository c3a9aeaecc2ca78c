//! Ternary weights: `d (q - 1)`. Codes: pairs, those of TQ1_0 too. Scales: `d` of every 256 weights times the factor of
//! the matrix or expert where there is one, f32: `q - 1` is a sign or zero, so the order of the products is of no account.

use super::q2_k::two_bits;
use super::{Decode, Parts, each, half, push_plane};
use ::half::f16;
use cubecl::prelude::*;
use marlin_tensor::Weight;

pub(crate) struct Tq2_0;

pub(super) fn split(weight: &Weight, parts: &mut Parts) {
    let blocks_per_row = weight.in_features / 256;
    let factors = weight.part("scale").map(|scale| scale.bytes());
    let push = |parts: &mut Parts, codes: [u8; 256], d: u16, block: usize| {
        push_plane(&mut parts.codes, &codes, 2);
        let at = 4 * (block / blocks_per_row);
        let factor = factors.map_or(1.0, |bytes| f32::from_bits(super::word(bytes, at)));
        parts.scales.push((f16::from_bits(d).to_f32() * factor).to_bits());
    };
    if weight.format.starts_with("tq1_0") {
        each(weight, parts, |block: &[u8; 54], parts, i| {
            push(parts, std::array::from_fn(|n| digit(block, n)), half(block, 52), i);
        });
    } else {
        each(weight, parts, |block: &[u8; 66], parts, i| {
            push(parts, std::array::from_fn(|n| two_bits(block, n)), half(block, 64), i);
        });
    }
}

/// Weight `n` of a block of TQ1_0, whose bytes are fractions with digits to the base 3.
fn digit(block: &[u8; 54], n: usize) -> u8 {
    let (byte, k) = match n {
        0..160 => (n % 32, n / 32),
        160..240 => (32 + n % 16, (n - 160) / 16),
        _ => (48 + n % 4, (n - 240) / 4),
    };
    let fraction = block[byte].wrapping_mul(3u8.pow(k as u32));
    ((u16::from(fraction) * 3) >> 8) as u8
}

#[cube]
impl Decode for Tq2_0 {
    fn eight(
        codes: &[u32],
        _high: &[u32],
        scales: &[u32],
        _supers: &[u32],
        unit: u32,
    ) -> Array<f32> {
        let mut out = Array::<f32>::new(8usize);
        let pairs = codes[(unit / 2) as usize] >> ((unit % 2) * 16);
        let d = f32::reinterpret(scales[(unit / 32) as usize]);
        #[unroll]
        for j in 0..8u32 {
            let q = (pairs >> (j * 2)) & 3u32;
            out[j as usize] = d * (f32::cast_from(q) - 1.0);
        }
        out
    }
}
