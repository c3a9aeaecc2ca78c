//! The product with a trellis on NVIDIA's tensor cores.
//!
//! The eight weights of a lane are its operands of two `mma.m16n8k16`: the columns of a tile fall into two halves of eight.
//! Of the sixteen rows of the other operand, eight are rows of inputs as f16 and eight what that leaves of
//! them, so one instruction sums both. Weights are made two at a time, exactly as the format defines them.

use super::{Trellis, generator};
use crate::gpu::{Buffer, Gpu};
use crate::ops::tiles::{ABSENT, Mode, Rows, tile_in, tile_out, tile_rows, tile_slot};
use cubecl::prelude::*;

/// Planes of a cube that share a column of tiles.
const PLANES: u32 = 8;
/// Planes where columns are few and long.
const MANY_PLANES: u32 = 16;
/// Most rows of a tile of rows.
const MOST: u32 = 32;
/// Tiles whose words are fetched before the first is decoded.
const AHEAD: u32 = 4;

type Words4 = Vector<u32, Const<4>>;
type Words2 = Vector<u32, Const<2>>;
type Sums = Vector<f32, Const<4>>;

/// `rotated: [rows.count(), padded_in]`, in the order of the operand, times `Ŵ`: `[rows.count(), padded_out]`.
pub(super) fn multiply(gpu: &Gpu, rotated: &Buffer, matrix: &Trellis, rows: &Rows) -> Buffer {
    let launch = rows.launch(gpu, MOST);
    // Every entry has a row of its own.
    let share = if launch.mode == Mode::Dense { launch.share } else { 1 };
    let (multiplier, addend, mul1) = generator(matrix.codebook);
    let (k_tiles, n_tiles) = (matrix.padded_in as u32 / 16, matrix.padded_out as u32 / 16);
    // By the matrix alone: the order of a row's sums does not depend on the others.
    let few = n_tiles < 512 && k_tiles >= 4 * MANY_PLANES;
    let planes = if few { MANY_PLANES } else { PLANES };
    let product = gpu.empty(rows.count() * matrix.padded_out);
    let count = CubeCount::Static(n_tiles, launch.tiles, 1);
    let (x, tiles, to) = (rotated.arg4(), matrix.tiles.arg(), product.arg());
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
            planes,
        );
    }
    product
}

#[cube(launch_unchecked)]
fn multiply_kernel(
    x: &[Words4],
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
    #[comptime] planes: u32,
) {
    let nt = CUBE_POS_X;
    let row_tile = CUBE_POS_Y;
    let slot = tile_slot(table, slots, row_tile, share, mode);
    if slot == comptime!(ABSENT) {
        terminate!();
    }
    let present = tile_rows(table, row_tile, rows, share, m, mode);
    let lane = UNIT_POS_X;
    let eights = comptime!(m.div_ceil(8));
    let words = comptime!(4 * twice_bits);
    let aligned = comptime!((8 * twice_bits / 2 - twice_bits / 2 + 16).div_ceil(32));
    let fetched = comptime!(aligned + 1);

    let mut inputs = Array::<u32>::new(comptime!(eights as usize));
    #[unroll]
    for r in 0..eights {
        // A row past the last is read as the last, and not written.
        let i = min(lane / 4 + comptime!(r * 8), present - 1);
        let row = tile_out(table, order, row_tile, i, share, m, mode);
        inputs[r as usize] = tile_in(row, share, mode) * k_tiles * 4 + lane % 4;
    }
    // First bit of the lane's first window, kept positive by one turn of the ring.
    let first =
        lane * comptime!(4 * twice_bits) + comptime!(twice_bits / 2 + 128 * twice_bits - 16);
    let shift = first % 32;
    let mut places = Array::<u32>::new(comptime!(fetched as usize));
    #[unroll]
    for i in 0..fetched {
        places[i as usize] = (first / 32 + i) % words;
    }
    let mut sums = Array::<Sums>::new(comptime!((2 * eights) as usize));
    #[unroll]
    for i in 0..comptime!(2 * eights) {
        sums[i as usize] = Sums::new(0.0);
    }

    let stride = n_tiles * words;
    let base = (slot * k_tiles * n_tiles + nt) * words;
    let mut kt = UNIT_POS_Y;
    let mut ring = Array::<u32>::new(comptime!((AHEAD * fetched) as usize));
    let mut fragments = Array::<Words4>::new(comptime!((AHEAD * eights) as usize));
    while kt + comptime!((AHEAD - 1) * planes) < k_tiles {
        #[unroll]
        for a in 0..AHEAD {
            let at = base + (kt + comptime!(a * planes)) * stride;
            #[unroll]
            for i in 0..fetched {
                ring[comptime!((a * fetched + i) as usize)] =
                    tiles[(at + places[i as usize]) as usize];
            }
            #[unroll]
            for r in 0..eights {
                let from = inputs[r as usize] + (kt + comptime!(a * planes)) * 4;
                fragments[comptime!((a * eights + r) as usize)] = x[from as usize];
            }
        }
        #[unroll]
        for a in 0..AHEAD {
            step(
                &ring, &fragments, &mut sums, shift, a, eights, twice_bits, mul1, multiplier,
                addend,
            );
        }
        kt += comptime!(AHEAD * planes);
    }
    while kt < k_tiles {
        let at = base + kt * stride;
        #[unroll]
        for i in 0..fetched {
            ring[i as usize] = tiles[(at + places[i as usize]) as usize];
        }
        #[unroll]
        for r in 0..eights {
            fragments[r as usize] = x[(inputs[r as usize] + kt * 4) as usize];
        }
        step(
            &ring, &fragments, &mut sums, shift, 0u32, eights, twice_bits, mul1, multiplier, addend,
        );
        kt += planes;
    }

    let mut shared = Shared::<[f32]>::new_slice(comptime!((16 * m * planes) as usize));
    #[unroll]
    for r in 0..eights {
        let i = lane / 4 + comptime!(r * 8);
        if i < m {
            #[unroll]
            for half in 0..2u32 {
                let s = sums[comptime!((2 * r + half) as usize)];
                let to = (UNIT_POS_Y * m + i) * 16 + comptime!(half * 8) + lane % 4 * 2;
                shared[to as usize] = s.extract(0usize) + s.extract(2usize);
                shared[(to + 1) as usize] = s.extract(1usize) + s.extract(3usize);
            }
        }
    }
    sync_cube();
    let mut at = UNIT_POS;
    while at < comptime!(16 * m) {
        let i = at / 16;
        if i < present {
            let mut total = f32::new(0.0);
            #[unroll]
            for p in 0..planes {
                total += shared[(at + comptime!(p * m * 16)) as usize];
            }
            let row = tile_out(table, order, row_tile, i, share, m, mode);
            product[((row * n_tiles + nt) * 16 + at % 16) as usize] = total;
        }
        at += CUBE_DIM;
    }
}

/// Decodes the tile whose words were fetched as number `a`, and adds its products.
#[cube]
fn step(
    ring: &Array<u32>,
    fragments: &Array<Words4>,
    sums: &mut Array<Sums>,
    shift: u32,
    #[comptime] a: u32,
    #[comptime] eights: u32,
    #[comptime] twice_bits: u32,
    #[comptime] mul1: bool,
    #[comptime] multiplier: u32,
    #[comptime] addend: u32,
) {
    let aligned = comptime!((8 * twice_bits / 2 - twice_bits / 2 + 16).div_ceil(32));
    let fetched = comptime!(aligned + 1);
    let mut bits = Array::<u32>::new(comptime!(aligned as usize));
    #[unroll]
    for i in 0..aligned {
        let high = ring[comptime!((a * fetched + i) as usize)];
        let low = ring[comptime!((a * fetched + i + 1) as usize)];
        bits[i as usize] = funnel(low, high, shift);
    }
    #[unroll]
    for half in 0..2u32 {
        let mut weights = Words2::new(0u32);
        #[unroll]
        for i in 0..2u32 {
            let j = comptime!(half * 4 + i * 2);
            let one = state(&bits, j, twice_bits);
            let two = state(&bits, comptime!(j + 1), twice_bits);
            weights.insert(comptime!(i as usize), values(one, two, mul1, multiplier, addend));
        }
        #[unroll]
        for r in 0..eights {
            let to = comptime!((2 * r + half) as usize);
            sums[to] = product(fragments[comptime!((a * eights + r) as usize)], weights, sums[to]);
        }
    }
}

/// State of position `j` of a lane's eight.
#[cube]
fn state(bits: &Array<u32>, #[comptime] j: u32, #[comptime] twice_bits: u32) -> u32 {
    let offset = comptime!((j + 1) * twice_bits / 2 - twice_bits / 2);
    let q = comptime!((offset / 32) as usize);
    let r = comptime!(offset % 32);
    if comptime!(r <= 16) {
        (bits[q] >> comptime!(16 - r)) & 0xffffu32
    } else {
        ((bits[q] << comptime!(r - 16)) | (bits[comptime!(q + 1)] >> comptime!(48 - r))) & 0xffffu32
    }
}

// `reinterpret` to the same type reads a variable: inline assembly takes values only.

/// The upper word of `high : low` shifted left by `shift`.
#[cube]
fn funnel(low: u32, high: u32, shift: u32) -> u32 {
    let out: u32;
    gpu_asm!("shf.l.wrap.b32 {}, {}, {}, {};", out(_) out, in(_) u32::reinterpret(low), in(_) u32::reinterpret(high), in(_) u32::reinterpret(shift), options(pure, nomem));
    out
}

/// Values of two states, as f16 in a word.
#[cube]
fn values(
    one: u32,
    two: u32,
    #[comptime] mul1: bool,
    #[comptime] multiplier: u32,
    #[comptime] addend: u32,
) -> u32 {
    let a = one * multiplier + addend;
    let b = two * multiplier + addend;
    let out: u32;
    if comptime!(mul1) {
        // The sum of the bytes on top of the f16 1024, whose unit is 1.
        let s: u32;
        gpu_asm!("dp4a.u32.u32 {}, {}, {}, {};", out(_) s, in(_) u32::reinterpret(a), in(_) 0x01010101u32, in(_) 0x6400u32, options(pure, nomem));
        let t: u32;
        gpu_asm!("dp4a.u32.u32 {}, {}, {}, {};", out(_) t, in(_) u32::reinterpret(b), in(_) 0x01010101u32, in(_) 0x6400u32, options(pure, nomem));
        let both = s | (t << 16u32);
        gpu_asm!("fma.rn.f16x2 {}, {}, {}, {};", out(_) out, in(_) u32::reinterpret(both), in(_) 0x1eee1eeeu32, in(_) 0xc931c931u32, options(pure, nomem));
    } else {
        let a = (a & 0x8fff8fffu32) ^ 0x3b603b60u32;
        let b = (b & 0x8fff8fffu32) ^ 0x3b603b60u32;
        let low: u32;
        gpu_asm!("prmt.b32 {}, {}, {}, {};", out(_) low, in(_) u32::reinterpret(a), in(_) u32::reinterpret(b), in(_) 0x5410u32, options(pure, nomem));
        let high: u32;
        gpu_asm!("prmt.b32 {}, {}, {}, {};", out(_) high, in(_) u32::reinterpret(a), in(_) u32::reinterpret(b), in(_) 0x7632u32, options(pure, nomem));
        gpu_asm!("add.rn.f16x2 {}, {}, {};", out(_) out, in(_) u32::reinterpret(low), in(_) u32::reinterpret(high), options(pure, nomem));
    }
    out
}

/// `sums + inputs · weights`.
#[cube]
fn product(inputs: Words4, weights: Words2, sums: Sums) -> Sums {
    let out: Sums;
    gpu_asm!(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {}, {}, {}, {};",
        out(_) out, in(_) Words4::reinterpret(inputs), in(_) Words2::reinterpret(weights), in(_) Sums::reinterpret(sums), options(pure, nomem)
    );
    out
}
