//! The product with a trellis in f32, for every runtime.

use super::{Trellis, generator};
use crate::gpu::{Buffer, Gpu};
use crate::ops::simdgroup;
use crate::ops::tiles::{ABSENT, MOST, Mode, Rows, tile_in, tile_out, tile_rows, tile_slot};
use crate::tune::Variant;
use cubecl::prelude::*;
use half::f16;
use marlin_quant::exl3::codebook::{MUL1_OFFSET, MUL1_SLOPE};

/// Planes of a cube that share a column of tiles, unless tuning found better.
const PLANES: u32 = 8;

/// What the rule says of a class of rows, or of every number of rows.
pub(super) fn rule(rows: Option<usize>) -> Variant {
    match rows {
        Some(rows) => Variant::Tile { tile: (rows as u32).min(MOST) },
        None => Variant::Planes { planes: PLANES },
    }
}

/// `rotated: [rows.count(), padded_in]` times `Ŵ`: `[rows.count(), padded_out]`.
pub(super) fn multiply(gpu: &Gpu, rotated: &Buffer, matrix: &Trellis, rows: &Rows) -> Buffer {
    if let Some(product) = simdgroup::trellis(gpu, rotated, matrix, rows) {
        return product;
    }
    let most = match rows.dense().and_then(|rows| matrix.choices.of(rows)) {
        Some(Variant::Tile { tile }) => tile,
        _ => MOST,
    };
    // Sums depend on it, so it is the same for every number of rows.
    let planes = match matrix.choices.every {
        Some(Variant::Planes { planes }) => planes,
        _ => PLANES,
    };
    let launch = rows.launch(gpu, most);
    // Every entry has a row of its own.
    let share = if launch.mode == Mode::Dense { launch.share } else { 1 };
    let (multiplier, addend, mul1) = generator(matrix.codebook);
    let (k_tiles, n_tiles) = (matrix.padded_in as u32 / 16, matrix.padded_out as u32 / 16);
    let product = gpu.empty(rows.count() * matrix.padded_out);
    let count = CubeCount::Static(n_tiles, launch.tiles, 1);
    let (x, tiles, to) = (rotated.arg2(), matrix.tiles.arg(), product.arg());
    let (table, order, slots) = (launch.table.arg(), launch.order.arg(), launch.slots.arg());
    // SAFETY: the tiles cover the padded matrix; rows past the last are not written.
    unsafe {
        multiply_kernel::launch_unchecked(
            &gpu.client,
            count,
            gpu.planes(planes),
            x,
            tiles,
            table,
            order,
            slots,
            to,
            k_tiles,
            n_tiles,
            launch.rows,
            share,
            launch.m,
            launch.mode,
            matrix.twice_bits,
            mul1,
            multiplier,
            addend,
            gpu.plane,
            planes,
        );
    }
    product
}

/// `product = rotated · Ŵ`: a cube per column of tiles and tile of rows, its planes sharing the inputs.
#[cube(launch_unchecked)]
fn multiply_kernel(
    x: &[Vector<f32, Const<2>>],
    tiles: &[u32],
    table: &[u32],
    order: &[u32],
    slots: &[u32],
    product: &mut [f32],
    k_tiles: u32,
    n_tiles: u32,
    rows: u32,
    share: u32,
    #[comptime] m: u32,
    #[comptime] mode: Mode,
    #[comptime] twice_bits: u32,
    #[comptime] mul1: bool,
    #[comptime] multiplier: u32,
    #[comptime] addend: u32,
    #[comptime] plane: u32,
    #[comptime] planes: u32,
) {
    let nt = CUBE_POS_X;
    let row_tile = CUBE_POS_Y;
    let slot = tile_slot(table, slots, row_tile, share, mode);
    if slot == comptime!(ABSENT) {
        terminate!();
    }
    let present = tile_rows(table, row_tile, rows, share, m, mode);
    let chunks = comptime!(32 / plane);
    let mut inputs = Array::<u32>::new(comptime!(m as usize));
    #[unroll]
    for i in 0..m {
        let row = tile_out(table, order, row_tile, min(i.runtime(), present - 1), share, m, mode);
        inputs[i as usize] = tile_in(row, share, mode) * k_tiles * 8;
    }
    let mut sums = Array::<f32>::new(comptime!((2 * m * chunks) as usize));
    #[unroll]
    for i in 0..comptime!(2 * m * chunks) {
        sums[i as usize] = 0.0;
    }
    let mut kt = UNIT_POS_Y;
    while kt < k_tiles {
        let base = ((slot * k_tiles + kt) * n_tiles + nt) * comptime!(4 * twice_bits);
        #[unroll]
        for c in 0..chunks {
            let chunk = UNIT_POS_X + comptime!(c * plane);
            let w = eight(tiles, base, chunk, twice_bits, mul1, multiplier, addend);
            let at = kt * 8 + chunk % 4;
            #[unroll]
            for i in 0..m {
                let a = x[(inputs[i as usize] + at) as usize];
                let b = x[(inputs[i as usize] + at + 4) as usize];
                let j = comptime!(((c * m + i) * 2) as usize);
                sums[j] += w[0] * a.extract(0usize)
                    + w[1] * a.extract(1usize)
                    + w[2] * b.extract(0usize)
                    + w[3] * b.extract(1usize);
                sums[j + 1] += w[4] * a.extract(0usize)
                    + w[5] * a.extract(1usize)
                    + w[6] * b.extract(0usize)
                    + w[7] * b.extract(1usize);
            }
        }
        kt += planes;
    }
    // Four neighbouring lanes hold the same two outputs.
    let mut shared = Shared::<[f32]>::new_slice(comptime!((16 * m * planes) as usize));
    #[unroll]
    for c in 0..chunks {
        #[unroll]
        for i in 0..m {
            #[unroll]
            for half in 0..2u32 {
                let mut v = sums[comptime!(((c * m + i) * 2 + half) as usize)];
                v += plane_shuffle_xor(v, 1u32);
                v += plane_shuffle_xor(v, 2u32);
                if UNIT_POS_X % 4 == 0 {
                    let column = UNIT_POS_X / 4 + comptime!(c * plane / 4 + half * 8);
                    shared[((UNIT_POS_Y * m + i) * 16 + column) as usize] = v;
                }
            }
        }
    }
    sync_cube();
    let mut at = UNIT_POS;
    while at < comptime!(16 * m) {
        let i = at / 16;
        let mut total = f32::new(0.0);
        #[unroll]
        for p in 0..planes {
            total += shared[(at + comptime!(p * m * 16)) as usize];
        }
        if i < present {
            let row = tile_out(table, order, row_tile, i, share, m, mode);
            product[((row * n_tiles + nt) * 16 + at % 16) as usize] = total;
        }
        at += CUBE_DIM;
    }
}

/// Weights of ring positions `8 chunk …` of the tile whose words start at `base`.
#[cube]
pub(in crate::ops) fn eight(
    tiles: &[u32],
    base: u32,
    chunk: u32,
    #[comptime] twice_bits: u32,
    #[comptime] mul1: bool,
    #[comptime] multiplier: u32,
    #[comptime] addend: u32,
) -> Array<f32> {
    let words = comptime!(4 * twice_bits);
    // First bit of the first window, kept positive by one turn of the ring.
    let first =
        chunk * comptime!(4 * twice_bits) + comptime!(twice_bits / 2 + 128 * twice_bits - 16);
    let shift = first % 32;
    let word = first / 32;
    let aligned = comptime!((8 * twice_bits / 2 - twice_bits / 2 + 16).div_ceil(32));
    let mut bits = Array::<u32>::new(comptime!(aligned as usize));
    let mut high = tiles[(base + word % words) as usize];
    #[unroll]
    for i in 0..aligned {
        let low = tiles[(base + (word + comptime!(i + 1)) % words) as usize];
        // In two steps, since a shift by 32 is undefined.
        bits[i as usize] = (high << shift) | ((low >> 1u32) >> (31 - shift));
        high = low;
    }
    let mut out = Array::<f32>::new(8usize);
    #[unroll]
    for j in 0..8u32 {
        let offset = comptime!((j + 1) * twice_bits / 2 - twice_bits / 2);
        let q = comptime!((offset / 32) as usize);
        let r = comptime!(offset % 32);
        let state = if comptime!(r <= 16) {
            (bits[q] >> comptime!(16 - r)) & 0xffffu32
        } else {
            ((bits[q] << comptime!(r - 16)) | (bits[comptime!(q + 1)] >> comptime!(48 - r)))
                & 0xffffu32
        };
        out[j as usize] = value(state, mul1, multiplier, addend);
    }
    out
}

/// Value of a state.
#[cube]
fn value(
    state: u32,
    #[comptime] mul1: bool,
    #[comptime] multiplier: u32,
    #[comptime] addend: u32,
) -> f32 {
    let x = state * multiplier + addend;
    if comptime!(mul1) {
        let pairs = (x & 0x00ff00ffu32) + ((x >> 8u32) & 0x00ff00ffu32);
        let sum = (pairs & 0xffffu32) + (pairs >> 16u32);
        rounded(f32::cast_from(sum) * MUL1_SLOPE + MUL1_OFFSET)
    } else {
        let y = (x & 0x8fff8fffu32) ^ 0x3b603b60u32;
        let pair = Vector::<f16, Const<2>>::reinterpret(y);
        rounded(f32::cast_from(pair.extract(0usize)) + f32::cast_from(pair.extract(1usize)))
    }
}

/// The nearest f16, ties to even, of a value in the range of normal ones. Runtimes may round otherwise or, between two conversions,
/// not at all.
#[cube]
fn rounded(v: f32) -> f32 {
    let bits = u32::reinterpret(v);
    let up = bits + 0xfffu32 + ((bits >> 13u32) & 1u32);
    f32::reinterpret(up & 0xffffe000u32)
}
