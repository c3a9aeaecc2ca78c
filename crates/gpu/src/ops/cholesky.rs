//! Block factorisation `A = L D Lᵀ` with `L` the identity in blocks of sixteen on the diagonal: a Cholesky factorisation, whose
//! columns are then divided by those blocks.
//!
//! By blocks of 64 columns: one cube factors the block on the diagonal in shared memory, cubes of 64 rows each solve for what lies
//! below, and a product takes it out of all that is right of it. All is f32.

use super::product::{Into, Part, product};
use crate::gpu::{Buffer, Gpu};
use cubecl::prelude::*;
use marlin_quant::exl3::ring::TILE_SIDE;

/// Columns of a block.
const BLOCK: u32 = 64;
/// Units of the cube that factors a block.
const UNITS: u32 = 256;
/// Columns that are divided together.
const SIDE: u32 = TILE_SIDE as u32;

/// Whether an array of `k` by `k` can be factored.
pub(crate) fn has(k: usize) -> bool {
    k.is_multiple_of(BLOCK as usize)
}

/// `L: [k, k]` of `a: [k, k]`, whose lower triangle is read and lost; and a word that is 0 if all pivots are positive.
pub(crate) fn block_ldl(gpu: &Gpu, a: &Buffer, k: usize) -> (Buffer, Buffer) {
    let failed = gpu.zeros(1);
    let size = BLOCK as usize;
    let turned = gpu.empty(size * k);
    let length = k as u32;
    for start in (0..k).step_by(size) {
        let (end, first) = (start + size, start as u32);
        let dim = gpu.planes(UNITS / gpu.plane);
        let one = CubeCount::Static(1, 1, 1);
        let (matrix, flag) = (a.arg(), failed.arg());
        // SAFETY: the one cube reads and writes its block.
        unsafe {
            diagonal_kernel::launch_unchecked(&gpu.client, one, dim, matrix, flag, length, first);
        }
        if end == k {
            break;
        }
        let below = k - end;
        let count = CubeCount::Static((below / size) as u32, 1, 1);
        let (matrix, to) = (a.arg(), turned.arg());
        let dim = gpu.planes(BLOCK / gpu.plane);
        // SAFETY: a cube reads and writes its own rows.
        unsafe {
            panel_kernel::launch_unchecked(&gpu.client, count, dim, matrix, to, length, first)
        }
        let part = Part::whole(&turned, below);
        let rest = a.after(end * k + end);
        product(gpu, part, part, size, (&rest, k), Into::LowerDifference);
    }
    let out = gpu.empty(k * k);
    let (count, dim) = gpu.each(k * k / TILE_SIDE);
    let (matrix, to) = (a.arg(), out.arg());
    // SAFETY: units past the end do nothing.
    unsafe { divide_kernel::launch_unchecked(&gpu.client, count, dim, matrix, to, length) }
    (out, failed)
}

/// The block that begins at row and column `start` becomes its Cholesky factor.
#[cube(launch_unchecked)]
fn diagonal_kernel(a: &mut [f32], failed: &mut [u32], k: u32, start: u32) {
    let mut block = Shared::<[f32]>::new_slice(comptime!((BLOCK * BLOCK) as usize));
    let mut at = UNIT_POS;
    while at < BLOCK * BLOCK {
        block[at as usize] = a[((start + at / BLOCK) * k + start + at % BLOCK) as usize];
        at += UNITS;
    }
    sync_cube();
    for j in 0..BLOCK {
        let found = block[(j * BLOCK + j) as usize];
        let is_positive = found > 0.0;
        let pivot = select(is_positive, found, 1.0f32.runtime()).sqrt();
        // All have read the pivot before it is written.
        sync_cube();
        if UNIT_POS == 0 {
            block[(j * BLOCK + j) as usize] = pivot;
            if !is_positive {
                failed[0] = 1u32;
            }
        }
        let own = j + 1 + UNIT_POS;
        if own < BLOCK {
            let place = (own * BLOCK + j) as usize;
            block[place] = block[place] / pivot;
        }
        sync_cube();
        let mut at = UNIT_POS;
        while at < BLOCK * BLOCK {
            let (row, column) = (at / BLOCK, at % BLOCK);
            if column > j && row >= column {
                let known =
                    block[(row * BLOCK + j) as usize] * block[(column * BLOCK + j) as usize];
                block[at as usize] = block[at as usize] - known;
            }
            at += UNITS;
        }
        sync_cube();
    }
    let mut at = UNIT_POS;
    while at < BLOCK * BLOCK {
        a[((start + at / BLOCK) * k + start + at % BLOCK) as usize] = block[at as usize];
        at += UNITS;
    }
}

/// The columns of the block below it: `X Dᵀ = A`; also turned, `[64, rows below]`.
#[cube(launch_unchecked)]
fn panel_kernel(a: &mut [f32], turned: &mut [f32], k: u32, start: u32) {
    let mut block = Shared::<[f32]>::new_slice(comptime!((BLOCK * BLOCK) as usize));
    // By columns, so that units read and write beside each other.
    let mut rows = Shared::<[f32]>::new_slice(comptime!((BLOCK * BLOCK) as usize));
    let first = start + BLOCK + CUBE_POS_X * BLOCK;
    for row in 0..BLOCK {
        block[(row * BLOCK + UNIT_POS) as usize] =
            a[((start + row) * k + start + UNIT_POS) as usize];
        rows[(UNIT_POS * BLOCK + row) as usize] =
            a[((first + row) * k + start + UNIT_POS) as usize];
    }
    sync_cube();
    let below = k - start - BLOCK;
    for j in 0..BLOCK {
        let mut left = rows[(j * BLOCK + UNIT_POS) as usize];
        for m in 0..j {
            left -= rows[(m * BLOCK + UNIT_POS) as usize] * block[(j * BLOCK + m) as usize];
        }
        let value = left / block[(j * BLOCK + j) as usize];
        rows[(j * BLOCK + UNIT_POS) as usize] = value;
        turned[(j * below + CUBE_POS_X * BLOCK + UNIT_POS) as usize] = value;
    }
    sync_cube();
    for row in 0..BLOCK {
        a[((first + row) * k + start + UNIT_POS) as usize] =
            rows[(UNIT_POS * BLOCK + row) as usize];
    }
}

/// Sixteen columns of a row times the inverse of their block on the diagonal; zeros above it.
#[cube(launch_unchecked)]
fn divide_kernel(a: &[f32], out: &mut [f32], k: u32) {
    let i = ABSOLUTE_POS as u32;
    let groups = k / SIDE;
    if i < k * groups {
        let row = i / groups;
        let first = i % groups * SIDE;
        let mut values = Array::<f32>::new(comptime!(SIDE as usize));
        #[unroll]
        for back in 0..SIDE {
            let c = comptime!(SIDE - 1 - back);
            let mut left = 0.0f32.runtime();
            if row >= first + c {
                left = a[(row * k + first + c) as usize];
            }
            #[unroll]
            for m in comptime!(c + 1)..SIDE {
                left -= values[comptime!(m as usize)] * a[((first + m) * k + first + c) as usize];
            }
            values[comptime!(c as usize)] = left / a[((first + c) * k + first + c) as usize];
        }
        #[unroll]
        for c in 0..SIDE {
            let value = select(row < first, 0.0f32.runtime(), values[comptime!(c as usize)]);
            out[(row * k + first + c) as usize] = value;
        }
    }
}
