//! Tiles without tile registers: the same products by `vdpbf16ps`, sums in vector registers.
//!
//! Eight rows by two bands are sixteen registers of sums; a step loads two registers of weights and broadcasts a pair of inputs of
//! each row, so products and not loads are what takes the time.

use super::product::Block;
use super::{ROWS, Tile};
use std::arch::x86_64::*;

/// Rows whose sums are in registers together.
const HELD: usize = 8;

/// Adds the products of `M` rows and `N` columns of tiles to `out`, or puts them there unless `add`. Tiles of `b` are `step`
/// apart, rows of `out` `stride`.
///
/// # Safety
/// The processor has AVX-512 with BF16; every pointer in use must have as many tiles as the block is deep, and `out` room for
/// whole tiles.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn sums<const M: usize, const N: usize>(
    block: Block,
    step: usize,
    out: *mut f32,
    stride: usize,
    add: bool,
) {
    for m in 0..M {
        for first in (0..ROWS).step_by(HELD) {
            // SAFETY: the caller's.
            unsafe {
                let out = out.add((m * ROWS + first) * stride);
                let mut sums = [[_mm512_setzero_ps(); N]; HELD];
                if add {
                    for (r, sums) in sums.iter_mut().enumerate() {
                        for (n, sum) in sums.iter_mut().enumerate() {
                            *sum = _mm512_loadu_ps(out.add(r * stride + n * ROWS));
                        }
                    }
                }
                let mut a = block.a[m].cast::<i32>().add(first * ROWS);
                let mut b = block.b.map(|b| b.cast::<i32>());
                for _ in 0..block.len {
                    for pair in 0..ROWS {
                        let mut w = [_mm512_setzero_si512(); N];
                        for (w, b) in w.iter_mut().zip(b) {
                            *w = _mm512_loadu_si512(b.add(pair * ROWS).cast());
                        }
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let x = _mm512_set1_epi32(a.add(r * ROWS + pair).read());
                            for (sum, w) in sums.iter_mut().zip(w) {
                                *sum = dot(*sum, x, w);
                            }
                        }
                    }
                    a = a.add(size_of::<Tile>() / 4);
                    b = b.map(|b| b.wrapping_add(step * size_of::<Tile>() / 4));
                }
                for (r, sums) in sums.iter().enumerate() {
                    for (n, sum) in sums.iter().enumerate() {
                        _mm512_storeu_ps(out.add(r * stride + n * ROWS), *sum);
                    }
                }
            }
        }
    }
}

/// `sum` and the products of two pairs of bf16 in every lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot(sum: __m512, x: __m512i, w: __m512i) -> __m512 {
    // SAFETY: changes of type only.
    let (x, w) = unsafe {
        (std::mem::transmute::<__m512i, __m512bh>(x), std::mem::transmute::<__m512i, __m512bh>(w))
    };
    _mm512_dpbf16_ps(sum, x, w)
}
