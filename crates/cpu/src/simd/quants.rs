//! Cached rows of 8 or 4 bits to f32; the layout is [`Rows`](crate::cache::Rows)'s.
// Other processors run the scalar bodies until someone writes their registers.
#![cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code))]

use super::vector::{Lanes, Work, run};
use crate::Level;
use crate::cache::{Bits, HADAMARD, HEAD};
use half::bf16;
use marlin_tensor::CACHE_GROUP;

/// Rows of `columns` columns from their bytes.
pub(crate) fn widen_quants(
    level: Level,
    bits: Bits,
    columns: usize,
    bytes: &[u8],
    out: &mut [f32],
) {
    run(level, Widen { bits, columns, bytes, out });
}

struct Widen<'a> {
    bits: Bits,
    columns: usize,
    bytes: &'a [u8],
    out: &'a mut [f32],
}

impl Work for Widen<'_> {
    fn scalar(self) {
        let (bits, mut bytes) = (self.bits, self.bytes);
        for row in self.out.chunks_exact_mut(self.columns) {
            for group in row.chunks_mut(CACHE_GROUP) {
                let (these, rest) = bytes.split_at(bits.group_bytes(group.len()));
                widen_group(bits, these, group);
                bytes = rest;
            }
        }
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(self) {
        let (bits, mut bytes) = (self.bits, self.bytes);
        for row in self.out.chunks_exact_mut(self.columns) {
            for group in row.chunks_mut(CACHE_GROUP) {
                let (these, rest) = bytes.split_at(bits.group_bytes(group.len()));
                bytes = rest;
                if group.len() < CACHE_GROUP {
                    widen_group(bits, these, group);
                    continue;
                }
                // SAFETY: a whole group has 32 quants behind its scale, and `group` 32 columns; 32 and 16
                // are whole registers.
                unsafe {
                    let (p, out) = (these.as_ptr().add(HEAD), group.as_mut_ptr());
                    let (scale, value, at) = head(these);
                    let (scale, value) = (L::splat(scale), L::splat(value));
                    let turned = HADAMARD[at].as_ptr();
                    match bits {
                        Bits::Eight => {
                            for i in (0..CACHE_GROUP).step_by(L::N) {
                                let quants = L::mul(scale, L::load_i8(p.add(i).cast()));
                                let large = L::mul(value, L::load(turned.add(i)));
                                L::store(out.add(i), L::add(quants, large));
                            }
                        }
                        Bits::Four => {
                            let eight = L::splat(8.0);
                            for i in (0..CACHE_GROUP / 2).step_by(L::N) {
                                let [low, high] = L::load_u4(p.add(i));
                                for (i, half) in [(i, low), (CACHE_GROUP / 2 + i, high)] {
                                    let quants = L::mul(scale, L::sub(half, eight));
                                    let large = L::mul(value, L::load(turned.add(i)));
                                    L::store(out.add(i), L::add(quants, large));
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Scale, and value and index of the largest column.
fn head(group: &[u8]) -> (f32, f32, usize) {
    let float = |at: usize| bf16::from_le_bytes([group[at], group[at + 1]]).to_f32();
    (float(0), float(2), usize::from(group[4]) % CACHE_GROUP)
}

fn widen_group(bits: Bits, bytes: &[u8], out: &mut [f32]) {
    let ((scale, large, at), quants) = (head(bytes), &bytes[HEAD..]);
    match bits {
        Bits::Eight => {
            out.iter_mut().zip(quants).for_each(|(o, q)| *o = scale * f32::from(*q as i8));
        }
        Bits::Four => {
            let (low, high) = out.split_at_mut(quants.len());
            let value = |q: u8| scale * (f32::from(q) - 8.0);
            low.iter_mut().zip(quants).for_each(|(o, q)| *o = value(q & 15));
            high.iter_mut().zip(quants).for_each(|(o, q)| *o = value(q >> 4));
        }
    }
    match out.len() {
        CACHE_GROUP => out.iter_mut().zip(&HADAMARD[at]).for_each(|(o, h)| *o += large * h),
        len => out[at.min(len - 1)] += large,
    }
}
