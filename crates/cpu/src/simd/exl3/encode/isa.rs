//! The instructions the encoder is written in, one implementation per level: registers of 16-bit
//! costs, unsigned integers or fp16. A value of an `Isa` type proves that the processor has the features.

/// A piece of work compiled once per level.
pub(super) trait Job {
    /// Result.
    type Output;
    /// The body; must be `#[inline(always)]`, as must everything it calls with `S`.
    fn run<S: Isa>(self, s: S) -> Self::Output;
}

/// One instruction set, `V` being a register.
#[allow(clippy::missing_safety_doc)] // every unsafe method reads or writes the lanes it names
pub(super) trait Isa: Copy + Send + Sync + 'static {
    /// Lanes of a register, a power of two.
    const LANES: usize;
    /// Whether there is fp16 arithmetic.
    const HALF: bool;
    /// Register.
    type V: Copy;

    /// Runs `job` compiled for this level.
    fn enter<J: Job>(self, job: J) -> J::Output;

    /// A register from `p`.
    unsafe fn load(self, p: *const u16) -> Self::V;
    /// A register to `p`.
    unsafe fn store(self, p: *mut u16, v: Self::V);
    /// The `LANES >> E` numbers at `p` (one, when that is none), `2^E` times over.
    unsafe fn repeat<const E: usize>(self, p: *const u16) -> Self::V;
    /// Lane `l·(LANES >> E) + h` becomes lane `h·2^E + l`. Nothing happens when `LANES >> E < 2`.
    fn interleave<const E: usize>(self, v: Self::V) -> Self::V;
    /// Every lane `v`.
    fn splat(self, v: u16) -> Self::V;
    /// Difference, modulo 2¹⁶.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// Sum, modulo 2¹⁶.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `(a² + 2¹⁴) / 2¹⁵` of signed lanes above -2¹⁵.
    fn square_high(self, a: Self::V) -> Self::V;
    /// `min(|a|, 181)²` of signed lanes.
    fn square_fine(self, a: Self::V) -> Self::V;
    /// Difference of fp16 lanes. Only with [`HALF`](Self::HALF).
    fn half_sub(self, _a: Self::V, _b: Self::V) -> Self::V {
        unreachable!("no fp16 arithmetic")
    }
    /// `sum + a²` of fp16 lanes, rounded once. Only with [`HALF`](Self::HALF).
    fn half_add_square(self, _sum: Self::V, _a: Self::V) -> Self::V {
        unreachable!("no fp16 arithmetic")
    }
    /// Smaller of unsigned lanes.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// Smallest lane.
    fn min_lane(self, v: Self::V) -> u16;
}
