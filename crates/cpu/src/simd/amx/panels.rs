//! Stored weights to bf16 tiles.

use super::pack::{narrow, transpose};
use super::{Amx, DEPTH, Panels, Part, ROWS, Tile};
use crate::simd::avx512::Avx512;
use crate::simd::float::{Element, Rows};
use crate::simd::tile::{Band, Format, GROUP, Source, Tiles};
use std::arch::x86_64::*;
use std::ops::Range;

/// A group of a band is a tile of weights.
const _: () = assert!(GROUP == DEPTH);

impl<F: Format> Panels for Tiles<F> {
    fn fill(&self, amx: Amx, part: Part, bands: Range<usize>, start: usize, out: &mut [Tile]) {
        let len = out.len() / bands.len();
        assert!(start + len <= self.groups());
        for (band, out) in bands.zip(out.chunks_exact_mut(len)) {
            // SAFETY: `amx` proves the features; the groups exist.
            unsafe {
                match part {
                    Part::Nearest => fill_groups(amx, |w| w, self.band(band), start, out),
                    part => fill_groups(amx, |w| part.of(w), self.band(band), start, out),
                }
            }
        }
    }
}

/// Groups from `start` on of a band, of every weight what `part` makes of it.
///
/// # Safety
/// The groups must exist.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn fill_groups<F: Format>(
    _: Amx,
    part: impl Fn(__m512) -> __m512,
    band: Band<'_, F>,
    start: usize,
    out: &mut [Tile],
) {
    let l = F::LAYOUT;
    // SAFETY: `amx` implies the features.
    let s = unsafe { Avx512::<true>::new() };
    for (i, tile) in out.iter_mut().enumerate() {
        let out = tile.0.as_mut_ptr();
        // SAFETY: the caller vouches for the groups; a tile has two registers for every column.
        unsafe {
            let q = band.quants(s, start + i, 0);
            let columns = 8 / l.subs();
            for sub in 0..l.subs() {
                let (scale, offset) = band.scales(s, start + i, sub, 0);
                for (j, &q) in q.iter().enumerate().skip(sub * columns).take(columns) {
                    let w = weights::<F>(q, scale, offset).map(&part);
                    _mm512_store_si512(out.add(32 * j).cast(), pair(w[0], w[1]));
                    _mm512_store_si512(out.add(32 * j + 16).cast(), pair(w[2], w[3]));
                }
            }
        }
    }
}

/// The four weights of every lane of a column.
#[inline(always)]
unsafe fn weights<F: Format>(q: __m512i, scale: __m512, offset: __m512) -> [__m512; 4] {
    // SAFETY: called with the features; registers only.
    unsafe {
        let l = F::LAYOUT;
        // Bytes 0, 1 and 3 moved to where byte 2 is; of a quant of eight bits, bytes 1 to 3 to byte 0.
        if l.quant_bits == 8 {
            let zero = _mm512_set1_ps(l.zero as f32);
            let three = _mm512_srli_epi32::<24>(q);
            return [
                byte::<F>(q, zero, scale, offset),
                byte::<F>(_mm512_srli_epi32::<8>(q), zero, scale, offset),
                byte::<F>(_mm512_srli_epi32::<16>(q), zero, scale, offset),
                byte::<F>(three, zero, scale, offset),
            ];
        }
        let origin = _mm512_set1_ps(-(128.0 + l.zero as f32));
        let origin = _mm512_fmadd_ps(origin, scale, offset);
        [
            small(_mm512_slli_epi32::<16>(q), scale, origin),
            small(_mm512_slli_epi32::<8>(q), scale, origin),
            small(q, scale, origin),
            small(_mm512_srli_epi32::<8>(q), scale, origin),
        ]
    }
}

/// The weight of the lowest byte.
#[inline(always)]
unsafe fn byte<F: Format>(q: __m512i, zero: __m512, scale: __m512, offset: __m512) -> __m512 {
    // SAFETY: called with the features; registers only.
    unsafe {
        let q = _mm512_cvtepi32_ps(_mm512_and_si512(q, _mm512_set1_epi32(255)));
        let w = _mm512_mul_ps(_mm512_sub_ps(q, zero), scale);
        if F::LAYOUT.has_offset() { _mm512_add_ps(w, offset) } else { w }
    }
}

/// The weight of a quant of up to seven bits in byte 2, which is where the bits of 1, 2, 4, … lie in
/// a float between 128 and 256: no conversion, one rounding.
#[inline(always)]
unsafe fn small(q: __m512i, scale: __m512, origin: __m512) -> __m512 {
    // SAFETY: called with the features; registers only.
    unsafe {
        let (mask, base) = (_mm512_set1_epi32(0x007f_0000), _mm512_set1_epi32(0x4300_0000));
        // (q & mask) | base
        let value = _mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0xea>(q, mask, base));
        _mm512_fmadd_ps(value, scale, origin)
    }
}

/// Two f32 rounded to bf16, the first in the low half of every lane.
#[inline(always)]
unsafe fn pair(first: __m512, second: __m512) -> __m512i {
    // SAFETY: called with the features; registers only.
    unsafe {
        let half = _mm512_set1_epi32(0x8000);
        let first = _mm512_add_epi32(_mm512_castps_si512(first), half);
        let second = _mm512_add_epi32(_mm512_castps_si512(second), half);
        // (second & mask) | first
        let mask = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        _mm512_ternarylogic_epi32::<0xea>(second, mask, _mm512_srli_epi32::<16>(first))
    }
}

impl<E: Element> Panels for Rows<'_, E> {
    fn fill(&self, amx: Amx, part: Part, bands: Range<usize>, start: usize, out: &mut [Tile]) {
        let len = out.len() / bands.len();
        for (band, out) in bands.zip(out.chunks_exact_mut(len)) {
            // SAFETY: `amx` proves the features.
            unsafe { fill_rows(amx, part, self, band, start, out) };
        }
    }
}

/// Tiles from `start` on of sixteen rows: pairs of inputs, transposed.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn fill_rows<E: Element>(
    _: Amx,
    part: Part,
    rows: &Rows<'_, E>,
    band: usize,
    start: usize,
    out: &mut [Tile],
) {
    // SAFETY: `amx` implies the features.
    let s = unsafe { Avx512::<true>::new() };
    for (i, tile) in out.iter_mut().enumerate() {
        let at = (start + i) * DEPTH;
        let mut pairs = [_mm512_setzero_ps(); ROWS];
        for (r, pairs) in pairs.iter_mut().enumerate() {
            let index = (band * ROWS + r).min(rows.out_features() - 1);
            let (row, scale) = (&rows.row(index)[at * E::BYTES..], rows.scale(index, at));
            // SAFETY: as many elements lie in the row.
            *pairs = unsafe { narrow::<E>(s, part, row.as_ptr(), row.len() / E::BYTES, scale) };
        }
        transpose(s, &mut pairs, tile);
    }
}
