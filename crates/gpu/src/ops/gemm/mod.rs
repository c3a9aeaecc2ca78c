//! Products of many rows on NVIDIA's tensor cores, weights in registers and rows in shared memory.
//!
//! * `wgmma.cu`: on Hopper GPUs four warps multiply 64 outputs with up to 128 columns in one instruction.
//! * `mma.cu`: everywhere else every warp multiplies by itself, sixteen outputs with eight columns.
//! * `common.cuh`: how both cut the work, and add it up.
//! * `trellis.cuh`: weights are decoded in registers, for any number of rows.
//! * `plain.cuh`: weights of row formats are decoded to halves first, a band of outputs at a time, which stays in the cache of the device.
//!
//! Up to 32 rows are read as halves and what these leave, as precise as the kernels for few rows; more are rounded to halves, and so are entries
//! of a routing, of which a tile has those that one expert is chosen for.

use super::exl3::{Trellis, generator, pair};
use super::matrix::RowMatrix;
use super::text::{Defines, Inputs, Text};
use super::tiles::Entries;
use crate::decode::{Decode, Format, with_format};
use crate::gpu::{Buffer, Gpu};
use crate::tune::Variant;
use cubecl::prelude::*;

/// Outputs of a block.
const OUTS: usize = 256;
/// Threads of a block that prepares rows.
const PREPARE: u32 = 128;
/// Parts of a block's sums in memory: a tile that others began, one that others end, one of its own.
const PARTS: usize = 3;
/// Weights that are decoded to halves at once: half of the cache.
const BAND_WEIGHTS: usize = 12 << 20;
/// Rows of heads up to which kernels that decode their matrices for each few rows are the faster.
const HEAD_ROWS: usize = 32;
/// Words of prepared entries of one launch.
const PREPARED_WORDS: usize = 16 << 20;

/// The instruction that multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Instruction {
    /// Of four warps together.
    Wgmma,
    /// Of one warp.
    Mma,
}

impl Instruction {
    /// The faster one that the device has.
    pub(crate) fn of(gpu: &Gpu) -> Option<Self> {
        match gpu.tensor_cores {
            true if gpu.warpgroups => Some(Self::Wgmma),
            true => Some(Self::Mma),
            false => None,
        }
    }

    /// What `variant` says.
    pub(crate) fn chosen(variant: Variant) -> Option<Self> {
        match variant {
            Variant::Halves | Variant::Many => Some(Self::Wgmma),
            Variant::Mma => Some(Self::Mma),
            _ => None,
        }
    }

    /// Rows of row formats up to which kernels that decode a matrix for each few rows are the faster.
    pub(crate) const fn few_plain_rows(self) -> usize {
        match self {
            Self::Wgmma => 4,
            Self::Mma => 16,
        }
    }

    /// Threads of a block that multiplies.
    fn threads(self) -> u32 {
        match self {
            Self::Wgmma => 640,
            Self::Mma => 256,
        }
    }

    /// Blocks of a multiprocessor that multiply with so many columns.
    fn resident(self, columns: usize) -> usize {
        if self == Self::Mma && columns == 32 { 2 } else { 1 }
    }
}

/// What a product is compiled for, besides its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    instruction: Instruction,
    k_tiles: usize,
    n_tiles: usize,
    inputs: usize,
    outputs: usize,
    width: usize,
    columns: usize,
    parts: usize,
    bias: bool,
    /// Of entries: how many share a row of inputs.
    grouped: Option<usize>,
    /// Matrices side by side, of which each row that follows another has the next one.
    heads: usize,
    activation: u32,
    brain: bool,
}

impl Shape {
    /// For `rows` rows; `most` is the most columns for which `wgmma` leaves registers.
    fn new(
        instruction: Instruction,
        inputs: usize,
        outputs: usize,
        width: usize,
        rows: usize,
        most: usize,
    ) -> Self {
        let (columns, parts) = match (rows, instruction) {
            (0..=16, Instruction::Mma) => (32, 2),
            (0..=32, _) => (64, 2),
            (33..=64, _) => (64, 1),
            (_, Instruction::Wgmma) => (most, 1),
            (_, Instruction::Mma) => (128, 1),
        };
        let k_tiles = inputs.next_multiple_of(128) / 16;
        let n_tiles = width.next_multiple_of(128) / 16;
        Self {
            instruction,
            k_tiles,
            n_tiles,
            inputs,
            outputs,
            width,
            columns,
            parts,
            bias: false,
            grouped: None,
            heads: 0,
            activation: 0,
            brain: false,
        }
    }

    fn tile(&self) -> usize {
        self.columns / self.parts
    }

    fn defines(&self) -> Vec<(&'static str, String)> {
        vec![
            ("WGMMA", u32::from(self.instruction == Instruction::Wgmma).to_string()),
            ("K_TILES", self.k_tiles.to_string()),
            ("N_TILES", self.n_tiles.to_string()),
            ("INPUTS", self.inputs.to_string()),
            ("OUTPUTS", self.outputs.to_string()),
            ("WIDTH", self.width.to_string()),
            ("N", self.columns.to_string()),
            ("PARTS", self.parts.to_string()),
            ("BIAS", u32::from(self.bias).to_string()),
            ("GROUPED", u32::from(self.grouped.is_some()).to_string()),
            ("SHARE", self.grouped.unwrap_or(1).to_string()),
            ("HEADS", self.heads.to_string()),
            ("ACTIVATION", self.activation.to_string()),
            ("BRAIN", u32::from(self.brain).to_string()),
        ]
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct TrellisText {
    shape: Shape,
    twice_bits: u32,
    generator: (u32, u32, bool),
}

impl Defines for TrellisText {
    const TEXT: &str = concat!(
        include_str!("../ptx.cuh"),
        include_str!("../halves.cuh"),
        include_str!("../exl3/codes.cuh"),
        include_str!("trellis.cuh"),
        include_str!("common.cuh"),
        include_str!("warpgroups.cuh"),
        include_str!("wgmma.cu"),
        include_str!("mma.cu")
    );

    fn defines(&self) -> Vec<(&'static str, String)> {
        let (multiplier, addend, mul1) = self.generator;
        let mut defines = self.shape.defines();
        defines.extend([
            ("TWICE_BITS", self.twice_bits.to_string()),
            ("MUL1", u32::from(mul1).to_string()),
            ("MULTIPLIER", format!("{multiplier}u")),
            ("ADDEND", format!("{addend}u")),
        ]);
        defines
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct PlainText(Shape);

impl Defines for PlainText {
    const TEXT: &str = concat!(
        include_str!("../ptx.cuh"),
        include_str!("../halves.cuh"),
        include_str!("plain.cuh"),
        include_str!("common.cuh"),
        include_str!("warpgroups.cuh"),
        include_str!("wgmma.cu"),
        include_str!("mma.cu")
    );

    fn defines(&self) -> Vec<(&'static str, String)> {
        self.0.defines()
    }
}

/// Rows of a product, or tiles of entries, as launches are told of them.
struct Operand<'a> {
    x: Inputs<'a>,
    /// Scales of inputs, which a trellis has.
    suh: &'a Buffer,
    /// What the launches are told: rows, or tiles that there may be.
    count: usize,
    /// Tiles.
    tiles: usize,
    order: &'a Buffer,
    table: Buffer,
    slots: &'a Buffer,
}

impl<'a> Operand<'a> {
    fn dense(gpu: &'a Gpu, x: Inputs<'a>, suh: &'a Buffer, rows: usize, shape: Shape) -> Self {
        let (none, tiles) = (&gpu.none, rows.div_ceil(shape.tile()));
        Self { x, suh, count: rows, tiles, order: none, table: none.clone(), slots: none }
    }

    /// Rows that a launch has room for.
    fn places(&self, shape: Shape) -> usize {
        let whole = shape.grouped.is_some() || shape.heads > 0;
        if whole { self.tiles * shape.tile() } else { self.count }
    }

    /// Rows in the order of the operand.
    fn prepare(&self, gpu: &Gpu, shape: Shape, defines: impl Defines) -> Buffer {
        let prepared = gpu.empty(self.tiles * shape.columns * shape.k_tiles * 8);
        let blocks = (self.places(shape) as u32, shape.k_tiles.div_ceil(8 * 4) as u32);
        let arrays =
            [self.x.x, self.x.up(gpu), self.suh, self.order, &self.table, self.slots, &prepared];
        let text = Text { function: "prepare", threads: PREPARE, defines };
        text.launch(gpu, blocks, &arrays, self.count as u64);
        prepared
    }

    /// Weights, scales of outputs and bias, multiplied into `out`.
    fn multiply(
        &self,
        gpu: &Gpu,
        [weights, svh, bias]: [&Buffer; 3],
        out: &Buffer,
        shape: Shape,
        defines: impl Defines,
    ) {
        let prepared = self.prepare(gpu, shape, defines.clone());
        self.product(gpu, [weights, &prepared, svh, bias], out, shape, defines);
    }

    /// The same with rows that were prepared.
    fn product(
        &self,
        gpu: &Gpu,
        [weights, rows, svh, bias]: [&Buffer; 4],
        out: &Buffer,
        shape: Shape,
        defines: impl Defines,
    ) {
        let units = shape.n_tiles.div_ceil(OUTS / 16) * self.tiles * (shape.k_tiles / 8);
        let blocks = gpu.multiprocessors() * shape.instruction.resident(shape.columns);
        let ranges = blocks.min(units);
        let partial = gpu.empty(ranges * PARTS * shape.tile() * OUTS);
        let text = Text { function: "multiply", threads: shape.instruction.threads(), defines };
        let (order, table, slots) = (self.order, &self.table, self.slots);
        let arrays = [weights, rows, svh, bias, order, table, slots, &partial, &gpu.counters, out];
        text.launch(gpu, (ranges as u32, 1), &arrays, self.count as u64);
    }
}

/// Columns for which `wgmma` leaves registers: words of other rates than four bits lie in several registers a lane.
fn most_columns(matrix: &Trellis) -> usize {
    if matrix.twice_bits == 8 { 128 } else { 96 }
}

/// Rows of a tile of entries.
pub(super) const ENTRIES: [u32; 2] = [64, 128];

/// Rows of a tile of entries, of experts that are chosen for `average` of them.
pub(super) fn entries_tile(matrix: &Trellis, average: usize) -> u32 {
    let [few, many] = ENTRIES;
    if average > few as usize && most_columns(matrix) == many as usize { many } else { few }
}

/// What the product with a matrix is compiled for.
fn trellis_text(
    matrix: &Trellis,
    bias: Option<&Buffer>,
    shape: Shape,
    activation: u32,
) -> TrellisText {
    let (k_tiles, n_tiles) = (matrix.padded_in / 16, matrix.padded_out / 16);
    let shape = Shape { k_tiles, n_tiles, bias: bias.is_some(), activation, ..shape };
    let (twice_bits, generator) = (matrix.twice_bits, generator(matrix.codebook));
    TrellisText { shape, twice_bits, generator }
}

/// `x: [rows, in_features]` times a trellis-coded matrix, rotations and bias included.
pub(super) fn trellis(
    gpu: &Gpu,
    instruction: Instruction,
    x: Inputs<'_>,
    matrix: &Trellis,
    bias: Option<&Buffer>,
    rows: usize,
) -> Buffer {
    let (outputs, most) = (matrix.out_features, most_columns(matrix));
    let shape = Shape::new(instruction, matrix.in_features, outputs, outputs, rows, most);
    let text = trellis_text(matrix, bias, shape, x.activation());
    let operand = Operand::dense(gpu, x, &matrix.suh, rows, text.shape);
    let out = gpu.empty(rows * outputs);
    let arrays = [&matrix.tiles, &matrix.svh, bias.unwrap_or(&gpu.none)];
    operand.multiply(gpu, arrays, &out, text.shape, text);
    out
}

/// Entries of `x`, in tiles of [`entries_tile`] rows, times their experts' matrices.
pub(super) fn trellis_entries(
    gpu: &Gpu,
    instruction: Instruction,
    x: Inputs<'_>,
    matrix: &Trellis,
    bias: Option<&Buffer>,
    entries: &Entries,
) -> Option<Buffer> {
    let grouped = entries.grouped.as_ref()?;
    let (outputs, columns) = (matrix.out_features, grouped.m as usize);
    let shape = Shape::new(instruction, matrix.in_features, outputs, outputs, columns, columns);
    let shape = Shape { columns, parts: 1, grouped: Some(entries.divisor), ..shape };
    let text = trellis_text(matrix, bias, shape, x.activation());
    let out = gpu.empty(entries.count * outputs);
    let step = (PREPARED_WORDS / (columns * matrix.padded_in / 2)).max(1);
    for done in (0..grouped.count).step_by(step) {
        let tiles = step.min(grouped.count - done);
        let operand = Operand {
            x,
            suh: &matrix.suh,
            count: tiles,
            tiles,
            order: &grouped.order,
            table: grouped.tiles.after(3 * done),
            slots: &entries.slots,
        };
        let arrays = [&matrix.tiles, &matrix.svh, bias.unwrap_or(&gpu.none)];
        operand.multiply(gpu, arrays, &out, text.shape, text);
    }
    Some(out)
}

/// `x: [rows, in_features]` times a matrix in a row format, plus the bias.
pub(crate) fn plain(
    gpu: &Gpu,
    instruction: Instruction,
    x: &Buffer,
    in_features: usize,
    matrix: &RowMatrix,
    bias: Option<&Buffer>,
    rows: usize,
) -> Buffer {
    let outputs = matrix.out_features;
    let band = (BAND_WEIGHTS / in_features.next_multiple_of(128) / OUTS).max(1) * OUTS;
    let of = |first: usize| {
        let width = band.min(outputs - first);
        let shape = Shape::new(instruction, in_features, outputs, width, rows, 96);
        Shape { bias: bias.is_some(), brain: matrix.format == Format::Bf16, ..shape }
    };
    let operand = Operand::dense(gpu, x.into(), &gpu.none, rows, of(0));
    let prepared = operand.prepare(gpu, of(0), PlainText(of(0)));
    let out = gpu.empty(rows * outputs);
    for first in (0..outputs).step_by(band) {
        let shape = of(first);
        let halves = halves(gpu, matrix, first, shape);
        let added = bias.map_or(gpu.none.clone(), |b| b.after(first));
        let arrays = [&halves, &prepared, &gpu.none, &added];
        operand.product(gpu, arrays, &out.after(first), shape, PlainText(shape));
    }
    out
}

/// Rows of heads, each times its own matrix, as precise as those of few rows; `None` where that is not for them.
pub(crate) fn heads(
    gpu: &Gpu,
    x: &Buffer,
    in_features: usize,
    matrix: &RowMatrix,
    rows: usize,
    heads: usize,
) -> Option<Buffer> {
    let (instruction, outputs) = (takes_heads(gpu, matrix, rows, heads)?, matrix.out_features);
    let shape = Shape::new(instruction, in_features, outputs, outputs, HEAD_ROWS, 0);
    let brain = matrix.format == Format::Bf16;
    let shape = Shape { n_tiles: outputs / 16, heads, brain, ..shape };
    let side_by_side = Shape { n_tiles: heads * outputs / 16, width: heads * outputs, ..shape };
    let halves = halves(gpu, matrix, 0, side_by_side);
    let operand = Operand::dense(gpu, x.into(), &gpu.none, rows, shape);
    let operand = Operand { tiles: heads * operand.tiles, ..operand };
    let out = gpu.empty(rows * heads * outputs);
    let arrays = [&halves, &gpu.none, &gpu.none];
    operand.multiply(gpu, arrays, &out, shape, PlainText(shape));
    Some(out)
}

/// What multiplies `rows` rows of heads.
pub(crate) fn takes_heads(
    gpu: &Gpu,
    matrix: &RowMatrix,
    rows: usize,
    heads: usize,
) -> Option<Instruction> {
    let weights = heads * matrix.out_features * (8 * matrix.units).next_multiple_of(128);
    let fits = matrix.out_features.is_multiple_of(16) && weights <= BAND_WEIGHTS;
    let is_halves = matches!(matrix.format, Format::F16 | Format::Bf16);
    Instruction::of(gpu).filter(|_| rows > HEAD_ROWS && fits && is_halves)
}

/// Outputs `first ..` of a matrix as halves, tile by tile, 16 bytes a lane: zeros where there is nothing.
fn halves(gpu: &Gpu, matrix: &RowMatrix, first: usize, shape: Shape) -> Buffer {
    let out = gpu.empty(shape.k_tiles * shape.n_tiles * 128);
    let total = shape.k_tiles / 2 * shape.n_tiles * 32;
    let (count, dim) = gpu.each(total);
    let [codes, high, scales, supers] = matrix.parts.each_ref().map(Buffer::arg);
    let (client, to, brain) = (&gpu.client, out.arg4(), shape.brain);
    let (first, width, units) = (first as u32, shape.width as u32, matrix.units as u32);
    let (pairs, n_tiles) = (shape.k_tiles as u32 / 2, shape.n_tiles as u32);
    with_format!(matrix.format, D => {
        // SAFETY: units past the end do nothing.
        unsafe {
            halves_kernel::launch_unchecked::<D>(
                client, count, dim, codes, high, scales, supers, to, first, width, units, pairs, n_tiles, brain,
            );
        }
    });
    out
}

/// A unit makes eight weights of two rows, its lane's part of two tiles.
#[cube(launch_unchecked)]
fn halves_kernel<D: Decode>(
    codes: &[u32],
    high: &[u32],
    scales: &[u32],
    supers: &[u32],
    out: &mut [Vector<u32, Const<4>>],
    first: u32,
    width: u32,
    units: u32,
    pairs: u32,
    n_tiles: u32,
    #[comptime] brain: bool,
) {
    let at = ABSOLUTE_POS as u32;
    let lane = at % 32;
    let pair = at / 32 % pairs;
    let n_tile = at / 32 / pairs;
    if n_tile < n_tiles {
        let unit = pair * 4 + lane % 4;
        let mut words = Array::<u32>::new(8usize);
        #[unroll]
        for half in 0..2u32 {
            let row = n_tile * 16 + lane / 4 + comptime!(half * 8);
            let there = row < width && unit < units;
            let place = select(there, (first + row) * units + unit, 0u32);
            let w = D::eight(codes, high, scales, supers, place);
            #[unroll]
            for i in 0..4u32 {
                let two = two_halves(
                    w[comptime!((2 * i) as usize)],
                    w[comptime!((2 * i + 1) as usize)],
                    brain,
                );
                words[comptime!((half * 4 + i) as usize)] = select(there, two, 0u32);
            }
        }
        #[unroll]
        for tile in 0..2u32 {
            // The first pair of both rows, then the second.
            let mut four = Vector::<u32, Const<4>>::new(0u32);
            #[unroll]
            for i in 0..4u32 {
                let from = comptime!((i % 2 * 4 + tile * 2 + i / 2) as usize);
                four.insert(comptime!(i as usize), words[from]);
            }
            out[(((pair * 2 + tile) * n_tiles + n_tile) * 32 + lane) as usize] = four;
        }
    }
}

/// Two values as halves in a word.
#[cube]
fn two_halves(a: f32, b: f32, #[comptime] brain: bool) -> u32 {
    if comptime!(brain) {
        // They were bf16.
        (u32::reinterpret(a) >> 16u32) | (u32::reinterpret(b) & 0xffff0000u32)
    } else {
        pair(a, b)
    }
}
