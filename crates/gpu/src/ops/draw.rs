//! Tokens drawn where the logits are: what is copied of a row is its token.
//!
//! A row is cut into parts of [`Shape::part`] tokens. `scan` has a plane for each: it adjusts the logits, and leaves the largest and the sum of weights
//! `exp((logit - largest) / temperature)`. `choose` has a cube for each draw. Tokens have an order, the larger logit first, and what top-k and top-p keep ends at
//! some token of it, the edge: a bound from the parts' largest logits says in which parts the edge can be, the range of logits around it is halved until few tokens
//! are in it, and those are ranked. Then the weights of what is kept are summed by part, and the part and the token are found where the draw falls.
//! Where nothing is cut, the sums of `scan` are those. `likeliest` finds the largest logits of draws that want them.
//!
//! No sum depends on anything but the row and its draw, and each has one order: the same draw gives the same token, alone or among others.

mod choose;
mod likeliest;
mod row;
mod scan;

use crate::gpu::{Buffer, Gpu, device_error};
use choose::choose_kernel;
use cubecl::prelude::*;
use likeliest::likeliest_kernel;
use marlin_tensor::{BackendError, Draw, Drawn, DrawnLogits};
use scan::scan_kernel;

/// Units of a cube that scans, and most tokens of a part.
const UNITS: u32 = 256;
/// Units of a cube that chooses, where there are tensor cores, NVIDIA's: one cube reads a whole row where a nucleus is large.
const MANY_UNITS: u32 = 512;
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
    /// Tokens of a part.
    part: u32,
    /// Parts that a unit of a cube that chooses has at most, a power of two.
    each: u32,
    plane: u32,
    /// Units of a cube that chooses.
    units: u32,
}

impl Shape {
    /// For rows of `vocab` logits, and how many parts they have.
    fn new(vocab: usize, gpu: &Gpu) -> (Self, u32) {
        let part = if vocab.div_ceil(PART) > MOST_PARTS { UNITS as usize } else { PART };
        let parts = vocab.div_ceil(part) as u32;
        let units = if gpu.tensor_cores { MANY_UNITS } else { UNITS };
        let each = parts.div_ceil(units).next_power_of_two();
        (Self { part: part as u32, each, plane: gpu.plane, units }, parts)
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

    /// Whether loops over what a lane has are written out: not where planes are narrow and loops long, which takes software that compiles to
    /// coroutines, as Mesa's does, minutes.
    const fn unrolls(&self) -> bool {
        self.plane >= 32
    }

    /// Parts that a cube has room for.
    const fn slots(&self) -> u32 {
        self.each * self.units
    }

    /// Bytes of shared memory of a cube.
    const fn shared_bytes(&self) -> usize {
        4 * (2 * self.slots() + 3 * RANKED + 4 * self.planes() + 2) as usize
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
    let (shape, parts) = Shape::new(vocab, gpu);
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
    let adjusted = if adjusted == 0 { gpu.none.clone() } else { gpu.empty(adjusted * vocab) };
    let stats = gpu.empty(rows * parts as usize * 4);
    let out = gpu.empty(rows * stride);
    let client = &gpu.client;
    let scanned = CubeCount::Static(parts.div_ceil(shape.scanning()), rows as u32, 1);
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
            vocab as u32,
            parts,
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
            vocab as u32,
            parts,
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
                vocab as u32,
                parts,
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
