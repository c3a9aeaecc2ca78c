//! IQ4_XS: `d (s - 32) L[q]`. Codes: nibbles. High: `s` of every 32 weights, bytes. Scales: `d` of every 256, f16. Supers:
//! the levels `L`, as IQ4_NL has them.

use super::iq4_nl::{self, levels};
use super::{Decode, Parts, byte, each, half, half_bits, low_f16, nibbles, push_plane, put_half};
use cubecl::prelude::*;
use marlin_tensor::Weight;

pub(crate) struct Iq4Xs;

pub(super) fn split(weight: &Weight, parts: &mut Parts) {
    each(weight, parts, |block: &[u8; 136], parts, i| {
        put_half(&mut parts.scales, i, half(block, 0));
        // Upper pairs in bytes 2 and 3, low nibbles in bytes 4 to 7.
        let high = half(block, 2);
        let scales: [u8; 8] = std::array::from_fn(|g| {
            let low = (block[4 + g / 2] >> (4 * (g % 2))) & 15;
            low | ((high >> (2 * g) & 3) as u8) << 4
        });
        push_plane(&mut parts.high, &scales, 8);
        for group in block[8..].chunks_exact(16) {
            push_plane(&mut parts.codes, &nibbles(group), 4);
        }
    });
    parts.supers = levels();
}

#[cube]
impl Decode for Iq4Xs {
    fn eight(codes: &[u32], high: &[u32], scales: &[u32], supers: &[u32], unit: u32) -> Array<f32> {
        let d = low_f16(half_bits(scales, unit / 32));
        let dl = d * (f32::cast_from(byte(high, unit / 4)) - 32.0);
        iq4_nl::eight(codes[unit as usize], dl, supers)
    }
}
