//! Products of whole f32 matrices, `aᵀ b`: for sums of outer products, fits, and what feedback carries.
//!
//! A cube makes 128 by 128 outputs, a unit 8 by 8 of them in registers, from tiles of eight rows in shared memory; while they are
//! multiplied the next come. Both matrices are read along their rows, so what is multiplied as it is, is turned first.

use crate::gpu::{Buffer, Gpu};
use cubecl::prelude::*;

/// Outputs along a side of a cube.
const SIDE: u32 = 128;
/// Rows of a tile in shared memory.
const DEPTH: u32 = 8;
/// Units along a side of a cube.
const ACROSS: u32 = 16;
/// Vectors of a tile: one for every unit.
const TILE: u32 = DEPTH * SIDE / 4;

type Four = Vector<f32, Const<4>>;

/// A matrix of which a product reads the first `columns` of every row.
#[derive(Clone, Copy)]
pub(crate) struct Part<'a> {
    pub(crate) buffer: &'a Buffer,
    pub(crate) columns: usize,
    /// Columns from one row to the next.
    pub(crate) stride: usize,
}

impl<'a> Part<'a> {
    /// All of `buffer: [.., columns]`.
    pub(crate) fn whole(buffer: &'a Buffer, columns: usize) -> Self {
        Self { buffer, columns, stride: columns }
    }
}

/// What becomes of the outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Into {
    /// They are written.
    Fresh,
    /// They are added to what is there.
    Sum,
    /// The same, of the blocks of 128 on and below the diagonal.
    LowerSum,
    /// They are taken from what is there, in these blocks.
    LowerDifference,
}

/// `out ← aᵀ b`, or as `into` says, for `a: [depth, m]`, `b: [depth, n]`, `out: [m, ..]`; with at least one row; all columns and strides are multiples of four.
pub(crate) fn product(
    gpu: &Gpu,
    a: Part,
    b: Part,
    depth: usize,
    out: (&Buffer, usize),
    into: Into,
) {
    let four = |n: usize| (n / 4) as u32;
    let sides = |columns: usize| (columns as u32).div_ceil(SIDE);
    let count = CubeCount::Static(sides(b.columns), sides(a.columns), 1);
    let dim = gpu.planes(ACROSS * ACROSS / gpu.plane);
    let (m, n, depth) = (four(a.columns), four(b.columns), depth as u32);
    let (a_stride, b_stride, out_stride) = (four(a.stride), four(b.stride), four(out.1));
    let (a, b, out) = (a.buffer.arg4(), b.buffer.arg4(), out.0.arg4());
    // SAFETY: what lies outside the matrices is neither read nor written.
    unsafe {
        product_kernel::launch_unchecked(
            &gpu.client,
            count,
            dim,
            a,
            b,
            out,
            m,
            n,
            depth,
            a_stride,
            b_stride,
            out_stride,
            into,
        );
    }
}

/// `x: [rows, columns]` as `[columns, rows]`.
pub(crate) fn turned(gpu: &Gpu, x: &Buffer, rows: usize, columns: usize) -> Buffer {
    let total = rows * columns;
    let out = gpu.empty(total);
    let (count, dim) = gpu.each(total);
    let (x, to, rows, columns, total) =
        (x.arg(), out.arg(), rows as u32, columns as u32, total as u32);
    // SAFETY: units past the end do nothing.
    unsafe { turn_kernel::launch_unchecked(&gpu.client, count, dim, x, to, rows, columns, total) }
    out
}

/// `x: [rows, columns]` with zeros for rows that hold NaN or infinity, whose number is added to `left_out`.
pub(crate) fn finite(
    gpu: &Gpu,
    x: &Buffer,
    rows: usize,
    columns: usize,
    left_out: &Buffer,
) -> Buffer {
    let out = gpu.empty(rows * columns);
    let count = CubeCount::Static(rows as u32, 1, 1);
    let dim = gpu.planes(ACROSS * ACROSS / gpu.plane);
    let (x, to, left_out) = (x.arg(), out.arg(), left_out.arg());
    let columns = columns as u32;
    // SAFETY: a cube reads and writes its own row.
    unsafe { finite_kernel::launch_unchecked(&gpu.client, count, dim, x, to, left_out, columns) }
    out
}

#[cube(launch_unchecked)]
fn product_kernel(
    a: &[Four],
    b: &[Four],
    out: &mut [Four],
    m: u32,
    n: u32,
    depth: u32,
    a_stride: u32,
    b_stride: u32,
    out_stride: u32,
    #[comptime] into: Into,
) {
    let first_row = CUBE_POS_Y * (SIDE / 4);
    let first_column = CUBE_POS_X * (SIDE / 4);
    if comptime!(matches!(into, Into::LowerSum | Into::LowerDifference)) {
        if first_column > first_row {
            terminate!();
        }
    }
    let mut left = Shared::<[Four]>::new_slice(comptime!(2 * TILE as usize));
    let mut right = Shared::<[Four]>::new_slice(comptime!(2 * TILE as usize));
    let down = UNIT_POS / ACROSS;
    let across = UNIT_POS % ACROSS;
    // What this unit brings to shared memory.
    let row = UNIT_POS / (SIDE / 4);
    let column = UNIT_POS % (SIDE / 4);
    let has_a = first_row + column < m;
    let has_b = first_column + column < n;
    let mut a_at = row * a_stride + first_row + column;
    let mut b_at = row * b_stride + first_column + column;
    let mut at = row;
    let mut sums = Array::<Four>::new(16usize);
    #[unroll]
    for i in 0..16usize {
        sums[i] = Four::new(0.0);
    }
    left[UNIT_POS as usize] = read(a, a_at, has_a && at < depth);
    right[UNIT_POS as usize] = read(b, b_at, has_b && at < depth);
    sync_cube();
    let steps = (depth - 1) / DEPTH + 1;
    for step in 0..steps {
        let here = step % 2 * TILE;
        let there = (step + 1) % 2 * TILE;
        at += DEPTH;
        a_at += DEPTH * a_stride;
        b_at += DEPTH * b_stride;
        let next_a = read(a, a_at, has_a && at < depth);
        let next_b = read(b, b_at, has_b && at < depth);
        #[unroll]
        for p in 0..DEPTH {
            let place = here + p * (SIDE / 4);
            let b_low = right[(place + across) as usize];
            let b_high = right[(place + ACROSS + across) as usize];
            #[unroll]
            for half in 0..2u32 {
                let four = left[(place + half * ACROSS + down) as usize];
                #[unroll]
                for i in 0..4u32 {
                    let factor = Four::new(four.extract(comptime!(i as usize)));
                    let low = comptime!((half * 8 + i * 2) as usize);
                    let high = comptime!((half * 8 + i * 2 + 1) as usize);
                    sums[low] = fma(factor, b_low, sums[low]);
                    sums[high] = fma(factor, b_high, sums[high]);
                }
            }
        }
        left[(there + UNIT_POS) as usize] = next_a;
        right[(there + UNIT_POS) as usize] = next_b;
        sync_cube();
    }
    #[unroll]
    for half in 0..2u32 {
        #[unroll]
        for i in 0..4u32 {
            let row = (first_row + half * ACROSS + down) * 4 + i;
            #[unroll]
            for right_half in 0..2u32 {
                let column = first_column + right_half * ACROSS + across;
                if row < m * 4 && column < n {
                    let place = (row * out_stride + column) as usize;
                    let sum = sums[comptime!((half * 8 + i * 2 + right_half) as usize)];
                    if comptime!(matches!(into, Into::Fresh)) {
                        out[place] = sum;
                    } else if comptime!(matches!(into, Into::LowerDifference)) {
                        out[place] = out[place] - sum;
                    } else {
                        out[place] = out[place] + sum;
                    }
                }
            }
        }
    }
}

/// `x[at]`, or zeros.
#[cube]
fn read(x: &[Four], at: u32, there: bool) -> Four {
    let mut value = Four::new(0.0);
    if there {
        value = x[at as usize];
    }
    value
}

#[cube(launch_unchecked)]
fn turn_kernel(x: &[u32], out: &mut [u32], rows: u32, columns: u32, total: u32) {
    let i = ABSOLUTE_POS as u32;
    if i < total {
        out[i as usize] = x[(i % rows * columns + i / rows) as usize];
    }
}

#[cube(launch_unchecked)]
fn finite_kernel(x: &[u32], out: &mut [u32], left_out: &mut [Atomic<u32>], columns: u32) {
    let mut bad = Shared::<[u32]>::new_slice(1usize);
    if UNIT_POS == 0 {
        bad[0] = 0u32;
    }
    sync_cube();
    let first = CUBE_POS_X * columns;
    let mut at = UNIT_POS;
    while at < columns {
        // An exponent of all ones, whatever the compiler thinks of NaN.
        if x[(first + at) as usize] & 0x7f80_0000u32 == 0x7f80_0000u32 {
            bad[0] = 1u32;
        }
        at += CUBE_DIM;
    }
    sync_cube();
    let is_bad = bad[0] == 1u32;
    let mut at = UNIT_POS;
    while at < columns {
        let place = (first + at) as usize;
        out[place] = select(is_bad, 0u32, x[place]);
        at += CUBE_DIM;
    }
    if UNIT_POS == 0 && is_bad {
        left_out[0].fetch_add(1u32);
    }
}
