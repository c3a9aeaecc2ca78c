//! The instructions the encoder is written in, one implementation per level: registers of unsigned
//! 16-bit costs. A value of an `Isa` type proves that the processor has the features.

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
    /// Signed difference, saturating.
    fn sub_signed(self, a: Self::V, b: Self::V) -> Self::V;
    /// `(a² + 2¹⁴) / 2¹⁵` of signed lanes.
    fn square_high(self, a: Self::V) -> Self::V;
    /// `min(|a|, 255)²` of signed lanes.
    fn square_low(self, a: Self::V) -> Self::V;
    /// Unsigned sum, saturating.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// Difference of unsigned lanes, none of which is negative.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// Smaller of unsigned lanes.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// Smallest lane.
    fn min_lane(self, v: Self::V) -> u16;
}
