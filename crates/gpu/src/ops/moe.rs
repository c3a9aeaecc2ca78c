//! Choosing experts, sorting their rows, and adding up what they say. Nothing is read back.

use super::tiles::{ABSENT, Grouped};
use crate::gpu::{Buffer, Gpu};
use cubecl::prelude::*;
use marlin_tensor::{Router, Scoring};

/// Units of a cube that chooses for one row.
const UNITS: u32 = 64;

/// Experts of rows and their weights, each `[rows, experts of a row]`.
pub(crate) struct Chosen {
    pub(crate) ids: Buffer,
    pub(crate) weights: Buffer,
}

/// What is chosen for every row of `logits`, best first, and the same with one more: the one after all experts, of weight 1.
pub(crate) fn route(
    gpu: &Gpu,
    logits: &Buffer,
    bias: Option<&Buffer>,
    router: &Router,
    rows: usize,
) -> [Chosen; 2] {
    let chosen = [router.top_k, router.top_k + 1]
        .map(|n| Chosen { ids: gpu.empty(rows * n), weights: gpu.empty(rows * n) });
    let [own, all] = &chosen;
    let shape = Shape {
        experts: router.num_experts as u32,
        top_k: router.top_k as u32,
        groups: router.num_groups as u32,
        top_groups: router.top_k_groups as u32,
        group_score: router.group_score_experts as u32,
        sigmoid: router.scoring == Scoring::Sigmoid,
        normalize: router.normalize,
        has_bias: bias.is_some(),
        plane: gpu.plane,
    };
    let count = CubeCount::Static(rows as u32, 1, 1);
    let bias = bias.unwrap_or(&gpu.none);
    // SAFETY: one cube per row.
    unsafe {
        route_kernel::launch_unchecked(
            &gpu.client,
            count,
            gpu.planes(UNITS / gpu.plane),
            logits.arg(),
            bias.arg(),
            own.ids.arg(),
            own.weights.arg(),
            all.ids.arg(),
            all.weights.arg(),
            router.scaling_factor,
            shape,
        );
    }
    chosen
}

/// What a routing kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    experts: u32,
    top_k: u32,
    groups: u32,
    top_groups: u32,
    group_score: u32,
    sigmoid: bool,
    normalize: bool,
    has_bias: bool,
    plane: u32,
}

/// Entries of `ids` sorted by expert, and cut into tiles of `m` rows.
pub(crate) fn group(gpu: &Gpu, ids: &Buffer, entries: usize, experts: usize, m: u32) -> Grouped {
    let count = entries.min(experts + entries / m as usize);
    let (order, tiles) = (gpu.empty(entries), gpu.empty(3 * count));
    let counts = gpu.empty(experts);
    let (client, cubes) = (&gpu.client, CubeCount::Static(experts as u32, 1, 1));
    let (entries, tiles_len) = (entries as u32, count as u32);
    // SAFETY: a cube of one plane for each expert; there are at most `count` tiles.
    unsafe {
        let plane = || gpu.planes(1);
        count_kernel::launch_unchecked(
            client,
            cubes.clone(),
            plane(),
            ids.arg(),
            counts.arg(),
            entries,
        );
        group_kernel::launch_unchecked(
            client,
            cubes,
            plane(),
            ids.arg(),
            counts.arg(),
            order.arg(),
            tiles.arg(),
            entries,
            tiles_len,
            experts as u32,
            m,
        );
    }
    Grouped { order, tiles, count, m }
}

/// `out[row] = Σ weights[row, j] · y[row · top_k + j]`, `y: [rows · top_k, columns]`.
pub(crate) fn combine(
    gpu: &Gpu,
    y: &Buffer,
    weights: &Buffer,
    rows: usize,
    top_k: usize,
    columns: usize,
) -> Buffer {
    let total = rows * columns;
    let out = gpu.empty(total);
    let (count, dim) = gpu.each(total);
    let (y, weights, to) = (y.arg(), weights.arg(), out.arg());
    let (top_k, columns, total) = (top_k as u32, columns as u32, total as u32);
    // SAFETY: units past the end do nothing.
    unsafe {
        combine_kernel::launch_unchecked(
            &gpu.client,
            count,
            dim,
            y,
            weights,
            to,
            top_k,
            columns,
            total,
        );
    }
    out
}

#[cube(launch_unchecked)]
fn combine_kernel(
    y: &[f32],
    weights: &[f32],
    out: &mut [f32],
    top_k: u32,
    columns: u32,
    total: u32,
) {
    let i = ABSOLUTE_POS as u32;
    if i < total {
        let row = i / columns;
        let column = i % columns;
        let mut sum = f32::new(0.0);
        for j in 0..top_k {
            let entry = row * top_k + j;
            sum += weights[entry as usize] * y[(entry * columns + column) as usize];
        }
        out[i as usize] = sum;
    }
}

/// Smaller than any choice that counts.
const LEAST: f64 = -3.0e38;

#[cube(launch_unchecked)]
fn route_kernel(
    logits: &[f32],
    bias: &[f32],
    ids: &mut [u32],
    weights: &mut [f32],
    all_ids: &mut [u32],
    all_weights: &mut [f32],
    scaling_factor: f32,
    #[comptime] shape: Shape,
) {
    let experts = comptime!(shape.experts);
    let top_k = comptime!(shape.top_k);
    let row = CUBE_POS_X;
    let unit = UNIT_POS;
    let mut scores = Shared::<[f32]>::new_slice(comptime!(experts as usize));
    let mut choices = Shared::<[f32]>::new_slice(comptime!(experts as usize));
    let mut best = Shared::<[f32]>::new_slice(64usize);
    let mut places = Shared::<[u32]>::new_slice(64usize);

    // Scores.
    let mut largest = f32::new(LEAST);
    let mut e = unit;
    while e < experts {
        largest = max(largest, logits[(row * experts + e) as usize]);
        e += 64;
    }
    let planes = comptime!(UNITS / shape.plane);
    let part = plane_max(largest);
    if UNIT_POS_X == 0 {
        best[UNIT_POS_Y as usize] = part;
    }
    sync_cube();
    let mut top = f32::new(LEAST);
    #[unroll]
    for i in 0..planes {
        top = max(top, best[i as usize]);
    }
    sync_cube();
    let mut part = f32::new(0.0);
    let mut e = unit;
    while e < experts {
        let x = logits[(row * experts + e) as usize];
        let score =
            if comptime!(shape.sigmoid) { 1.0 / (1.0 + (-x).exp()) } else { (x - top).exp() };
        scores[e as usize] = score;
        part += score;
        e += 64;
    }
    let part = plane_sum(part);
    if UNIT_POS_X == 0 {
        best[UNIT_POS_Y as usize] = part;
    }
    sync_cube();
    let mut total = f32::new(0.0);
    #[unroll]
    for i in 0..planes {
        total += best[i as usize];
    }
    let mut e = unit;
    while e < experts {
        let mut score = scores[e as usize];
        if comptime!(!shape.sigmoid) {
            score /= total;
            scores[e as usize] = score;
        }
        if comptime!(shape.has_bias) {
            score += bias[e as usize];
        }
        choices[e as usize] = score;
        e += 64;
    }
    sync_cube();

    if comptime!(shape.groups > 1) {
        exclude_groups(&mut choices, &mut best, shape);
    }

    // The best, then the best of the rest.
    let mut sum = f32::new(0.0);
    for k in 0..top_k {
        let mut value = f32::new(LEAST);
        let mut place = experts.runtime();
        let mut e = unit;
        while e < experts {
            let v = choices[e as usize];
            if v > value {
                value = v;
                place = e;
            }
            e += 64;
        }
        let of_plane = plane_max(value);
        let place_of = plane_min(select(value == of_plane, place, experts.runtime()));
        if UNIT_POS_X == 0 {
            best[UNIT_POS_Y as usize] = of_plane;
            places[UNIT_POS_Y as usize] = place_of;
        }
        sync_cube();
        let mut chosen = experts.runtime();
        let mut highest = f32::new(LEAST);
        #[unroll]
        for i in 0..planes {
            let v = best[i as usize];
            let p = places[i as usize];
            // The lower index among equals.
            if v > highest || (v == highest && p < chosen) {
                highest = v;
                chosen = p;
            }
        }
        sync_cube();
        let chosen = min(chosen, comptime!(experts - 1).runtime());
        let weight = scores[chosen as usize];
        sum += weight;
        if unit == 0 {
            choices[chosen as usize] = f32::new(LEAST);
            ids[(row * top_k + k) as usize] = chosen;
            weights[(row * top_k + k) as usize] = weight;
        }
        sync_cube();
    }
    if unit == 0 {
        let divisor = if comptime!(shape.normalize) { sum + 1e-20 } else { f32::new(1.0) };
        let all = row * comptime!(top_k + 1);
        for k in 0..top_k {
            let at = (row * top_k + k) as usize;
            let weight = weights[at] / divisor * scaling_factor;
            weights[at] = weight;
            all_weights[(all + k) as usize] = weight;
            all_ids[(all + k) as usize] = ids[at];
        }
        all_ids[(all + top_k) as usize] = experts.runtime();
        all_weights[(all + top_k) as usize] = f32::new(1.0);
    }
}

/// Sets the choices of groups that may not be used below all others. `room` has a place per group.
#[cube]
fn exclude_groups(choices: &mut [f32], room: &mut [f32], #[comptime] shape: Shape) {
    let size = comptime!(shape.experts / shape.groups);
    let unit = UNIT_POS;
    if unit < comptime!(shape.groups) {
        // The sum of the best few, found one after the other; equals count as often as they occur.
        let mut sum = f32::new(0.0);
        let mut bound = f32::new(3.0e38);
        let mut taken = 0u32.runtime();
        while taken < comptime!(shape.group_score) {
            let mut next = f32::new(LEAST);
            let mut times = 0u32.runtime();
            for i in 0..size {
                let v = choices[(unit * size + i) as usize];
                if v < bound {
                    if v > next {
                        next = v;
                        times = 0u32.runtime();
                    }
                    if v == next {
                        times += 1;
                    }
                }
            }
            let used = max(min(times, comptime!(shape.group_score).runtime() - taken), 1u32);
            sum += next * f32::cast_from(used);
            taken += used;
            bound = next;
        }
        room[unit as usize] = sum;
    }
    sync_cube();
    if unit < comptime!(shape.groups) {
        let mine = room[unit as usize];
        let mut better = 0u32.runtime();
        for g in 0..comptime!(shape.groups) {
            let other = room[g as usize];
            if other > mine || (other == mine && g < unit) {
                better += 1;
            }
        }
        if better >= comptime!(shape.top_groups) {
            for i in 0..size {
                choices[(unit * size + i) as usize] = f32::new(LEAST);
            }
        }
    }
    sync_cube();
}

/// Entries of the cube's expert.
#[cube(launch_unchecked)]
fn count_kernel(ids: &[u32], counts: &mut [u32], entries: u32) {
    let expert = CUBE_POS_X;
    let mut count = 0u32.runtime();
    let mut i = UNIT_POS_X;
    while i < entries {
        count += select(ids[i as usize] == expert, 1u32, 0u32);
        i += CUBE_DIM_X;
    }
    let count = plane_sum(count);
    if UNIT_POS_X == 0 {
        counts[expert as usize] = count;
    }
}

/// Where entries of the cube's expert stand, in their order, and its tiles; the last cube leaves the others empty.
#[cube(launch_unchecked)]
fn group_kernel(
    ids: &[u32],
    counts: &[u32],
    order: &mut [u32],
    tiles: &mut [u32],
    entries: u32,
    tiles_len: u32,
    experts: u32,
    #[comptime] m: u32,
) {
    let expert = CUBE_POS_X;
    // Entries and tiles of the experts before.
    let mut start = 0u32.runtime();
    let mut first = 0u32.runtime();
    let mut e = UNIT_POS_X;
    while e < expert {
        let count = counts[e as usize];
        start += count;
        first += (count + comptime!(m - 1)) / m;
        e += CUBE_DIM_X;
    }
    let start = plane_sum(start);
    let first = plane_sum(first);
    let count = counts[expert as usize];
    let mut at = start;
    let mut from = 0u32.runtime();
    while from < entries {
        let i = from + UNIT_POS_X;
        let mut own = 0u32.runtime();
        if i < entries {
            own = select(ids[i as usize] == expert, 1u32, 0u32);
        }
        let place = at + plane_exclusive_sum(own);
        if own == 1 {
            order[place as usize] = i;
        }
        at += plane_sum(own);
        from += CUBE_DIM_X;
    }
    let own = (count + comptime!(m - 1)) / m;
    let past = select(expert + 1 == experts, tiles_len, first + own);
    let mut t = first + UNIT_POS_X;
    while t < past {
        let done = min((t - first) * m, count);
        tiles[(t * 3) as usize] = select(done < count, expert, 0u32);
        tiles[(t * 3 + 1) as usize] = start + done;
        tiles[(t * 3 + 2) as usize] = min(count - done, m.runtime());
        t += CUBE_DIM_X;
    }
}

/// Copies to `out` the rows of `part` whose expert has a slot.
pub(crate) fn keep(
    gpu: &Gpu,
    part: &Buffer,
    ids: &Buffer,
    slots: &Buffer,
    out: &Buffer,
    entries: usize,
    columns: usize,
) {
    let total = entries * columns;
    let (count, dim) = gpu.each(total);
    let (part, ids, slots, out) = (part.arg(), ids.arg(), slots.arg(), out.arg());
    // SAFETY: units past the end do nothing.
    unsafe {
        keep_kernel::launch_unchecked(
            &gpu.client,
            count,
            dim,
            part,
            ids,
            slots,
            out,
            columns as u32,
            total as u32,
        );
    }
}

#[cube(launch_unchecked)]
fn keep_kernel(
    part: &[f32],
    ids: &[u32],
    slots: &[u32],
    out: &mut [f32],
    columns: u32,
    total: u32,
) {
    let i = ABSOLUTE_POS as u32;
    if i < total {
        if slots[ids[(i / columns) as usize] as usize] != comptime!(ABSENT) {
            out[i as usize] = part[i as usize];
        }
    }
}
