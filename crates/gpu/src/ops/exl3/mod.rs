//! Rows times a trellis-coded matrix, `y = x · diag(suh) · P · Ŵ · P · diag(svh)`: the inputs are rotated, multiplied with `Ŵ`
//! as it is decoded from its rings, and the outputs rotated back. What the format means stands in `marlin_quant::exl3`.
//!
//! A lane owns eight consecutive ring positions of a tile: four inputs of two outputs. Its eight windows of 16 bits lie in
//! two to five words; once these are shifted to its first bit, every window is at a constant place.
//!
//! * `embed`: rows of an embedding.
//! * `portable`: f32 products, for every runtime.
//! * `hand_written`: CUDA C++ for NVIDIA's tensor cores, whose operand the ring order is (many rows: `ops/gemm`).

mod embed;
mod hand_written;
mod portable;

pub(super) use portable::eight;

pub(crate) use embed::embed;
pub(crate) use hand_written::{entries_tile, multiply_many};

use super::tiles::{ABSENT, Mode, Rows, tile_in, tile_slot};
use crate::gpu::{Buffer, Gpu};
use crate::tune::{Choices, Variant};
use cubecl::prelude::*;
use half::f16;
use marlin_quant::exl3::Codebook;
use marlin_quant::exl3::codebook::{THREE_INST_ADDEND, THREE_INST_MULTIPLIER};

/// Width of a rotation.
const BLOCK: u32 = 128;

/// A trellis-coded matrix, or a stack of equal ones.
#[derive(Clone)]
pub(crate) struct Trellis {
    /// Tiles `[stack, padded_in / 16, padded_out / 16]`, each `4 · twice_bits` words.
    pub(crate) tiles: Buffer,
    /// `[stack, padded_in]`.
    pub(crate) suh: Buffer,
    /// `[stack, padded_out]`.
    pub(crate) svh: Buffer,
    pub(crate) padded_in: usize,
    pub(crate) padded_out: usize,
    pub(crate) in_features: usize,
    pub(crate) out_features: usize,
    /// Twice the bits per weight.
    pub(crate) twice_bits: u32,
    pub(crate) codebook: Codebook,
    pub(crate) choices: Choices,
}

/// What the rule says of a class of rows, or of every number of rows.
pub(crate) fn rule(gpu: &Gpu, matrix: &Trellis, rows: Option<usize>) -> Variant {
    match gpu.tensor_cores {
        true => hand_written::rule(gpu, matrix, rows),
        false => portable::rule(rows),
    }
}

/// `x: [.., in_features]` times the matrices: `[rows.count(), out_features]`, plus `bias` per output and matrix where there is
/// one.
pub(crate) fn multiply(
    gpu: &Gpu,
    x: &Buffer,
    matrix: &Trellis,
    bias: Option<&Buffer>,
    rows: &Rows,
) -> Buffer {
    if let Some(out) = hand_written::multiply(gpu, x, matrix, bias, rows) {
        return out;
    }
    let entries = rows.count();
    let single = rows.one_by_one(gpu);
    let (table, slots) = (&single.table, &single.slots);
    let (padded_in, padded_out) = (matrix.padded_in as u32, matrix.padded_out as u32);
    let (inputs, outputs) = (matrix.in_features as u32, matrix.out_features as u32);
    let (client, plane) = (&gpu.client, gpu.plane);
    let block = gpu.planes(BLOCK / plane);

    let rotated = gpu.empty(entries * matrix.padded_in);
    // SAFETY: columns past the last are read as zero; empty entries do nothing.
    unsafe {
        rotate_in::launch_unchecked(
            client,
            CubeCount::Static(padded_in / BLOCK, entries as u32, 1),
            block,
            x.arg(),
            matrix.suh.arg(),
            table.arg(),
            slots.arg(),
            rotated.arg(),
            inputs,
            padded_in,
            single.share,
            single.mode,
            plane,
        );
    }

    let product = portable::multiply(gpu, &rotated, matrix, rows);

    let out = gpu.empty(entries * matrix.out_features);
    let added = bias.unwrap_or(&gpu.none);
    // SAFETY: columns past the last are not written; empty entries do nothing.
    unsafe {
        rotate_out::launch_unchecked(
            client,
            CubeCount::Static(padded_out / BLOCK, entries as u32, 1),
            block,
            product.arg(),
            matrix.svh.arg(),
            added.arg(),
            table.arg(),
            slots.arg(),
            out.arg(),
            outputs,
            padded_out,
            single.share,
            single.mode,
            bias.is_some(),
            plane,
        );
    }
    out
}

/// Multiplier and addend of a codebook, and whether it is `mul1`.
pub(in crate::ops) fn generator(codebook: Codebook) -> (u32, u32, bool) {
    match codebook {
        Codebook::ThreeInst => (THREE_INST_MULTIPLIER, THREE_INST_ADDEND, false),
        Codebook::Mcg(multiplier) => (multiplier, 0, false),
        Codebook::Mul1(multiplier) => (multiplier, 0, true),
    }
}

/// `rotated = (x ∘ suh) · H / √128`, one cube per block of 128 columns and entry.
#[cube(launch_unchecked)]
fn rotate_in(
    x: &[f32],
    suh: &[f32],
    table: &[u32],
    slots: &[u32],
    rotated: &mut [f32],
    columns: u32,
    padded: u32,
    share: u32,
    #[comptime] mode: Mode,
    #[comptime] plane: u32,
) {
    let entry = CUBE_POS_Y;
    let slot = tile_slot(table, slots, entry, share, mode);
    if slot == comptime!(ABSENT) {
        terminate!();
    }
    let column = CUBE_POS_X * 128 + UNIT_POS;
    let row = tile_in(entry, share, mode);
    let mut v = f32::new(0.0);
    if column < columns {
        v = x[(row * columns + column) as usize] * suh[(slot * padded + column) as usize];
    }
    rotated[(entry * padded + column) as usize] = hadamard(v, plane);
}

/// Two values as f16 in a word.
#[cube]
pub(super) fn pair(a: f32, b: f32) -> u32 {
    let mut pair = Vector::<f16, Const<2>>::new(f16::new(0.0));
    pair.insert(0usize, f16::cast_from(a));
    pair.insert(1usize, f16::cast_from(b));
    u32::reinterpret(pair)
}

/// `out = (product · H / √128) ∘ svh + bias`, one cube per block of 128 columns and entry.
#[cube(launch_unchecked)]
fn rotate_out(
    product: &[f32],
    svh: &[f32],
    bias: &[f32],
    table: &[u32],
    slots: &[u32],
    out: &mut [f32],
    columns: u32,
    padded: u32,
    share: u32,
    #[comptime] mode: Mode,
    #[comptime] has_bias: bool,
    #[comptime] plane: u32,
) {
    let entry = CUBE_POS_Y;
    let slot = tile_slot(table, slots, entry, share, mode);
    if slot == comptime!(ABSENT) {
        terminate!();
    }
    let column = CUBE_POS_X * 128 + UNIT_POS;
    let v = hadamard(product[(entry * padded + column) as usize], plane);
    if column < columns {
        let mut y = v * svh[(slot * padded + column) as usize];
        if comptime!(has_bias) {
            y += bias[(slot * columns + column) as usize];
        }
        out[(entry * columns + column) as usize] = y;
    }
}

/// The unit's value of the cube's 128, rotated.
#[cube]
fn hadamard(value: f32, #[comptime] plane: u32) -> f32 {
    let mut shared = Shared::<[f32]>::new_slice(128usize);
    let unit = UNIT_POS;
    let mut v = value * 0.08838834764831845;
    #[unroll]
    for stage in 0..7u32 {
        let distance = comptime!(1u32 << stage);
        if comptime!(distance < plane) {
            let other = plane_shuffle_xor(v, distance.runtime());
            v = select(unit & distance == 0, v + other, other - v);
        } else {
            shared[unit as usize] = v;
            sync_cube();
            let other = shared[(unit ^ distance) as usize];
            v = select(unit & distance == 0, v + other, other - v);
            sync_cube();
        }
    }
    v
}
