//! Products of many rows where a plane multiplies matrices of 8 by 8 by 8, as Apple's GPUs do: 64 outputs and up to 64 rows a cube.
//! Weights are decoded to halves in shared memory, a step of inputs at a time; sums are f32. Up to 32 rows are read as halves and what
//! these leave, more are rounded to halves.

use super::exl3::{Trellis, eight, generator};
use super::matrix::RowMatrix;
use super::tiles::{ABSENT, Launch, MOST, Mode, Rows, tile_in, tile_out, tile_rows, tile_slot};
use crate::decode::{Decode, F16, Format, with_format};
use crate::gpu::{Buffer, Gpu};
use cubecl::cmma::{self, Matrix, MatrixIdent, MatrixLayout};
use cubecl::prelude::*;
use half::f16;

/// Planes of a cube, each with outputs of its own.
const PLANES: u32 = 4;
/// Outputs of a cube.
const OUTS: u32 = 64;
/// Inputs at a time.
const STEP: u32 = 32;
/// Halves of a line in shared memory: a step, and what keeps eight lines in different banks.
const LINE: u32 = STEP + 8;
/// Most rows of a cube.
const ROWS: u32 = 64;
/// Rows of a cube that are read in two parts.
const PRECISE_ROWS: u32 = 32;
/// Side of a matrix.
const SIDE: u32 = 8;

/// What the rings of a trellis are decoded with; comptime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Ring {
    twice_bits: u32,
    mul1: bool,
    multiplier: u32,
    addend: u32,
}

/// The launch for `rows`, if they are more than what kernels for few take at a time.
fn launch(gpu: &Gpu, rows: &Rows) -> Option<Launch> {
    let many = match rows {
        Rows::Dense { rows } => *rows > MOST as usize,
        Rows::Heads { .. } => false,
        Rows::Entries(entries) => entries.grouped.as_ref().is_some_and(|g| g.m >= SIDE),
    };
    (gpu.simdgroup_matrices && many).then(|| rows.launch(gpu, ROWS))
}

/// Weights on the device.
struct Weights<'a> {
    parts: [&'a Buffer; 4],
    bias: Option<&'a Buffer>,
    outputs: usize,
    /// Units of eight inputs.
    units: usize,
    /// Of a trellis; no row format is read then.
    ring: Option<Ring>,
}

/// [`matrix::multiply`](super::matrix::multiply), where this serves. Halves are too coarse for f32.
pub(super) fn rows(
    gpu: &Gpu,
    x: &Buffer,
    matrix: &RowMatrix,
    bias: Option<&Buffer>,
    rows: &Rows,
) -> Option<Buffer> {
    let launch = launch(gpu, rows).filter(|_| matrix.format != Format::F32)?;
    let (parts, outputs) = (matrix.parts.each_ref(), matrix.out_features);
    let weights = Weights { parts, bias, outputs, units: matrix.units, ring: None };
    let out = gpu.empty(rows.count() * outputs);
    with_format!(matrix.format, D => multiply::<D>(gpu, x, &weights, &launch, &out));
    Some(out)
}

/// Rotated rows times a trellis, where this serves: `[rows.count(), padded_out]`.
pub(super) fn trellis(
    gpu: &Gpu,
    rotated: &Buffer,
    matrix: &Trellis,
    rows: &Rows,
) -> Option<Buffer> {
    let launch = launch(gpu, rows)?;
    // Every entry has a row of its own.
    let share = if launch.mode == Mode::Dense { launch.share } else { 1 };
    let launch = Launch { share, ..launch };
    let (multiplier, addend, mul1) = generator(matrix.codebook);
    let weights = Weights {
        parts: [&matrix.tiles, &gpu.none, &gpu.none, &gpu.none],
        bias: None,
        outputs: matrix.padded_out,
        units: matrix.padded_in / 8,
        ring: Some(Ring { twice_bits: matrix.twice_bits, mul1, multiplier, addend }),
    };
    let product = gpu.empty(rows.count() * matrix.padded_out);
    multiply::<F16>(gpu, rotated, &weights, &launch, &product);
    Some(product)
}

fn multiply<D: Decode>(gpu: &Gpu, x: &Buffer, weights: &Weights, launch: &Launch, out: &Buffer) {
    let outputs = weights.outputs as u32;
    let count = CubeCount::Static(outputs.div_ceil(OUTS), launch.tiles, 1);
    let [codes, high, scales, supers] = weights.parts.map(Buffer::arg);
    // SAFETY: outputs, inputs and rows past the last are read as zeros and not written.
    unsafe {
        multiply_kernel::launch_unchecked::<D>(
            &gpu.client,
            count,
            gpu.planes(PLANES),
            x.arg4(),
            codes,
            high,
            scales,
            supers,
            weights.bias.unwrap_or(&gpu.none).arg(),
            launch.table.arg(),
            launch.order.arg(),
            launch.slots.arg(),
            out.arg(),
            outputs,
            weights.units as u32,
            launch.rows,
            launch.share,
            launch.m,
            launch.mode,
            weights.bias.is_some(),
            weights.ring,
        );
    }
}

#[cube(launch_unchecked)]
fn multiply_kernel<D: Decode>(
    x: &[Vector<f32, Const<4>>],
    codes: &[u32],
    high: &[u32],
    scales: &[u32],
    supers: &[u32],
    bias: &[f32],
    table: &[u32],
    order: &[u32],
    slots: &[u32],
    out: &mut [f32],
    outputs: u32,
    units: u32,
    rows: u32,
    share: u32,
    #[comptime] m: u32,
    #[comptime] mode: Mode,
    #[comptime] has_bias: bool,
    #[comptime] ring: Option<Ring>,
) {
    let tile = CUBE_POS_Y;
    let slot = tile_slot(table, slots, tile, share, mode);
    if slot == comptime!(ABSENT) {
        terminate!();
    }
    let present = tile_rows(table, tile, rows, share, m, mode);
    let first = CUBE_POS_X * OUTS;
    let parts = comptime!(if m <= PRECISE_ROWS { 2u32 } else { 1u32 });
    let own = UNIT_POS_Y * comptime!(OUTS / PLANES);

    let mut inputs = Shared::<[u32]>::new_slice(comptime!(m as usize));
    let mut a_lines = Shared::<[f16]>::new_slice(comptime!((parts * m * LINE) as usize));
    let mut b_lines = Shared::<[f16]>::new_slice(comptime!((OUTS * LINE) as usize));
    let mut results = Shared::<[f32]>::new_slice(comptime!((m * OUTS) as usize));
    if UNIT_POS < m {
        // A row past the last is read as the last, and not written.
        let row = tile_out(table, order, tile, min(UNIT_POS, present - 1), share, m, mode);
        inputs[UNIT_POS as usize] = tile_in(row, share, mode) * units * 2;
    }
    let mut sums = Sequence::<Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(m / SIDE * 2) {
        sums.push(Matrix::<f32>::from_value(
            MatrixIdent::Accumulator,
            8usize,
            8usize,
            8usize,
            MatrixLayout::Undefined,
            0.0,
        ));
    }

    let mut unit = 0u32.runtime();
    while unit < units {
        sync_cube();
        let mut at = UNIT_POS;
        while at < comptime!(m * STEP / 4) {
            let row = at / comptime!(STEP / 4);
            let quarter = at % comptime!(STEP / 4);
            let mut v = Vector::<f32, Const<4>>::new(0.0);
            if unit * 2 + quarter < units * 2 {
                v = x[(inputs[row as usize] + unit * 2 + quarter) as usize];
            }
            #[unroll]
            for j in 0..4u32 {
                let value = v.extract(j as usize);
                let high = f16::cast_from(min(max(value, -65504.0), 65504.0));
                let to = row * LINE + quarter * 4 + j;
                a_lines[to as usize] = high;
                if comptime!(parts == 2) {
                    let low = value - f32::cast_from(high);
                    a_lines[(to + comptime!(m * LINE)) as usize] = f16::cast_from(low);
                }
            }
            at += CUBE_DIM;
        }
        let mut at = UNIT_POS;
        while at < comptime!(OUTS * STEP / 8) {
            if comptime!(ring.is_some()) {
                let ring = comptime!(ring.unwrap());
                let twice_bits = comptime!(ring.twice_bits);
                // Tiles of 16 by 16: two of inputs, and as many of outputs as there are.
                let k_tile = at / comptime!(OUTS * 2);
                let n_tile = at / 32 % comptime!(OUTS / 16);
                let chunk = at % 32;
                let n_tiles = outputs / 16;
                let tile = (slot * (units / 2) + unit / 2 + k_tile) * n_tiles + first / 16 + n_tile;
                let base = tile * comptime!(4 * twice_bits);
                let w = eight(
                    codes,
                    base,
                    chunk,
                    twice_bits,
                    comptime!(ring.mul1),
                    comptime!(ring.multiplier),
                    comptime!(ring.addend),
                );
                let to = (n_tile * 16 + chunk / 4) * LINE + k_tile * 16 + chunk % 4 * 2;
                #[unroll]
                for j in 0..8u32 {
                    // Pairs of inputs, those eight further on, and the output eight further on.
                    let place = comptime!(j % 2 + j / 2 % 2 * 8 + j / 4 * 8 * LINE);
                    b_lines[(to + place) as usize] = f16::cast_from(w[j as usize]);
                }
            } else {
                let n = at / comptime!(STEP / 8);
                let u = unit + at % comptime!(STEP / 8);
                let to = n * LINE + at % comptime!(STEP / 8) * 8;
                if first + n < outputs && u < units {
                    let row = slot * outputs + first + n;
                    let w = D::eight(codes, high, scales, supers, row * units + u);
                    #[unroll]
                    for j in 0..8u32 {
                        b_lines[(to + j) as usize] = f16::cast_from(w[j as usize]);
                    }
                } else {
                    #[unroll]
                    for j in 0..8u32 {
                        b_lines[(to + j) as usize] = f16::new(0.0);
                    }
                }
            }
            at += CUBE_DIM;
        }
        sync_cube();
        #[unroll]
        for k in 0..comptime!(STEP / SIDE) {
            let mut b = Sequence::<Matrix<f16>>::new();
            #[unroll]
            for j in 0..2u32 {
                let from = ((own + j * SIDE) * LINE + k * SIDE) as usize;
                b.push(Matrix::<f16>::from_slice(
                    MatrixIdent::B,
                    8usize,
                    8usize,
                    8usize,
                    MatrixLayout::ColMajor,
                    &b_lines[from..],
                    LINE,
                ));
            }
            #[unroll]
            for i in 0..comptime!(m / SIDE) {
                #[unroll]
                for part in 0..parts {
                    let from = comptime!(((part * m + i * SIDE) * LINE + k * SIDE) as usize);
                    let a = Matrix::<f16>::from_slice(
                        MatrixIdent::A,
                        8usize,
                        8usize,
                        8usize,
                        MatrixLayout::RowMajor,
                        &a_lines[from..],
                        LINE,
                    );
                    #[unroll]
                    for j in 0..2u32 {
                        let sum = sums.index(comptime!((i * 2 + j) as usize));
                        cmma::execute(&a, b.index(comptime!(j as usize)), sum, sum);
                    }
                }
            }
        }
        unit += comptime!(STEP / 8);
    }

    #[unroll]
    for i in 0..comptime!(m / SIDE) {
        #[unroll]
        for j in 0..2u32 {
            let to = (i * SIDE * OUTS + own + j * SIDE) as usize;
            cmma::store(
                &mut results[to..],
                sums.index(comptime!((i * 2 + j) as usize)),
                OUTS,
                MatrixLayout::RowMajor,
            );
        }
    }
    sync_cube();
    let mut at = UNIT_POS;
    while at < comptime!(m * OUTS) {
        let i = at / OUTS;
        let n = first + at % OUTS;
        if i < present && n < outputs {
            let mut sum = results[at as usize];
            if comptime!(has_bias) {
                sum += bias[(slot * outputs + n) as usize];
            }
            let row = tile_out(table, order, tile, i, share, m, mode);
            out[(row * outputs + n) as usize] = sum;
        }
        at += CUBE_DIM;
    }
}
