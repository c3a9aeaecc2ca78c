//! The largest logits of rows, found where they are: a few hundred bytes a row are copied instead of the whole vocabulary.
//!
//! `scan` takes a row by chunks and leaves the largest of every plane's part, and sums of exponentials. Of as many parts as logits are wanted, each
//! has one that is not below the least of their largest: `collect` finds that bound and gathers what is not below it, in any order.

use crate::gpu::{Buffer, Gpu, device_error};
use cubecl::prelude::*;
use marlin_tensor::{BackendError, Selected, Selection};

/// Logits of a chunk.
const CHUNK: u32 = 1024;
/// Units that share a chunk.
const UNITS: u32 = 256;
/// Places for what is gathered, as a multiple of what is wanted, and at least.
const ROOM: usize = 4;
const LEAST_ROOM: usize = 32;

/// What `wanted` says of every row of `logits: [rows, vocab]`; `None` for a row that has to be read whole.
///
/// # Errors
/// When a kernel before failed.
pub(crate) fn largest(
    gpu: &Gpu,
    logits: &Buffer,
    vocab: usize,
    wanted: &[Selection],
) -> Result<Vec<Option<Selected>>, BackendError> {
    let rows = wanted.len();
    let most = wanted.iter().map(|w| w.count).max().unwrap_or(0);
    let chunks = vocab.div_ceil(CHUNK as usize);
    let planes = UNITS / gpu.plane;
    let parts = chunks * planes as usize;
    // Fewer parts than logits that are wanted give no bound.
    let room = if parts < most { vocab } else { (ROOM * most).max(LEAST_ROOM).min(vocab) };
    let asked: Vec<u32> =
        wanted.iter().flat_map(|w| [w.count as u32, (1.0 / w.temperature).to_bits()]).collect();
    let asked = gpu.words(&asked);
    let (maxima, sums) = (gpu.empty(rows * parts), gpu.empty(rows * 2 * chunks));
    let (counts, found) = (gpu.empty(rows), gpu.empty(rows * 2 * room));
    let count = CubeCount::Static(chunks as u32, rows as u32, 1);
    let dim = gpu.planes(planes);
    let client = &gpu.client;
    let (vocab_len, room_len) = (vocab as u32, room as u32);
    // SAFETY: units past the vocabulary read nothing, and what there is no room for is not written.
    unsafe {
        scan_kernel::launch_unchecked(
            client,
            count.clone(),
            dim,
            logits.arg(),
            asked.arg(),
            maxima.arg(),
            sums.arg(),
            counts.arg(),
            vocab_len,
            planes,
        );
        collect_kernel::launch_unchecked(
            client,
            count,
            dim,
            logits.arg(),
            asked.arg(),
            maxima.arg(),
            counts.arg(),
            found.arg(),
            vocab_len,
            room_len,
            parts as u32,
            planes,
        );
    }
    let handles = vec![sums.handle.clone(), counts.handle.clone(), found.handle.clone()];
    let read = client.read(handles).map_err(device_error)?;
    let [sums, counts, found] = read.as_slice() else {
        return Err(device_error("three arrays were to be read"));
    };
    let word = |bytes: &[u8], i: usize| {
        u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
    };
    let float = |bytes: &[u8], i: usize| f32::from_bits(word(bytes, i));
    let selected = wanted.iter().enumerate().map(|(row, wanted)| {
        let count = word(counts, row) as usize;
        let chunk = |c: usize| {
            let at = 2 * (row * chunks + c);
            (float(sums, at), float(sums, at + 1))
        };
        if count > room || (0..chunks).any(|c| !chunk(c).0.is_finite()) {
            return None;
        }
        let mut largest: Vec<(u32, f32)> = (row * room..row * room + count)
            .map(|at| (word(found, 2 * at), float(found, 2 * at + 1)))
            .collect();
        largest.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let top = largest.first()?.1;
        largest.truncate(wanted.count);
        let share = |c| {
            let (sum, own) = chunk(c);
            f64::from(sum) * f64::from((own - top) / wanted.temperature).exp()
        };
        Some(Selected { largest, total: (0..chunks).map(share).sum() })
    });
    Ok(selected.collect())
}

/// Below every logit.
const LEAST: f64 = -3.4e38;

#[cube(launch_unchecked)]
fn scan_kernel(
    logits: &[f32],
    asked: &[u32],
    maxima: &mut [f32],
    sums: &mut [f32],
    counts: &mut [Atomic<u32>],
    vocab: u32,
    #[comptime] planes: u32,
) {
    let row = CUBE_POS_Y;
    let chunk = CUBE_POS_X;
    let inverse = f32::reinterpret(asked[(row * 2 + 1) as usize]);
    let mut values = Array::<f32>::new(comptime!((CHUNK / UNITS) as usize));
    let mut largest = f32::new(LEAST);
    let mut bad = 0u32.runtime();
    #[unroll]
    for j in 0..comptime!(CHUNK / UNITS) {
        let i = chunk * comptime!(CHUNK) + comptime!(j * UNITS) + UNIT_POS;
        let mut v = f32::new(LEAST);
        if i < vocab {
            v = logits[(row * vocab + i) as usize];
            if u32::reinterpret(v) & 0x7f800000u32 == 0x7f800000u32 {
                bad += 1;
            }
        }
        values[comptime!(j as usize)] = v;
        largest = max(largest, v);
    }
    let mut shared = Shared::<[f32]>::new_slice(comptime!((2 * planes) as usize));
    let mut bads = Shared::<[u32]>::new_slice(comptime!(planes as usize));
    let own = plane_max(largest);
    let own_bad = plane_sum(bad);
    if UNIT_POS_X == 0 {
        shared[UNIT_POS_Y as usize] = own;
        bads[UNIT_POS_Y as usize] = own_bad;
        let part = (row * CUBE_COUNT_X + chunk) * planes + UNIT_POS_Y;
        maxima[part as usize] = own;
    }
    sync_cube();
    let mut top = f32::new(LEAST);
    #[unroll]
    for p in 0..planes {
        top = max(top, shared[p as usize]);
    }
    let mut sum = f32::new(0.0);
    #[unroll]
    for j in 0..comptime!(CHUNK / UNITS) {
        let i = chunk * comptime!(CHUNK) + comptime!(j * UNITS) + UNIT_POS;
        if i < vocab {
            sum += ((values[comptime!(j as usize)] - top) * inverse).exp();
        }
    }
    let own = plane_sum(sum);
    if UNIT_POS_X == 0 {
        shared[(planes + UNIT_POS_Y) as usize] = own;
    }
    sync_cube();
    if UNIT_POS == 0 {
        let mut total = f32::new(0.0);
        let mut all_bad = 0u32.runtime();
        #[unroll]
        for p in 0..planes {
            total += shared[comptime!((planes + p) as usize)];
            all_bad += bads[p as usize];
        }
        if all_bad > 0 {
            // Not a number, whatever the sum is.
            total = f32::reinterpret(0x7fc00000u32);
        }
        let at = (row * CUBE_COUNT_X + chunk) * 2;
        sums[at as usize] = total;
        sums[(at + 1) as usize] = top;
        if chunk == 0 {
            counts[row as usize].store(0u32);
        }
    }
}

/// Floats as words in the same order.
#[cube]
fn key(value: f32) -> u32 {
    let bits = u32::reinterpret(value);
    select(bits >> 31u32 == 1, !bits, bits | 0x80000000u32)
}

#[cube(launch_unchecked)]
fn collect_kernel(
    logits: &[f32],
    asked: &[u32],
    maxima: &[f32],
    counts: &mut [Atomic<u32>],
    found: &mut [u32],
    vocab: u32,
    room: u32,
    #[comptime] parts: u32,
    #[comptime] planes: u32,
) {
    let row = CUBE_POS_Y;
    let wanted = asked[(row * 2) as usize];
    let mut keys = Array::<u32>::new(comptime!(parts.div_ceil(UNITS) as usize));
    #[unroll]
    for j in 0..comptime!(parts.div_ceil(UNITS)) {
        let i = comptime!(j * UNITS) + UNIT_POS;
        let mut k = 0u32.runtime();
        if i < parts {
            k = key(maxima[(row * parts + i) as usize]);
        }
        keys[comptime!(j as usize)] = k;
    }
    let mut shared = Shared::<[u32]>::new_slice(comptime!(planes as usize));
    // The largest bound that as many parts reach as logits are wanted: of one, the largest of all.
    let mut bound = 0u32.runtime();
    if wanted == 1 {
        let mut own = 0u32.runtime();
        #[unroll]
        for j in 0..comptime!(parts.div_ceil(UNITS)) {
            own = max(own, keys[comptime!(j as usize)]);
        }
        let part = plane_max(own);
        if UNIT_POS_X == 0 {
            shared[UNIT_POS_Y as usize] = part;
        }
        sync_cube();
        #[unroll]
        for p in 0..planes {
            bound = max(bound, shared[p as usize]);
        }
    } else {
        for bit in 0..32u32 {
            let trial = bound | (0x80000000u32 >> bit);
            let mut reached = 0u32.runtime();
            #[unroll]
            for j in 0..comptime!(parts.div_ceil(UNITS)) {
                reached += select(keys[comptime!(j as usize)] >= trial, 1u32, 0u32);
            }
            let part = plane_sum(reached);
            if UNIT_POS_X == 0 {
                shared[UNIT_POS_Y as usize] = part;
            }
            sync_cube();
            let mut total = 0u32.runtime();
            #[unroll]
            for p in 0..planes {
                total += shared[p as usize];
            }
            bound = select(total >= wanted, trial, bound);
            sync_cube();
        }
    }
    #[unroll]
    for j in 0..comptime!(CHUNK / UNITS) {
        let i = CUBE_POS_X * comptime!(CHUNK) + comptime!(j * UNITS) + UNIT_POS;
        if i < vocab {
            let v = logits[(row * vocab + i) as usize];
            if key(v) >= bound {
                let place = counts[row as usize].fetch_add(1u32);
                if place < room {
                    let at = (row * room + place) * 2;
                    found[at as usize] = i;
                    found[(at + 1) as usize] = u32::reinterpret(v);
                }
            }
        }
    }
}
