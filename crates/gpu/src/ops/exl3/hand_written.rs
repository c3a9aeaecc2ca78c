//! The product with a trellis in CUDA C++ (`trellis.cu`), for rows that all meet one matrix, and for entries of a routing
//! one by one.
//!
//! The weights of a tile are one operand of one instruction of the tensor cores, formed in registers exactly as the format defines
//! them; the other operand is four rows, as f16 and what these leave. Warps share a matrix evenly, in the order of its blocks of
//! columns; a second kernel adds their sums up and rotates them. How the work is parted follows from the matrix alone,
//! so a row's sums are the same in any company.

use super::{Trellis, generator};
use crate::gpu::{Buffer, Gpu};
use crate::ops::hopper;
use crate::ops::text::{Defines, Text};
use crate::ops::tiles::{Launch, Rows};

/// Warps of a block.
const WARPS: u32 = 8;
/// Blocks that a multiprocessor holds.
const RESIDENT: u32 = 2;
/// Tiles side by side that a warp takes, of the eight of a block of columns.
const TILES: u32 = 4;
/// Ranges that a multiprocessor's warps take at once.
const RANGES: u32 = RESIDENT * WARPS * TILES / 8;
/// Matrices over the same inputs that one launch takes.
const MOST_MATRICES: usize = 3;
/// Rows up to which a kernel for few is the faster, of small matrices and of others (`bench/gpu.md`).
const FEW_ROWS_OF_SMALL: usize = 128;
const FEW_ROWS: usize = 16;
/// Weights up to which a matrix is small.
const SMALL: usize = 8 << 20;
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
    matrices: usize,
    n_tiles: [usize; MOST_MATRICES],
    inputs: usize,
    outputs: [usize; MOST_MATRICES],
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
    const TEXT: &str = concat!(
        include_str!("../halves.cuh"),
        include_str!("codes.cuh"),
        include_str!("trellis.cu")
    );

    fn defines(&self) -> Vec<(&'static str, String)> {
        let flag = |on: bool| u32::from(on).to_string();
        vec![
            ("K_TILES", self.k_tiles.to_string()),
            ("MATRICES", self.matrices.to_string()),
            ("N_TILES_0", self.n_tiles[0].to_string()),
            ("N_TILES_1", self.n_tiles[1].to_string()),
            ("N_TILES_2", self.n_tiles[2].to_string()),
            ("INPUTS", self.inputs.to_string()),
            ("OUTPUTS_0", self.outputs[0].to_string()),
            ("OUTPUTS_1", self.outputs[1].to_string()),
            ("OUTPUTS_2", self.outputs[2].to_string()),
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
    match entries {
        None if gpu.warpgroups && count > few_rows(matrix) => {
            Some(hopper::trellis(gpu, x, matrix, bias, count))
        }
        Some(_) if count > MOST_ENTRIES => None,
        entries => launch(gpu, x, &[(matrix, bias)], entries.as_ref(), count).pop(),
    }
}

/// Rows that are few for a matrix, where there is a kernel for many.
fn few_rows(matrix: &Trellis) -> usize {
    if matrix.padded_in * matrix.padded_out <= SMALL { FEW_ROWS_OF_SMALL } else { FEW_ROWS }
}

/// `rows` rows times several matrices at once; `None` when the text is not for such rows, or the matrices differ in more than their width.
pub(crate) fn multiply_many(
    gpu: &Gpu,
    x: &Buffer,
    matrices: &[(&Trellis, Option<&Buffer>)],
    rows: usize,
) -> Option<Vec<Buffer>> {
    let most = if gpu.warpgroups { FEW_ROWS } else { MOST_ROWS };
    let key = |(m, bias): &(&Trellis, Option<&Buffer>)| {
        (m.in_features, m.padded_in, m.twice_bits, m.codebook, bias.is_some())
    };
    let alike = matrices.windows(2).all(|two| key(&two[0]) == key(&two[1]));
    let fits = (1..=MOST_MATRICES).contains(&matrices.len()) && rows <= most;
    (gpu.tensor_cores && alike && fits).then(|| launch(gpu, x, matrices, None, rows))
}

/// At most [`MOST_ROWS`] rows where there are several matrices.
fn launch(
    gpu: &Gpu,
    x: &Buffer,
    matrices: &[(&Trellis, Option<&Buffer>)],
    entries: Option<&Launch>,
    count: usize,
) -> Vec<Buffer> {
    let none = &gpu.none;
    let (first, first_bias) = matrices[0];
    let step = if entries.is_some() { MOST_ENTRIES } else { MOST_ROWS };
    let (multiplier, addend, mul1) = generator(first.codebook);
    let of = |f: &dyn Fn(&Trellis) -> usize| {
        std::array::from_fn(|i| matrices.get(i).map_or(0, |(matrix, _)| f(matrix)))
    };
    let k_tiles = first.padded_in / 16;
    let n_tiles: [usize; MOST_MATRICES] = of(&|m| m.padded_out / 16);
    let blocks = n_tiles.iter().sum::<usize>() / 8;
    let units = (blocks * k_tiles) as u32;
    // Two steps at least are worth a warp.
    let ranges = (RANGES * gpu.multiprocessors() as u32).min(units / 2).max(1);
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
        matrices: matrices.len(),
        n_tiles,
        inputs: first.in_features,
        outputs: of(&|m| m.out_features),
        twice_bits: first.twice_bits,
        mul1,
        multiplier,
        addend,
        sets,
        inline,
        entries: entries.is_some(),
        share: entries.map_or(1, |l| l.share),
        bias: first_bias.is_some(),
        ranges,
    };
    let run = |function, threads, blocks: (usize, usize), arrays: &[&Buffer], word: usize| {
        let text = Text { function, threads, defines: shape };
        text.launch(gpu, (blocks.0 as u32, blocks.1 as u32), arrays, word as u64);
    };
    // An array of every matrix.
    let each = |f: fn(&Trellis) -> &Buffer| -> [&Buffer; MOST_MATRICES] {
        std::array::from_fn(|i| matrices.get(i).map_or(none, |(matrix, _)| f(matrix)))
    };
    let (ids, slots) = entries.map_or((none, none), |l| (&l.table, &l.slots));
    let [suh_0, suh_1, suh_2] = each(|m| &m.suh);
    // Two halves of every value.
    let row_words = first.padded_in;
    let rotated = match inline {
        true => x.clone(),
        false => {
            let rows = matrices.len() * count;
            let rotated = gpu.empty(rows * row_words);
            let arrays = [x, suh_0, suh_1, suh_2, &rotated];
            run("prepare", PREPARE, (first.padded_in / 128, rows), &arrays, count);
            rotated
        }
    };
    let outs: Vec<Buffer> =
        matrices.iter().map(|(m, _)| gpu.empty(count * m.out_features)).collect();
    let bias = |i: usize| matrices.get(i).and_then(|(_, bias)| *bias).unwrap_or(none);
    let warps = ranges as usize * 8 / TILES as usize;
    let tiles = count.min(step).div_ceil(tile);
    let partial = gpu.empty(tiles * (blocks + ranges as usize) * 4 * sets * 128);
    for done in (0..count).step_by(step) {
        let here = step.min(count - done);
        let grid = (warps.div_ceil(WARPS as usize), here.div_ceil(tile));
        let inputs = rotated.after(done * row_words);
        let [t0, t1, t2] = each(|m| &m.tiles);
        let arrays = [t0, t1, t2, &inputs, suh_0, suh_1, suh_2, ids, slots, &partial];
        run("multiply", 32 * WARPS, grid, &arrays, here);
        let [s0, s1, s2] = each(|m| &m.svh);
        let to: [Buffer; MOST_MATRICES] = std::array::from_fn(|i| match outs.get(i) {
            Some(out) => out.after(done * matrices[i].0.out_features),
            None => none.clone(),
        });
        let (b0, b1, b2) = (bias(0), bias(1), bias(2));
        let [o0, o1, o2] = &to;
        let arrays = [&partial, s0, s1, s2, b0, b1, b2, ids, slots, o0, o1, o2];
        run("finish", FINISH, (blocks, here), &arrays, 0);
    }
    outs
}
