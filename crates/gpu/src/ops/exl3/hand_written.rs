//! The product with a trellis in CUDA C++ (`trellis.cu`), for rows that all meet one matrix, and for entries of a routing, one by one or by
//! their experts.
//!
//! The weights of a tile are one operand of the tensor cores, formed in registers: as the format defines them, or, with the codebook `mul1`, as
//! the bytes that its weights are sums of, so that the cores add these up too, exactly. The other operand is four rows in two parts of eight or eleven
//! bits. Warps share a matrix evenly, in the order of its blocks of columns; how the work is parted follows from the matrix
//! and from how many rows there are: one, up to four or up to eight at a time.

use super::{Trellis, generator};
use crate::gpu::{Buffer, Gpu, LEFT};
use crate::ops::gemm::{self, Instruction};
use crate::ops::text::{Defines, Inputs, Text};
use crate::ops::tiles::{Entries, Rows};
use crate::tune::Variant;

/// Rows of a tile of entries by the kernel for few, at least and at most.
const TILE: (u32, u32) = (4, 8);
/// Warps of a block.
const WARPS: u32 = 8;
/// Blocks that a multiprocessor holds, unless tuning found better.
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
/// Pairs of tiles of inputs that a block of threads rotates for one row, from which on it takes more columns, and at most, of one matrix and of
/// entries: what registers and shared memory have room for.
const PAIRS_OF_BLOCK: usize = 32;
const MOST_PAIRS_OF_BLOCK: usize = 48;
const MOST_PAIRS_OF_ENTRIES: usize = 64;
/// Words of partial sums of entries by their experts: what the cache of a device holds beside weights.
const PARTIAL_WORDS: usize = 6 << 20;
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
    grouped: bool,
    share: usize,
    bias: bool,
    /// Tiles side by side that a warp takes, of the eight of a block of columns.
    tiles: usize,
    cut: Cut,
    resident: u32,
    activation: u32,
}

impl Defines for Shape {
    const TEXT: &str = concat!(
        include_str!("../ptx.cuh"),
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
            ("GROUPED", flag(self.grouped)),
            ("SHARE", self.share.to_string()),
            ("BIAS", flag(self.bias)),
            ("RANGES", self.cut.ranges.to_string()),
            ("NT", self.tiles.to_string()),
            ("BESIDE", self.cut.beside.to_string()),
            ("TOUCHED", self.cut.touched.to_string()),
            ("GROUPS", self.cut.groups.to_string()),
            ("RESIDENT", self.resident.to_string()),
            ("ACTIVATION", self.activation.to_string()),
        ]
    }
}

/// Rows of a tile of entries, of experts that are chosen for `average` of them.
pub(crate) fn entries_tile(matrix: &Trellis, average: usize) -> u32 {
    match average.next_power_of_two() as u32 {
        few if few <= TILE.1 => few.max(TILE.0),
        _ => gemm::entries_tile(matrix, average),
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
    let chosen = rows.dense().and_then(|rows| matrix.choices.of(rows));
    if chosen == Some(Variant::Portable) {
        return None;
    }
    let many = rows.dense().and_then(|rows| {
        let instruction = chosen.map_or_else(|| many(gpu, matrix, rows), Instruction::chosen)?;
        Some(gemm::trellis(gpu, instruction, x.into(), matrix, bias, rows))
    });
    let many = many.or_else(|| entries(gpu, x.into(), matrix, bias, rows));
    many.or_else(|| multiply_few(gpu, x.into(), &[(matrix, bias)], rows)?.pop())
}

/// Tiles of entries that are for the kernels of many rows.
fn entries(
    gpu: &Gpu,
    x: Inputs<'_>,
    matrix: &Trellis,
    bias: Option<&Buffer>,
    rows: &Rows,
) -> Option<Buffer> {
    let Rows::Entries(entries) = rows else { return None };
    entries.grouped.as_ref().filter(|grouped| gemm::ENTRIES.contains(&grouped.m))?;
    gemm::trellis_entries(gpu, Instruction::of(gpu)?, x, matrix, bias, entries)
}

/// What the rule says of a class of rows, or of every number of rows.
pub(super) fn rule(gpu: &Gpu, matrix: &Trellis, rows: Option<usize>) -> Variant {
    match rows {
        None => Variant::Resident { blocks: RESIDENT },
        Some(rows) => match many(gpu, matrix, rows) {
            Some(Instruction::Wgmma) => Variant::Many,
            Some(Instruction::Mma) => Variant::Mma,
            None => Variant::Few,
        },
    }
}

/// What multiplies a matrix for which `rows` rows are many.
fn many(gpu: &Gpu, matrix: &Trellis, rows: usize) -> Option<Instruction> {
    let small = matrix.padded_in * matrix.padded_out <= SMALL;
    let few = if small { FEW_ROWS_OF_SMALL } else { FEW_ROWS };
    Instruction::of(gpu).filter(|_| rows > few)
}

/// The same rows times several matrices, or stacks of as many, at once; `None` when the text is not for such rows, or the matrices differ in more
/// than their width.
pub(crate) fn multiply_many(
    gpu: &Gpu,
    x: Inputs<'_>,
    matrices: &[(&Trellis, Option<&Buffer>)],
    rows: &Rows,
) -> Option<Vec<Buffer>> {
    let each = matrices.iter().map(|(matrix, bias)| entries(gpu, x, matrix, *bias, rows));
    if let Some(outs) = each.collect() {
        return Some(outs);
    }
    let key = |(m, bias): &(&Trellis, Option<&Buffer>)| {
        (m.in_features, m.padded_in, m.twice_bits, m.codebook, bias.is_some())
    };
    let alike = matrices.windows(2).all(|two| key(&two[0]) == key(&two[1]));
    let fits = (1..=MOST_MATRICES).contains(&matrices.len())
        && !matches!(rows, Rows::Dense { rows } if *rows > FEW_ROWS);
    let few = |(matrix, _): &(&Trellis, Option<&Buffer>)| {
        let chosen = rows.dense().and_then(|rows| matrix.choices.of(rows));
        matches!(chosen, None | Some(Variant::Few))
    };
    let fits = fits && matrices.iter().all(few);
    if alike && fits { multiply_few(gpu, x, matrices, rows) } else { None }
}

fn multiply_few(
    gpu: &Gpu,
    x: Inputs<'_>,
    matrices: &[(&Trellis, Option<&Buffer>)],
    rows: &Rows,
) -> Option<Vec<Buffer>> {
    let entries = match rows {
        Rows::Dense { .. } => None,
        Rows::Entries(e) if e.grouped.as_ref().is_some_and(|g| g.m > TILE.1) => return None,
        Rows::Entries(entries) => Some(entries),
        Rows::Heads { .. } => return None,
    };
    let outputs: usize = matrices.iter().map(|(matrix, _)| matrix.padded_out).sum();
    let fits = gpu.tensor_cores && outputs <= LEFT / 2;
    if fits { launch(gpu, x, matrices, entries, rows.count()) } else { None }
}

/// How matrices are cut for the warps of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Cut {
    /// Blocks of columns that a block of threads takes side by side.
    beside: usize,
    /// Ranges of such a band's depth that a block of threads has, and all.
    shares: usize,
    ranges: usize,
    /// Bands, and runs of 128 inputs in them, that the ranges of a block of threads lie in at most.
    touched: usize,
    groups: usize,
}

impl Cut {
    /// Of `blocks` blocks of columns of each matrix, with `pairs` pairs of tiles each, for warps of which `abreast` share a block of threads' columns.
    /// Several experts `together` share the device: all ranges of a block of threads are then in one block of columns.
    fn new(
        gpu: &Gpu,
        blocks: &[usize],
        pairs: usize,
        abreast: usize,
        resident: u32,
        inline: bool,
        together: Option<usize>,
    ) -> Self {
        let (all, multiprocessors) = (blocks.iter().sum::<usize>(), gpu.multiprocessors());
        let at_once = resident as usize * multiprocessors;
        // Side by side they need fewer inputs, each of which a block of threads rotates for itself. No band lies in two matrices.
        let mut beside = 1;
        while inline
            && together.is_none()
            && beside < abreast
            && all * pairs > PAIRS_OF_BLOCK * at_once * beside
            && blocks[..blocks.len() - 1].iter().all(|n| n % (2 * beside) == 0)
        {
            beside *= 2;
        }
        let shares = abreast / beside;
        let units = all.div_ceil(beside) * pairs;
        let wanted = match together {
            Some(count) => {
                let whole = all * shares;
                let parts = WARPS_OF_ENTRIES * multiprocessors / (whole * count);
                whole * parts.max(if inline { pairs.div_ceil(MOST_PAIRS_OF_ENTRIES) } else { 1 })
            }
            // What shared memory has no room for comes in turns.
            None if inline => at_once * shares * units.div_ceil(MOST_PAIRS_OF_BLOCK * at_once),
            None => at_once * shares,
        };
        // Short enough that few bands are touched.
        let few = units.div_ceil((pairs * 3 / 4).max(1));
        let ranges = wanted.max(few).min(units);
        let longest = shares * units.div_ceil(ranges);
        let (touched, groups) = ((longest + pairs - 2) / pairs + 1, (longest + 2) / 4 + 1);
        Self { beside, shares, ranges, touched, groups }
    }

    /// Blocks of threads.
    fn count(&self) -> usize {
        self.ranges.div_ceil(self.shares)
    }

    /// Words of sums that these leave each other, of `blocks` blocks of columns.
    fn left(&self, blocks: usize) -> usize {
        (blocks.div_ceil(self.beside) + self.count()) * self.beside * 128
    }
}

/// At most [`MOST_ROWS`] rows where there are several matrices, but for entries; `None` when there is no room for sums that blocks of threads leave.
fn launch(
    gpu: &Gpu,
    x: Inputs<'_>,
    matrices: &[(&Trellis, Option<&Buffer>)],
    entries: Option<&Entries>,
    count: usize,
) -> Option<Vec<Buffer>> {
    let none = &gpu.none;
    let (first, first_bias) = matrices[0];
    let (multiplier, addend, mul1) = generator(first.codebook);
    let of = |f: &dyn Fn(&Trellis) -> usize| {
        std::array::from_fn(|i| matrices.get(i).map_or(0, |(matrix, _)| f(matrix)))
    };
    let k_tiles = first.padded_in / 16;
    let n_tiles: [usize; MOST_MATRICES] = of(&|m| m.padded_out / 16);
    let blocks = n_tiles.iter().sum::<usize>() / 8;
    let grouped = entries.and_then(|e| e.grouped.as_ref());
    let inline = grouped.is_none() && (count == 1 || entries.is_some());
    // The states of a lane lie in three words or more with other rates, and halves need registers too.
    let slim = !mul1 || !matches!(first.twice_bits, 2 | 4 | 6 | 8);
    // Rows of a tile, operands of four that they fill, and tiles that there are registers for.
    let (tile, sets, tiles) = match (inline, grouped.map_or(count, |g| g.m as usize)) {
        (true, _) => (1, 1, if slim { 4 } else { 8 }),
        (false, 0..=4) => (4, 1, if slim { 4 } else { 8 }),
        (false, _) => (8, 2, if slim { 2 } else { 4 }),
    };
    let abreast = WARPS as usize * tiles / 8;
    let together = entries.map(|_| grouped.map_or(count, |g| g.count));
    let resident = match first.choices.every {
        // Sums depend on it; several matrices are parted as one, and entries share the device.
        Some(Variant::Resident { blocks }) if matrices.len() == 1 && entries.is_none() => blocks,
        _ => RESIDENT,
    };
    let blocks_of: Vec<usize> = matrices.iter().map(|(m, _)| m.padded_out / 128).collect();
    let cut = Cut::new(gpu, &blocks_of, k_tiles / 2, abreast, resident, inline, together);
    if inline && cut.left(blocks) > LEFT {
        return None;
    }
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
        grouped: grouped.is_some(),
        share: entries.map_or(1, |e| e.divisor),
        bias: first_bias.is_some(),
        tiles,
        cut,
        resident,
        activation: x.activation(),
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
    let (x, up) = (x.x, x.up(gpu));
    let outs_after = |done: usize| -> [Buffer; MOST_MATRICES] {
        std::array::from_fn(|i| match outs.get(i) {
            Some(out) => out.after(done * matrices[i].0.out_features),
            None => none.clone(),
        })
    };
    let (ids, slots) = entries.map_or((none, none), |e| (&e.ids, &e.slots));
    let groups = cut.count();
    if inline {
        let step = count.min(MOST_ENTRIES).min(LEFT / cut.left(blocks));
        for done in (0..count).step_by(step) {
            let here = step.min(count - done);
            let [o0, o1, o2] = &outs_after(done);
            let arrays = [
                t0, t1, t2, x, up, i0, i1, i2, s0, s1, s2, b0, b1, b2, ids, none, slots, &gpu.left,
                o0, o1, o2,
            ];
            run("multiply", 32 * WARPS, (groups, here), &arrays, done);
        }
        return Some(outs);
    }
    // Bytes of a row with sums of every 32 and scales of every 128, or two halves of every value.
    let row_words =
        if mul1 { first.padded_in / 2 + k_tiles / 2 + k_tiles / 8 } else { first.padded_in };
    let prepared = gpu.empty(matrices.len() * count * row_words);
    let arrays = [x, up, i0, i1, i2, ids, slots, &prepared];
    run("prepare", PREPARE, (first.padded_in / 128, matrices.len() * count), &arrays, count);
    let total = grouped.map_or(count.div_ceil(tile), |g| g.count);
    let tile_words = (blocks + cut.ranges) * tile * 128;
    let step = match grouped {
        Some(_) => (PARTIAL_WORDS / tile_words).max(1),
        None => MOST_ROWS / tile,
    };
    let step = step.min(total);
    let partial = gpu.empty(step * tile_words);
    for done in (0..total).step_by(step) {
        let here = step.min(total - done);
        // Tiles of entries find their rows themselves.
        let (inputs, outs, table, order, rows) = match grouped {
            Some(g) => (prepared.clone(), outs_after(0), g.tiles.after(3 * done), &g.order, count),
            None => {
                let rows = (here * tile).min(count - done * tile);
                let inputs = prepared.after(done * tile * row_words);
                (inputs, outs_after(done * tile), none.clone(), none, rows)
            }
        };
        let arrays = [
            t0, t1, t2, &inputs, none, none, none, none, none, none, none, none, none, none,
            &table, order, slots, &partial, none, none, none,
        ];
        run("multiply", 32 * WARPS, (groups, here), &arrays, rows);
        let rows = if grouped.is_some() { here * tile } else { rows };
        let [o0, o1, o2] = &outs;
        let arrays = [&partial, s0, s1, s2, b0, b1, b2, &table, order, slots, o0, o1, o2];
        run("finish", FINISH, (blocks, rows), &arrays, 0);
    }
    Some(outs)
}
