//! The blocked product of packed activations and a matrix read as panels.
//!
//! Two bands of sixteen outputs are decoded for a chunk of the depth and then multiplied with all
//! rows, 32 at a time: four tiles of sums, two of activations, two of weights, so that every tile
//! loaded is used twice. A chunk is as deep as keeps its activations in the second-level cache, and of that
//! as much is multiplied with all rows as keeps the two bands in the first. Sums lie side by side meanwhile;
//! to and from the output, whose rows are pages apart, they go several bands at a time.

use super::{Amx, Engine, Packed, Part, ROWS, Tile, Tiles, dots};
use crate::ColumnBand;
use crate::memory::grown;
use std::cell::Cell;
use std::ops::Range;

/// A matrix that can be read as bf16 tiles of sixteen outputs.
pub trait Panels: Sync {
    /// Fills `out` with the tiles of a part from `start` on, a multiple of [`GRANULE`], along the
    /// inputs of `bands`, one or two of them, a band after the other. Inputs behind the last are
    /// zero; outputs behind the last are arbitrary.
    fn fill(&self, amx: Amx, part: Part, bands: Range<usize>, start: usize, out: &mut [Tile]);
}

/// Most tiles of depth multiplied before the next rows: two bands of them stay in the first-level cache.
const SHALLOW: usize = 20;
/// Tiles that begin a chunk are a multiple of this: what formats are made of, 128 inputs, or a part
/// of it.
pub(crate) const GRANULE: usize = 4;
/// Bands multiplied together.
const TOGETHER: usize = 2;
/// Times as many go to the output together, so that of a row a kilobyte does.
const ABREAST: usize = 8;

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Memory of a call, kept by the thread.
#[derive(Default)]
struct Scratch {
    panels: Vec<Tile>,
    /// Sums of two bands after two, of each 32 rows by 32 columns after 32 rows.
    sums: Vec<Sums>,
}

/// Sums of up to 32 rows by up to 32 columns, on a few pages, which rows of an output are not.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Sums([[f32; TOGETHER * ROWS]; 2 * ROWS]);

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
    let (parts, chunk) = (x.parts.len(), x.chunk);
    let mut scratch = SCRATCH.take();
    let memory = grown(&mut scratch.panels, parts * TOGETHER * chunk, Tile::ZERO);
    let pairs = blocks.len().div_ceil(2).max(1);
    let sums = grown(&mut scratch.sums, ABREAST * pairs, Sums([[0.0; TOGETHER * ROWS]; 2 * ROWS]));
    let engine = amx.engine();
    let rows = x.rows.min(blocks.end * ROWS) - blocks.start * ROWS;
    for start in (0..x.depth).step_by(chunk) {
        let len = chunk.min(x.depth - start);
        for first in bands.clone().step_by(ABREAST * TOGETHER) {
            let group = first..bands.end.min(first + ABREAST * TOGETHER);
            let column = (first - bands.start) * ROWS;
            if start > 0 {
                carry(out, rows, column, sums, pairs, |out, sums| sums.copy_from_slice(out));
            }
            for (band, sums) in group.step_by(TOGETHER).zip(sums.chunks_exact_mut(pairs)) {
                let together = TOGETHER.min(bands.end - band);
                let panels = &mut memory[..parts * together * len];
                for (&part, out) in x.parts.iter().zip(panels.chunks_exact_mut(together * len)) {
                    weights.fill(amx, part, band..band + together, start, out);
                }
                let step = Step { engine: &engine, x, panels, start, len };
                let shallow = len.div_ceil(len.div_ceil(SHALLOW));
                for at in (0..len).step_by(shallow) {
                    let range = at..len.min(at + shallow);
                    for (block, sums) in blocks.clone().step_by(2).zip(&mut *sums) {
                        let range = range.clone();
                        match (blocks.end - block, together) {
                            (2.., 2) => step.run::<2, 2>(block, range, sums),
                            (2.., _) => step.run::<2, 1>(block, range, sums),
                            (_, 2) => step.run::<1, 2>(block, range, sums),
                            _ => step.run::<1, 1>(block, range, sums),
                        }
                    }
                }
            }
            carry(out, rows, column, sums, pairs, |out, sums| out.copy_from_slice(sums));
        }
    }
    drop(engine);
    SCRATCH.set(scratch);
}

/// Calls `copy` with pieces of a row of `out` from `column` on, as many as it has and `sums` are for, and their sums.
fn carry(
    out: &mut ColumnBand<'_>,
    rows: usize,
    column: usize,
    sums: &mut [Sums],
    pairs: usize,
    copy: impl Fn(&mut [f32], &mut [f32]),
) {
    for row in 0..rows {
        let out = out.row(row)[column..].chunks_mut(TOGETHER * ROWS);
        for (out, sums) in out.zip(sums.chunks_exact_mut(pairs)) {
            let sums = &mut sums[row / (2 * ROWS)].0[row % (2 * ROWS)];
            copy(out, &mut sums[..out.len()]);
        }
    }
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
/// 2 (1, 0) and 3 (1, 1). Tiles of `b` are `step` apart; those of `a` need not stay in the first-level cache if they are
/// read `ONCE`.
///
/// # Safety
/// Every pointer in use must have as many tiles as the block is deep.
#[inline(always)]
unsafe fn inner<const M: usize, const N: usize, const ONCE: bool>(
    t: &Tiles,
    block: Block,
    step: usize,
) {
    const STRIDE: usize = 64;
    let Block { a, b, len } = block;
    macro_rules! row {
        ($t:literal, $m:literal, $k:expr) => {
            match ONCE {
                true => t.load_once::<$t>(a[$m].add($k).cast(), STRIDE),
                false => t.load::<$t>(a[$m].add($k).cast(), STRIDE),
            }
        };
    }
    // Every register is loaded again right after its last use, so that little of the order has to be
    // changed by the processor to keep products going while loads are under way.
    // SAFETY: the caller's; the last tiles are not followed by more.
    unsafe {
        row!(4, 0, 0);
        t.load::<6>(b[0].cast(), STRIDE);
        if M > 1 {
            row!(5, 1, 0);
        }
        if N > 1 {
            t.load::<7>(b[1].cast(), STRIDE);
        }
        for k in 1..=len {
            let more = k < len;
            t.add_bf16::<0, 4, 6>();
            if N > 1 {
                t.add_bf16::<1, 4, 7>();
            }
            if more {
                row!(4, 0, k);
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
                row!(5, 1, k);
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

/// Puts the products of `M` rows and `N` columns of tiles to `out`, or adds them to what is there: of one block, or of the three
/// parts of both factors. Tiles of `b` are `step` apart, rows of `out` `stride`. `ONCE`: as of [`inner`].
///
/// # Safety
/// Every pointer in use must have as many tiles as the blocks are deep, and `out` room for whole tiles.
#[inline(always)]
pub(super) unsafe fn sums<const M: usize, const N: usize, const ONCE: bool>(
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
            _ => inner::<M, N, ONCE>(t, parts[0], step),
        }
        tiles!(end);
    }
}

/// Two bands over one chunk.
struct Step<'a> {
    engine: &'a Engine,
    x: &'a Packed,
    panels: &'a [Tile],
    start: usize,
    len: usize,
}

impl Step<'_> {
    /// Adds the products of tiles `range` of the chunk's depth, of up to 32 rows, to `to`; the first of all begin it.
    #[inline(always)]
    fn run<const M: usize, const N: usize>(
        &self,
        block: usize,
        range: Range<usize>,
        to: &mut Sums,
    ) {
        let count = self.x.parts.len();
        let parts = [0, 1, 2].map(|part| self.tiles_of::<M, N>(part.min(count - 1), block, &range));
        let add = self.start + range.start > 0;
        // SAFETY: the blocks hold the tiles of `range`, and there is room for 32 rows by 32 columns.
        unsafe {
            let to = to.0.as_mut_ptr().cast();
            sums::<M, N, true>(self.engine, &parts[..count], 1, to, TOGETHER * ROWS, add);
        }
    }

    /// The tiles to multiply, of one part.
    #[inline(always)]
    fn tiles_of<const M: usize, const N: usize>(
        &self,
        part: usize,
        block: usize,
        range: &Range<usize>,
    ) -> Block {
        let a = |m| self.x.block(block + m, part, self.start)[range.clone()].as_ptr();
        let b = |n| self.panels[(part * N + n) * self.len..][range.clone()].as_ptr();
        Block { a: [a(0), a(M - 1)], b: [b(0), b(N - 1)], len: range.len() }
    }
}
