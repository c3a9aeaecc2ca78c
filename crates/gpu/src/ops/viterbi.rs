//! The search for the cheapest ring of states of a tile, as `marlin_quant::exl3::encode` defines it: a free walk once round
//! from the middle, which fixes the node at the wrap, and a walk from there to there.
//!
//! A cube searches one tile after another. At every position a unit takes four nodes that follow each other and tries
//! the `2^C` states that lead to each. Only costs are kept, those of every position; a plane walks back through them and
//! tries again the states that lead to the one node of each position. Values are not rounded to fp16 here: the
//! search may choose by them, what a state means stays what it is.

use super::exl3;
use crate::gpu::{Buffer, Gpu, WORD};
use cubecl::prelude::*;
use half::f16;
use marlin_quant::exl3::codebook::{MUL1_OFFSET, MUL1_SLOPE};
use marlin_quant::exl3::ring::TILE;
use marlin_quant::exl3::{Codebook, Rate};

/// Nodes of a unit.
const NODES: u32 = 4;
/// Units of a cube, which every device has; NVIDIA's have as many as there is work for.
const UNITS: u32 = 256;
/// Most units of a cube.
const MOST_UNITS: u32 = 1024;
/// Most searches under way.
const MOST_CUBES: usize = 1024;
/// Shared memory besides the costs.
const OTHER_SHARED: usize = 9 << 10;
/// A cost that no walk has.
const NEVER: f32 = 1e38;
/// What the sum of bytes of a product is multiplied by.
const STEP: u32 = 128;
/// 2²³, to which a smaller whole number can be added as bits.
const WHOLE: u32 = 0x4b00_0000;

type Costs = Vector<f32, Const<4>>;

/// `states: [count, 256]`, one a word, of `tiles`, finite and in ring order; costs take `bytes`, or as much as one tile needs.
pub(crate) fn search(
    gpu: &Gpu,
    tiles: &Buffer,
    states: &Buffer,
    count: usize,
    rate: Rate,
    codebook: Codebook,
    bytes: u64,
) {
    let bits = [rate.new_bits(0) as u32, rate.new_bits(1) as u32];
    let least = bits[0].min(bits[1]);
    let nodes = 1usize << (16 - least);
    let room = usize::try_from(bytes).unwrap_or(usize::MAX) / (TILE * nodes * WORD);
    let cubes = room.clamp(1, MOST_CUBES).min(count);
    let (multiplier, addend, mul1) = exl3::generator(codebook);
    let units =
        if gpu.tensor_cores { (nodes as u32 / NODES).clamp(UNITS, MOST_UNITS) } else { UNITS };
    let shared_bytes = gpu.client.properties().hardware.max_shared_memory_size;
    let is_shared = 2 * nodes * WORD + OTHER_SHARED <= shared_bytes;
    let live = if is_shared { gpu.none.clone() } else { gpu.empty(cubes * 2 * nodes) };
    let kept = gpu.empty(cubes * TILE * nodes);
    // SAFETY: every cube has its own costs, of as many nodes as the lower rate has.
    unsafe {
        search_kernel::launch_unchecked(
            &gpu.client,
            CubeCount::Static(cubes as u32, 1, 1),
            gpu.planes(units / gpu.plane),
            tiles.arg(),
            states.arg(),
            live.arg(),
            kept.arg4(),
            count as u32,
            bits[0],
            bits[1],
            Search { least, units, is_shared, mul1, multiplier, addend, nvidia: gpu.tensor_cores },
        );
    }
}

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Search {
    /// Least new bits of a state.
    least: u32,
    units: u32,
    /// Whether the costs before and after a position are in shared memory.
    is_shared: bool,
    mul1: bool,
    multiplier: u32,
    addend: u32,
    nvidia: bool,
}

#[cube(launch_unchecked)]
fn search_kernel(
    tiles: &[f32],
    states: &mut [u32],
    live: &mut [f32],
    kept: &mut [Costs],
    count: u32,
    even: u32,
    odd: u32,
    #[comptime] kind: Search,
) {
    let nodes = comptime!(1u32 << (16 - kind.least));
    if comptime!(kind.is_shared) {
        let mut shared = Shared::<[f32]>::new_slice(comptime!(2 * nodes as usize));
        rings(tiles, states, &mut shared, 0u32.runtime(), kept, count, even, odd, kind);
    } else {
        let own = CUBE_POS_X * comptime!(2 * nodes);
        rings(tiles, states, live, own, kept, count, even, odd, kind);
    }
}

/// Every tile of a cube; its costs are `live[own..]`.
#[cube]
#[allow(clippy::too_many_arguments)]
fn rings(
    tiles: &[f32],
    states: &mut [u32],
    live: &mut [f32],
    own: u32,
    kept: &mut [Costs],
    count: u32,
    even: u32,
    odd: u32,
    #[comptime] kind: Search,
) {
    let nodes = comptime!(1u32 << (16 - kind.least));
    let row = comptime!(nodes / NODES);
    let own_kept = CUBE_POS_X * 256 * row;
    let mut best_cost = Shared::<[f32]>::new_slice(comptime!(kind.units as usize));
    let mut best_node = Shared::<[u32]>::new_slice(comptime!(kind.units as usize));
    let mut wrap = Shared::<[u32]>::new_slice(1usize);
    let mut tile = CUBE_POS_X;
    while tile < count {
        for walk in 0..2u32 {
            let free = walk == 0;
            let first = select(free, 128u32, 0u32);
            // Position 0 and the middle both have an even number.
            let begin = 1u32 << (16 - even);
            let start = select(free, begin, wrap[0]);
            let mut at = UNIT_POS * NODES;
            while at < begin {
                let mut costs = Costs::empty();
                #[unroll]
                for i in 0..NODES {
                    let closed = !free && at + i != start;
                    let cost = select(closed, comptime!(NEVER).runtime(), 0f32);
                    live[(own + at + i) as usize] = cost;
                    costs.insert(comptime!(i as usize), cost);
                }
                if !free {
                    kept[(own_kept + at / NODES) as usize] = costs;
                }
                at += CUBE_DIM * NODES;
            }
            sync(kind);
            for step in 0..256u32 {
                let position = (first + step) % 256;
                let is_odd = position % 2 == 1;
                let e = select(is_odd, odd, even);
                let c = select(is_odd, even, odd);
                let target = tiles[(tile * 256 + position) as usize];
                let old = own + (step % 2) * nodes;
                let new = own + ((step + 1) % 2) * nodes;
                let next = step + 1;
                // What is walked back through: of the free walk only what leads to the wrap.
                let is_kept = next < 256 && next >= first;
                let place = own_kept + next * row;
                advance(live, kept, old, new, is_kept, place, e, c, target, kind);
                sync(kind);
            }
            // After 256 steps the costs are where they began.
            if free {
                let mut cost = comptime!(f32::MAX).runtime();
                let mut node = 0u32.runtime();
                let mut at = UNIT_POS;
                while at < begin {
                    let here = live[(own + at) as usize];
                    if here < cost {
                        cost = here;
                        node = at;
                    }
                    at += CUBE_DIM;
                }
                best_cost[UNIT_POS as usize] = cost;
                best_node[UNIT_POS as usize] = node;
            }
            sync(kind);
            if UNIT_POS < PLANE_DIM {
                let mut node = start;
                let mut steps = 256u32.runtime();
                if free {
                    let mut cost = comptime!(f32::MAX).runtime();
                    for unit in 0..CUBE_DIM {
                        if best_cost[unit as usize] < cost {
                            cost = best_cost[unit as usize];
                            node = best_node[unit as usize];
                        }
                    }
                    // The node before position 0, in the middle of the walk.
                    steps = 128u32.runtime();
                }
                for back in 0..steps {
                    let step = 255 - back;
                    let position = (first + step) % 256;
                    let is_odd = position % 2 == 1;
                    let e = select(is_odd, odd, even);
                    let c = select(is_odd, even, odd);
                    let target = tiles[(tile * 256 + position) as usize];
                    let state = cheapest(&*kept, own_kept + step * row, node, e, c, target, kind);
                    if !free && UNIT_POS == 0 {
                        states[(tile * 256 + position) as usize] = state;
                    }
                    node = state >> e;
                }
                if UNIT_POS == 0 {
                    wrap[0] = node;
                }
            }
            sync(kind);
        }
        tile += CUBE_COUNT_X;
    }
}

/// Costs of all nodes before a position to those of all nodes after it, which are kept where they are wanted.
#[cube]
#[allow(clippy::too_many_arguments)]
fn advance(
    live: &mut [f32],
    kept: &mut [Costs],
    old: u32,
    new: u32,
    is_kept: bool,
    place: u32,
    e: u32,
    c: u32,
    target: f32,
    #[comptime] kind: Search,
) {
    let many = 1u32 << c;
    let shift = 16 - c;
    let offset = offset(target, kind);
    let mut node = UNIT_POS * NODES;
    while node < 1u32 << shift {
        let mut best = Costs::new(comptime!(f32::MAX));
        let mut x = node * comptime!(kind.multiplier) + comptime!(kind.addend);
        let mut from = old + (node >> e);
        // Nodes that follow each other come from one node if at least two bits are new.
        let second = ((node + 2) >> e) - (node >> e);
        for _ in 0..many {
            let first_cost = live[from as usize];
            let second_cost =
                if comptime!(kind.least < 2) { live[(from + second) as usize] } else { first_cost };
            #[unroll]
            for i in 0..NODES {
                let product = x + comptime!(i.wrapping_mul(kind.multiplier));
                let d = distance(product, offset, kind);
                let before = if comptime!(i < 2) { first_cost } else { second_cost };
                let at = comptime!(i as usize);
                best.insert(at, min(best.extract(at), fma(d, d, before)));
            }
            x += comptime!(kind.multiplier) << shift;
            from += 1u32 << (shift - e);
        }
        #[unroll]
        for i in 0..NODES {
            live[(new + node + i) as usize] = best.extract(comptime!(i as usize));
        }
        if is_kept {
            kept[(place + node / NODES) as usize] = best;
        }
        node += CUBE_DIM * NODES;
    }
}

/// The state that leads to `node` best, the smallest of several, from the costs at `place`; the same for all lanes.
#[cube]
fn cheapest(
    kept: &[Costs],
    place: u32,
    node: u32,
    e: u32,
    c: u32,
    target: f32,
    #[comptime] kind: Search,
) -> u32 {
    let offset = offset(target, kind);
    let mut best = comptime!(f32::MAX).runtime();
    let mut found = comptime!(u32::MAX).runtime();
    let mut choice = UNIT_POS_PLANE;
    while choice < 1u32 << c {
        let state = (choice << (16 - c)) | node;
        let from = state >> e;
        let costs = kept[(place + from / NODES) as usize];
        let low = select(from % 2 == 1, costs.extract(1usize), costs.extract(0usize));
        let high = select(from % 2 == 1, costs.extract(3usize), costs.extract(2usize));
        let before = select(from % 4 >= 2, high, low);
        let product = state * comptime!(kind.multiplier) + comptime!(kind.addend);
        let d = distance(product, offset, kind);
        let cost = fma(d, d, before);
        if cost < best {
            best = cost;
            found = state;
        }
        choice += PLANE_DIM;
    }
    let least = plane_min(best);
    plane_min(select(best == least, found, comptime!(u32::MAX).runtime()))
}

/// What [`distance`] adds.
#[cube]
fn offset(target: f32, #[comptime] kind: Search) -> f32 {
    if comptime!(kind.mul1) {
        comptime!(MUL1_OFFSET - 8388608.0 / STEP as f32 * MUL1_SLOPE) - target
    } else {
        -target
    }
}

/// Value of the state whose product is `x`, less the target.
#[cube]
fn distance(x: u32, offset: f32, #[comptime] kind: Search) -> f32 {
    if comptime!(kind.mul1) {
        let bits = if comptime!(kind.nvidia) {
            sum_of_bytes(x)
        } else {
            let pairs = (x & 0x00ff00ffu32) + ((x >> 8u32) & 0x00ff00ffu32);
            ((pairs & 0xffffu32) + (pairs >> 16u32)) * STEP + WHOLE
        };
        fma(f32::reinterpret(bits), comptime!(MUL1_SLOPE / STEP as f32).runtime(), offset)
    } else {
        let y = (x & 0x8fff8fffu32) ^ 0x3b603b60u32;
        let pair = Vector::<f16, Const<2>>::reinterpret(y);
        f32::cast_from(pair.extract(0usize)) + f32::cast_from(pair.extract(1usize)) + offset
    }
}

/// 2²³ and 128 times the sum of four bytes.
#[cube]
fn sum_of_bytes(x: u32) -> u32 {
    let out: u32;
    gpu_asm!("dp4a.u32.u32 {}, {}, {}, {};", out(_) out, in(_) u32::reinterpret(x), in(_) 0x80808080u32, in(_) 0x4b000000u32, options(pure, nomem));
    out
}

/// Waits until what the units of a cube wrote can be read by all.
#[cube]
fn sync(#[comptime] kind: Search) {
    sync_cube();
    if comptime!(!kind.nvidia) {
        sync_storage();
    }
}
