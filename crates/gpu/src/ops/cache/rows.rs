//! Rows of cached columns in 8 or 4 bits, rounded as on the processor: groups of [`CACHE_GROUP`] columns without their largest, rotated
//! by a Hadamard matrix.
//!
//! A row is the codes of its groups, then a word for each group, the bf16 scale low and the bf16 value of the largest column high, then
//! the places of the largest columns, four a word. A word of 8-bit codes holds four columns, signed; one of 4-bit codes four low and
//! those 16 further on high, 8 higher than they are.
//! What is read stays rotated: attention rotates its queries, and its sums back.

use super::{Element, PagedCache, upper_half};
use crate::gpu::{Buffer, Gpu};
use cubecl::prelude::*;
use marlin_tensor::CACHE_GROUP;

/// Columns of a group.
const GROUP: u32 = CACHE_GROUP as u32;
/// `1 / sqrt(32)`.
const NORM: f32 = 0.176_776_7;
/// Units of a cube: each rounds one group.
const UNITS: u32 = 64;
/// A float of this size has its integer in its lowest bits.
const INTEGER: f32 = 12_582_912.0;
/// Exponent of what is no number.
const NOT_FINITE: u32 = 0x7f80_0000;
/// Upper half of a scale that is no number.
const NAN: u32 = 0x7fc0;

/// Words of codes of a group.
const fn code_words(element: Element) -> u32 {
    match element {
        Element::Q4 => GROUP / 8,
        _ => GROUP / 4,
    }
}

/// Words of a row behind its codes.
pub(super) const fn head_words(columns: usize) -> usize {
    let groups = columns / CACHE_GROUP;
    groups + groups.div_ceil(4)
}

/// Writes rows of keys and values (flattened heads) to their slots, in one launch.
pub(super) fn write(
    gpu: &Gpu,
    cache: &PagedCache,
    layer: usize,
    meta: &Buffer,
    rows: usize,
    keys: &Buffer,
    values: Option<&Buffer>,
) {
    let layer = &cache.layers[layer];
    // Four groups share a word: their units are neighbours.
    let groups = |dim: usize| (rows * layer.heads * (dim / CACHE_GROUP).next_multiple_of(4)) as u32;
    let value_total = values.map_or(0, |_| groups(layer.value_dim));
    let key_total = groups(layer.key_dim);
    let cubes = key_total.max(value_total).div_ceil(UNITS);
    let count = CubeCount::Static(cubes, 1, 1 + u32::from(value_total > 0));
    // SAFETY: units past the end write nothing; slots lie in the cache.
    unsafe {
        write_kernel::launch_unchecked(
            &gpu.client,
            count,
            gpu.planes(UNITS / gpu.plane),
            keys.arg(),
            values.unwrap_or(&gpu.none).arg(),
            meta.arg(),
            layer.keys.arg(),
            layer.values.arg(),
            layer.heads as u32,
            key_total,
            value_total,
            layer.key_dim as u32,
            layer.value_dim as u32,
            cache.keys,
            cache.values,
        );
    }
}

#[cube(launch_unchecked)]
fn write_kernel(
    keys: &[f32],
    values: &[f32],
    meta: &[u32],
    key_array: &mut [u32],
    value_array: &mut [u32],
    heads: u32,
    key_total: u32,
    value_total: u32,
    #[comptime] key_dim: u32,
    #[comptime] value_dim: u32,
    #[comptime] key_element: Element,
    #[comptime] value_element: Element,
) {
    // Whole cubes take one way, for lanes hand each other their places.
    if CUBE_POS_Z == 0 {
        write_group(keys, meta, key_array, key_total, heads, key_dim, key_element);
    } else {
        write_group(values, meta, value_array, value_total, heads, value_dim, value_element);
    }
}

/// Rounds and writes the unit's group.
#[cube]
fn write_group(
    x: &[f32],
    meta: &[u32],
    array: &mut [u32],
    total: u32,
    heads: u32,
    #[comptime] dim: u32,
    #[comptime] element: Element,
) {
    let groups = comptime!(dim / GROUP);
    let padded = comptime!(groups.next_multiple_of(4).max(4));
    let words = comptime!(code_words(element));
    let i = CUBE_POS_X * CUBE_DIM + UNIT_POS;
    let head = i / padded;
    let group = i % padded;
    let there = i < total && group < groups;
    let mut v = Array::<f32>::new(32usize);
    #[unroll]
    for c in 0..GROUP {
        v[c as usize] = 0.0;
    }
    if there {
        let first = head * dim + group * GROUP;
        #[unroll]
        for c in 0..GROUP {
            v[c as usize] = x[(first + c) as usize];
        }
    }

    // The first of the largest is kept apart; what rounding left of it stays with the others.
    let mut place = 0u32.runtime();
    let mut largest = v[0];
    #[unroll]
    for c in 1..GROUP {
        let larger = v[c as usize].abs() > largest.abs();
        largest = select(larger, v[c as usize], largest);
        place = select(larger, c.runtime(), place);
    }
    let apart = upper_half(largest);
    #[unroll]
    for c in 0..GROUP {
        let rest = v[c as usize] - f32::reinterpret(apart);
        v[c as usize] = select(place == c, rest, v[c as usize]);
    }
    #[unroll]
    for stage in 0..5u32 {
        let half = comptime!(1u32 << stage);
        #[unroll]
        for pair in 0..16u32 {
            let low = comptime!((pair / half * 2 * half + pair % half) as usize);
            let high = comptime!(low + half as usize);
            let (a, b) = (v[low], v[high]);
            v[low] = a + b;
            v[high] = a - b;
        }
    }

    let mut peak = f32::new(0.0);
    let mut sum = f32::new(0.0);
    #[unroll]
    for c in 0..GROUP {
        let turned = v[c as usize] * NORM;
        v[c as usize] = turned;
        peak = select(turned.abs() > peak.abs(), turned, peak);
        sum += turned;
    }
    let step = match comptime!(element) {
        Element::Q4 => peak * f32::new(-0.125),
        _ => peak.abs() / 127.0,
    };
    let mut scale = upper_half(step) >> 16u32;
    // What is no number must stay visible.
    if u32::reinterpret(sum) & NOT_FINITE == NOT_FINITE {
        scale = NAN.runtime();
    }
    let width = f32::reinterpret(scale << 16u32);
    let mut inverse = f32::new(0.0);
    if scale & 0x7fffu32 != 0 {
        inverse = 1.0 / width;
    }

    let slot = meta[(head / heads * 4 + 2) as usize];
    let stride = comptime!(element.stride(dim as usize) as u32);
    let row = (slot * heads + head % heads) * stride;
    #[unroll]
    for w in 0..words {
        let mut word = 0u32.runtime();
        #[unroll]
        for e in 0..comptime!(GROUP / words) {
            let scaled = v[comptime!(column_in_group(w, e) as usize)] * inverse;
            match comptime!(element) {
                Element::Q4 => {
                    let code = u32::reinterpret(min(max(scaled, -8.0), 7.0) + INTEGER) + 8;
                    word |= (code & 15u32) << comptime!(shift(e, element));
                }
                _ => {
                    let code = u32::reinterpret(min(max(scaled, -127.0), 127.0) + INTEGER);
                    word |= (code & 255u32) << comptime!(shift(e, element));
                }
            }
        }
        if there {
            array[(row + group * words + w) as usize] = word;
        }
    }
    let mut places = place << (group % 4 * 8);
    places |= plane_shuffle_xor(places, 1u32);
    places |= plane_shuffle_xor(places, 2u32);
    if there {
        let heads = row + comptime!(groups * words);
        array[(heads + group) as usize] = scale | apart;
        if group % 4 == 0 {
            array[(heads + groups + group / 4) as usize] = places;
        }
    }
}

/// Column of its group that element `e` of word `word` of its codes is.
const fn column_in_group(word: u32, e: u32) -> u32 {
    word * 4 + e % 4 + e / 4 * (GROUP / 2)
}

/// Bits below code `e` of a word.
const fn shift(e: u32, element: Element) -> u32 {
    match element {
        Element::Q4 => e % 4 * 8 + e / 4 * 4,
        _ => e * 8,
    }
}

/// Column of the row that element `e` of word `word` of its codes is.
#[cube]
pub(super) fn column(word: u32, #[comptime] e: u32, #[comptime] element: Element) -> u32 {
    let words = comptime!(code_words(element));
    word / words * GROUP + word % words * 4 + comptime!(column_in_group(0, e))
}

/// The columns of word `word` of the codes of a row of `dim` columns that begins at `row`, rotated.
#[cube]
pub(super) fn read(
    array: &[u32],
    row: u32,
    word: u32,
    #[comptime] dim: u32,
    #[comptime] element: Element,
) -> Array<f32> {
    let per = comptime!(element.per_word() as u32);
    let words = comptime!(code_words(element));
    let groups = comptime!(dim / GROUP);
    let group = word / words;
    let codes = array[(row + word) as usize];
    let heads = row + comptime!(groups * words);
    let head = array[(heads + group) as usize];
    let scale = f32::reinterpret(head << 16u32);
    let apart = f32::reinterpret(head & 0xffff0000u32) * NORM;
    let place = array[(heads + groups + group / 4) as usize] >> (group % 4 * 8);
    let mut out = Array::<f32>::new(comptime!(per as usize));
    #[unroll]
    for e in 0..per {
        let code = match comptime!(element) {
            Element::Q4 => f32::cast_from((codes >> comptime!(shift(e, element))) & 15u32) - 8.0,
            _ => {
                let code = ((codes >> comptime!(shift(e, element))) & 255u32) ^ 128u32;
                f32::cast_from(code) - 128.0
            }
        };
        // Row `place` of the matrix has a minus where both numbers share an odd number of bits.
        let minus = (place & column(word, e, element) & 31u32).count_ones() << 31u32;
        out[e as usize] = scale * code + f32::reinterpret(u32::reinterpret(apart) ^ minus);
    }
    out
}

/// Rotates groups of the first `columns` values in shared memory, or rotates them back; the whole cube calls it, and finds them there.
#[cube]
pub(crate) fn rotate(x: &mut [f32], #[comptime] columns: u32) {
    #[unroll]
    for stage in 0..5u32 {
        let half = comptime!(1u32 << stage);
        let scale = comptime!(if stage == 4 { NORM } else { 1.0 });
        sync_cube();
        let mut pair = UNIT_POS;
        while pair < comptime!(columns / 2) {
            let low = pair / half * comptime!(2 * half) + pair % half;
            let (a, b) = (x[low as usize], x[(low + half) as usize]);
            x[low as usize] = (a + b) * scale;
            x[(low + half) as usize] = (a - b) * scale;
            pair += CUBE_DIM;
        }
    }
    sync_cube();
}
