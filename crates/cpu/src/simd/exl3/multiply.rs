//! The inner product `a · Ŵ`, a strip of 32 outputs and a block of 128 inputs at a time.
//!
//! States of the block are written to an 8 kB buffer first, so that what depends on the rate and
//! what depends on the codebook are separate loops; the buffer costs no arithmetic instruction.
//! With one row, values are made and used on the spot. With more, they replace the states (or
//! fill a second buffer, as f32) and are then read by every row.

use super::isa::{Isa, Job};
use super::layout::{BLOCK, BLOCK_STATES, STRIP, Strips};
use super::rotate::{Activations, RECORD, SCALE, START};
use super::states::states;
use marlin_quant::exl3::Codebook;
use marlin_quant::exl3::codebook::{
    MUL1_OFFSET, MUL1_SLOPE, THREE_INST_ADDEND, THREE_INST_MULTIPLIER,
};
use std::mem::MaybeUninit;

/// Pairs of inputs of a block: states lie as `[pair][half of the columns][lane]`.
const PAIRS: usize = BLOCK / 2;

/// Rows of rotated activations times consecutive strips.
pub(super) struct Multiply<'a> {
    pub strips: &'a Strips,
    pub codebook: Codebook,
    pub activations: Activations,
    /// `[rows, row_words]`.
    pub x: &'a [u32],
    pub rows: usize,
    pub first_strip: usize,
    /// `[strips, rows, strip_sums]`.
    pub sums: &'a mut [f32],
}

#[repr(align(64))]
struct States(#[allow(dead_code)] [u16; BLOCK_STATES]);

#[repr(align(64))]
struct Values(#[allow(dead_code)] [f32; BLOCK_STATES]);

impl Job for Multiply<'_> {
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        match (self.activations, self.codebook) {
            (Activations::Integers, Codebook::Mul1(multiplier)) => self.integers(s, multiplier),
            (_, Codebook::Mul1(multiplier)) => self.floats(s, Mul1::new(s, multiplier)),
            (_, Codebook::Mcg(multiplier)) => self.floats(s, Halves::new(s, multiplier)),
            (_, Codebook::ThreeInst) => self.floats(s, ThreeInst::new(s)),
        }
    }
}

impl Multiply<'_> {
    #[inline(always)]
    fn integers<S: Isa>(self, s: S, multiplier: u32) {
        let mut buffer = MaybeUninit::<States>::uninit();
        let block_states = buffer.as_mut_ptr().cast::<u16>();
        let words = self.activations.row_words(self.strips.inputs);
        let product = Product::new(s, multiplier);
        for (i, sums) in self.sums.chunks_exact_mut(self.rows * STRIP).enumerate() {
            for (sums, x) in sums.chunks_exact_mut(STRIP).zip(self.x.chunks_exact(words)) {
                sums.fill(f32::from_bits(x[words - 1]));
            }
            for block in 0..self.strips.blocks() {
                let stored = self.strips.block(self.first_strip + i, block).cast();
                let x = self.x[block * RECORD..].as_ptr();
                let sums = sums.as_mut_ptr();
                // SAFETY: the buffer holds a block of states, which `states` fills; every row has
                // a record at `x + row * words` and 32 sums.
                unsafe {
                    states(s, self.strips.rate, stored, block_states);
                    if self.rows == 1 {
                        integer_rows::<S, 1, true>(s, product, block_states, x, words, sums);
                        continue;
                    }
                    for at in (0..BLOCK_STATES).step_by(2 * S::LANES) {
                        let p = block_states.add(at);
                        s.store(p, product.byte_sums(s, s.load(p)));
                    }
                    let mut row = 0;
                    while row < self.rows {
                        let (x, sums) = (x.add(row * words), sums.add(row * STRIP));
                        row += match self.rows - row {
                            8.. if S::LANES == 16 => {
                                integer_rows::<S, 8, false>(
                                    s,
                                    product,
                                    block_states,
                                    x,
                                    words,
                                    sums,
                                );
                                8
                            }
                            4.. => {
                                integer_rows::<S, 4, false>(
                                    s,
                                    product,
                                    block_states,
                                    x,
                                    words,
                                    sums,
                                );
                                4
                            }
                            2.. => {
                                integer_rows::<S, 2, false>(
                                    s,
                                    product,
                                    block_states,
                                    x,
                                    words,
                                    sums,
                                );
                                2
                            }
                            _ => {
                                integer_rows::<S, 1, false>(
                                    s,
                                    product,
                                    block_states,
                                    x,
                                    words,
                                    sums,
                                );
                                1
                            }
                        };
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn floats<S: Isa, C: Generator<S>>(self, s: S, codebook: C) {
        let mut buffer = MaybeUninit::<States>::uninit();
        let block_states = buffer.as_mut_ptr().cast::<u16>();
        let mut buffer = MaybeUninit::<Values>::uninit();
        let values = buffer.as_mut_ptr().cast::<f32>();
        let words = self.activations.row_words(self.strips.inputs);
        for (i, sums) in self.sums.chunks_exact_mut(self.rows * 2 * STRIP).enumerate() {
            sums.fill(0.0);
            for block in 0..self.strips.blocks() {
                let stored = self.strips.block(self.first_strip + i, block).cast();
                let x = self.x[block * BLOCK..].as_ptr().cast::<f32>();
                let sums = sums.as_mut_ptr();
                // SAFETY: the buffers hold a block of states and of values, which `states` and the
                // loop fill; every row has 128 floats at `x + row * words` and 64 sums.
                unsafe {
                    states(s, self.strips.rate, stored, block_states);
                    if self.rows == 1 {
                        float_row(s, codebook, block_states, x, sums);
                        continue;
                    }
                    for at in (0..BLOCK_STATES).step_by(2 * S::LANES) {
                        let [low, high] = codebook.values(s, s.load(block_states.add(at)));
                        s.store_f32(values.add(at), low);
                        s.store_f32(values.add(at + S::LANES), high);
                    }
                    let mut row = 0;
                    while row < self.rows {
                        let (x, sums) = (x.add(row * words), sums.add(row * 2 * STRIP));
                        row += match self.rows - row {
                            4.. if S::LANES == 16 => {
                                float_rows::<S, 4>(s, values, x, words, sums);
                                4
                            }
                            2.. => {
                                float_rows::<S, 2>(s, values, x, words, sums);
                                2
                            }
                            _ => {
                                float_rows::<S, 1>(s, values, x, words, sums);
                                1
                            }
                        };
                    }
                }
            }
        }
    }
}

/// `R` rows times a block of states (`RAW`) or of byte sums.
///
/// # Safety
/// `block` must hold a block; every row a record at `x + row * words` and 32 floats at
/// `sums + row * 32`.
#[inline(always)]
unsafe fn integer_rows<S: Isa, const R: usize, const RAW: bool>(
    s: S,
    product: Product<S>,
    block: *const u16,
    x: *const u32,
    words: usize,
    sums: *mut f32,
) {
    for part in 0..STRIP / (2 * S::LANES) {
        // SAFETY: all offsets stay inside what the caller vouches for.
        unsafe {
            let mut acc = [[s.splat32(0); 2]; R];
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = [s.splat32(x.add(r * words + START).read() as i32); 2];
            }
            let block = block.add(part * 2 * S::LANES);
            for pair in 0..PAIRS {
                let mut t = [s.load(block.add(2 * pair * STRIP)); 2];
                t[1] = s.load(block.add((2 * pair + 1) * STRIP));
                if RAW {
                    t = [product.byte_sums(s, t[0]), product.byte_sums(s, t[1])];
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let a = s.splat32(x.add(r * words + pair).read() as i32);
                    *acc = [s.dot(acc[0], t[0], a), s.dot(acc[1], t[1], a)];
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                let scale = s.splat(f32::from_bits(x.add(r * words + SCALE).read()));
                for (half, &acc) in acc.iter().enumerate() {
                    let to = sums.add(r * STRIP + half * 16 + part * S::LANES);
                    s.store_f32(to, s.fma(s.to_f32(acc), scale, s.load_f32(to)));
                }
            }
        }
    }
}

/// One row times a block of states.
///
/// # Safety
/// `block` must hold a block, `x` 128 floats and `sums` 64.
#[inline(always)]
unsafe fn float_row<S: Isa, C: Generator<S>>(
    s: S,
    codebook: C,
    block: *const u16,
    x: *const f32,
    sums: *mut f32,
) {
    for part in 0..STRIP / (2 * S::LANES) {
        // SAFETY: all offsets stay inside what the caller vouches for.
        unsafe {
            let (block, sums) = (block.add(part * 2 * S::LANES), sums.add(part * 2 * S::LANES));
            let at = [0, S::LANES, STRIP, STRIP + S::LANES];
            let mut acc = at.map(|at| s.load_f32(sums.add(at)));
            for pair in 0..PAIRS {
                let a = s.splat_pair(x.add(2 * pair));
                for half in 0..2 {
                    let states = s.load(block.add((2 * pair + half) * STRIP));
                    let [low, high] = codebook.values(s, states);
                    acc[2 * half] = s.fma(low, a, acc[2 * half]);
                    acc[2 * half + 1] = s.fma(high, a, acc[2 * half + 1]);
                }
            }
            for (at, acc) in at.into_iter().zip(acc) {
                s.store_f32(sums.add(at), acc);
            }
        }
    }
}

/// `R` rows times a block of values.
///
/// # Safety
/// `values` must hold a block; every row 128 floats at `x + row * words` and 64 at
/// `sums + row * 64`.
#[inline(always)]
unsafe fn float_rows<S: Isa, const R: usize>(
    s: S,
    values: *const f32,
    x: *const f32,
    words: usize,
    sums: *mut f32,
) {
    for part in 0..STRIP / (2 * S::LANES) {
        let at = [0, S::LANES, STRIP, STRIP + S::LANES].map(|at| at + part * 2 * S::LANES);
        // SAFETY: all offsets stay inside what the caller vouches for.
        unsafe {
            let mut acc = [[s.splat(0.0); 4]; R];
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = at.map(|at| s.load_f32(sums.add(r * 2 * STRIP + at)));
            }
            for pair in 0..PAIRS {
                let w = at.map(|at| s.load_f32(values.add(2 * pair * STRIP + at)));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let a = s.splat_pair(x.add(r * words + 2 * pair));
                    for (acc, w) in acc.iter_mut().zip(w) {
                        *acc = s.fma(w, a, *acc);
                    }
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                for (at, &acc) in at.into_iter().zip(acc) {
                    s.store_f32(sums.add(r * 2 * STRIP + at), acc);
                }
            }
        }
    }
}

/// The 32-bit product of a state and a constant, as two 16-bit halves.
#[derive(Clone, Copy)]
struct Product<S: Isa> {
    low: S::I,
    high: S::I,
}

impl<S: Isa> Product<S> {
    #[inline(always)]
    fn new(s: S, multiplier: u32) -> Self {
        Self { low: s.splat16(multiplier as u16), high: s.splat16((multiplier >> 16) as u16) }
    }

    /// The low and the high halves.
    #[inline(always)]
    fn halves(self, s: S, states: S::I) -> (S::I, S::I) {
        let carried = s.mul_high(states, self.low);
        (s.mul_low(states, self.low), s.add16(carried, s.mul_low(states, self.high)))
    }

    /// Sum of the four bytes, at most 1020.
    #[inline(always)]
    fn byte_sums(self, s: S, states: S::I) -> S::I {
        let (low, high) = self.halves(s, states);
        s.add16(s.add_bytes(low), s.add_bytes(high))
    }
}

/// States to values: the lower and the upper lanes.
trait Generator<S: Isa>: Copy {
    fn values(self, s: S, states: S::I) -> [S::F; 2];
}

#[derive(Clone, Copy)]
struct Mul1<S: Isa> {
    product: Product<S>,
    slope: S::F,
    offset: S::F,
}

impl<S: Isa> Mul1<S> {
    #[inline(always)]
    fn new(s: S, multiplier: u32) -> Self {
        let (slope, offset) = (s.splat(MUL1_SLOPE), s.splat(MUL1_OFFSET));
        Self { product: Product::new(s, multiplier), slope, offset }
    }
}

impl<S: Isa> Generator<S> for Mul1<S> {
    #[inline(always)]
    fn values(self, s: S, states: S::I) -> [S::F; 2] {
        s.affine(self.product.byte_sums(s, states), self.slope, self.offset)
    }
}

/// The codebook `mcg`: fp16 sum of the masked halves of the product.
#[derive(Clone, Copy)]
struct Halves<S: Isa> {
    product: Product<S>,
    mask: S::I,
    flip: S::I,
}

impl<S: Isa> Halves<S> {
    #[inline(always)]
    fn new(s: S, multiplier: u32) -> Self {
        let (mask, flip) = (s.splat16(0x8fff), s.splat16(0x3b60));
        Self { product: Product::new(s, multiplier), mask, flip }
    }

    #[inline(always)]
    fn sum(self, s: S, low: S::I, high: S::I) -> [S::F; 2] {
        let masked = |v| s.mask_flip(v, self.mask, self.flip);
        s.add_halves(masked(low), masked(high))
    }
}

impl<S: Isa> Generator<S> for Halves<S> {
    #[inline(always)]
    fn values(self, s: S, states: S::I) -> [S::F; 2] {
        let (low, high) = self.product.halves(s, states);
        self.sum(s, low, high)
    }
}

/// The codebook `3inst`: as `mcg` with an addend.
#[derive(Clone, Copy)]
struct ThreeInst<S: Isa> {
    halves: Halves<S>,
    low: S::I,
    high: S::I,
}

impl<S: Isa> ThreeInst<S> {
    #[inline(always)]
    fn new(s: S) -> Self {
        let (multiplier, addend) = (THREE_INST_MULTIPLIER, THREE_INST_ADDEND);
        Self {
            halves: Halves::new(s, multiplier),
            low: s.splat16(addend as u16),
            high: s.splat16((addend >> 16) as u16),
        }
    }
}

impl<S: Isa> Generator<S> for ThreeInst<S> {
    #[inline(always)]
    fn values(self, s: S, states: S::I) -> [S::F; 2] {
        let (low, high) = self.halves.product.halves(s, states);
        let low = s.add16(low, self.low);
        let high = s.add_carry(s.add16(high, self.high), low, self.low);
        self.halves.sum(s, low, high)
    }
}
