//! Activations as bf16 tiles.

use super::{Amx, DEPTH, GRANULE, Part, ROWS, Tile};
use crate::Pool;
use crate::memory::grown;
use crate::simd::avx512::Avx512;
use crate::simd::float::Element;
use crate::simd::isa::Isa;
use std::arch::x86_64::*;
use std::cell::Cell;

/// Rows of activations as bf16, zero-padded to whole tiles: chunks of the depth one after another, in each all sixteens of
/// rows, of these each of the parts, and of a part the tiles along the inputs. A chunk of neighbouring rows lies in one piece
/// and so fits a cache, whatever the depth is a multiple of.
pub(crate) struct Packed {
    tiles: Vec<Tile>,
    /// What they are the tiles of.
    pub parts: &'static [Part],
    /// Rows that exist.
    pub rows: usize,
    /// Tiles along the inputs.
    pub depth: usize,
    /// Tiles along the inputs of a chunk; the last may have fewer.
    pub chunk: usize,
}

/// Bytes of a chunk of the rows that a thread multiplies, to keep in its second-level cache.
const CACHED_BYTES: usize = 1 << 20;
/// Fewest tiles of depth of a chunk.
const FEWEST: usize = 16;
/// Tiles of a row that are written before those of the next: whole lines of it are read one after another.
const ALONG: usize = 8;

thread_local! {
    /// Memory of the last call on this thread.
    static SCRATCH: Cell<Vec<Tile>> = const { Cell::new(Vec::new()) };
}

impl Packed {
    /// Packs `x: [rows, columns]`, of which `height` rows will be multiplied together.
    pub(crate) fn new(amx: Amx, x: &[f32], columns: usize, height: usize, pool: &Pool) -> Self {
        let rows = x.len() / columns;
        let depth = columns.div_ceil(DEPTH);
        let parts = amx.parts;
        let cached =
            CACHED_BYTES / (height.div_ceil(ROWS).max(1) * parts.len() * size_of::<Tile>());
        let cached = cached.max(FEWEST).min(depth).max(1);
        // Chunks of about one depth.
        let chunk = depth.div_ceil(depth.div_ceil(cached).max(1)).next_multiple_of(GRANULE);
        let blocks = rows.div_ceil(ROWS);
        let len = depth.div_ceil(chunk.max(1)) * blocks * parts.len() * chunk;
        let mut tiles = SCRATCH.take();
        pool.run_chunks(grown(&mut tiles, len, Tile::ZERO), chunk, |i, tiles| {
            let part = parts[i % parts.len()];
            let (first, block) = (i / parts.len() / blocks * chunk, i / parts.len() % blocks);
            let tiles = &mut tiles[..chunk.min(depth - first)];
            let x = &x[block * ROWS * columns..];
            let x = &x[..x.len().min(ROWS * columns)];
            // SAFETY: `amx` proves the features; the tiles are those of 32 columns each.
            unsafe { pack_rows(amx, part, x, columns, first, tiles) };
        });
        Self { tiles, parts, rows, depth, chunk }
    }

    /// Sixteens of rows.
    pub(crate) fn blocks(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    /// The tiles of a part of the `block`th sixteen rows in the chunk that begins with tile `start`.
    pub(crate) fn block(&self, block: usize, part: usize, start: usize) -> &[Tile] {
        let before = start * self.blocks() * self.parts.len();
        let first = before + (block * self.parts.len() + part) * self.chunk;
        &self.tiles[first..first + self.chunk.min(self.depth - start)]
    }
}

impl Drop for Packed {
    fn drop(&mut self) {
        SCRATCH.set(std::mem::take(&mut self.tiles));
    }
}

/// Packs columns of up to sixteen rows, those of tile `first` on; rows that do not exist become zeros.
///
/// # Safety
/// The processor has AVX-512 with BF16 and BW; every tile has columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn pack_rows(
    _: Amx,
    part: Part,
    x: &[f32],
    columns: usize,
    first: usize,
    tiles: &mut [Tile],
) {
    let rows = x.len() / columns;
    debug_assert!(rows <= ROWS && columns.div_ceil(DEPTH) >= first + tiles.len());
    for (group, tiles) in tiles.chunks_mut(ALONG).enumerate() {
        for r in 0..ROWS {
            for (i, tile) in tiles.iter_mut().enumerate() {
                let out = &mut tile.0.as_chunks_mut::<16>().0[r];
                if r >= rows {
                    out.fill(0);
                    continue;
                }
                let at = (first + group * ALONG + i) * DEPTH;
                let left = (columns - at).min(DEPTH);
                let mask = u32::MAX >> (DEPTH - left);
                // SAFETY: the masks keep the loads inside row `r`; `out` is one register.
                unsafe {
                    let x = x.as_ptr().add(r * columns + at);
                    let low = _mm512_maskz_loadu_ps(mask as u16, x);
                    let high = match left > 16 {
                        true => _mm512_maskz_loadu_ps((mask >> 16) as u16, x.add(16)),
                        false => _mm512_setzero_ps(),
                    };
                    let packed = narrowed(part.of(low), part.of(high));
                    _mm512_storeu_si512(out.as_mut_ptr().cast(), packed);
                }
            }
        }
    }
}

/// `low` and then `high` as bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn narrowed(low: __m512, high: __m512) -> __m512i {
    // SAFETY: a change of type only.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
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
        _mm512_castsi512_ps(narrowed(part.of(low), part.of(high)))
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
