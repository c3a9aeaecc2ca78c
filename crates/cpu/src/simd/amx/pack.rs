//! Activations as bf16 tiles.

use super::{Amx, DEPTH, Part, ROWS, Tile};
use crate::Pool;
use crate::memory::grown;
use crate::simd::avx512::Avx512;
use crate::simd::float::Element;
use crate::simd::isa::Isa;
use std::arch::x86_64::*;
use std::cell::Cell;

/// Rows of activations as bf16, zero-padded to whole tiles: for every sixteen rows and each of the
/// parts, the tiles one after another along the inputs.
pub(crate) struct Packed {
    tiles: Vec<Tile>,
    /// What they are the tiles of.
    pub parts: &'static [Part],
    /// Rows that exist.
    pub rows: usize,
    /// Tiles along the inputs.
    pub depth: usize,
}

thread_local! {
    /// Memory of the last call on this thread.
    static SCRATCH: Cell<Vec<Tile>> = const { Cell::new(Vec::new()) };
}

impl Packed {
    /// Packs `x: [rows, columns]`.
    pub(crate) fn new(amx: Amx, x: &[f32], columns: usize, pool: &Pool) -> Self {
        let rows = x.len() / columns;
        let depth = columns.div_ceil(DEPTH);
        let parts = amx.parts;
        let len = rows.div_ceil(ROWS) * parts.len() * depth;
        let mut tiles = SCRATCH.take();
        pool.run_chunks(grown(&mut tiles, len, Tile::ZERO), depth, |i, tiles| {
            let (block, part) = (i / parts.len(), parts[i % parts.len()]);
            let x = &x[block * ROWS * columns..];
            let x = &x[..x.len().min(ROWS * columns)];
            // SAFETY: `amx` proves the features; `tiles` has a tile for every 32 columns.
            unsafe { pack_rows(amx, part, x, columns, tiles) };
        });
        Self { tiles, parts, rows, depth }
    }

    /// Sixteens of rows.
    pub(crate) fn blocks(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    /// The tiles of a part of the `block`th sixteen rows from tile `start` on.
    pub(crate) fn block(&self, block: usize, part: usize, start: usize) -> &[Tile] {
        let first = (block * self.parts.len() + part) * self.depth;
        &self.tiles[first + start..first + self.depth]
    }
}

impl Drop for Packed {
    fn drop(&mut self) {
        SCRATCH.set(std::mem::take(&mut self.tiles));
    }
}

/// Packs up to sixteen rows; rows that do not exist become zeros.
///
/// # Safety
/// The processor has AVX-512 with BF16 and BW; `tiles` covers `columns`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn pack_rows(_: Amx, part: Part, x: &[f32], columns: usize, tiles: &mut [Tile]) {
    let rows = x.len() / columns;
    debug_assert!(rows <= ROWS && tiles.len() * DEPTH >= columns);
    for (i, tile) in tiles.iter_mut().enumerate() {
        let at = i * DEPTH;
        let left = (columns - at).min(DEPTH);
        let mask = u32::MAX >> (DEPTH - left);
        for (r, out) in tile.0.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            if r >= rows {
                out.fill(0);
                continue;
            }
            // SAFETY: the masks keep the loads inside row `r`; `out` is one register.
            unsafe {
                let x = x.as_ptr().add(r * columns + at);
                let low = _mm512_maskz_loadu_ps(mask as u16, x);
                let high = match left > 16 {
                    true => _mm512_maskz_loadu_ps((mask >> 16) as u16, x.add(16)),
                    false => _mm512_setzero_ps(),
                };
                let packed = _mm512_cvtne2ps_pbh(part.of(high), part.of(low));
                let packed = std::mem::transmute::<__m512bh, __m512i>(packed);
                _mm512_storeu_si512(out.as_mut_ptr().cast(), packed);
            }
        }
    }
}

/// `len` elements at `p`, of a row that ends there if they are fewer than 32, as bf16 and zeros; elements under scales
/// times `scale`.
///
/// # Safety
/// The processor has the features, of which `s` is a part; the elements must be readable.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(super) unsafe fn narrow<E: Element>(
    s: Avx512<true>,
    part: Part,
    p: *const u8,
    len: usize,
    scale: f32,
) -> __m512 {
    let mut tail = [0u8; DEPTH * 4];
    // SAFETY: the caller's; a short row is copied to where 32 elements can be read.
    unsafe {
        let p = match len >= DEPTH {
            true => p,
            false => {
                p.copy_to_nonoverlapping(tail.as_mut_ptr(), len * E::BYTES);
                tail.as_ptr()
            }
        };
        let (mut low, mut high) = (E::load(s, p), E::load(s, p.add(16 * E::BYTES)));
        if E::BLOCK.is_some() {
            let scale = s.splat(scale);
            (low, high) = (s.mul(low, scale), s.mul(high, scale));
        }
        std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(part.of(high), part.of(low)))
    }
}

/// Sixteen rows of 32 bf16 as a tile of weights: pairs of inputs, a row's in its column.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(super) fn transpose(s: Avx512<true>, rows: &mut [__m512; ROWS], out: &mut Tile) {
    s.transpose(rows);
    for (out, row) in out.0.chunks_exact_mut(16).zip(rows) {
        // SAFETY: sixteen words.
        unsafe { _mm512_store_ps(out.as_mut_ptr().cast(), *row) };
    }
}

/// `low` and `high` as bf16, the low one in the lower half of every 32-bit lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx512vl")]
pub(super) fn interleave(low: __m512, high: __m512) -> __m512i {
    // SAFETY: a change of type only.
    let (low, high) = unsafe {
        (
            std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(low)),
            std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(high)),
        )
    };
    let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high));
    _mm512_or_si512(high, _mm512_cvtepu16_epi32(low))
}
