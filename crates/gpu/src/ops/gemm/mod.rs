//! Products of many rows on NVIDIA's tensor cores, weights in registers and rows in shared memory.
//!
//! * `wgmma.cu`: on Hopper GPUs four warps multiply 64 outputs with up to 128 columns in one instruction.
//! * `mma.cu`: everywhere else every warp multiplies by itself, sixteen outputs with eight columns.
//! * `common.cuh`: how both cut the work, and add it up.
//! * `trellis.cuh`: weights are decoded in registers, for any number of rows.
//! * `plain.cuh`: weights of row formats are decoded to halves first, a band of outputs at a time, which stays in the cache of the device.
//!
//! Up to 32 rows are read as halves and what these leave, as precise as the kernels for few rows; more are rounded to halves.

use super::exl3::{Trellis, generator, pair};
use super::matrix::RowMatrix;
use super::text::{Defines, Text};
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
        let (bias, brain) = (false, false);
        Self { instruction, k_tiles, n_tiles, inputs, outputs, width, columns, parts, bias, brain }
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
        include_str!("../halves.cuh"),
        include_str!("../exl3/codes.cuh"),
        include_str!("trellis.cuh"),
        include_str!("common.cuh"),
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
        include_str!("../halves.cuh"),
        include_str!("plain.cuh"),
        include_str!("common.cuh"),
        include_str!("wgmma.cu"),
        include_str!("mma.cu")
    );

    fn defines(&self) -> Vec<(&'static str, String)> {
        self.0.defines()
    }
}

/// `x: [rows, in_features]` times a trellis-coded matrix, rotations and bias included.
pub(super) fn trellis(
    gpu: &Gpu,
    instruction: Instruction,
    x: &Buffer,
    matrix: &Trellis,
    bias: Option<&Buffer>,
    rows: usize,
) -> Buffer {
    // Words of other rates than four bits lie in several registers a lane, and leave too few for 128 columns.
    let most = if matrix.twice_bits == 8 { 128 } else { 96 };
    let outputs = matrix.out_features;
    let mut shape = Shape::new(instruction, matrix.in_features, outputs, outputs, rows, most);
    (shape.k_tiles, shape.n_tiles) = (matrix.padded_in / 16, matrix.padded_out / 16);
    shape.bias = bias.is_some();
    let (twice_bits, generator) = (matrix.twice_bits, generator(matrix.codebook));
    let text = TrellisText { shape, twice_bits, generator };
    let prepared = prepare(gpu, x, &matrix.suh, rows, shape, text);
    let out = gpu.empty(rows * outputs);
    let added = bias.unwrap_or(&gpu.none);
    product(gpu, [&matrix.tiles, &prepared, &matrix.svh, added], &out, rows, shape, text);
    out
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
    let prepared = prepare(gpu, x, &gpu.none, rows, of(0), PlainText(of(0)));
    let out = gpu.empty(rows * outputs);
    for first in (0..outputs).step_by(band) {
        let shape = of(first);
        let halves = halves(gpu, matrix, first, shape);
        let added = bias.map_or(gpu.none.clone(), |b| b.after(first));
        let arrays = [&halves, &prepared, &gpu.none, &added];
        product(gpu, arrays, &out.after(first), rows, shape, PlainText(shape));
    }
    out
}

/// Rows in the order of the operand.
fn prepare(
    gpu: &Gpu,
    x: &Buffer,
    suh: &Buffer,
    rows: usize,
    shape: Shape,
    defines: impl Defines,
) -> Buffer {
    let tiles = rows.div_ceil(shape.tile());
    let prepared = gpu.empty(tiles * shape.columns * shape.k_tiles * 8);
    let blocks = (rows as u32, shape.k_tiles.div_ceil(8 * 4) as u32);
    let text = Text { function: "prepare", threads: PREPARE, defines };
    text.launch(gpu, blocks, &[x, suh, &prepared], rows as u64);
    prepared
}

/// Weights, prepared rows, scales of outputs and bias, multiplied into `out`.
fn product(
    gpu: &Gpu,
    [weights, rows, svh, bias]: [&Buffer; 4],
    out: &Buffer,
    count: usize,
    shape: Shape,
    defines: impl Defines,
) {
    let tiles = count.div_ceil(shape.tile());
    let units = shape.n_tiles.div_ceil(OUTS / 16) * tiles * (shape.k_tiles / 8);
    let blocks = gpu.multiprocessors() * shape.instruction.resident(shape.columns);
    let ranges = blocks.min(units);
    let partial = gpu.empty(ranges * PARTS * shape.tile() * OUTS);
    let text = Text { function: "multiply", threads: shape.instruction.threads(), defines };
    let arrays = [weights, rows, svh, bias, &partial, &gpu.counters, out];
    text.launch(gpu, (ranges as u32, 1), &arrays, count as u64);
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
