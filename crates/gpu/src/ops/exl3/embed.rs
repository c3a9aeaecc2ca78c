//! Rows of an embedding that is a trellis: a tied output projection, read by the token.
//!
//! Of `E = diag(suh) · P · Ŵ · P · diag(svh)` a token's column is the signed sum of the 128 columns of `Ŵ` that its rotation
//! mixes, rotated over the inputs.

use super::portable::eight;
use super::{BLOCK, Trellis, generator, hadamard};
use crate::gpu::{Buffer, Gpu};
use cubecl::prelude::*;

/// Rows of the tokens, the first word of every four of `meta`, times `scale`: `[rows, in_features]`.
pub(crate) fn embed(gpu: &Gpu, table: &Trellis, meta: &Buffer, rows: usize, scale: f32) -> Buffer {
    let out = gpu.empty(rows * table.in_features);
    let (multiplier, addend, mul1) = generator(table.codebook);
    // SAFETY: tokens are below `out_features`, the caller's to hold; columns past the last are not written.
    unsafe {
        embed_kernel::launch_unchecked(
            &gpu.client,
            CubeCount::Static(table.padded_in as u32 / BLOCK, rows as u32, 1),
            gpu.planes(BLOCK / gpu.plane),
            meta.arg(),
            table.tiles.arg(),
            table.suh.arg(),
            table.svh.arg(),
            out.arg(),
            scale,
            table.in_features as u32,
            table.padded_out as u32 / 16,
            table.twice_bits,
            mul1,
            multiplier,
            addend,
            gpu.plane,
        );
    }
    out
}

/// A cube per block of 128 columns and row. Four units share the four inputs of a place in a tile, and part the outputs.
#[cube(launch_unchecked)]
fn embed_kernel(
    meta: &[u32],
    tiles: &[u32],
    suh: &[f32],
    svh: &[f32],
    out: &mut [f32],
    scale: f32,
    columns: u32,
    n_tiles: u32,
    #[comptime] twice_bits: u32,
    #[comptime] mul1: bool,
    #[comptime] multiplier: u32,
    #[comptime] addend: u32,
    #[comptime] plane: u32,
) {
    let row = CUBE_POS_Y;
    let token = meta[(row * 4) as usize];
    let place = token % 128;
    // One of the block's eight rows of tiles, one of four places in a tile, one of four parts of the outputs.
    let kt = UNIT_POS / 16;
    let quad = UNIT_POS / 4 % 4;
    let part = UNIT_POS % 4;
    let mut sums = Array::<f32>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        sums[i] = 0.0;
    }
    for step in 0..16u32 {
        let nt = part * 2 + step / 8;
        let column = step % 8;
        let tile = (CUBE_POS_X * 8 + kt) * n_tiles + token / 128 * 8 + nt;
        let base = tile * comptime!(4 * twice_bits);
        let w = eight(tiles, base, column * 4 + quad, twice_bits, mul1, multiplier, addend);
        let at = nt * 16 + column;
        let first = select((at & place).count_ones() % 2 == 1, -1.0f32, 1.0f32);
        let second = select(((at + 8) & place).count_ones() % 2 == 1, -1.0f32, 1.0f32);
        #[unroll]
        for i in 0..4usize {
            sums[i] += first * w[i] + second * w[i + 4];
        }
    }
    let mut shared = Shared::<[f32]>::new_slice(128usize);
    #[unroll]
    for i in 0..4u32 {
        let mut sum = sums[i as usize];
        sum += plane_shuffle_xor(sum, 1u32);
        sum += plane_shuffle_xor(sum, 2u32);
        if part == i {
            let input = kt * 16 + quad * 2 + comptime!(i % 2 + i / 2 * 8);
            shared[input as usize] = sum * 0.08838834764831845;
        }
    }
    sync_cube();
    let v = hadamard(shared[UNIT_POS as usize], plane);
    let column = CUBE_POS_X * 128 + UNIT_POS;
    if column < columns {
        let y = v * suh[column as usize] * svh[token as usize];
        out[(row * columns + column) as usize] = y * scale;
    }
}
