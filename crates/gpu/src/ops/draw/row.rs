//! What kernels know of a row: its logits, its parts, and sums over a cube.

use super::{BOUND_BITS, LEAST, NONE, Shape};
use cubecl::prelude::*;

/// Floats as words in the same order.
#[cube]
pub(super) fn key(value: f32) -> u32 {
    let bits = u32::reinterpret(value);
    select(bits >> 31u32 == 1, !bits, bits | 0x80000000u32)
}

/// The float of a word.
#[cube]
pub(super) fn value(key: u32) -> f32 {
    f32::reinterpret(select(key >> 31u32 == 1, key & 0x7fffffffu32, !key))
}

/// Weight of a logit beside the largest.
#[cube]
pub(super) fn weight(logit: f32, top: f32, inverse: f32) -> f32 {
    let exponent = max(max(logit - top, f32::new(LEAST)) * inverse, f32::new(-120.0));
    select(logit > f32::new(LEAST), exponent.exp(), f32::new(0.0))
}

/// Where a draw's row is, and what its weights are of.
#[derive(CubeType)]
pub(super) struct Row {
    pub(super) row: u32,
    /// Row of adjusted logits, if it has any.
    pub(super) place: u32,
    pub(super) top: f32,
    pub(super) inverse: f32,
    /// Where the words of its parts begin, four each, of which the first two are read, and how many parts there are.
    pub(super) first: u32,
    pub(super) parts: u32,
    pub(super) vocab: u32,
}

/// The logit of a token, adjusted if the row is.
#[cube]
pub(super) fn logit(token: u32, logits: &[f32], adjusted: &[f32], row: &Row) -> f32 {
    let mut v = f32::new(LEAST);
    if token < row.vocab {
        if row.place == NONE {
            v = logits[(row.row * row.vocab + token) as usize];
        } else {
            v = adjusted[(row.place * row.vocab + token) as usize];
        }
    }
    v
}

/// Sum over the cube.
#[cube]
pub(super) fn cube_sum(value: f32, scratch: &mut [f32], #[comptime] shape: Shape) -> f32 {
    let own = plane_sum(value);
    if UNIT_POS_X == 0 {
        scratch[UNIT_POS_Y as usize] = own;
    }
    sync_cube();
    let mut total = f32::new(0.0);
    #[unroll(comptime!(shape.unrolls()))]
    for p in 0..comptime!(shape.planes()) {
        total += scratch[p as usize];
    }
    sync_cube();
    total
}

/// Sums of two values over the cube; `scratch` has two numbers for every plane.
#[cube]
pub(super) fn cube_sums(
    one: f32,
    other: f32,
    scratch: &mut [f32],
    #[comptime] shape: Shape,
) -> (f32, f32) {
    let own = plane_sum(one);
    let own_other = plane_sum(other);
    if UNIT_POS_X == 0 {
        scratch[UNIT_POS_Y as usize] = own;
        scratch[(UNIT_POS_Y + comptime!(shape.planes())) as usize] = own_other;
    }
    sync_cube();
    let mut total = f32::new(0.0);
    let mut total_other = f32::new(0.0);
    #[unroll(comptime!(shape.unrolls()))]
    for p in 0..comptime!(shape.planes()) {
        total += scratch[p as usize];
        total_other += scratch[(p + comptime!(shape.planes())) as usize];
    }
    sync_cube();
    (total, total_other)
}

/// Sum over the units before, and over all.
#[cube]
pub(super) fn cube_before(value: f32, scratch: &mut [f32], #[comptime] shape: Shape) -> (f32, f32) {
    let own = plane_sum(value);
    if UNIT_POS_X == 0 {
        scratch[UNIT_POS_Y as usize] = own;
    }
    sync_cube();
    let mut before = plane_exclusive_sum(value);
    let mut total = f32::new(0.0);
    #[unroll(comptime!(shape.unrolls()))]
    for p in 0..comptime!(shape.planes()) {
        before += select(UNIT_POS_Y > p, scratch[p as usize], f32::new(0.0));
        total += scratch[p as usize];
    }
    sync_cube();
    (before, total)
}

/// Largest of the cube.
#[cube]
pub(super) fn cube_max(value: u32, scratch: &mut [u32], #[comptime] shape: Shape) -> u32 {
    let own = plane_max(value);
    if UNIT_POS_X == 0 {
        scratch[UNIT_POS_Y as usize] = own;
    }
    sync_cube();
    let mut largest = 0u32.runtime();
    #[unroll(comptime!(shape.unrolls()))]
    for p in 0..comptime!(shape.planes()) {
        largest = max(largest, scratch[p as usize]);
    }
    sync_cube();
    largest
}

/// A bound that the largest logits of at least `wanted` parts reach, and so as many tokens; near the best one.
#[cube]
pub(super) fn bound(
    wanted: u32,
    stats: &[f32],
    row: &Row,
    scratch: &mut [f32],
    #[comptime] shape: Shape,
) -> u32 {
    let each = comptime!(shape.each);
    let mut keys = Array::<u32>::new(comptime!(each as usize));
    #[unroll(comptime!(shape.unrolls()))]
    for j in 0..each {
        let part = j * comptime!(shape.units) + UNIT_POS;
        let mut k = 0u32.runtime();
        if part < row.parts {
            k = key(stats[(row.first + part * 4) as usize]);
        }
        keys[j as usize] = k;
    }
    let mut found = 0u32.runtime();
    for bit in 0..BOUND_BITS {
        let trial = found | (0x80000000u32 >> bit);
        let mut reached = 0u32.runtime();
        #[unroll(comptime!(shape.unrolls()))]
        for j in 0..each {
            reached += select(keys[j as usize] >= trial, 1u32, 0u32);
        }
        let total = cube_sum(f32::cast_from(reached), scratch, shape);
        found = select(total >= f32::cast_from(wanted), trial, found);
    }
    found
}

/// The key of the largest logit, none where a logit is not finite. `first` is where the words of the `parts` begin.
#[cube]
pub(super) fn best(
    stats: &[f32],
    first: u32,
    parts: u32,
    scratch: &mut [u32],
    #[comptime] shape: Shape,
) -> u32 {
    let mut own = 0u32.runtime();
    for j in 0..comptime!(shape.each) {
        let part = UNIT_POS * comptime!(shape.each) + j;
        if part < parts {
            let stat = (first + part * 4) as usize;
            let bad = u32::reinterpret(stats[stat + 1]) & 0x7f800000u32 == 0x7f800000u32;
            own = max(own, select(bad, NONE, key(stats[stat])));
        }
    }
    cube_max(own, scratch, shape)
}

/// The sum of all weights of a part.
#[cube]
pub(super) fn mass(part: u32, stats: &[f32], row: &Row) -> f32 {
    let stat = (row.first + part * 4) as usize;
    stats[stat + 1] * weight(stats[stat], row.top, row.inverse)
}

/// Puts the parts whose largest logit reaches `low` into `active`, in order; how many.
#[cube]
pub(super) fn activate(
    low: u32,
    stats: &[f32],
    row: &Row,
    active: &mut [u32],
    scratch: &mut [f32],
    #[comptime] shape: Shape,
) -> u32 {
    let each = comptime!(shape.each);
    let mut own = 0u32.runtime();
    for j in 0..each {
        let part = UNIT_POS * each + j;
        if part < row.parts {
            if key(stats[(row.first + part * 4) as usize]) >= low {
                own += 1;
            }
        }
    }
    let (before, total) = cube_before(f32::cast_from(own), scratch, shape);
    let mut to = u32::cast_from(before);
    for j in 0..each {
        let part = UNIT_POS * each + j;
        if part < row.parts {
            if key(stats[(row.first + part * 4) as usize]) >= low {
                active[to as usize] = part;
                to += 1;
            }
        }
    }
    sync_cube();
    u32::cast_from(total)
}

/// The first of the tokens that have the largest logit.
#[cube]
pub(super) fn first_of(
    best: u32,
    logits: &[f32],
    adjusted: &[f32],
    stats: &[f32],
    row: &Row,
    scratch: &mut [u32],
    #[comptime] shape: Shape,
) -> u32 {
    let mut own = 0u32.runtime();
    for j in 0..comptime!(shape.each) {
        let part = UNIT_POS * comptime!(shape.each) + j;
        if part < row.parts {
            if key(stats[(row.first + part * 4) as usize]) == best {
                own = max(own, !part);
            }
        }
    }
    let part = !cube_max(own, scratch, shape);
    let token = part * comptime!(shape.part) + UNIT_POS;
    let mut own = 0u32.runtime();
    if UNIT_POS < comptime!(shape.part) {
        if key(logit(token, logits, adjusted, row)) == best {
            own = !token;
        }
    }
    !cube_max(own, scratch, shape)
}

/// The key of the logit that has a weight, or of one a little lower.
#[cube]
pub(super) fn key_of_weight(weight: f32, row: &Row) -> u32 {
    let logit = row.top + max(weight * 0.999, f32::new(1.0e-37)).ln() / row.inverse;
    max(key(max(logit, f32::new(LEAST))), key(f32::new(LEAST)) + 1)
}
