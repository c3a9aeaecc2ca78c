//! Single rows (outputs) of the matrix, in its original basis: what a tied embedding looks up.
//!
//! The rotation of the outputs makes a row the sum of 128 rows of the inner matrix with signs
//! `(−1)^popcount(i & j)`. All of them are decoded, four strips of 32, into one sum for every input;
//! the sums are then rotated as inputs are.

use super::isa::{Isa, Job};
use super::layout::{BLOCK, BLOCK_STATES, GROUPS, MAX_DEPTH, STRIP, Vector, repack};
use super::multiply::{Buffer, Generator, PAIRS, WithGenerator, with_generator};
use super::states::States;
use super::tier::Visitor;
use crate::embedding::Rows;
use marlin_quant::exl3::Exl3Parts;
use marlin_quant::exl3::hadamard::sign;
use marlin_tensor::BackendError;
use std::mem::MaybeUninit;

/// f32 lanes of the widest register.
const MAX_LANES: usize = 16;

struct Exl3Rows<S> {
    s: S,
    parts: Exl3Parts,
}

impl Visitor for Exl3Parts {
    type Output = Box<dyn Rows>;

    fn visit<S: Isa>(self, s: S) -> Box<dyn Rows> {
        Box::new(Exl3Rows { s, parts: self })
    }
}

impl<S: Isa> Rows for Exl3Rows<S> {
    fn row(&self, row: usize, out: &mut [f32]) -> Result<(), BackendError> {
        let parts = &self.parts;
        assert!(row < parts.padded_out && out.len() <= parts.padded_in, "a row of the matrix");
        let mut sums = vec![0.0; parts.padded_in];
        self.s.enter(Sum { parts, row, sums: &mut sums });
        parts.finish_row(row, &mut sums, out);
        Ok(())
    }
}

/// The signed sums of a row, `[padded_in]`.
struct Sum<'a> {
    parts: &'a Exl3Parts,
    row: usize,
    sums: &'a mut [f32],
}

impl Job for Sum<'_> {
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        with_generator(s, self.parts.codebook, self);
    }
}

impl<S: Isa> WithGenerator<S> for Sum<'_> {
    #[inline(always)]
    fn run<C: Generator<S>>(self, s: S, codebook: C) {
        let (band, place) = (self.row / BLOCK, self.row % BLOCK);
        let depth = self.parts.rate.twice_bits();
        let mut words = [Vector::ZERO; GROUPS * MAX_DEPTH];
        let mut buffer = MaybeUninit::<Buffer>::uninit();
        let states = buffer.as_mut_ptr().cast::<u16>();
        for (block, sums) in self.sums.chunks_exact_mut(BLOCK).enumerate() {
            // Lanes differ in their output, and adjacent ones in the tile of their input.
            let mut lanes = [[0.0; MAX_LANES]; PAIRS];
            for strip in 0..BLOCK / STRIP {
                for (group, words) in words[..GROUPS * depth].chunks_exact_mut(depth).enumerate() {
                    repack(
                        self.parts,
                        band * (BLOCK / STRIP) + strip,
                        block * GROUPS + group,
                        words,
                    );
                }
                // SAFETY: the words are a block of this rate, the buffer has room for its states.
                unsafe { s.enter(States::new(self.parts.rate, words.as_ptr().cast(), states)) };
                // SAFETY: that filled the buffer.
                unsafe { add_signed(s, codebook, states, signs(strip, place), &mut lanes) };
            }
            for (pair, lanes) in lanes.iter().enumerate() {
                let input = pair / 16 * STRIP + pair % 16;
                sums[input] = lanes.iter().step_by(2).sum();
                sums[input + 16] = lanes.iter().skip(1).step_by(2).sum();
            }
        }
    }
}

/// Signs with which the outputs of `strip` make up the row at `place` of the block:
/// `[half of the columns][lane]`.
fn signs(strip: usize, place: usize) -> [[f32; STRIP]; 2] {
    std::array::from_fn(|half| {
        std::array::from_fn(|lane| {
            let output = strip * STRIP + 16 * (lane / 16) + lane % 16 / 2 + 8 * half;
            sign(output, place)
        })
    })
}

/// Adds the values of a block of states, with signs, to the sums of every pair of inputs.
///
/// # Safety
/// `states` must hold [`BLOCK_STATES`].
#[inline(always)]
unsafe fn add_signed<S: Isa, C: Generator<S>>(
    s: S,
    codebook: C,
    states: *const u16,
    signs: [[f32; STRIP]; 2],
    lanes: &mut [[f32; MAX_LANES]; PAIRS],
) {
    const { assert!(2 * PAIRS * STRIP == BLOCK_STATES) };
    for part in (0..STRIP).step_by(2 * S::LANES) {
        // SAFETY: `part` and the registers from there are lanes of the strip.
        let signs = signs.each_ref().map(|signs| unsafe {
            let signs = signs.as_ptr().add(part);
            [s.load_f32(signs), s.load_f32(signs.add(S::LANES))]
        });
        for (pair, lanes) in lanes.iter_mut().enumerate() {
            // SAFETY: a register has at most `MAX_LANES`; pairs have 32 states in each half.
            unsafe {
                let mut sum = s.load_f32(lanes.as_ptr());
                for (half, signs) in signs.iter().enumerate() {
                    let states = s.load(states.add((2 * pair + half) * STRIP + part));
                    let [low, high] = codebook.values(s, states);
                    sum = s.fma(low, signs[0], s.fma(high, signs[1], sum));
                }
                s.store_f32(lanes.as_mut_ptr(), sum);
            }
        }
    }
}
