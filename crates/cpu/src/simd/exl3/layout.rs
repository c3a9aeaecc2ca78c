//! The trellis repacked so that one instruction reads the states of 32 rings' segments.
//!
//! A *group* is two tiles along the inputs times two along the outputs: 32×32 weights. Every ring
//! is cut into eight segments of 32 positions, which are `2·K` half-words at every rate, half
//! rates included. Lane `16·b + 2·j + a` of half-word vector `q` holds half-word `q` of segment
//! `j` of tile (input `a`, output `b`), most significant bits first:
//!
//! ```text
//! [strip: 32 outputs][group: 32 inputs][q: 2·K][lane: 32] u16
//! ```
//!
//! The size is that of the original. Position `c` of a segment has, in every lane, the same place
//! in those vectors, the same input row of its tile and the same half of its columns: the output
//! column is `16·b + j` (+ 8 for the odd half), and adjacent lanes differ only in the input tile,
//! which is what pairwise dot products add up.

use crate::memory::{Plain, no_room, zeroed};
use marlin_quant::exl3::{Exl3Parts, Rate};

/// Outputs of a strip, inputs of a group, lanes of a vector.
pub(super) const STRIP: usize = 32;
/// Inputs that share a Hadamard block and an activation scale.
pub(super) const BLOCK: usize = 128;
/// Groups of a block.
pub(super) const GROUPS: usize = BLOCK / STRIP;
/// States of a block of a strip.
pub(super) const BLOCK_STATES: usize = BLOCK * STRIP;
/// Segments of a ring.
const SEGMENTS: usize = 8;
/// Vectors of a group at 8 bits.
pub(super) const MAX_DEPTH: usize = 16;

/// A whole repacked trellis.
pub(super) struct Strips {
    words: Vec<Vector>,
    /// Padded inputs and outputs.
    pub inputs: usize,
    pub outputs: usize,
    pub rate: Rate,
}

/// One vector of half-words, aligned for any register.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Vector([u16; STRIP]);

impl Plain for Vector {}

impl Vector {
    pub(super) const ZERO: Self = Self([0; STRIP]);
}

/// The `2·K` vectors of one group.
pub(super) fn repack(parts: &Exl3Parts, strip: usize, group: usize, vectors: &mut [Vector]) {
    let depth = vectors.len();
    for (a, b) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        // Stored words are 32 bits wide, so half-words come in swapped pairs.
        let mut half_words = [0u16; SEGMENTS * MAX_DEPTH];
        let tile = parts.tile(2 * group + a, 2 * strip + b).as_chunks().0;
        for (pair, word) in half_words.as_chunks_mut().0.iter_mut().zip(tile) {
            let word = u32::from_le_bytes(*word);
            *pair = [(word >> 16) as u16, word as u16];
        }
        for (j, segment) in half_words.chunks_exact(depth).take(SEGMENTS).enumerate() {
            let lane = 16 * b + 2 * j + a;
            for (vector, half_word) in vectors.iter_mut().zip(segment) {
                vector.0[lane] = *half_word;
            }
        }
    }
}

impl Strips {
    pub(super) fn new(parts: &Exl3Parts) -> Self {
        let (inputs, outputs, rate) = (parts.padded_in, parts.padded_out, parts.rate);
        let depth = rate.twice_bits();
        let groups = inputs / STRIP * (outputs / STRIP);
        let len = groups * depth;
        let words = zeroed::<Vector>(len);
        let mut words = words.unwrap_or_else(|| no_room("a matrix", len * size_of::<Vector>()));
        for (i, vectors) in words.chunks_exact_mut(depth).enumerate() {
            let (strip, group) = (i / (inputs / STRIP), i % (inputs / STRIP));
            repack(parts, strip, group, vectors);
        }
        Self { words, inputs, outputs, rate }
    }

    /// All strips.
    pub(super) fn stored(&self) -> &[u8] {
        // SAFETY: the vectors are half-words without padding, read as bytes.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), self.bytes()) }
    }

    /// Bytes it occupies.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&self.words[..])
    }

    /// Number of strips.
    pub(super) fn strips(&self) -> usize {
        self.outputs / STRIP
    }

    /// Blocks of 128 inputs.
    pub(super) fn blocks(&self) -> usize {
        self.inputs / BLOCK
    }

    /// Bytes of a block.
    pub(super) fn block_bytes(&self) -> usize {
        size_of_val(&self.words[..GROUPS * self.rate.twice_bits()])
    }

    /// The half-word vectors of `block` of `strip`: `GROUPS · 2·K` of them.
    pub(super) fn block(&self, strip: usize, block: usize) -> *const u16 {
        let len = GROUPS * self.rate.twice_bits();
        self.words[(strip * self.blocks() + block) * len..][..len].as_ptr().cast()
    }
}
