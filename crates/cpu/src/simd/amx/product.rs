//! The blocked product of packed activations and a matrix read as panels.
//!
//! Two bands of sixteen outputs are decoded for a chunk of the depth and then multiplied with all
//! rows, 32 at a time: four tiles of sums, two of activations, two of weights, so that every tile
//! loaded is used twice. A chunk is as deep as keeps its activations in the second-level cache;
//! sums of later chunks continue in the output.

use super::{Amx, Engine, Packed, Part, ROWS, Tile, Tiles, dots};
use crate::ColumnBand;
use crate::memory::grown;
use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
use std::cell::Cell;
use std::ops::Range;

/// A matrix that can be read as bf16 tiles of sixteen outputs.
pub trait Panels: Sync {
    /// Fills `out` with the tiles of a part from `start` on, a multiple of [`GRANULE`], along the
    /// inputs of `bands`, one or two of them, a band after the other. Inputs behind the last are
    /// zero; outputs behind the last are arbitrary.
    fn fill(&self, amx: Amx, part: Part, bands: Range<usize>, start: usize, out: &mut [Tile]);
}

/// Bytes of packed activations to keep in the second-level cache.
const CACHED_BYTES: usize = 1 << 20;
/// Fewest tiles of depth of a chunk.
const FEWEST: usize = 16;
/// Tiles that begin a chunk are a multiple of this: what formats are made of, 128 inputs, or a part
/// of it.
pub(crate) const GRANULE: usize = 4;
/// Bands multiplied together.
const TOGETHER: usize = 2;

thread_local! {
    static PANELS: Cell<Vec<Tile>> = const { Cell::new(Vec::new()) };
}

/// `bands` of `weights` times the sixteens of rows `blocks` of `x`, to `out`, which begins with the
/// first of either.
pub(crate) fn multiply(
    amx: Amx,
    weights: &dyn Panels,
    x: &Packed,
    blocks: Range<usize>,
    bands: Range<usize>,
    out: &mut ColumnBand<'_>,
) {
    let parts = x.parts.len();
    let chunk = CACHED_BYTES / (blocks.len().max(1) * parts * size_of::<Tile>());
    let chunk = chunk.max(FEWEST).min(x.depth);
    // Chunks of about one depth.
    let chunk = x.depth.div_ceil(x.depth.div_ceil(chunk.max(1)).max(1));
    let chunk = chunk.next_multiple_of(GRANULE);
    let mut panels = PANELS.take();
    let memory = grown(&mut panels, parts * TOGETHER * chunk, Tile::ZERO);
    let engine = amx.engine();
    for start in (0..x.depth).step_by(chunk.max(1)) {
        let len = chunk.min(x.depth - start);
        for band in bands.clone().step_by(TOGETHER) {
            let together = TOGETHER.min(bands.end - band);
            let panels = &mut memory[..parts * together * len];
            for (&part, out) in x.parts.iter().zip(panels.chunks_exact_mut(together * len)) {
                weights.fill(amx, part, band..band + together, start, out);
            }
            let first = band - bands.start;
            for block in blocks.clone().step_by(2) {
                let row = (block - blocks.start) * ROWS;
                let step = Step { engine: &engine, x, panels, start, len, block, row, first };
                match (blocks.end - block, together) {
                    (2.., 2) => step.run::<2, 2>(out),
                    (2.., _) => step.run::<2, 1>(out),
                    (_, 2) => step.run::<1, 2>(out),
                    _ => step.run::<1, 1>(out),
                }
            }
        }
    }
    drop(engine);
    PANELS.set(panels);
}

/// Tiles of one or two sixteens of rows, and of one or two sixteens of columns, to multiply.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub a: [*const Tile; 2],
    pub b: [*const Tile; 2],
    /// Tiles of depth.
    pub len: usize,
}

/// Adds the products of `M` rows and `N` columns of tiles to registers 0 (row 0, column 0), 1 (0, 1),
/// 2 (1, 0) and 3 (1, 1). Tiles of `b` are `step` apart.
///
/// # Safety
/// Every pointer in use must have as many tiles as the block is deep.
#[inline(always)]
unsafe fn inner<const M: usize, const N: usize>(t: &Tiles, block: Block, step: usize) {
    const STRIDE: usize = 64;
    let Block { a, b, len } = block;
    // Every register is loaded again right after its last use, so that little of the order has to be
    // changed by the processor to keep products going while loads are under way.
    // SAFETY: the caller's; the last tiles are not followed by more.
    unsafe {
        t.load::<4>(a[0].cast(), STRIDE);
        t.load::<6>(b[0].cast(), STRIDE);
        if M > 1 {
            t.load::<5>(a[1].cast(), STRIDE);
        }
        if N > 1 {
            t.load::<7>(b[1].cast(), STRIDE);
        }
        for k in 1..=len {
            let more = k < len;
            if more && k + 1 < len {
                prefetch(a[0].add(k + 1));
                if M > 1 {
                    prefetch(a[1].add(k + 1));
                }
            }
            t.add_bf16::<0, 4, 6>();
            if N > 1 {
                t.add_bf16::<1, 4, 7>();
            }
            if more {
                t.load::<4>(a[0].add(k).cast(), STRIDE);
            }
            if M > 1 {
                t.add_bf16::<2, 5, 6>();
            }
            if more {
                t.load::<6>(b[0].add(k * step).cast(), STRIDE);
            }
            if M > 1 && N > 1 {
                t.add_bf16::<3, 5, 7>();
            }
            if more && M > 1 {
                t.load::<5>(a[1].add(k).cast(), STRIDE);
            }
            if more && N > 1 {
                t.load::<7>(b[1].add(k * step).cast(), STRIDE);
            }
        }
    }
}

/// The same from the three parts of either: of every tile of depth the products that count, the
/// smallest first, so that sums do not depend on where chunks begin.
///
/// # Safety
/// Every pointer in use must have as many tiles as the blocks are deep.
#[inline(always)]
unsafe fn exact<const M: usize, const N: usize>(t: &Tiles, parts: [Block; 3]) {
    let a = |part: usize, k: usize| {
        // SAFETY: the caller's.
        unsafe {
            t.load::<4>(parts[part].a[0].add(k).cast(), 64);
            if M > 1 {
                t.load::<5>(parts[part].a[1].add(k).cast(), 64);
            }
        }
    };
    let b = |part: usize, k: usize| {
        // SAFETY: the caller's.
        unsafe {
            t.load::<6>(parts[part].b[0].add(k).cast(), 64);
            if N > 1 {
                t.load::<7>(parts[part].b[1].add(k).cast(), 64);
            }
        }
    };
    let add = || {
        t.add_bf16::<0, 4, 6>();
        if N > 1 {
            t.add_bf16::<1, 4, 7>();
        }
        if M > 1 {
            t.add_bf16::<2, 5, 6>();
        }
        if M > 1 && N > 1 {
            t.add_bf16::<3, 5, 7>();
        }
    };
    for k in 0..parts[0].len {
        a(0, k);
        b(2, k);
        add();
        b(1, k);
        add();
        a(1, k);
        add();
        b(0, k);
        add();
        a(2, k);
        add();
        a(0, k);
        add();
    }
}

/// Starts to bring a tile into the first-level cache.
#[inline(always)]
fn prefetch(tile: *const Tile) {
    for line in 0..size_of::<Tile>() / 64 {
        // SAFETY: a hint, which reads nothing, of an instruction every processor of this kind has.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(tile.cast::<i8>().wrapping_add(line * 64)) };
    }
}

/// Puts the products of `M` rows and `N` columns of tiles to `out`, or adds them to what is there: of one block, or of the three
/// parts of both factors. Tiles of `b` are `step` apart, rows of `out` `stride`.
///
/// # Safety
/// Every pointer in use must have as many tiles as the blocks are deep, and `out` room for whole tiles.
#[inline(always)]
pub(super) unsafe fn sums<const M: usize, const N: usize>(
    engine: &Engine,
    parts: &[Block],
    step: usize,
    out: *mut f32,
    stride: usize,
    add: bool,
) {
    let t = match engine {
        Engine::Registers(tiles) => tiles,
        // SAFETY: the engine proves the features; the rest is the caller's.
        Engine::Dots => return unsafe { dots::sums::<M, N>(parts[0], step, out, stride, add) },
    };
    let bytes = stride * size_of::<f32>();
    // SAFETY: the caller's.
    unsafe {
        let at = |m, n| out.add(m * ROWS * stride + n * ROWS).cast::<u8>();
        macro_rules! tiles {
            ($use:ident) => {
                $use!(0, 0, 0);
                if N > 1 {
                    $use!(1, 0, 1);
                }
                if M > 1 {
                    $use!(2, 1, 0);
                }
                if M > 1 && N > 1 {
                    $use!(3, 1, 1);
                }
            };
        }
        macro_rules! begin {
            ($t:literal, $m:literal, $n:literal) => {
                match add {
                    true => t.load::<$t>(at($m, $n), bytes),
                    false => t.zero::<$t>(),
                }
            };
        }
        macro_rules! end {
            ($t:literal, $m:literal, $n:literal) => {
                t.store::<$t>(at($m, $n), bytes)
            };
        }
        tiles!(begin);
        match *parts {
            [a, b, c] => exact::<M, N>(t, [a, b, c]),
            _ => inner::<M, N>(t, parts[0], step),
        }
        tiles!(end);
    }
}

/// Up to 32 rows times up to 32 outputs over one chunk.
struct Step<'a> {
    engine: &'a Engine,
    x: &'a Packed,
    panels: &'a [Tile],
    start: usize,
    len: usize,
    block: usize,
    /// First row in the output.
    row: usize,
    /// First band in the output.
    first: usize,
}

/// Sums on their way to an output that has no room for whole tiles.
#[repr(align(64))]
struct Edge([f32; 4 * ROWS * ROWS]);

impl Step<'_> {
    fn run<const M: usize, const N: usize>(&self, out: &mut ColumnBand<'_>) {
        let parts = [0, 1, 2].map(|part| self.tiles_of::<M, N>(part.min(self.x.parts.len() - 1)));
        let parts = &parts[..self.x.parts.len()];
        let (engine, add) = (self.engine, self.start > 0);
        let (stride, column) = (out.stride(), self.first * ROWS);
        let rows = (self.x.rows - self.block * ROWS).min(M * ROWS);
        let width = out.row(self.row).len() - column;
        if rows == M * ROWS && width >= N * ROWS {
            let sums_at = out.row(self.row)[column..].as_mut_ptr();
            // SAFETY: the blocks hold `len` tiles, and whole tiles of sums exist in the output.
            return unsafe { sums::<M, N>(engine, parts, 1, sums_at, stride, add) };
        }
        let (width, apart) = (width.min(N * ROWS), N * ROWS);
        let mut edge = Edge([0.0; 4 * ROWS * ROWS]);
        if add {
            for (r, edge) in edge.0.chunks_exact_mut(apart).enumerate().take(rows) {
                edge[..width].copy_from_slice(&out.row(self.row + r)[column..][..width]);
            }
        }
        // SAFETY: as above; the edge has room for whole tiles.
        unsafe { sums::<M, N>(engine, parts, 1, edge.0.as_mut_ptr(), apart, add) };
        for (r, edge) in edge.0.chunks_exact(apart).enumerate().take(rows) {
            out.row(self.row + r)[column..][..width].copy_from_slice(&edge[..width]);
        }
    }

    /// The tiles to multiply, of one part.
    #[inline(always)]
    fn tiles_of<const M: usize, const N: usize>(&self, part: usize) -> Block {
        let a = |m| self.x.block(self.block + m, part, self.start)[..self.len].as_ptr();
        let b = |n| self.panels[(part * N + n) * self.len..][..self.len].as_ptr();
        Block { a: [a(0), a(M - 1)], b: [b(0), b(N - 1)], len: self.len }
    }
}
