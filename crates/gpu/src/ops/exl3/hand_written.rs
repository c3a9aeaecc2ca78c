//! The product with a trellis in CUDA C++ (`trellis.cu`), for rows that all meet one matrix, and for entries of a routing
//! one by one.
//!
//! The weights of a tile are one operand of the tensor cores, formed in registers: as the format defines them, or, with the codebook `mul1`, as
//! the bytes that its weights are sums of, so that the cores add these up too, exactly. The other operand is four rows in two parts of eight or eleven
//! bits. Warps share a matrix evenly, in the order of its blocks of columns; how the work is parted follows from the matrix alone,
//! so a row's sums are the same in any company.

use super::{Trellis, generator};
use crate::gpu::{Buffer, COUNTERS, Gpu};
use crate::ops::hopper;
use crate::ops::text::{Defines, Text};
use crate::ops::tiles::{Launch, Rows};

/// Warps of a block.
const WARPS: u32 = 8;
/// Blocks that a multiprocessor holds.
const RESIDENT: u32 = 2;
/// Warps of a multiprocessor that entries share.
const WARPS_OF_ENTRIES: usize = 12;
/// Matrices over the same inputs that one launch takes.
const MOST_MATRICES: usize = 3;
/// Rows up to which a kernel for few is the faster, of small matrices and of others (`bench/gpu.md`).
const FEW_ROWS_OF_SMALL: usize = 128;
const FEW_ROWS: usize = 8;
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
    ranges: usize,
    /// Tiles side by side that a warp takes, of the eight of a block of columns.
    tiles: usize,
    touched: usize,
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
            ("NT", self.tiles.to_string()),
            ("TOUCHED", self.touched.to_string()),
            ("RESIDENT", RESIDENT.to_string()),
        ]
    }
}

/// `x: [.., in_features]` times a matrix or its stack, rotations and bias included; `None` when the text is not for such rows.
pub(super) fn multiply(
    gpu: &Gpu,
    x: &Buffer,
    matrix: &Trellis,
    bias: Option<&Buffer>,
    rows: &Rows,
) -> Option<Buffer> {
    match rows {
        Rows::Dense { rows } if gpu.warpgroups && *rows > few_rows(matrix) => {
            Some(hopper::trellis(gpu, x, matrix, bias, *rows))
        }
        _ => multiply_few(gpu, x, &[(matrix, bias)], rows)?.pop(),
    }
}

/// Rows that are few for a matrix, where there is a kernel for many.
fn few_rows(matrix: &Trellis) -> usize {
    if matrix.padded_in * matrix.padded_out <= SMALL { FEW_ROWS_OF_SMALL } else { FEW_ROWS }
}

/// The same rows times several matrices, or stacks of as many, at once; `None` when the text is not for such rows, or the matrices differ in more
/// than their width.
pub(crate) fn multiply_many(
    gpu: &Gpu,
    x: &Buffer,
    matrices: &[(&Trellis, Option<&Buffer>)],
    rows: &Rows,
) -> Option<Vec<Buffer>> {
    let key = |(m, bias): &(&Trellis, Option<&Buffer>)| {
        (m.in_features, m.padded_in, m.twice_bits, m.codebook, bias.is_some())
    };
    let alike = matrices.windows(2).all(|two| key(&two[0]) == key(&two[1]));
    let most = if gpu.warpgroups { FEW_ROWS } else { MOST_ROWS };
    let fits = (1..=MOST_MATRICES).contains(&matrices.len())
        && !matches!(rows, Rows::Dense { rows } if *rows > most);
    if alike && fits { multiply_few(gpu, x, matrices, rows) } else { None }
}

fn multiply_few(
    gpu: &Gpu,
    x: &Buffer,
    matrices: &[(&Trellis, Option<&Buffer>)],
    rows: &Rows,
) -> Option<Vec<Buffer>> {
    let entries = match rows {
        Rows::Dense { .. } => None,
        Rows::Entries(entries) if entries.grouped.is_none() && entries.count <= MOST_ENTRIES => {
            Some(rows.one_by_one(gpu))
        }
        _ => return None,
    };
    gpu.tensor_cores.then(|| launch(gpu, x, matrices, entries.as_ref(), rows.count()))
}

/// Ranges of `blocks` blocks of columns with `pairs` pairs of tiles each, and the blocks that those of a block of threads touch at most. Several
/// entries share the device: all ranges of a block of threads are then in one block of columns.
fn ranges(
    gpu: &Gpu,
    blocks: usize,
    pairs: usize,
    shares: usize,
    entries: Option<usize>,
) -> (usize, usize) {
    let (units, multiprocessors) = (blocks * pairs, gpu.multiprocessors());
    let wanted = match entries {
        Some(count) => {
            let whole = blocks * shares;
            whole * (WARPS_OF_ENTRIES * multiprocessors / (whole * count)).max(1)
        }
        None => RESIDENT as usize * shares * multiprocessors,
    };
    // Short enough that few blocks are touched.
    let few = units.div_ceil((pairs * 3 / 4).max(1));
    let ranges = wanted.max(few).min(units);
    let longest = shares * units.div_ceil(ranges);
    (ranges, (longest + pairs - 2) / pairs + 1)
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
    let (multiplier, addend, mul1) = generator(first.codebook);
    let of = |f: &dyn Fn(&Trellis) -> usize| {
        std::array::from_fn(|i| matrices.get(i).map_or(0, |(matrix, _)| f(matrix)))
    };
    let k_tiles = first.padded_in / 16;
    let n_tiles: [usize; MOST_MATRICES] = of(&|m| m.padded_out / 16);
    let blocks = n_tiles.iter().sum::<usize>() / 8;
    let inline = count == 1 || entries.is_some();
    // Rows of a tile, operands of four that they fill, and tiles that there are registers for.
    // The states of a lane lie in three words or more with other rates.
    let slim = !matches!(first.twice_bits, 2 | 4 | 6 | 8);
    let (tile, sets, tiles) = match (inline, count) {
        (true, _) => (1, 1, if slim { 4 } else { 8 }),
        (false, 0..=4) => (4, 1, if slim { 4 } else { 8 }),
        (false, _) => (8, 2, if slim { 2 } else { 4 }),
    };
    let shares = WARPS as usize * tiles / 8;
    let (ranges, touched) = ranges(gpu, blocks, k_tiles / 2, shares, entries.map(|_| count));
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
        tiles,
        touched,
    };
    let run = |function, threads, blocks: (usize, usize), arrays: &[&Buffer], word: usize| {
        let text = Text { function, threads, defines: shape };
        text.launch(gpu, (blocks.0 as u32, blocks.1 as u32), arrays, word as u64);
    };
    // An array of every matrix.
    let each = |f: fn(&Trellis) -> &Buffer| -> [&Buffer; MOST_MATRICES] {
        std::array::from_fn(|i| matrices.get(i).map_or(none, |(matrix, _)| f(matrix)))
    };
    let [[t0, t1, t2], [i0, i1, i2], [s0, s1, s2]] =
        [each(|m| &m.tiles), each(|m| &m.suh), each(|m| &m.svh)];
    let [b0, b1, b2] = std::array::from_fn(|i| {
        matrices.get(i).and_then(|(_, bias): &(_, Option<&Buffer>)| *bias).unwrap_or(none)
    });
    let outs: Vec<Buffer> =
        matrices.iter().map(|(m, _)| gpu.empty(count * m.out_features)).collect();
    let outs_after = |done: usize| -> [Buffer; MOST_MATRICES] {
        std::array::from_fn(|i| match outs.get(i) {
            Some(out) => out.after(done * matrices[i].0.out_features),
            None => none.clone(),
        })
    };
    let (ids, slots) = entries.map_or((none, none), |l| (&l.table, &l.slots));
    let groups = ranges.div_ceil(shares);
    if inline {
        let step = count.min(MOST_ENTRIES).min(COUNTERS / blocks);
        let partial = gpu.empty(step * (blocks + groups) * 128);
        for done in (0..count).step_by(step) {
            let here = step.min(count - done);
            let [o0, o1, o2] = &outs_after(done);
            let arrays = [
                t0,
                t1,
                t2,
                x,
                i0,
                i1,
                i2,
                s0,
                s1,
                s2,
                b0,
                b1,
                b2,
                ids,
                slots,
                &partial,
                &gpu.counters,
                o0,
                o1,
                o2,
            ];
            run("multiply", 32 * WARPS, (groups, here), &arrays, done);
        }
        return outs;
    }
    // Bytes of a row and a scale for every 128, or two halves of every value.
    let row_words = if mul1 { first.padded_in / 2 + k_tiles / 8 } else { first.padded_in };
    let prepared = gpu.empty(matrices.len() * count * row_words);
    let arrays = [x, i0, i1, i2, &prepared];
    run("prepare", PREPARE, (first.padded_in / 128, matrices.len() * count), &arrays, count);
    let step = MOST_ROWS.min(count);
    let partial = gpu.empty(step.div_ceil(tile) * (blocks + ranges) * tile * 128);
    for done in (0..count).step_by(step) {
        let here = step.min(count - done);
        let [o0, o1, o2] = &outs_after(done);
        let inputs = prepared.after(done * row_words);
        let arrays = [
            t0, t1, t2, &inputs, none, none, none, none, none, none, none, none, none, none, none,
            &partial, none, none, none, none,
        ];
        run("multiply", 32 * WARPS, (groups, here.div_ceil(tile)), &arrays, here);
        run("finish", FINISH, (blocks, here), &[&partial, s0, s1, s2, b0, b1, b2, o0, o1, o2], 0);
    }
    outs
}
