//! The product with a trellis in CUDA C++ (`trellis.cu`), for rows that all meet one matrix, and for entries of a routing
//! one by one.
//!
//! The weights of a tile are one operand of one instruction of the tensor cores, formed in registers exactly as the format defines
//! them; the other operand is four rows, as f16 and what these leave. Warps share a matrix evenly, in the order of its blocks of
//! columns; a second kernel adds their sums up and rotates them. How the work is parted follows from the matrix alone,
//! so a row's sums are the same in any company.

use super::{Trellis, generator};
use crate::gpu::{Buffer, Gpu};
use crate::ops::text::{Defines, Text};
use crate::ops::tiles::Rows;

/// Warps of a block.
const WARPS: u32 = 8;
/// Blocks that a multiprocessor holds.
const RESIDENT: u32 = 2;
/// Tiles side by side that a warp takes, of the eight of a block of columns.
const TILES: u32 = 4;
/// Ranges that a multiprocessor's warps take at once.
const RANGES: u32 = RESIDENT * WARPS * TILES / 8;
/// Multiprocessors where a device does not say.
const MULTIPROCESSORS: u32 = 108;
/// Rows of one launch, which bounds the memory for partial sums.
const MOST_ROWS: usize = 64;
/// Entries of one launch.
const MOST_ENTRIES: usize = 256;
/// Threads of a block that rotates inputs, and of one that adds sums up.
const PREPARE: u32 = 32;
const FINISH: u32 = 256;

/// What `trellis.cu` is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    k_tiles: usize,
    n_tiles: usize,
    inputs: usize,
    outputs: usize,
    twice_bits: u32,
    mul1: bool,
    multiplier: u32,
    addend: u32,
    sets: usize,
    inline: bool,
    entries: bool,
    share: u32,
    bias: bool,
    ranges: u32,
}

impl Defines for Shape {
    const TEXT: &str = include_str!("trellis.cu");

    fn defines(&self) -> Vec<(&'static str, String)> {
        let flag = |on: bool| u32::from(on).to_string();
        vec![
            ("K_TILES", self.k_tiles.to_string()),
            ("N_TILES", self.n_tiles.to_string()),
            ("INPUTS", self.inputs.to_string()),
            ("OUTPUTS", self.outputs.to_string()),
            ("TWICE_BITS", self.twice_bits.to_string()),
            ("MUL1", flag(self.mul1)),
            ("MULTIPLIER", format!("{}u", self.multiplier)),
            ("ADDEND", format!("{}u", self.addend)),
            ("SETS", self.sets.to_string()),
            ("INLINE", flag(self.inline)),
            ("ENTRIES", flag(self.entries)),
            ("SHARE", self.share.to_string()),
            ("BIAS", flag(self.bias)),
            ("RANGES", self.ranges.to_string()),
            ("WARPS", WARPS.to_string()),
            ("NT", TILES.to_string()),
            ("RESIDENT", RESIDENT.to_string()),
        ]
    }
}

/// `x: [.., in_features]` times the matrices, rotations and bias included; `None` when the text is not for such rows.
pub(super) fn multiply(
    gpu: &Gpu,
    x: &Buffer,
    matrix: &Trellis,
    bias: Option<&Buffer>,
    rows: &Rows,
) -> Option<Buffer> {
    if !gpu.tensor_cores {
        return None;
    }
    let entries = match rows {
        Rows::Dense { .. } => None,
        Rows::Entries(entries) if entries.grouped.is_none() => Some(rows.one_by_one(gpu)),
        _ => return None,
    };
    let count = rows.count();
    let step = if entries.is_some() { MOST_ENTRIES } else { MOST_ROWS };
    if entries.is_some() && count > step {
        return None;
    }
    let (multiplier, addend, mul1) = generator(matrix.codebook);
    let (k_tiles, n_tiles) = (matrix.padded_in / 16, matrix.padded_out / 16);
    let blocks = n_tiles / 8;
    let units = (blocks * k_tiles) as u32;
    let multiprocessors = gpu.client.properties().hardware.num_streaming_multiprocessors;
    // Two steps at least are worth a warp.
    let ranges = (RANGES * multiprocessors.unwrap_or(MULTIPROCESSORS)).min(units / 2).max(1);
    let inline = count == 1 || entries.is_some();
    // Rows of a tile, and operands of four that they fill.
    let (tile, sets) = match (inline, count) {
        (true, _) => (1, 1),
        (false, 0..=4) => (4, 1),
        (false, 5..=8) => (8, 2),
        (false, _) => (16, 4),
    };
    let shape = Shape {
        k_tiles,
        n_tiles,
        inputs: matrix.in_features,
        outputs: matrix.out_features,
        twice_bits: matrix.twice_bits,
        mul1,
        multiplier,
        addend,
        sets,
        inline,
        entries: entries.is_some(),
        share: entries.as_ref().map_or(1, |l| l.share),
        bias: bias.is_some(),
        ranges,
    };

    let none = &gpu.none;
    let (ids, slots) = entries.as_ref().map_or((none, none), |l| (&l.table, &l.slots));
    let launch = |function, threads, blocks: (usize, usize), arrays: &[&Buffer], word: usize| {
        let text = Text { function, threads, defines: shape };
        text.launch(gpu, (blocks.0 as u32, blocks.1 as u32), arrays, word as u32);
    };
    // Two halves of every value.
    let row_words = matrix.padded_in;
    let rotated = match inline {
        true => x.clone(),
        false => {
            let rotated = gpu.empty(count * row_words);
            let arrays = [x, &matrix.suh, ids, slots, &rotated];
            launch("prepare", PREPARE, (matrix.padded_in / 128, count), &arrays, 0);
            rotated
        }
    };
    let out = gpu.empty(count * matrix.out_features);
    let added = bias.unwrap_or(none);
    let warps = ranges as usize * 8 / TILES as usize;
    let tiles = count.min(step).div_ceil(tile);
    let partial = gpu.empty(tiles * (blocks + ranges as usize) * 4 * sets * 128);
    for first in (0..count).step_by(step) {
        let here = step.min(count - first);
        let grid = (warps.div_ceil(WARPS as usize), here.div_ceil(tile));
        let inputs = rotated.after(first * row_words);
        let arrays = [&matrix.tiles, &inputs, &matrix.suh, ids, slots, &partial];
        launch("multiply", 32 * WARPS, grid, &arrays, here);
        let outputs = out.after(first * matrix.out_features);
        let arrays = [&partial, &matrix.svh, added, ids, slots, &outputs];
        launch("finish", FINISH, (blocks, here), &arrays, 0);
    }
    Some(out)
}
