//! Tokens drawn where the logits are: what is copied of a row is its token.
//!
//! A row is cut into parts of [`Shape::part`] tokens. `scan` has a plane for each: it adjusts the logits, and leaves the largest and the sum of weights
//! `exp((logit - largest) / temperature)`. `choose` has a cube for each draw. Tokens have an order, the larger logit first, and what top-k and top-p keep ends at
//! some token of it, the edge: a bound from the parts' largest logits says in which parts the edge can be, the range of logits around it is halved until few tokens
//! are in it, and those are ranked. Then the weights of what is kept are summed by part, and the part and the token are found where the draw falls.
//! Where nothing is cut, the sums of `scan` are those. `likeliest` finds the largest logits of draws that want them.
//!
//! No sum depends on anything but the row and its draw, and each has one order: the same draw gives the same token, alone or among others.

use crate::gpu::{Buffer, Gpu, device_error};
use cubecl::prelude::*;
use marlin_tensor::{BackendError, Draw, Drawn, DrawnLogits};

/// Units of a cube that scans, and most tokens of a part.
const UNITS: u32 = 256;
/// Units of a cube that chooses, where there are tensor cores, NVIDIA's: one cube reads a whole row where a nucleus is large.
const MANY_UNITS: u32 = 1024;
/// Tokens of a part, unless that makes more parts than these.
const PART: usize = 128;
const MOST_PARTS: usize = 2048;
/// Tokens that are ranked beside each other.
const RANKED: u32 = 1024;
/// Of so many parts the largest logits are looked at first for a nucleus.
const NUCLEUS: u32 = 256;
/// Bits of a bound from the parts' largest logits.
const BOUND_BITS: u32 = 20;
/// Below every logit: what is banned or past the end.
const LEAST: f64 = -3.4e38;
/// Word that stands for no token and for no place.
const NONE: u32 = u32::MAX;

/// Words of a draw: where they are.
const ASKED: u32 = 13;
const ROW: u32 = 0;
/// Its adjustments, from and to.
const FROM: u32 = 1;
const TO: u32 = 2;
/// Row of adjusted logits, if it has any.
const PLACE: u32 = 3;
const INVERSE: u32 = 4;
const TOP_K: u32 = 5;
const TOP_P: u32 = 6;
const MIN_P: u32 = 7;
/// Above 1 where nothing is excluded.
const EXCLUDE: u32 = 8;
/// Two floats whose sum is where the draw falls.
const UNIFORM: u32 = 9;
/// How many of the largest logits are wanted, and whether any are.
const LARGEST: u32 = 11;
const WANTS: u32 = 12;
/// Words of an adjustment: token, penalty, what is added.
const ADJUSTMENT: u32 = 3;

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    vocab: u32,
    /// Tokens of a part, parts of a row.
    part: u32,
    parts: u32,
    plane: u32,
    /// Units of a cube that chooses.
    units: u32,
}

impl Shape {
    fn new(vocab: usize, gpu: &Gpu) -> Self {
        let part = if vocab.div_ceil(PART) > MOST_PARTS { UNITS as usize } else { PART };
        let parts = vocab.div_ceil(part) as u32;
        let units = if gpu.tensor_cores { MANY_UNITS } else { UNITS };
        Self { vocab: vocab as u32, part: part as u32, parts, plane: gpu.plane, units }
    }

    /// Planes of a cube that chooses.
    const fn planes(&self) -> u32 {
        self.units / self.plane
    }

    /// Planes of a cube that scans.
    const fn scanning(&self) -> u32 {
        UNITS / self.plane
    }

    /// Tokens of a part that a lane has.
    const fn own(&self) -> u32 {
        self.part / self.plane
    }

    /// Parts that a unit has.
    const fn each(&self) -> u32 {
        self.parts.div_ceil(self.units)
    }

    /// Bytes of shared memory of a cube.
    const fn shared_bytes(&self) -> usize {
        4 * (2 * self.parts + 3 * RANKED + 3 * self.planes() + 2) as usize
    }
}

/// Tokens for `draws` from rows of `logits: [rows, vocab]`; `None` for one whose row has to be read whole.
///
/// # Errors
/// When a kernel before failed.
pub(crate) fn draw(
    gpu: &Gpu,
    logits: &Buffer,
    vocab: usize,
    draws: &[Draw],
) -> Result<Vec<Option<Drawn>>, BackendError> {
    let shape = Shape::new(vocab, gpu);
    if draws.is_empty()
        || shape.shared_bytes() > gpu.client.properties().hardware.max_shared_memory_size
    {
        return Ok(vec![None; draws.len()]);
    }
    let most = draws.iter().filter_map(|d| d.logprobs).max().map(|most| most.min(vocab));
    // Token, then the logits of it and the largest, the sum of weights, and the largest ones.
    let stride = most.map_or(1, |most| 4 + 2 * most);
    let (words, adjusted) = words(draws, vocab);
    let asked = gpu.words(&words);
    let rows = draws.len();
    let parts = shape.parts as usize;
    let adjusted = if adjusted == 0 { gpu.none.clone() } else { gpu.empty(adjusted * vocab) };
    let stats = gpu.empty(rows * parts * 4);
    let out = gpu.empty(rows * stride);
    let client = &gpu.client;
    let scanned = CubeCount::Static(shape.parts.div_ceil(shape.scanning()), rows as u32, 1);
    let (each, dim) = (CubeCount::Static(rows as u32, 1, 1), gpu.planes(shape.planes()));
    // SAFETY: units past the vocabulary and planes past the parts read and write nothing; places of adjusted rows are counted above.
    unsafe {
        scan_kernel::launch_unchecked(
            client,
            scanned,
            gpu.planes(shape.scanning()),
            logits.arg(),
            asked.arg(),
            adjusted.arg(),
            stats.arg(),
            shape,
        );
        choose_kernel::launch_unchecked(
            client,
            each.clone(),
            dim,
            logits.arg(),
            adjusted.arg(),
            asked.arg(),
            stats.arg(),
            out.arg(),
            stride as u32,
            shape,
        );
        if most.is_some() {
            likeliest_kernel::launch_unchecked(
                client,
                each,
                dim,
                logits.arg(),
                asked.arg(),
                stats.arg(),
                out.arg(),
                stride as u32,
                shape,
            );
        }
    }
    let bytes = client.read_one(out.handle.clone()).map_err(device_error)?;
    let words: Vec<u32> = bytes.as_chunks().0.iter().map(|&w| u32::from_le_bytes(w)).collect();
    let drawn = draws.iter().zip(words.chunks_exact(stride)).map(|(draw, words)| {
        let token = words[0];
        let logits = draw.logprobs.map(|count| {
            let float = |word: u32| f32::from_bits(word);
            let norm = f64::from(float(words[2])) + f64::from(float(words[3])).ln();
            let pairs = words[4..].chunks_exact(2).take(count.min(vocab));
            let largest = pairs.map(|pair| (pair[0], float(pair[1]))).collect();
            DrawnLogits { own: float(words[1]), norm, largest }
        });
        (token != NONE).then_some(Drawn { token, logits })
    });
    Ok(drawn.collect())
}

/// What is asked, as words, and how many rows have adjustments.
fn words(draws: &[Draw], vocab: usize) -> (Vec<u32>, usize) {
    let (mut words, mut adjustments, mut adjusted) = (Vec::new(), Vec::new(), 0);
    let first = draws.len() * ASKED as usize;
    for draw in draws {
        let from = first + adjustments.len();
        adjustments.extend(
            draw.adjustments.iter().flat_map(|a| [a.token, a.penalty.to_bits(), a.add.to_bits()]),
        );
        let greedy = draw.temperature == 0.0;
        let temperature = if greedy { 1.0 } else { draw.temperature };
        let top_k = if greedy { 1 } else { draw.top_k.unwrap_or(vocab).min(vocab) };
        let high = draw.uniform as f32;
        // A float above the number it stands for may be 1.
        let high = if high < 1.0 { high } else { 1.0f32.next_down() };
        let low = (draw.uniform - f64::from(high)) as f32;
        let place = if draw.adjustments.is_empty() { NONE } else { adjusted };
        adjusted += u32::from(place != NONE);
        words.extend([
            draw.row as u32,
            from as u32,
            (first + adjustments.len()) as u32,
            place,
            (1.0 / temperature).min(f32::MAX).to_bits(),
            top_k as u32,
            draw.top_p.to_bits(),
            draw.min_p.to_bits(),
            draw.exclude.unwrap_or(2.0).to_bits(),
            high.to_bits(),
            low.to_bits(),
            draw.logprobs.map_or(0, |count| count.min(vocab)) as u32,
            u32::from(draw.logprobs.is_some()),
        ]);
    }
    words.extend(adjustments);
    (words, adjusted as usize)
}

/// Floats as words in the same order.
#[cube]
fn key(value: f32) -> u32 {
    let bits = u32::reinterpret(value);
    select(bits >> 31u32 == 1, !bits, bits | 0x80000000u32)
}

/// The float of a word.
#[cube]
fn value(key: u32) -> f32 {
    f32::reinterpret(select(key >> 31u32 == 1, key & 0x7fffffffu32, !key))
}

/// Weight of a logit beside the largest.
#[cube]
fn weight(logit: f32, top: f32, inverse: f32) -> f32 {
    let exponent = max(max(logit - top, f32::new(LEAST)) * inverse, f32::new(-120.0));
    select(logit > f32::new(LEAST), exponent.exp(), f32::new(0.0))
}

/// `logit` of `token` as the entries from word `from` to word `to` of `asked` have it.
#[cube]
fn adjust(logit: f32, token: u32, asked: &[u32], from: u32, to: u32) -> f32 {
    let mut low = 0u32.runtime();
    let mut high = (to - from) / ADJUSTMENT;
    while low < high {
        let middle = (low + high) / 2;
        let found = asked[(from + middle * ADJUSTMENT) as usize];
        low = select(found < token, middle + 1, low);
        high = select(found < token, high, middle);
    }
    let at = from + low * ADJUSTMENT;
    let mut adjusted = logit;
    if at < to {
        if asked[at as usize] == token {
            let penalty = f32::reinterpret(asked[(at + 1) as usize]);
            let add = asked[(at + 2) as usize];
            let penalised = select(logit > 0.0, logit / penalty, logit * penalty);
            let sum =
                max(min(penalised, f32::new(-LEAST)), f32::new(LEAST)) + f32::reinterpret(add);
            // A banned token gets negative infinity, which is not computed with.
            adjusted = select(add == 0xff800000u32, f32::new(LEAST), sum);
        }
    }
    adjusted
}

/// Of every part: the largest logit and the sum of weights beside it, adjusted and at the draw's temperature, then as they are at 1. A sum is not a number where a
/// logit is not finite.
#[cube(launch_unchecked)]
fn scan_kernel(
    logits: &[f32],
    asked: &[u32],
    adjusted: &mut [f32],
    stats: &mut [f32],
    #[comptime] shape: Shape,
) {
    let draw = CUBE_POS_Y;
    let part = CUBE_POS_X * comptime!(shape.scanning()) + UNIT_POS_Y;
    let at = draw * ASKED;
    let row = asked[(at + ROW) as usize];
    let from = asked[(at + FROM) as usize];
    let to = asked[(at + TO) as usize];
    let place = asked[(at + PLACE) as usize];
    let wants = asked[(at + WANTS) as usize] == 1;
    let inverse = f32::reinterpret(asked[(at + INVERSE) as usize]);
    let own = comptime!(shape.own());
    let mut values = Array::<f32>::new(comptime!(own as usize));
    let mut raw = Array::<f32>::new(comptime!(own as usize));
    let mut top = f32::new(LEAST);
    let mut raw_top = f32::new(LEAST);
    let mut bad = 0u32.runtime();
    #[unroll]
    for j in 0..own {
        let token = part * comptime!(shape.part) + comptime!(j * shape.plane) + UNIT_POS_X;
        let mut v = f32::new(LEAST);
        let mut r = f32::new(LEAST);
        if token < comptime!(shape.vocab) {
            r = logits[(row * comptime!(shape.vocab) + token) as usize];
            if u32::reinterpret(r) & 0x7f800000u32 == 0x7f800000u32 {
                bad += 1;
            }
            v = r;
            if place != NONE {
                v = adjust(r, token, asked, from, to);
                adjusted[(place * comptime!(shape.vocab) + token) as usize] = v;
            }
        }
        values[comptime!(j as usize)] = v;
        raw[comptime!(j as usize)] = r;
        top = max(top, v);
        raw_top = max(raw_top, r);
    }
    let top = plane_max(top);
    let bad = plane_sum(bad);
    let mut sum = f32::new(0.0);
    #[unroll]
    for j in 0..own {
        sum += weight(values[comptime!(j as usize)], top, inverse);
    }
    let sum = plane_sum(sum);
    let to = ((draw * comptime!(shape.parts) + part) * 4) as usize;
    let not_a_number = f32::reinterpret(0x7fc00000u32);
    if UNIT_POS_X == 0 && part < comptime!(shape.parts) {
        stats[to] = top;
        stats[to + 1] = select(bad > 0, not_a_number, sum);
    }
    if wants {
        let top = plane_max(raw_top);
        let mut sum = f32::new(0.0);
        #[unroll]
        for j in 0..own {
            sum += weight(raw[comptime!(j as usize)], top, f32::new(1.0));
        }
        let sum = plane_sum(sum);
        if UNIT_POS_X == 0 && part < comptime!(shape.parts) {
            stats[to + 2] = top;
            stats[to + 3] = sum;
        }
    }
}

/// Sum over the cube.
#[cube]
fn cube_sum(value: f32, scratch: &mut [f32], #[comptime] shape: Shape) -> f32 {
    let own = plane_sum(value);
    if UNIT_POS_X == 0 {
        scratch[UNIT_POS_Y as usize] = own;
    }
    sync_cube();
    let mut total = f32::new(0.0);
    #[unroll]
    for p in 0..comptime!(shape.planes()) {
        total += scratch[p as usize];
    }
    sync_cube();
    total
}

/// Sum over the units before, and over all.
#[cube]
fn cube_before(value: f32, scratch: &mut [f32], #[comptime] shape: Shape) -> (f32, f32) {
    let own = plane_sum(value);
    if UNIT_POS_X == 0 {
        scratch[UNIT_POS_Y as usize] = own;
    }
    sync_cube();
    let mut before = plane_exclusive_sum(value);
    let mut total = f32::new(0.0);
    #[unroll]
    for p in 0..comptime!(shape.planes()) {
        before += select(p.runtime() < UNIT_POS_Y, scratch[p as usize], f32::new(0.0));
        total += scratch[p as usize];
    }
    sync_cube();
    (before, total)
}

/// Largest of the cube.
#[cube]
fn cube_max(value: u32, scratch: &mut [u32], #[comptime] shape: Shape) -> u32 {
    let own = plane_max(value);
    if UNIT_POS_X == 0 {
        scratch[UNIT_POS_Y as usize] = own;
    }
    sync_cube();
    let mut largest = 0u32.runtime();
    #[unroll]
    for p in 0..comptime!(shape.planes()) {
        largest = max(largest, scratch[p as usize]);
    }
    sync_cube();
    largest
}

/// A bound that the largest logits of at least `wanted` parts reach, and so as many tokens; near the best one. `first` is where the parts' words begin.
#[cube]
fn bound(
    wanted: u32,
    stats: &[f32],
    first: u32,
    scratch: &mut [f32],
    #[comptime] shape: Shape,
) -> u32 {
    let each = comptime!(shape.each());
    let mut keys = Array::<u32>::new(comptime!(each as usize));
    #[unroll]
    for j in 0..each {
        let part = comptime!(j * shape.units) + UNIT_POS;
        let mut k = 0u32.runtime();
        if part < comptime!(shape.parts) {
            k = key(stats[(first + part * 4) as usize]);
        }
        keys[comptime!(j as usize)] = k;
    }
    let mut found = 0u32.runtime();
    for bit in 0..BOUND_BITS {
        let trial = found | (0x80000000u32 >> bit);
        let mut reached = 0u32.runtime();
        #[unroll]
        for j in 0..each {
            reached += select(keys[comptime!(j as usize)] >= trial, 1u32, 0u32);
        }
        let total = cube_sum(f32::cast_from(reached), scratch, shape);
        found = select(total >= f32::cast_from(wanted), trial, found);
    }
    found
}

/// Puts the parts whose largest logit reaches `low` into `active`, in order; how many.
#[cube]
fn activate(
    low: u32,
    stats: &[f32],
    first: u32,
    active: &mut [u32],
    scratch: &mut [f32],
    #[comptime] shape: Shape,
) -> u32 {
    let each = comptime!(shape.each());
    let mut own = 0u32.runtime();
    for j in 0..each {
        let part = UNIT_POS * each + j;
        if part < comptime!(shape.parts) {
            if key(stats[(first + part * 4) as usize]) >= low {
                own += 1;
            }
        }
    }
    let (before, total) = cube_before(f32::cast_from(own), scratch, shape);
    let mut to = u32::cast_from(before);
    for j in 0..each {
        let part = UNIT_POS * each + j;
        if part < comptime!(shape.parts) {
            if key(stats[(first + part * 4) as usize]) >= low {
                active[to as usize] = part;
                to += 1;
            }
        }
    }
    sync_cube();
    u32::cast_from(total)
}

/// Where a draw's row is, and what its weights are of.
#[derive(CubeType)]
struct Row {
    row: u32,
    /// Row of adjusted logits, if it has any.
    place: u32,
    top: f32,
    inverse: f32,
}

#[cube]
fn logit(token: u32, logits: &[f32], adjusted: &[f32], row: &Row, #[comptime] shape: Shape) -> f32 {
    let mut v = f32::new(LEAST);
    if token < comptime!(shape.vocab) {
        if row.place == NONE {
            v = logits[(row.row * comptime!(shape.vocab) + token) as usize];
        } else {
            v = adjusted[(row.place * comptime!(shape.vocab) + token) as usize];
        }
    }
    v
}

/// Whether the order has a token before another one, or whether they are the same.
#[cube]
fn is_before(key: u32, token: u32, edge: u32, edge_token: u32) -> bool {
    key > edge || (key == edge && token <= edge_token)
}

/// How many tokens of the active parts reach `low`, none after the edge, and their weights.
#[cube]
#[allow(clippy::too_many_arguments)]
fn tally(
    low: u32,
    edge: u32,
    edge_token: u32,
    logits: &[f32],
    adjusted: &[f32],
    row: &Row,
    active: &[u32],
    count: u32,
    scratch: &mut [f32],
    #[comptime] shape: Shape,
) -> (f32, f32) {
    let mut number = f32::new(0.0);
    let mut mass = f32::new(0.0);
    let mut a = UNIT_POS_Y;
    while a < count {
        let start = active[a as usize] * comptime!(shape.part) + UNIT_POS_X;
        #[unroll]
        for j in 0..comptime!(shape.own()) {
            let token = start + comptime!(j * shape.plane);
            let v = logit(token, logits, adjusted, row, shape);
            let k = key(v);
            if k >= low && is_before(k, token, edge, edge_token) {
                number += 1.0;
                mass += weight(v, row.top, row.inverse);
            }
        }
        a += comptime!(shape.planes());
    }
    (cube_sum(number, scratch, shape), cube_sum(mass, scratch, shape))
}

/// A token for every draw.
#[cube(launch_unchecked)]
fn choose_kernel(
    logits: &[f32],
    adjusted: &[f32],
    asked: &[u32],
    stats: &[f32],
    out: &mut [u32],
    stride: u32,
    #[comptime] shape: Shape,
) {
    let each = comptime!(shape.each());
    let planes = comptime!(shape.planes());
    let draw = CUBE_POS_X;
    let at = draw * ASKED;
    let first = draw * comptime!(shape.parts) * 4;
    let inverse = f32::reinterpret(asked[(at + INVERSE) as usize]);
    let top_k = asked[(at + TOP_K) as usize];
    let top_p = f32::reinterpret(asked[(at + TOP_P) as usize]);
    let min_p = f32::reinterpret(asked[(at + MIN_P) as usize]);
    let exclude = f32::reinterpret(asked[(at + EXCLUDE) as usize]);
    let uniform_high = f32::reinterpret(asked[(at + UNIFORM) as usize]);
    let uniform_low = f32::reinterpret(asked[(at + UNIFORM + 1) as usize]);

    let mut active = Shared::<[u32]>::new_slice(comptime!(shape.parts as usize));
    let mut sums = Shared::<[f32]>::new_slice(comptime!(shape.parts as usize));
    let mut ranked_keys = Shared::<[u32]>::new_slice(comptime!(RANKED as usize));
    let mut ranked_tokens = Shared::<[u32]>::new_slice(comptime!(RANKED as usize));
    let mut ranked_terms = Shared::<[f32]>::new_slice(comptime!(RANKED as usize));
    let mut floats = Shared::<[f32]>::new_slice(comptime!(planes as usize));
    let mut words = Shared::<[u32]>::new_slice(comptime!(planes as usize));
    let mut place = Shared::<[u32]>::new_slice(2usize);

    // The largest logit; a row that is not finite has no key of one.
    let mut own = 0u32.runtime();
    for j in 0..each {
        let part = UNIT_POS * each + j;
        if part < comptime!(shape.parts) {
            let stat = (first + part * 4) as usize;
            let bad = u32::reinterpret(stats[stat + 1]) & 0x7f800000u32 == 0x7f800000u32;
            own = max(own, select(bad, NONE, key(stats[stat])));
        }
    }
    let best = cube_max(own, &mut words, shape);
    let least = key(f32::new(LEAST)) + 1;
    let mut token = NONE.runtime();
    let row = Row {
        row: asked[(at + ROW) as usize],
        place: asked[(at + PLACE) as usize],
        top: value(best),
        inverse,
    };
    if best != NONE && best >= least {
        if top_k == 1 {
            // The first of the largest.
            let mut own = 0u32.runtime();
            for j in 0..each {
                let part = UNIT_POS * each + j;
                if part < comptime!(shape.parts) {
                    if key(stats[(first + part * 4) as usize]) == best {
                        own = max(own, !part);
                    }
                }
            }
            let part = !cube_max(own, &mut words, shape);
            let candidate = part * comptime!(shape.part) + UNIT_POS;
            let mut own = 0u32.runtime();
            if UNIT_POS < comptime!(shape.part) {
                if key(logit(candidate, logits, adjusted, &row, shape)) == best {
                    own = !candidate;
                }
            }
            token = !cube_max(own, &mut words, shape);
        } else {
            // The sum of all weights, which top-p needs and the draw where nothing is cut.
            let mut own = f32::new(0.0);
            for j in 0..each {
                let part = UNIT_POS * each + j;
                if part < comptime!(shape.parts) {
                    let stat = (first + part * 4) as usize;
                    let all = stats[stat + 1] * weight(stats[stat], row.top, inverse);
                    sums[part as usize] = all;
                    own += all;
                }
            }
            let mut total = cube_sum(own, &mut floats, shape);
            let mut count = comptime!(shape.parts).runtime();
            for j in 0..each {
                let part = UNIT_POS * each + j;
                if part < comptime!(shape.parts) {
                    active[part as usize] = part;
                }
            }
            sync_cube();

            // Where the order is cut: by number, then by weight.
            let mut edge = 0u32.runtime();
            let mut edge_token = NONE.runtime();
            let mut decided = true.runtime();
            for round in 0..2u32 {
                let by_weight = round == 1;
                let is_asked = select(by_weight, top_p < 1.0, top_k < comptime!(shape.vocab));
                if is_asked && decided {
                    let target = select(
                        by_weight,
                        max(top_p * total, f32::new(1.0e-30)),
                        f32::cast_from(top_k),
                    );
                    // The edge is a token of the range from `low` to below `high`; `above` are those that reach `high`.
                    let mut low = edge;
                    let mut high = best + 1;
                    let mut above_number = f32::new(0.0);
                    let mut above_mass = f32::new(0.0);
                    if edge == 0 {
                        let wanted = select(by_weight, NUCLEUS.runtime(), top_k);
                        low = max(bound(wanted, stats, first, &mut floats, shape), least);
                    }
                    count = activate(low, stats, first, &mut active, &mut floats, shape);
                    let (mut number, mass) = tally(
                        low,
                        edge,
                        edge_token,
                        logits,
                        adjusted,
                        &row,
                        &active,
                        count,
                        &mut floats,
                        shape,
                    );
                    if by_weight && edge == 0 && mass < target && low > least {
                        // A larger nucleus. All tokens of less than this weight are not what it lacks.
                        high = low;
                        above_number = number;
                        above_mass = mass;
                        let part = (1.0 - top_p) * total * comptime!(0.5 / shape.vocab as f32);
                        let lowest = row.top + max(part, f32::new(1.0e-37)).ln() / inverse;
                        low = max(key(max(lowest, f32::new(LEAST))), least);
                        low = min(low, high - 1);
                        count = activate(low, stats, first, &mut active, &mut floats, shape);
                        let (all, _) = tally(
                            low,
                            edge,
                            edge_token,
                            logits,
                            adjusted,
                            &row,
                            &active,
                            count,
                            &mut floats,
                            shape,
                        );
                        number = all;
                    }
                    while number - above_number > comptime!(RANKED as f32) && high - low > 1 {
                        let middle = low + (high - low) / 2;
                        let (n, m) = tally(
                            middle,
                            edge,
                            edge_token,
                            logits,
                            adjusted,
                            &row,
                            &active,
                            count,
                            &mut floats,
                            shape,
                        );
                        if select(by_weight, m, n) >= target {
                            low = middle;
                            number = n;
                        } else {
                            high = middle;
                            above_number = n;
                            above_mass = m;
                        }
                    }
                    let found = u32::cast_from(number - above_number);
                    if found > RANKED || found == 0 {
                        // Very many equals: the whole row says which of them are kept. None, if rounded sums miss the share.
                        decided = false.runtime();
                    } else {
                        // Those in the range, by token.
                        let mut a = UNIT_POS_Y;
                        while a < count {
                            let start = active[a as usize] * comptime!(shape.part) + UNIT_POS_X;
                            let mut own = 0u32.runtime();
                            #[unroll]
                            for j in 0..comptime!(shape.own()) {
                                let t = start + comptime!(j * shape.plane);
                                let k = key(logit(t, logits, adjusted, &row, shape));
                                if k >= low && k < high && is_before(k, t, edge, edge_token) {
                                    own += 1;
                                }
                            }
                            let all = plane_sum(own);
                            if UNIT_POS_X == 0 {
                                sums[a as usize] = f32::cast_from(all);
                            }
                            a += planes;
                        }
                        sync_cube();
                        let mut own = f32::new(0.0);
                        for j in 0..each {
                            let a = UNIT_POS * each + j;
                            if a < count {
                                own += sums[a as usize];
                            }
                        }
                        let (mut before, _) = cube_before(own, &mut floats, shape);
                        for j in 0..each {
                            let a = UNIT_POS * each + j;
                            if a < count {
                                let own = sums[a as usize];
                                sums[a as usize] = before;
                                before += own;
                            }
                        }
                        sync_cube();
                        let mut a = UNIT_POS_Y;
                        while a < count {
                            let start = active[a as usize] * comptime!(shape.part) + UNIT_POS_X;
                            let mut to = u32::cast_from(sums[a as usize]);
                            #[unroll]
                            for j in 0..comptime!(shape.own()) {
                                let t = start + comptime!(j * shape.plane);
                                let v = logit(t, logits, adjusted, &row, shape);
                                let k = key(v);
                                let is_found =
                                    k >= low && k < high && is_before(k, t, edge, edge_token);
                                let flag = select(is_found, 1u32, 0u32);
                                let own = to + plane_exclusive_sum(flag);
                                if is_found {
                                    ranked_keys[own as usize] = k;
                                    ranked_tokens[own as usize] = t;
                                    ranked_terms[own as usize] = select(
                                        by_weight,
                                        weight(v, row.top, inverse),
                                        f32::new(1.0),
                                    );
                                }
                                to += plane_sum(flag);
                            }
                            a += planes;
                        }
                        sync_cube();
                        // A token is kept if what is before it does not reach the target.
                        let above = select(by_weight, above_mass, above_number);
                        let mut last = 0u32.runtime();
                        let mut mass = f32::new(0.0);
                        let mut i = UNIT_POS;
                        while i < found {
                            let k = ranked_keys[i as usize];
                            let mut before = above;
                            for j in 0..found {
                                let other = ranked_keys[j as usize];
                                if other > k || (other == k && j < i) {
                                    before += ranked_terms[j as usize];
                                }
                            }
                            if before < target {
                                last = max(last, !k);
                                mass += weight(value(k), row.top, inverse);
                            } else {
                                ranked_tokens[i as usize] = NONE;
                            }
                            i += comptime!(shape.units);
                        }
                        total = above_mass + cube_sum(mass, &mut floats, shape);
                        edge = !cube_max(last, &mut words, shape);
                        let mut last = 0u32.runtime();
                        let mut i = UNIT_POS;
                        while i < found {
                            let t = ranked_tokens[i as usize];
                            if t != NONE && ranked_keys[i as usize] == edge {
                                last = max(last, t);
                            }
                            i += comptime!(shape.units);
                        }
                        edge_token = cube_max(last, &mut words, shape);
                    }
                }
            }
            if decided {
                // The weights of what is kept, by part.
                let is_cut = edge > 0 || min_p > 0.0;
                if is_cut || exclude <= 1.0 {
                    let mut low = max(edge, least);
                    if min_p > 0.0 {
                        let lowest = row.top + (min_p * 0.999).ln() / inverse;
                        low = max(low, key(max(lowest, f32::new(LEAST))));
                    }
                    count = activate(min(low, best), stats, first, &mut active, &mut floats, shape);
                }
                let mut from = NONE.runtime();
                let mut from_token = 0u32.runtime();
                let mut left = select(exclude <= 1.0, 2u32, select(is_cut, 1u32, 0u32));
                while left > 0 {
                    let mut a = UNIT_POS_Y;
                    while a < count {
                        let start = active[a as usize] * comptime!(shape.part) + UNIT_POS_X;
                        let mut own = f32::new(0.0);
                        #[unroll]
                        for j in 0..comptime!(shape.own()) {
                            let t = start + comptime!(j * shape.plane);
                            let v = logit(t, logits, adjusted, &row, shape);
                            own += kept(v, t, &row, edge, edge_token, from, from_token, min_p);
                        }
                        let all = plane_sum(own);
                        if UNIT_POS_X == 0 {
                            sums[a as usize] = all;
                        }
                        a += planes;
                    }
                    sync_cube();
                    let mut own = f32::new(0.0);
                    for j in 0..each {
                        let a = UNIT_POS * each + j;
                        if a < count {
                            own += sums[a as usize];
                        }
                    }
                    total = cube_sum(own, &mut floats, shape);
                    if left == 2 {
                        // The last one of at least that share, and of its equals the last.
                        let share = exclude * total;
                        let mut last = 0u32.runtime();
                        for again in 0..2u32 {
                            let mut own = 0u32.runtime();
                            let mut a = UNIT_POS_Y;
                            while a < count {
                                let start = active[a as usize] * comptime!(shape.part) + UNIT_POS_X;
                                #[unroll]
                                for j in 0..comptime!(shape.own()) {
                                    let t = start + comptime!(j * shape.plane);
                                    let v = logit(t, logits, adjusted, &row, shape);
                                    let w =
                                        kept(v, t, &row, edge, edge_token, from, from_token, min_p);
                                    if w > 0.0 && w >= share {
                                        if again == 0 {
                                            own = max(own, !key(v));
                                        } else if key(v) == !last {
                                            own = max(own, t);
                                        }
                                    }
                                }
                                a += planes;
                            }
                            let found = cube_max(own, &mut words, shape);
                            if again == 0 {
                                last = found;
                            } else if last != 0 {
                                from = !last;
                                from_token = found;
                            }
                        }
                    }
                    left -= 1;
                }
                // The part, and the token of it, at which the sum of those before is not above the draw for the last time.
                let mut own = f32::new(0.0);
                for j in 0..each {
                    let a = UNIT_POS * each + j;
                    if a < count {
                        own += sums[a as usize];
                    }
                }
                let (before, all) = cube_before(own, &mut floats, shape);
                let mut after = fma(uniform_high, all, -before) + uniform_low * all;
                let reached = own > 0.0 && after >= 0.0;
                let unit = cube_max(select(reached, UNIT_POS + 1, 0u32), &mut words, shape);
                if UNIT_POS + 1 == unit {
                    let mut chosen = 0u32.runtime();
                    let mut rest = after;
                    for j in 0..each {
                        let a = UNIT_POS * each + j;
                        if a < count {
                            let sum = sums[a as usize];
                            if sum > 0.0 && after >= 0.0 {
                                chosen = active[a as usize];
                                rest = after;
                            }
                            after -= sum;
                        }
                    }
                    place[0] = chosen;
                    place[1] = u32::reinterpret(rest);
                }
                sync_cube();
                if unit > 0 {
                    let rest = f32::reinterpret(place[1]);
                    let t = place[0] * comptime!(shape.part) + UNIT_POS;
                    let mut own = f32::new(0.0);
                    if UNIT_POS < comptime!(shape.part) {
                        let v = logit(t, logits, adjusted, &row, shape);
                        own = kept(v, t, &row, edge, edge_token, from, from_token, min_p);
                    }
                    let (before, _) = cube_before(own, &mut floats, shape);
                    let reached = own > 0.0 && before <= rest;
                    let found = cube_max(select(reached, t + 1, 0u32), &mut words, shape);
                    token = found - 1;
                }
            }
        }
    }
    if UNIT_POS == 0 {
        out[(draw * stride) as usize] = token;
    }
}

/// The weight of a token that is kept, or zero.
#[cube]
#[allow(clippy::too_many_arguments)]
fn kept(
    v: f32,
    token: u32,
    row: &Row,
    edge: u32,
    edge_token: u32,
    from: u32,
    from_token: u32,
    min_p: f32,
) -> f32 {
    let k = key(v);
    let w = weight(v, row.top, row.inverse);
    let excluded = k > from || (k == from && token < from_token);
    let is_kept = is_before(k, token, edge, edge_token) && !excluded && w >= min_p;
    select(is_kept, w, f32::new(0.0))
}

/// The largest logits of a row as they are, and the drawn one's, where a draw wants them.
#[cube(launch_unchecked)]
fn likeliest_kernel(
    logits: &[f32],
    asked: &[u32],
    stats: &[f32],
    out: &mut [u32],
    stride: u32,
    #[comptime] shape: Shape,
) {
    let draw = CUBE_POS_X;
    let at = draw * ASKED;
    let token = out[(draw * stride) as usize];
    if asked[(at + WANTS) as usize] == 0 || token == NONE {
        terminate!();
    }
    let each = comptime!(shape.each());
    // Words of the parts as the row is.
    let first = draw * comptime!(shape.parts) * 4 + 2;
    let wanted = asked[(at + LARGEST) as usize];
    let mut active = Shared::<[u32]>::new_slice(comptime!(shape.parts as usize));
    let mut floats = Shared::<[f32]>::new_slice(comptime!(shape.planes() as usize));
    let mut words = Shared::<[u32]>::new_slice(comptime!(shape.planes() as usize));
    let mut own = 0u32.runtime();
    for j in 0..each {
        let part = UNIT_POS * each + j;
        if part < comptime!(shape.parts) {
            own = max(own, key(stats[(first + part * 4) as usize]));
        }
    }
    let best = cube_max(own, &mut words, shape);
    let row = Row {
        row: asked[(at + ROW) as usize],
        place: NONE.runtime(),
        top: value(best),
        inverse: f32::new(1.0),
    };
    let mut own = f32::new(0.0);
    for j in 0..each {
        let part = UNIT_POS * each + j;
        if part < comptime!(shape.parts) {
            let stat = (first + part * 4) as usize;
            own += stats[stat + 1] * weight(stats[stat], row.top, row.inverse);
        }
    }
    let total = cube_sum(own, &mut floats, shape);
    let to = draw * stride;
    if UNIT_POS == 0 {
        out[(to + 1) as usize] = u32::reinterpret(logit(token, logits, logits, &row, shape));
        out[(to + 2) as usize] = u32::reinterpret(row.top);
        out[(to + 3) as usize] = u32::reinterpret(total);
    }
    let low = bound(wanted, stats, first, &mut floats, shape);
    let count = activate(low, stats, first, &mut active, &mut floats, shape);
    let mut edge = NONE.runtime();
    let mut edge_token = 0u32.runtime();
    for i in 0..wanted {
        // The next of the order: its key, then its token.
        let mut next = 0u32.runtime();
        for again in 0..2u32 {
            let mut own = 0u32.runtime();
            let mut a = UNIT_POS_Y;
            while a < count {
                let start = active[a as usize] * comptime!(shape.part) + UNIT_POS_X;
                #[unroll]
                for j in 0..comptime!(shape.own()) {
                    let t = start + comptime!(j * shape.plane);
                    let k = key(logit(t, logits, logits, &row, shape));
                    if t < comptime!(shape.vocab) && (k < edge || (k == edge && t > edge_token)) {
                        if again == 0 {
                            own = max(own, k);
                        } else if k == next {
                            own = max(own, !t);
                        }
                    }
                }
                a += comptime!(shape.planes());
            }
            let found = cube_max(own, &mut words, shape);
            if again == 0 {
                next = found;
            } else {
                edge_token = !found;
            }
        }
        edge = next;
        if UNIT_POS == 0 {
            out[(to + 4 + 2 * i) as usize] = edge_token;
            out[(to + 5 + 2 * i) as usize] = u32::reinterpret(value(edge));
        }
    }
}
