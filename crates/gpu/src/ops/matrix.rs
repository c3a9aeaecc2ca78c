//! Rows times a matrix in a row format: one plane per output, few rows at a time, weights decoded in registers.

use super::tiles::{ABSENT, MOST, Mode, Rows, tile_in, tile_out, tile_rows, tile_slot};
use super::{integer, simdgroup};
use crate::decode::{Decode, Format, with_format};
use crate::gpu::{Buffer, Gpu};
use crate::tune::{Choices, Variant};
use cubecl::prelude::*;

/// Planes of a cube, unless tuning found better.
const PLANES: u32 = 4;
/// Outputs of a plane, whose inputs it reads once: most of them, over the rows of a tile, and planes of a launch that are worth more than that.
const OUTPUTS: u32 = 4;
const FEWEST_PLANES: u32 = 4096;

/// A matrix, or a stack of equal ones, in a row format.
#[derive(Clone)]
pub(crate) struct RowMatrix {
    pub(crate) format: Format,
    /// Codes, upper bits, scales, super-scales.
    pub(crate) parts: [Buffer; 4],
    /// Outputs of one matrix.
    pub(crate) out_features: usize,
    /// Units of eight weights of a row.
    pub(crate) units: usize,
    /// The input that each place of a row belongs to, where inputs stand in another order.
    pub(crate) order: Option<Buffer>,
    pub(crate) choices: Choices,
}

/// What the rule says of `rows` rows.
pub(crate) fn rule(rows: usize) -> Variant {
    Variant::Decode { planes: PLANES, tile: (rows as u32).min(MOST) }
}

/// `x: [.., 8 units]` times the matrices: `[rows.count(), out_features]`, plus `bias` per output and matrix where there is
/// one.
pub(crate) fn multiply(
    gpu: &Gpu,
    x: &Buffer,
    matrix: &RowMatrix,
    bias: Option<&Buffer>,
    rows: &Rows,
) -> Buffer {
    let out = integer::multiply(gpu, x, matrix, bias, rows);
    if let Some(out) = out.or_else(|| simdgroup::rows(gpu, x, matrix, bias, rows)) {
        return out;
    }
    planes(gpu, x, matrix, bias, rows, None)
}

/// Heads times their matrices, each row before `columns` of `beside`.
pub(crate) fn multiply_beside(
    gpu: &Gpu,
    x: &Buffer,
    matrix: &RowMatrix,
    rows: &Rows,
    beside: &Buffer,
    columns: usize,
) -> Buffer {
    planes(gpu, x, matrix, None, rows, Some((beside, columns)))
}

fn planes(
    gpu: &Gpu,
    x: &Buffer,
    matrix: &RowMatrix,
    bias: Option<&Buffer>,
    rows: &Rows,
    beside: Option<(&Buffer, usize)>,
) -> Buffer {
    let n = matrix.out_features;
    let (beside, more) = beside.unwrap_or((&gpu.none, 0));
    let out = gpu.empty(rows.count() * (n + more));
    let (planes, most) = match rows.dense().and_then(|rows| matrix.choices.of(rows)) {
        Some(Variant::Decode { planes, tile }) => (planes, tile),
        _ => (PLANES, MOST),
    };
    let launch = rows.launch(gpu, most);
    let fits =
        |outs: &u32| outs * launch.m <= OUTPUTS && n as u32 / outs * launch.tiles >= FEWEST_PLANES;
    let outs = [4, 2].into_iter().find(fits).unwrap_or(1);
    let count = CubeCount::Static((n as u32).div_ceil(planes * outs), launch.tiles, 1);
    let [codes, high, scales, supers] = matrix.parts.each_ref().map(Buffer::arg);
    let added = bias.unwrap_or(&gpu.none).arg();
    let (table, order, slots) = (launch.table.arg(), launch.order.arg(), launch.slots.arg());
    let (client, dim) = (&gpu.client, gpu.planes(planes));
    with_format!(matrix.format, D => {
        // SAFETY: planes past the last output and rows past the last do nothing.
        unsafe {
            multiply_kernel::launch_unchecked::<D>(
                client, count, dim, x.arg4(), codes, high, scales, supers, added, table, order, slots, beside.arg(), out.arg(),
                n as u32, matrix.units as u32, launch.rows, launch.share, launch.m, launch.mode, bias.is_some(), outs, more as u32,
            );
        }
    });
    out
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
    beside: &[f32],
    out: &mut [f32],
    outputs: u32,
    units: u32,
    rows: u32,
    share: u32,
    #[comptime] m: u32,
    #[comptime] mode: Mode,
    #[comptime] has_bias: bool,
    #[comptime] outs: u32,
    #[comptime] more: u32,
) {
    let n = (CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y) * outs;
    let tile = CUBE_POS_Y;
    let slot = tile_slot(table, slots, tile, share, mode);
    if n >= outputs || slot == comptime!(ABSENT) {
        terminate!();
    }
    let present = tile_rows(table, tile, rows, share, m, mode);
    let mut inputs = Array::<u32>::new(comptime!(m as usize));
    let mut sums = Array::<f32>::new(comptime!((m * outs) as usize));
    #[unroll]
    for i in 0..m {
        // A row past the last is read as the last, and not written.
        let row = tile_out(table, order, tile, min(i.runtime(), present - 1), share, m, mode);
        inputs[i as usize] = tile_in(row, share, mode) * units * 2;
    }
    #[unroll]
    for i in 0..comptime!(m * outs) {
        sums[i as usize] = 0.0;
    }
    let base = slot * outputs;
    let mut unit = UNIT_POS_X;
    while unit < units {
        #[unroll]
        for o in 0..outs {
            // An output past the last is read as the last, and not written.
            let place = (base + min(n + o, outputs - 1)) * units + unit;
            let w = D::eight(codes, high, scales, supers, place);
            #[unroll]
            for i in 0..m {
                let at = inputs[i as usize] + unit * 2;
                let a = x[at as usize];
                let b = x[(at + 1) as usize];
                let mut sum = sums[comptime!((o * m + i) as usize)];
                #[unroll]
                for j in 0..4usize {
                    sum += w[j] * a.extract(j);
                    sum += w[j + 4] * b.extract(j);
                }
                sums[comptime!((o * m + i) as usize)] = sum;
            }
        }
        unit += CUBE_DIM_X;
    }
    #[unroll]
    for o in 0..outs {
        #[unroll]
        for i in 0..m {
            let mut sum = plane_sum(sums[comptime!((o * m + i) as usize)]);
            if UNIT_POS_X == 0 && i < present && n + o < outputs {
                if comptime!(has_bias) {
                    sum += bias[(base + n + o) as usize];
                }
                let row = tile_out(table, order, tile, i.runtime(), share, m, mode);
                out[(row * (outputs + more) + n + o) as usize] = sum;
            }
        }
    }
    if comptime!(more > 0) {
        if CUBE_POS_X + UNIT_POS_Y == 0 {
            #[unroll]
            for i in 0..m {
                if i < present {
                    let row = tile_out(table, order, tile, i.runtime(), share, m, mode);
                    let mut column = UNIT_POS_X;
                    while column < more {
                        out[(row * (outputs + more) + outputs + column) as usize] =
                            beside[(row * more + column) as usize];
                        column += CUBE_DIM_X;
                    }
                }
            }
        }
    }
}

/// Rows of the table for `tokens`, the first word of every four of `meta`, times `scale`.
pub(crate) fn embed(
    gpu: &Gpu,
    table: &RowMatrix,
    meta: &Buffer,
    rows: usize,
    columns: usize,
    scale: f32,
) -> Buffer {
    let out = gpu.empty(rows * columns);
    let total = rows * table.units;
    let (count, dim) = gpu.each(total);
    let [codes, high, scales, supers] = table.parts.each_ref().map(Buffer::arg);
    let (units, columns, total) = (table.units as u32, columns as u32, total as u32);
    with_format!(table.format, D => {
        // SAFETY: units past the end do nothing.
        unsafe {
            embed_kernel::launch_unchecked::<D>(
                &gpu.client, count, dim, meta.arg(), codes, high, scales, supers, out.arg(), scale, units, columns,
                total,
            );
        }
    });
    out
}

#[cube(launch_unchecked)]
fn embed_kernel<D: Decode>(
    meta: &[u32],
    codes: &[u32],
    high: &[u32],
    scales: &[u32],
    supers: &[u32],
    out: &mut [f32],
    scale: f32,
    units: u32,
    columns: u32,
    total: u32,
) {
    let i = ABSOLUTE_POS as u32;
    if i < total {
        let row = i / units;
        let unit = i % units;
        let token = meta[(row * 4) as usize];
        let w = D::eight(codes, high, scales, supers, token * units + unit);
        #[unroll]
        for j in 0..8u32 {
            let column = unit * 8 + j;
            if column < columns {
                out[(row * columns + column) as usize] = w[j as usize] * scale;
            }
        }
    }
}
