//! A token for every draw.

#![allow(clippy::too_many_arguments)]

use super::row::{
    Row, activate, best, bound, cube_before, cube_max, cube_sum, cube_sums, first_of, key,
    key_of_weight, logit, mass, value, weight,
};
use super::{
    ASKED, EXCLUDE, INVERSE, LEAST, MIN_P, NONE, NUCLEUS, PLACE, RANKED, ROW, Shape, TOP_K, TOP_P,
    UNIFORM,
};
use cubecl::prelude::*;

/// Shared memory of a cube.
#[derive(CubeType)]
struct Scratch {
    /// Parts that are looked at, in order, and a number for each.
    active: Shared<[u32]>,
    sums: Shared<[f32]>,
    /// Tokens that are ranked, their keys, and how much each counts.
    keys: Shared<[u32]>,
    tokens: Shared<[u32]>,
    terms: Shared<[f32]>,
    /// For sums over the cube.
    floats: Shared<[f32]>,
    words: Shared<[u32]>,
}

/// A range of the order: from the token `(from, from_token)` to the token `(edge, edge_token)`, both of it, but for those of less than `least` weight.
#[derive(CubeType)]
struct Kept {
    from: u32,
    from_token: u32,
    edge: u32,
    edge_token: u32,
    least: f32,
}

/// Whether the order has a token before the edge, or whether it is that.
#[cube]
fn is_within(key: u32, token: u32, edge: u32, edge_token: u32) -> bool {
    key > edge || (key == edge && token <= edge_token)
}

/// Whether a token reaches `low` but not `high`, and is not after the edge.
#[cube]
fn is_between(key: u32, token: u32, low: u32, high: u32, kept: &Kept) -> bool {
    key >= low && key < high && is_within(key, token, kept.edge, kept.edge_token)
}

/// The weight of a token that is kept, or zero.
#[cube]
fn weight_of(v: f32, token: u32, kept: &Kept, row: &Row) -> f32 {
    let k = key(v);
    let w = weight(v, row.top, row.inverse);
    let excluded = k > kept.from || (k == kept.from && token < kept.from_token);
    let is_kept = is_within(k, token, kept.edge, kept.edge_token) && !excluded && w >= kept.least;
    select(is_kept, w, f32::new(0.0))
}

/// How many tokens of the active parts reach `low`, none after the edge, and their weights.
#[cube]
fn tally(
    low: u32,
    kept: &Kept,
    logits: &[f32],
    adjusted: &[f32],
    row: &Row,
    count: u32,
    scratch: &mut Scratch,
    #[comptime] shape: Shape,
) -> (f32, f32) {
    let mut number = f32::new(0.0);
    let mut mass = f32::new(0.0);
    let mut a = UNIT_POS_Y;
    while a < count {
        let start = scratch.active[a as usize] * comptime!(shape.part) + UNIT_POS_X;
        #[unroll(comptime!(shape.unrolls()))]
        for j in 0..comptime!(shape.own()) {
            let token = start + j * comptime!(shape.plane);
            let v = logit(token, logits, adjusted, row);
            let k = key(v);
            if k >= low && is_within(k, token, kept.edge, kept.edge_token) {
                number += 1.0;
                mass += weight(v, row.top, row.inverse);
            }
        }
        a += comptime!(shape.planes());
    }
    cube_sums(number, mass, &mut scratch.floats, shape)
}

/// What a unit's active parts have, together.
#[cube]
fn own_sums(count: u32, sums: &[f32], #[comptime] shape: Shape) -> f32 {
    let mut own = f32::new(0.0);
    for j in 0..comptime!(shape.each) {
        let a = UNIT_POS * comptime!(shape.each) + j;
        if a < count {
            own += sums[a as usize];
        }
    }
    own
}

/// Puts the tokens of the active parts that are between `low` and `high` beside each other, always in the same order.
#[cube]
fn gather(
    low: u32,
    high: u32,
    by_weight: bool,
    kept: &Kept,
    logits: &[f32],
    adjusted: &[f32],
    row: &Row,
    count: u32,
    scratch: &mut Scratch,
    #[comptime] shape: Shape,
) {
    // Each part's first place is how many the parts before it have.
    let mut a = UNIT_POS_Y;
    while a < count {
        let start = scratch.active[a as usize] * comptime!(shape.part) + UNIT_POS_X;
        let mut own = 0u32.runtime();
        #[unroll(comptime!(shape.unrolls()))]
        for j in 0..comptime!(shape.own()) {
            let token = start + j * comptime!(shape.plane);
            let k = key(logit(token, logits, adjusted, row));
            own += select(is_between(k, token, low, high, kept), 1u32, 0u32);
        }
        let all = plane_sum(own);
        if UNIT_POS_X == 0 {
            scratch.sums[a as usize] = f32::cast_from(all);
        }
        a += comptime!(shape.planes());
    }
    sync_cube();
    let own = own_sums(count, &scratch.sums, shape);
    let (mut before, _) = cube_before(own, &mut scratch.floats, shape);
    for j in 0..comptime!(shape.each) {
        let a = UNIT_POS * comptime!(shape.each) + j;
        if a < count {
            let own = scratch.sums[a as usize];
            scratch.sums[a as usize] = before;
            before += own;
        }
    }
    sync_cube();
    let mut values = Array::<f32>::new(comptime!(shape.own() as usize));
    let mut a = UNIT_POS_Y;
    while a < count {
        let start = scratch.active[a as usize] * comptime!(shape.part) + UNIT_POS_X;
        let mut own = 0u32.runtime();
        #[unroll(comptime!(shape.unrolls()))]
        for j in 0..comptime!(shape.own()) {
            let token = start + j * comptime!(shape.plane);
            let v = logit(token, logits, adjusted, row);
            own += select(is_between(key(v), token, low, high, kept), 1u32, 0u32);
            values[j as usize] = v;
        }
        let mut to = u32::cast_from(scratch.sums[a as usize]) + plane_exclusive_sum(own);
        #[unroll(comptime!(shape.unrolls()))]
        for j in 0..comptime!(shape.own()) {
            let token = start + j * comptime!(shape.plane);
            let v = values[j as usize];
            if is_between(key(v), token, low, high, kept) {
                scratch.keys[to as usize] = key(v);
                scratch.tokens[to as usize] = token;
                scratch.terms[to as usize] =
                    select(by_weight, weight(v, row.top, row.inverse), f32::new(1.0));
                to += 1;
            }
        }
        a += comptime!(shape.planes());
    }
    sync_cube();
}

/// The last of `found` tokens, in the order, before which the terms, and `above`, do not reach the target; and the weights up to it.
#[cube]
fn rank(
    found: u32,
    above: f32,
    target: f32,
    row: &Row,
    scratch: &mut Scratch,
    #[comptime] shape: Shape,
) -> (u32, u32, f32) {
    let each = comptime!(RANKED / shape.units);
    let mut befores = Array::<f32>::new(comptime!(each as usize));
    let mut last = 0u32.runtime();
    let mut mass = f32::new(0.0);
    #[unroll(comptime!(shape.unrolls()))]
    for j in 0..each {
        let i = j * comptime!(shape.units) + UNIT_POS;
        let mut before = target;
        if i < found {
            let k = scratch.keys[i as usize];
            let token = scratch.tokens[i as usize];
            before = above;
            for other in 0..found {
                let other_key = scratch.keys[other as usize];
                if other_key > k || (other_key == k && scratch.tokens[other as usize] < token) {
                    before += scratch.terms[other as usize];
                }
            }
            if before < target {
                last = max(last, !k);
                mass += weight(value(k), row.top, row.inverse);
            }
        }
        befores[j as usize] = before;
    }
    let mass = cube_sum(mass, &mut scratch.floats, shape);
    let edge = !cube_max(last, &mut scratch.words, shape);
    let mut last = 0u32.runtime();
    #[unroll(comptime!(shape.unrolls()))]
    for j in 0..each {
        let i = j * comptime!(shape.units) + UNIT_POS;
        if befores[j as usize] < target && scratch.keys[i as usize] == edge {
            last = max(last, scratch.tokens[i as usize]);
        }
    }
    (edge, cube_max(last, &mut scratch.words, shape), mass)
}

/// The weights of what is kept, by active part and all together.
#[cube]
fn weigh(
    kept: &Kept,
    logits: &[f32],
    adjusted: &[f32],
    row: &Row,
    count: u32,
    scratch: &mut Scratch,
    #[comptime] shape: Shape,
) -> f32 {
    let mut a = UNIT_POS_Y;
    while a < count {
        let start = scratch.active[a as usize] * comptime!(shape.part) + UNIT_POS_X;
        let mut own = f32::new(0.0);
        #[unroll(comptime!(shape.unrolls()))]
        for j in 0..comptime!(shape.own()) {
            let token = start + j * comptime!(shape.plane);
            own += weight_of(logit(token, logits, adjusted, row), token, kept, row);
        }
        let all = plane_sum(own);
        if UNIT_POS_X == 0 {
            scratch.sums[a as usize] = all;
        }
        a += comptime!(shape.planes());
    }
    sync_cube();
    let own = own_sums(count, &scratch.sums, shape);
    cube_sum(own, &mut scratch.floats, shape)
}

/// The last token of the order that has at least a weight, as a key and a token: those that are kept begin with it. The key is none if no token has that.
#[cube]
fn last_above(
    least: f32,
    kept: &Kept,
    logits: &[f32],
    adjusted: &[f32],
    row: &Row,
    count: u32,
    scratch: &mut Scratch,
    #[comptime] shape: Shape,
) -> (u32, u32) {
    // Its key, then the last of the tokens that have it.
    let mut last = 0u32.runtime();
    let mut token = 0u32.runtime();
    for round in 0..2u32 {
        let mut own = 0u32.runtime();
        let mut a = UNIT_POS_Y;
        while a < count {
            let start = scratch.active[a as usize] * comptime!(shape.part) + UNIT_POS_X;
            #[unroll(comptime!(shape.unrolls()))]
            for j in 0..comptime!(shape.own()) {
                let t = start + j * comptime!(shape.plane);
                let v = logit(t, logits, adjusted, row);
                let w = weight_of(v, t, kept, row);
                if w > 0.0 && w >= least {
                    if round == 0 {
                        own = max(own, !key(v));
                    } else if key(v) == !last {
                        own = max(own, t);
                    }
                }
            }
            a += comptime!(shape.planes());
        }
        let found = cube_max(own, &mut scratch.words, shape);
        if round == 0 {
            last = found;
        } else {
            token = found;
        }
    }
    (!last, select(last == 0, 0u32, token))
}

/// The token at which the weights of those before it, by token, are not above a share for the last time; none if there is none. `sums` has the weights by active part.
#[cube]
fn locate(
    share_high: f32,
    share_low: f32,
    kept: &Kept,
    logits: &[f32],
    adjusted: &[f32],
    row: &Row,
    count: u32,
    scratch: &mut Scratch,
    #[comptime] shape: Shape,
) -> u32 {
    let own = own_sums(count, &scratch.sums, shape);
    let (before, all) = cube_before(own, &mut scratch.floats, shape);
    let mut after = fma(share_high, all, -before) + share_low * all;
    let reached = own > 0.0 && after >= 0.0;
    let unit = cube_max(select(reached, UNIT_POS + 1, 0u32), &mut scratch.words, shape);
    // The part, and what of the share is left to it.
    if UNIT_POS + 1 == unit {
        let mut part = 0u32.runtime();
        let mut left = after;
        for j in 0..comptime!(shape.each) {
            let a = UNIT_POS * comptime!(shape.each) + j;
            if a < count {
                let sum = scratch.sums[a as usize];
                if sum > 0.0 && after >= 0.0 {
                    part = scratch.active[a as usize];
                    left = after;
                }
                after -= sum;
            }
        }
        scratch.tokens[0] = part;
        scratch.terms[0] = left;
    }
    sync_cube();
    let mut found = 0u32.runtime();
    if unit > 0 {
        let token = scratch.tokens[0] * comptime!(shape.part) + UNIT_POS;
        let left = scratch.terms[0];
        let mut own = f32::new(0.0);
        if UNIT_POS < comptime!(shape.part) {
            own = weight_of(logit(token, logits, adjusted, row), token, kept, row);
        }
        let (before, _) = cube_before(own, &mut scratch.floats, shape);
        let reached = own > 0.0 && before <= left;
        found = cube_max(select(reached, token + 1, 0u32), &mut scratch.words, shape);
    }
    found - 1
}

#[cube(launch_unchecked)]
pub(super) fn choose_kernel(
    logits: &[f32],
    adjusted: &[f32],
    asked: &[u32],
    stats: &[f32],
    out: &mut [u32],
    stride: u32,
    vocab: u32,
    parts: u32,
    #[comptime] shape: Shape,
) {
    let draw = CUBE_POS_X;
    let at = draw * ASKED;
    let first = draw * parts * 4;
    let top_k = asked[(at + TOP_K) as usize];
    let mut scratch = Scratch {
        active: Shared::<[u32]>::new_slice(comptime!(shape.slots() as usize)),
        sums: Shared::<[f32]>::new_slice(comptime!(shape.slots() as usize)),
        keys: Shared::<[u32]>::new_slice(comptime!(RANKED as usize)),
        tokens: Shared::<[u32]>::new_slice(comptime!(RANKED as usize)),
        terms: Shared::<[f32]>::new_slice(comptime!(RANKED as usize)),
        floats: Shared::<[f32]>::new_slice(comptime!(2 * shape.planes() as usize)),
        words: Shared::<[u32]>::new_slice(comptime!(shape.planes() as usize)),
    };
    let best = best(stats, first, parts, &mut scratch.words, shape);
    let row = Row {
        row: asked[(at + ROW) as usize],
        place: asked[(at + PLACE) as usize],
        top: value(best),
        inverse: f32::reinterpret(asked[(at + INVERSE) as usize]),
        first,
        parts,
        vocab,
    };
    let least = key(f32::new(LEAST)) + 1;
    let mut token = NONE.runtime();
    if best != NONE && best >= least {
        if top_k == 1 {
            token = first_of(best, logits, adjusted, stats, &row, &mut scratch.words, shape);
        } else {
            // All parts, and the sum of their weights.
            let mut own = f32::new(0.0);
            for j in 0..comptime!(shape.each) {
                let part = UNIT_POS * comptime!(shape.each) + j;
                if part < parts {
                    let all = mass(part, stats, &row);
                    scratch.active[part as usize] = part;
                    scratch.sums[part as usize] = all;
                    own += all;
                }
            }
            let mut total = cube_sum(own, &mut scratch.floats, shape);
            let mut count = parts;

            // Where the order is cut: by number, then by weight.
            let mut edge = 0u32.runtime();
            let mut edge_token = NONE.runtime();
            let mut decided = true.runtime();
            for round in 0..2u32 {
                let by_weight = round == 1;
                let top_p = f32::reinterpret(asked[(at + TOP_P) as usize]);
                let is_asked = select(by_weight, top_p < 1.0, top_k < vocab);
                if is_asked && decided {
                    let kept = Kept {
                        from: NONE.runtime(),
                        from_token: 0u32.runtime(),
                        edge,
                        edge_token,
                        least: f32::new(0.0),
                    };
                    let share = max(top_p * total, f32::new(1.0e-30));
                    let target = select(by_weight, share, f32::cast_from(top_k));
                    // The edge is to be a token that reaches `low` and not `high`; `above` are those that reach that.
                    let mut low = edge;
                    let mut high = best + 1;
                    let mut above_number = f32::new(0.0);
                    let mut above_mass = f32::new(0.0);
                    let mut number = f32::new(0.0);
                    if edge == 0 {
                        let wanted = select(by_weight, NUCLEUS.runtime(), top_k);
                        low = max(bound(wanted, stats, &row, &mut scratch.floats, shape), least);
                    }
                    // Once, and again where a nucleus is larger than was looked at.
                    let mut tries = 2u32.runtime();
                    while tries > 0 {
                        count = activate(
                            low,
                            stats,
                            &row,
                            &mut scratch.active,
                            &mut scratch.floats,
                            shape,
                        );
                        let (n, mass) =
                            tally(low, &kept, logits, adjusted, &row, count, &mut scratch, shape);
                        number = n;
                        tries -= 1;
                        if by_weight && edge == 0 && tries == 1 && mass < target && low > least {
                            high = low;
                            above_number = n;
                            above_mass = mass;
                            // All tokens of less weight than this are not what it lacks.
                            let part = (1.0 - top_p) * total * 0.5 / f32::cast_from(vocab);
                            low = min(key_of_weight(part, &row), high - 1);
                        } else {
                            tries = 0u32.runtime();
                        }
                    }
                    while number - above_number > comptime!(RANKED as f32) && high - low > 1 {
                        let middle = low + (high - low) / 2;
                        let (n, mass) = tally(
                            middle,
                            &kept,
                            logits,
                            adjusted,
                            &row,
                            count,
                            &mut scratch,
                            shape,
                        );
                        if select(by_weight, mass, n) >= target {
                            low = middle;
                            number = n;
                        } else {
                            high = middle;
                            above_number = n;
                            above_mass = mass;
                        }
                    }
                    let found = u32::cast_from(number - above_number);
                    if found > RANKED || found == 0 {
                        // Very many equals: the whole row says which of them are kept. None, if rounded sums miss the share.
                        decided = false.runtime();
                    } else {
                        gather(
                            low,
                            high,
                            by_weight,
                            &kept,
                            logits,
                            adjusted,
                            &row,
                            count,
                            &mut scratch,
                            shape,
                        );
                        let above = select(by_weight, above_mass, above_number);
                        let (k, t, mass) = rank(found, above, target, &row, &mut scratch, shape);
                        edge = k;
                        edge_token = t;
                        total = above_mass + mass;
                    }
                }
            }
            if decided {
                let min_p = f32::reinterpret(asked[(at + MIN_P) as usize]);
                let exclude = f32::reinterpret(asked[(at + EXCLUDE) as usize]);
                let is_cut = edge > 0 || min_p > 0.0;
                let excludes = exclude <= 1.0;
                let mut from = NONE.runtime();
                let mut from_token = 0u32.runtime();
                // Sums of parts that are not whole, and once more without what is excluded.
                let mut left = select(excludes, 2u32, select(is_cut, 1u32, 0u32));
                if left > 0 {
                    let low = max(edge, select(min_p > 0.0, key_of_weight(min_p, &row), least));
                    count =
                        activate(low, stats, &row, &mut scratch.active, &mut scratch.floats, shape);
                }
                while left > 0 {
                    let kept = Kept { from, from_token, edge, edge_token, least: min_p };
                    total = weigh(&kept, logits, adjusted, &row, count, &mut scratch, shape);
                    if left == 2 {
                        let (k, t) = last_above(
                            exclude * total,
                            &kept,
                            logits,
                            adjusted,
                            &row,
                            count,
                            &mut scratch,
                            shape,
                        );
                        from = k;
                        from_token = t;
                    }
                    left -= 1;
                }
                let kept = Kept { from, from_token, edge, edge_token, least: min_p };
                let share_high = f32::reinterpret(asked[(at + UNIFORM) as usize]);
                let share_low = f32::reinterpret(asked[(at + UNIFORM + 1) as usize]);
                token = locate(
                    share_high,
                    share_low,
                    &kept,
                    logits,
                    adjusted,
                    &row,
                    count,
                    &mut scratch,
                    shape,
                );
            }
        }
    }
    if UNIT_POS == 0 {
        out[(draw * stride) as usize] = token;
    }
}
