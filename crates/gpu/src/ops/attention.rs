//! Attention over the paged cache. A cube is a row, a head and a part of the sequence; its planes take keys
//! in turn, with an online softmax each, and are put together at the end. Parts of one row are merged by a second
//! kernel. What is seen follows from the positions on the device alone, so a recorded launch serves any length. Parts
//! lie at fixed places, so that a row's sums are the same in any company and for any room in the cache. Quantized rows are
//! read as they are stored, rotated: the query is rotated first, and the sums are rotated back. Prompts go through `flash`
//! where it serves.

use super::cache::{Element, PagedCache, column, read, rotate};
use super::elementwise::capped;
use super::flash;
use crate::gpu::{Buffer, Gpu};
use crate::step::Step;
use crate::tune::{self, Variant};
use cubecl::prelude::*;
use marlin_tensor::{AttentionParams, CacheType};

/// Planes of a cube, unless tuning found better.
const PLANES: u32 = 8;
/// Keys of a part, unless tuning found better.
const PART: u32 = 128;
/// Below every score.
const LEAST: f64 = -1.0e30;

/// Sizes an attention kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    heads: u32,
    kv_heads: u32,
    key_dim: u32,
    value_dim: u32,
    keys: Element,
    values: Element,
    latent: bool,
    windowed: bool,
    has_cap: bool,
    /// Whether a row has more than one part.
    in_parts: bool,
    plane: u32,
    /// Keys of a part.
    part: u32,
    /// Planes of a cube.
    planes: u32,
}

/// What the rule says.
pub(crate) const RULE: Variant = Variant::Parts { keys: PART, planes: PLANES };

/// The shape for which choices are kept.
pub(crate) fn shape(cache: CacheType, latent: bool, params: &AttentionParams) -> tune::Shape {
    tune::Shape::Attention {
        num_heads: params.num_heads,
        num_kv_heads: params.num_kv_heads,
        key_head_dim: params.key_head_dim,
        value_head_dim: params.value_head_dim,
        cache_type: cache.name().to_owned(),
        latent,
        windowed: params.window.is_some(),
    }
}

/// `[rows, num_heads * value_head_dim]`.
pub(crate) fn attend(
    gpu: &Gpu,
    q: &Buffer,
    cache: &PagedCache,
    layer: usize,
    step: &Step,
    params: &AttentionParams,
) -> Buffer {
    if let Some(out) = flash::attend(gpu, q, cache, layer, step, params) {
        return out;
    }
    // The same for every row, whatever its company: sums depend on it.
    let latent = cache.layers[layer].value_dim == 0;
    let chosen = gpu.tuned(&shape(cache.cache_type, latent, params));
    attend_in_parts(gpu, q, cache, layer, step, params, chosen.unwrap_or(RULE))
}

/// The same by the kernel for every device, with sequences cut as `variant` says.
pub(crate) fn attend_in_parts(
    gpu: &Gpu,
    q: &Buffer,
    cache: &PagedCache,
    layer: usize,
    step: &Step,
    params: &AttentionParams,
    variant: Variant,
) -> Buffer {
    let layer = &cache.layers[layer];
    let (keys, planes) = match variant {
        Variant::Parts { keys, planes } => (keys, planes),
        _ => (PART, PLANES),
    };
    let rows = step.rows;
    let cells = rows * params.num_heads;
    let parts = (step.blocks * cache.block_size).div_ceil(keys as usize);
    let shape = Shape {
        heads: params.num_heads as u32,
        kv_heads: params.num_kv_heads as u32,
        key_dim: params.key_head_dim as u32,
        value_dim: params.value_head_dim as u32,
        keys: cache.keys,
        values: if layer.value_dim == 0 { cache.keys } else { cache.values },
        latent: layer.value_dim == 0,
        windowed: params.window.is_some(),
        has_cap: params.softcap.is_some(),
        in_parts: parts > 1,
        plane: gpu.plane,
        part: keys,
        planes,
    };
    let out = gpu.empty(cells * params.value_head_dim);
    let part = match parts {
        1 => gpu.none.clone(),
        _ => gpu.empty(cells * parts * (params.value_head_dim + 2)),
    };
    let values = if shape.latent { &layer.keys } else { &layer.values };
    let count = CubeCount::Static(rows as u32, shape.heads, parts as u32);
    let (window, cap) = (params.window.unwrap_or(0), params.softcap.unwrap_or(1.0));
    // SAFETY: a cube per row, head and part; positions and block tables come from the batch.
    unsafe {
        attend_kernel::launch_unchecked(
            &gpu.client,
            count,
            gpu.planes(planes),
            q.arg(),
            layer.keys.arg(),
            values.arg(),
            step.meta.arg(),
            out.arg(),
            part.arg(),
            rows as u32,
            cache.block_size as u32,
            step.blocks as u32,
            params.scale,
            window,
            cap,
            shape,
        );
    }
    if parts > 1 {
        let count = CubeCount::Static(rows as u32, shape.heads, 1);
        // SAFETY: a cube per row and head.
        unsafe {
            merge_kernel::launch_unchecked(
                &gpu.client,
                count,
                gpu.planes(PLANES),
                part.arg(),
                step.meta.arg(),
                out.arg(),
                parts as u32,
                window,
                shape,
            );
        }
    }
    out
}

#[cube(launch_unchecked)]
fn attend_kernel(
    q: &[f32],
    keys: &[u32],
    values: &[u32],
    meta: &[u32],
    out: &mut [f32],
    part: &mut [f32],
    rows: u32,
    block_size: u32,
    blocks: u32,
    scale: f32,
    window: u32,
    cap: f32,
    #[comptime] shape: Shape,
) {
    let plane = comptime!(shape.plane);
    let key_per = comptime!(shape.keys.per_word() as u32);
    let value_per = comptime!(shape.values.per_word() as u32);
    let key_words = comptime!(shape.keys.words(shape.key_dim as usize) as u32);
    let value_words = comptime!(shape.values.words(shape.value_dim as usize) as u32);
    let key_stride = comptime!(shape.keys.stride(shape.key_dim as usize) as u32);
    // Values that are a prefix of the keys lie in rows of these.
    let value_row = comptime!(if shape.latent { shape.key_dim } else { shape.value_dim });
    let value_stride = comptime!(shape.values.stride(value_row as usize) as u32);
    let key_steps = comptime!(key_words.div_ceil(plane));
    let value_steps = comptime!(value_words.div_ceil(plane));
    let rotated = comptime!(shape.keys.is_quantized());
    let row = CUBE_POS_X;
    let head = CUBE_POS_Y;
    let part_index = CUBE_POS_Z;
    let lane = UNIT_POS_X;
    let kv_head = head / comptime!(shape.heads / shape.kv_heads);

    let seen = meta[(row * 4 + 1) as usize] + 1;
    let table = rows * 4 + meta[(row * 4 + 3) as usize] * blocks;
    let mut begin = 0u32.runtime();
    if comptime!(shape.windowed) {
        if seen > window {
            begin = seen - window;
        }
    }
    let start = part_index * comptime!(shape.part);
    let from = max(begin, start);
    let to = min(start + comptime!(shape.part), seen);
    if comptime!(shape.in_parts) {
        // The merge does not read the part of such a cube.
        if from >= to {
            terminate!();
        }
    }

    let first = (row * comptime!(shape.heads) + head) * comptime!(shape.key_dim);
    let mut query = Array::<f32>::new(comptime!((key_steps * key_per) as usize));
    if comptime!(rotated) {
        let mut whole = Shared::<[f32]>::new_slice(comptime!(shape.key_dim as usize));
        let mut at = UNIT_POS;
        while at < comptime!(shape.key_dim) {
            whole[at as usize] = q[(first + at) as usize];
            at += CUBE_DIM;
        }
        rotate(&mut whole, comptime!(shape.key_dim));
        load(&whole, 0u32, scale, &mut query, key_steps, shape);
    } else {
        load(q, first, scale, &mut query, key_steps, shape);
    }
    let mut sums = Array::<f32>::new(comptime!((value_steps * value_per) as usize));
    #[unroll]
    for s in 0..comptime!(value_steps * value_per) {
        sums[s as usize] = 0.0;
    }
    let mut highest = f32::new(LEAST);
    let mut total = f32::new(0.0);

    let mut p = from + UNIT_POS_Y;
    while p < to {
        let block = meta[(table + p / block_size) as usize];
        let cell = (block * block_size + p % block_size) * comptime!(shape.kv_heads) + kv_head;
        let mut dot = f32::new(0.0);
        #[unroll]
        for s in 0..key_steps {
            let word = lane + comptime!(s * plane);
            if word < key_words {
                let k = read(keys, cell * key_stride, word, shape.key_dim, shape.keys);
                #[unroll]
                for e in 0..key_per {
                    dot += query[comptime!((s * key_per + e) as usize)] * k[e as usize];
                }
            }
        }
        let mut score = plane_sum(dot);
        if comptime!(shape.has_cap) {
            score = capped(score, cap);
        }
        let above = max(highest, score);
        let faded = (highest - above).exp();
        let weight = (score - above).exp();
        total = total * faded + weight;
        highest = above;
        #[unroll]
        for s in 0..value_steps {
            let word = lane + comptime!(s * plane);
            if word < value_words {
                let v = read(values, cell * value_stride, word, value_row, shape.values);
                #[unroll]
                for e in 0..value_per {
                    let i = comptime!((s * value_per + e) as usize);
                    sums[i] = sums[i] * faded + weight * v[e as usize];
                }
            }
        }
        p += CUBE_DIM_Y;
    }

    // Put the planes together.
    let padded = comptime!(value_words * value_per);
    let mut all = Shared::<[f32]>::new_slice(comptime!((shape.planes * padded) as usize));
    let mut tops = Shared::<[f32]>::new_slice(comptime!(shape.planes as usize));
    let mut totals = Shared::<[f32]>::new_slice(comptime!(shape.planes as usize));
    #[unroll]
    for s in 0..value_steps {
        #[unroll]
        for e in 0..value_per {
            let word = lane + comptime!(s * plane);
            if word < value_words {
                all[(UNIT_POS_Y * padded + column(word, e, shape.values)) as usize] =
                    sums[comptime!((s * value_per + e) as usize)];
            }
        }
    }
    if lane == 0 {
        tops[UNIT_POS_Y as usize] = highest;
        totals[UNIT_POS_Y as usize] = total;
    }
    sync_cube();
    let mut top = f32::new(LEAST);
    #[unroll]
    for i in 0..comptime!(shape.planes) {
        top = max(top, tops[i as usize]);
    }
    let mut weight = f32::new(0.0);
    #[unroll]
    for i in 0..comptime!(shape.planes) {
        weight += totals[i as usize] * (tops[i as usize] - top).exp();
    }
    let cell = row * comptime!(shape.heads) + head;
    let mut at = UNIT_POS;
    while at < comptime!(shape.value_dim) {
        let mut v = f32::new(0.0);
        #[unroll]
        for i in 0..comptime!(shape.planes) {
            v += all[(at + comptime!(i * padded)) as usize] * (tops[i as usize] - top).exp();
        }
        all[at as usize] = v;
        at += CUBE_DIM;
    }
    if comptime!(rotated) {
        rotate(&mut all, comptime!(shape.value_dim));
    }
    let mut at = UNIT_POS;
    while at < comptime!(shape.value_dim) {
        let v = all[at as usize];
        if comptime!(shape.in_parts) {
            let to = (cell * CUBE_COUNT_Z + part_index) * comptime!(shape.value_dim + 2);
            part[(to + at) as usize] = v;
        } else {
            out[(cell * comptime!(shape.value_dim) + at) as usize] = v / weight;
        }
        at += CUBE_DIM;
    }
    if comptime!(shape.in_parts) {
        if UNIT_POS == 0 {
            let to = (cell * CUBE_COUNT_Z + part_index) * comptime!(shape.value_dim + 2);
            part[(to + comptime!(shape.value_dim)) as usize] = top;
            part[(to + comptime!(shape.value_dim + 1)) as usize] = weight;
        }
    }
}

/// The lane's columns of a query that begins at `first`.
#[cube]
fn load(
    q: &[f32],
    first: u32,
    scale: f32,
    query: &mut Array<f32>,
    #[comptime] steps: u32,
    #[comptime] shape: Shape,
) {
    let per = comptime!(shape.keys.per_word() as u32);
    #[unroll]
    for s in 0..steps {
        #[unroll]
        for e in 0..per {
            let at = column(UNIT_POS_X + comptime!(s * shape.plane), e, shape.keys);
            let mut v = f32::new(0.0);
            if at < comptime!(shape.key_dim) {
                v = q[(first + at) as usize];
            }
            query[comptime!((s * per + e) as usize)] = v * scale;
        }
    }
}

#[cube(launch_unchecked)]
fn merge_kernel(
    part: &[f32],
    meta: &[u32],
    out: &mut [f32],
    parts: u32,
    window: u32,
    #[comptime] shape: Shape,
) {
    let row = CUBE_POS_X;
    let cell = row * comptime!(shape.heads) + CUBE_POS_Y;
    let stride = comptime!(shape.value_dim + 2);
    let base = cell * parts * stride;
    let seen = meta[(row * 4 + 1) as usize] + 1;
    let mut first = 0u32.runtime();
    if comptime!(shape.windowed) {
        if seen > window {
            first = (seen - window) / comptime!(shape.part);
        }
    }
    let end = (seen + comptime!(shape.part - 1)) / comptime!(shape.part);
    let mut top = f32::new(LEAST);
    for s in first..end {
        top = max(top, part[(base + s * stride + comptime!(shape.value_dim)) as usize]);
    }
    let mut weight = f32::new(0.0);
    for s in first..end {
        let at = base + s * stride + comptime!(shape.value_dim);
        weight += part[(at + 1) as usize] * (part[at as usize] - top).exp();
    }
    let mut column = UNIT_POS;
    while column < comptime!(shape.value_dim) {
        let mut v = f32::new(0.0);
        for s in first..end {
            let at = base + s * stride;
            let faded = (part[(at + comptime!(shape.value_dim)) as usize] - top).exp();
            v += part[(at + column) as usize] * faded;
        }
        out[(cell * comptime!(shape.value_dim) + column) as usize] = v / weight;
        column += CUBE_DIM;
    }
}
