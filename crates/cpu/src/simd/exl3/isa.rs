//! The instructions these kernels are written in, one implementation per level. The body of a
//! kernel is a [`Job`], generic over [`Isa`] and inlined into one function compiled for the
//! level's features; a value of an `Isa` type proves that the processor has them.

use crate::simd::amx::Part;

/// A piece of work compiled once per level.
pub(super) trait Job {
    /// The body; must be `#[inline(always)]`, as must everything it calls with `S`.
    fn run<S: Isa>(self, s: S);
}

/// One instruction set. `I` is a register of integers, `F` one of f32.
#[allow(clippy::missing_safety_doc)] // every unsafe method reads or writes the bytes it names
pub(super) trait Isa: Copy + Send + Sync + 'static {
    /// f32 lanes of a register; 16-bit lanes are twice as many.
    const LANES: usize;
    /// Whether [`sum_halves_8192`](Self::sum_halves_8192) exists: fp16 arithmetic.
    const HALF_ARITHMETIC: bool;
    /// Integer register.
    type I: Copy;
    /// Float register.
    type F: Copy;

    /// Runs `job` compiled for this level.
    fn enter<J: Job>(self, job: J);

    /// A register from `p`, any alignment.
    unsafe fn load(self, p: *const u16) -> Self::I;
    /// A register to `p`.
    unsafe fn store(self, p: *mut u16, v: Self::I);
    /// Every 16-bit lane `v`.
    fn splat16(self, v: u16) -> Self::I;
    /// Every 32-bit lane `v`.
    fn splat32(self, v: i32) -> Self::I;
    /// 32-bit lane `i` becomes lane `i - 1`, cyclically within every eight.
    fn rotate8(self, v: Self::I) -> Self::I;
    /// Per 16-bit lane: the low half of `(high : low) >> shift`, `shift` a constant in 1 … 15.
    fn funnel(self, high: Self::I, low: Self::I, shift: u32) -> Self::I;
    /// 16-bit product, low half.
    fn mul_low(self, a: Self::I, b: Self::I) -> Self::I;
    /// 16-bit unsigned product, high half.
    fn mul_high(self, a: Self::I, b: Self::I) -> Self::I;
    /// 16-bit sum.
    fn add16(self, a: Self::I, b: Self::I) -> Self::I;
    /// 16-bit `a + carry`, the carry being 1 where unsigned `sum < addend`.
    fn add_carry(self, a: Self::I, sum: Self::I, addend: Self::I) -> Self::I;
    /// Per 16-bit lane, the sum of its two bytes.
    fn add_bytes(self, v: Self::I) -> Self::I;
    /// `(v & mask) ^ flip`.
    fn mask_flip(self, v: Self::I, mask: Self::I, flip: Self::I) -> Self::I;
    /// Per 32-bit lane: `acc +` the sum of the two signed 16-bit products, wrapping.
    fn dot(self, acc: Self::I, a: Self::I, b: Self::I) -> Self::I;
    /// 32-bit sum.
    fn add32(self, a: Self::I, b: Self::I) -> Self::I;
    /// Low 16 bits of `low`, then low 16 bits of `high`, per 32-bit lane.
    fn pair(self, low: Self::I, high: Self::I) -> Self::I;
    /// Sum of all 32-bit lanes.
    fn sum32(self, v: Self::I) -> i32;

    /// 16-bit byte sums to values of the codebook `mul1`: the lower and the upper lanes.
    fn mul1_values(self, sums: Self::I) -> [Self::F; 2];
    /// 16-bit lanes as fp16, added and rounded to fp16: the lower and the upper lanes.
    fn sum_halves(self, a: Self::I, b: Self::I) -> [Self::F; 2];
    /// 16-bit lanes as fp16 below 2 in magnitude, added and rounded to fp16, times 8192, as 16-bit
    /// integers. Only with [`HALF_ARITHMETIC`](Self::HALF_ARITHMETIC).
    fn sum_halves_8192(self, a: Self::I, b: Self::I) -> Self::I;

    /// That part of the lower and the upper lanes as bf16. Only where there are tiles.
    fn narrow(self, _: Part, _: [Self::F; 2]) -> Self::I {
        unreachable!("bf16 is for tiles")
    }

    /// Every lane `v`.
    fn splat(self, v: f32) -> Self::F;
    /// The two floats at `p`, repeated.
    unsafe fn splat_pair(self, p: *const f32) -> Self::F;
    /// `LANES` floats from `p`.
    unsafe fn load_f32(self, p: *const f32) -> Self::F;
    /// Eight floats from `low` and eight from `high`. Only where there are sixteen lanes.
    unsafe fn load_eights(self, _low: *const f32, _high: *const f32) -> Self::F {
        unreachable!("a register of eight lanes")
    }
    /// `LANES` floats to `p`.
    unsafe fn store_f32(self, p: *mut f32, v: Self::F);
    /// `a * b + c` with one rounding.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Sum.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// Difference.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// Product.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// Larger of `|a|` and `b`; NaN when `a` is.
    fn max_abs(self, a: Self::F, b: Self::F) -> Self::F;
    /// Largest lane.
    fn max(self, v: Self::F) -> f32;
    /// `[v[i] + v[i + h], v[i] - v[i + h]]` within the lanes, `h` a constant below `LANES`.
    fn butterfly(self, v: Self::F, h: usize) -> Self::F;
    /// 32-bit integers to f32.
    fn to_f32(self, v: Self::I) -> Self::F;
    /// f32 to the nearest 32-bit integer, ties to even.
    fn round(self, v: Self::F) -> Self::I;
}
