//! The inner product `a · Ŵ`, a strip of 32 outputs and a block of 128 inputs at a time.
//!
//! States of the block are written to an 8 kB buffer first, so that what depends on the rate and
//! what depends on the codebook are separate loops; the buffer costs no arithmetic instruction.
//! With one row, values are made and used on the spot. With more, they replace the states (or
//! fill a second buffer, as f32) and are then read by every row.

use super::isa::{Isa, Job};
use super::layout::{BLOCK, BLOCK_STATES, STRIP, Strips};
use super::rotate::{Activations, RECORD, SCALE, START};
use super::states::States;
use crate::pool::ahead::read_on;
use crate::simd::amx::{DEPTH, Part, Tile};
use marlin_quant::exl3::Codebook;
use marlin_quant::exl3::codebook::{THREE_INST_ADDEND, THREE_INST_MULTIPLIER};
use std::mem::MaybeUninit;

/// Pairs of inputs of a block: states lie as `[pair][half of the columns][lane]`.
pub(super) const PAIRS: usize = BLOCK / 2;

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
pub(super) struct Buffer(#[allow(dead_code)] [u16; BLOCK_STATES]);

#[repr(align(64))]
struct Values(#[allow(dead_code)] [f32; BLOCK_STATES]);

impl Job for Multiply<'_> {
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        with_generator(s, self.codebook, self);
    }
}

impl<S: Isa> WithGenerator<S> for Multiply<'_> {
    #[inline(always)]
    fn run<C: Generator<S>>(self, s: S, codebook: C) {
        match self.activations {
            Activations::Integers(_) => self.integers(s, codebook),
            Activations::Floats => self.floats(s, codebook),
        }
    }
}

impl Multiply<'_> {
    #[inline(always)]
    fn integers<S: Isa, C: Generator<S>>(self, s: S, codebook: C) {
        if C::HALVES && !S::HALF_ARITHMETIC {
            unreachable!("integers of this codebook need fp16 arithmetic");
        }
        let mut buffer = MaybeUninit::<Buffer>::uninit();
        let block_states = buffer.as_mut_ptr().cast::<u16>();
        let words = self.activations.row_words(self.strips.inputs);
        for (i, sums) in self.sums.chunks_exact_mut(self.rows * STRIP).enumerate() {
            for (sums, x) in sums.chunks_exact_mut(STRIP).zip(self.x.chunks_exact(words)) {
                sums.fill(f32::from_bits(x[words - 1]));
            }
            for block in 0..self.strips.blocks() {
                let stored = self.strips.block(self.first_strip + i, block);
                read_on(stored.cast(), self.strips.block_bytes());
                let x = self.x[block * RECORD..].as_ptr();
                let sums = sums.as_mut_ptr();
                // SAFETY: the buffer holds a block of states, which `states` fills; every row has
                // a record at `x + row * words` and 32 sums.
                unsafe {
                    s.enter(States::new(self.strips.rate, stored, block_states));
                    if self.rows == 1 {
                        integer_rows::<S, C, 1>(s, codebook, block_states, x, words, sums);
                        continue;
                    }
                    for at in (0..BLOCK_STATES).step_by(2 * S::LANES) {
                        let p = block_states.add(at);
                        s.store(p, codebook.integers(s, s.load(p)));
                    }
                    let mut row = 0;
                    while row < self.rows {
                        let (x, sums) = (x.add(row * words), sums.add(row * STRIP));
                        row += match self.rows - row {
                            8.. if S::LANES == 16 => {
                                ready_rows::<S, C, 8>(s, block_states, x, words, sums);
                                8
                            }
                            4.. => {
                                ready_rows::<S, C, 4>(s, block_states, x, words, sums);
                                4
                            }
                            2.. => {
                                ready_rows::<S, C, 2>(s, block_states, x, words, sums);
                                2
                            }
                            _ => {
                                ready_rows::<S, C, 1>(s, block_states, x, words, sums);
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
        let mut buffer = MaybeUninit::<Buffer>::uninit();
        let block_states = buffer.as_mut_ptr().cast::<u16>();
        let mut buffer = MaybeUninit::<Values>::uninit();
        let values = buffer.as_mut_ptr().cast::<f32>();
        let words = self.activations.row_words(self.strips.inputs);
        for (i, sums) in self.sums.chunks_exact_mut(self.rows * 2 * STRIP).enumerate() {
            sums.fill(0.0);
            for block in 0..self.strips.blocks() {
                let stored = self.strips.block(self.first_strip + i, block);
                read_on(stored.cast(), self.strips.block_bytes());
                let x = self.x[block * BLOCK..].as_ptr().cast::<f32>();
                let sums = sums.as_mut_ptr();
                // SAFETY: the buffers hold a block of states and of values, which `states` and the
                // loop fill; every row has 128 floats at `x + row * words` and 64 sums.
                unsafe {
                    s.enter(States::new(self.strips.rate, stored, block_states));
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

/// Blocks of a strip as bf16 tiles: for each half of the columns, pairs of inputs in the order of the
/// states.
pub(super) struct Fill<'a> {
    pub strips: &'a Strips,
    pub codebook: Codebook,
    pub part: Part,
    pub strip: usize,
    pub first_block: usize,
    /// Tiles of the lower halves, then of the upper ones.
    pub out: &'a mut [Tile],
}

impl Job for Fill<'_> {
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        with_generator(s, self.codebook, self);
    }
}

impl<S: Isa> WithGenerator<S> for Fill<'_> {
    #[inline(always)]
    fn run<C: Generator<S>>(self, s: S, codebook: C) {
        let mut buffer = MaybeUninit::<Buffer>::uninit();
        let block_states = buffer.as_mut_ptr().cast::<u16>();
        let (lower, upper) = self.out.split_at_mut(self.out.len() / 2);
        let tiles = BLOCK / DEPTH;
        for (i, (lower, upper)) in
            lower.chunks_exact_mut(tiles).zip(upper.chunks_exact_mut(tiles)).enumerate()
        {
            let stored = self.strips.block(self.strip, self.first_block + i);
            // SAFETY: the buffer holds a block of states, which `states` fills; four tiles of sixteen
            // rows take its 64 pairs.
            unsafe {
                s.enter(States::new(self.strips.rate, stored, block_states));
                for (half, tiles) in [lower, upper].into_iter().enumerate() {
                    let out = tiles.as_mut_ptr().cast::<u16>();
                    for pair in 0..PAIRS {
                        let states = s.load(block_states.add((2 * pair + half) * STRIP));
                        let values = s.narrow(self.part, codebook.values(s, states));
                        s.store(out.add(pair * STRIP), values);
                    }
                }
            }
        }
    }
}

/// `R` rows times a block of states, or with [`Ready`] of integers.
///
/// # Safety
/// `block` must hold a block; every row a record at `x + row * words` and 32 floats at
/// `sums + row * 32`.
#[inline(always)]
unsafe fn integer_rows<S: Isa, C: Generator<S>, const R: usize>(
    s: S,
    codebook: C,
    block: *const u16,
    x: *const u32,
    words: usize,
    sums: *mut f32,
) {
    // Pairs whose sum surely fits 32 bits: see `Integers`.
    let chunk = if C::HALVES { PAIRS / 4 } else { PAIRS };
    for part in 0..STRIP / (2 * S::LANES) {
        // SAFETY: all offsets stay inside what the caller vouches for.
        unsafe {
            let block = block.add(part * 2 * S::LANES);
            for first in (0..PAIRS).step_by(chunk) {
                let mut acc = [[s.splat32(0); 2]; R];
                for (r, acc) in acc.iter_mut().enumerate() {
                    *acc = [s.splat32(x.add(r * words + START).read() as i32); 2];
                }
                for pair in first..first + chunk {
                    let mut t = [s.load(block.add(2 * pair * STRIP)); 2];
                    t[1] = s.load(block.add((2 * pair + 1) * STRIP));
                    t = [codebook.integers(s, t[0]), codebook.integers(s, t[1])];
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
}

/// `R` rows times a block of integers of codebook `C`, the same code for similar codebooks.
///
/// # Safety
/// As [`integer_rows`].
#[inline(always)]
unsafe fn ready_rows<S: Isa, C: Generator<S>, const R: usize>(
    s: S,
    block: *const u16,
    x: *const u32,
    words: usize,
    sums: *mut f32,
) {
    // SAFETY: the caller's.
    unsafe {
        if C::HALVES {
            integer_rows::<S, _, R>(s, Ready::<true>, block, x, words, sums);
        } else {
            integer_rows::<S, _, R>(s, Ready::<false>, block, x, words, sums);
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
}

/// A codebook.
pub(super) trait Generator<S: Isa>: Copy {
    /// Whether values are sums of fp16 halves, so that integers need fp16 arithmetic.
    const HALVES: bool;
    /// States to values: the lower and the upper lanes.
    fn values(self, s: S, states: S::I) -> [S::F; 2];
    /// States to the 16-bit integers of [`Integers`](super::rotate::Integers).
    fn integers(self, s: S, states: S::I) -> S::I;
}

/// Work that is compiled once per codebook.
pub(super) trait WithGenerator<S: Isa> {
    /// The body; must be `#[inline(always)]`.
    fn run<C: Generator<S>>(self, s: S, codebook: C);
}

/// Runs `work` with the values of `codebook`.
#[inline(always)]
pub(super) fn with_generator<S: Isa>(s: S, codebook: Codebook, work: impl WithGenerator<S>) {
    match codebook {
        Codebook::Mul1(multiplier) => work.run(s, Mul1 { product: Product::new(s, multiplier) }),
        Codebook::Mcg(multiplier) => work.run(s, Halves::new(s, multiplier)),
        Codebook::ThreeInst => work.run(s, ThreeInst::new(s)),
    }
}

/// Integers made before.
#[derive(Clone, Copy)]
struct Ready<const HALVES: bool>;

impl<S: Isa, const HALVES: bool> Generator<S> for Ready<HALVES> {
    const HALVES: bool = HALVES;

    #[inline(always)]
    fn values(self, _: S, _: S::I) -> [S::F; 2] {
        unreachable!("integers are not made into floats")
    }

    #[inline(always)]
    fn integers(self, _: S, integers: S::I) -> S::I {
        integers
    }
}

/// The codebook `mul1`: affine in the byte sum of the product.
#[derive(Clone, Copy)]
struct Mul1<S: Isa> {
    product: Product<S>,
}

impl<S: Isa> Generator<S> for Mul1<S> {
    const HALVES: bool = false;

    #[inline(always)]
    fn values(self, s: S, states: S::I) -> [S::F; 2] {
        s.mul1_values(self.integers(s, states))
    }

    #[inline(always)]
    fn integers(self, s: S, states: S::I) -> S::I {
        let (low, high) = self.product.halves(s, states);
        s.add16(s.add_bytes(low), s.add_bytes(high))
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
    fn masked(self, s: S, (low, high): (S::I, S::I)) -> (S::I, S::I) {
        (s.mask_flip(low, self.mask, self.flip), s.mask_flip(high, self.mask, self.flip))
    }
}

impl<S: Isa> Generator<S> for Halves<S> {
    const HALVES: bool = true;

    #[inline(always)]
    fn values(self, s: S, states: S::I) -> [S::F; 2] {
        let (low, high) = self.masked(s, self.product.halves(s, states));
        s.sum_halves(low, high)
    }

    #[inline(always)]
    fn integers(self, s: S, states: S::I) -> S::I {
        let (low, high) = self.masked(s, self.product.halves(s, states));
        s.sum_halves_8192(low, high)
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

    #[inline(always)]
    fn masked(self, s: S, states: S::I) -> (S::I, S::I) {
        let (low, high) = self.halves.product.halves(s, states);
        let low = s.add16(low, self.low);
        let high = s.add_carry(s.add16(high, self.high), low, self.low);
        self.halves.masked(s, (low, high))
    }
}

impl<S: Isa> Generator<S> for ThreeInst<S> {
    const HALVES: bool = true;

    #[inline(always)]
    fn values(self, s: S, states: S::I) -> [S::F; 2] {
        let (low, high) = self.masked(s, states);
        s.sum_halves(low, high)
    }

    #[inline(always)]
    fn integers(self, s: S, states: S::I) -> S::I {
        let (low, high) = self.masked(s, states);
        s.sum_halves_8192(low, high)
    }
}
