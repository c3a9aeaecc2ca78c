//! The registers and instructions the kernels are written in, one implementation per level.
//!
//! A kernel is a [`Job`] whose body is generic over [`Isa`] and `#[inline(always)]`;
//! [`Isa::enter`] inlines it into one function compiled for the level's features. A value of an
//! `Isa` type proves that the processor has those features, so only memory accesses are unsafe.

use super::integer::Group;
use super::points::load_entries;
use super::quantized::Record;

#[cfg(target_arch = "x86_64")]
use super::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::avx512::Avx512;
#[cfg(target_arch = "x86_64")]
use crate::Level;

#[cfg(target_arch = "aarch64")]
pub(crate) use super::neon::{FloatIsa, IntegerIsa};

/// What a float kernel runs on. A value proves that the processor supports it.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) enum FloatIsa {
    Avx2(Avx2),
    Avx512(Avx512<false>),
}

#[cfg(target_arch = "x86_64")]
impl FloatIsa {
    /// The one for `level`; `None` for the scalar level and where the processor lacks it.
    pub(crate) fn new(level: Level) -> Option<Self> {
        if !level.is_supported() {
            return None;
        }
        // SAFETY: the level is supported, and levels include the ones before.
        unsafe {
            match level {
                Level::Scalar | Level::Neon | Level::NeonDotprod => None,
                Level::Avx2 => Some(Self::Avx2(Avx2::new())),
                _ => Some(Self::Avx512(Avx512::new())),
            }
        }
    }

    /// Level it is named after.
    pub(crate) fn level(level: Level) -> Level {
        level.float()
    }

    /// Runs `job`.
    pub(crate) fn enter<J: Job>(self, job: J) -> J::Output {
        match self {
            Self::Avx2(s) => s.enter(job),
            Self::Avx512(s) => s.enter(job),
        }
    }

    /// Lanes of a register.
    pub(crate) fn lanes(self) -> usize {
        match self {
            Self::Avx2(_) => Avx2::LANES,
            Self::Avx512(_) => Avx512::<false>::LANES,
        }
    }
}

/// What an integer kernel runs on. A value proves that the processor supports it.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) enum IntegerIsa {
    Avx2(Avx2),
    Vnni(Avx512<true>),
}

#[cfg(target_arch = "x86_64")]
impl IntegerIsa {
    /// The one for `level`; `None` for the scalar level and where the processor lacks it.
    pub(crate) fn new(level: Level) -> Option<Self> {
        if !level.is_supported() {
            return None;
        }
        // SAFETY: the level is supported, and levels include the ones before.
        unsafe {
            match level {
                Level::Scalar | Level::Neon | Level::NeonDotprod => None,
                Level::Avx2 | Level::Avx512 => Some(Self::Avx2(Avx2::new())),
                Level::Avx512Vnni | Level::Avx512Bf16 | Level::Amx => {
                    Some(Self::Vnni(Avx512::new()))
                }
            }
        }
    }

    /// Level it is named after: AVX-512 without VNNI multiplies bytes no faster than AVX2.
    pub(crate) fn level(level: Level) -> Level {
        if level == Level::Avx512 { Level::Avx2 } else { level.without_tiles() }
    }

    /// Runs `job`.
    pub(crate) fn enter<J: Job>(self, job: J) -> J::Output {
        match self {
            Self::Avx2(s) => s.enter(job),
            Self::Vnni(s) => s.enter(job),
        }
    }

    /// Whether [`Isa::dot`] multiplies 8-bit quants as signed numbers.
    pub(crate) fn signed_bytes(self) -> bool {
        match self {
            Self::Avx2(_) => Avx2::SIGNED_BYTES,
            Self::Vnni(_) => Avx512::<true>::SIGNED_BYTES,
        }
    }
}

/// A piece of work compiled once per level.
pub(crate) trait Job {
    /// Result.
    type Output;
    /// The body; must be `#[inline(always)]`, as must everything it calls with `S`.
    fn run<S: Isa>(self, s: S) -> Self::Output;
}

/// One instruction set. `I` and `F` are one register of integers and of f32.
#[allow(clippy::missing_safety_doc)] // every unsafe method reads or writes the bytes it names
pub(crate) trait Isa: Copy + Send + Sync + 'static {
    /// f32 or i32 lanes of a register; divides 16.
    const LANES: usize;
    /// Rows multiplied together: their sums in one register each, and eight columns of quants, fit the registers. A power
    /// of two, at most 8.
    const ROWS: usize;
    /// The same with sums of all sixteen outputs of a band.
    const WHOLE_ROWS: usize;
    /// Whether [`dot`](Self::dot) multiplies 8-bit quants as signed numbers (stored byte - 128).
    const SIGNED_BYTES: bool;
    /// Whether two registers of columns are multiplied with every activation that is loaded.
    const PAIRS: bool = true;
    /// Integer register.
    type I: Copy;
    /// Float register.
    type F: Copy;

    /// Runs `job` compiled for this level.
    fn enter<J: Job>(self, job: J) -> J::Output;

    /// `LANES * 4` bytes from `p`, any alignment.
    unsafe fn load(self, p: *const u8) -> Self::I;
    /// `LANES * 4` bytes to `p`.
    unsafe fn store(self, p: *mut u8, v: Self::I);
    /// Every byte `v`.
    fn splat_u8(self, v: u8) -> Self::I;
    /// Every 32-bit lane `v`.
    fn splat_i32(self, v: i32) -> Self::I;
    /// Bitwise and.
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    /// Bitwise or.
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    /// 16-bit lanes shifted right by `n`, left when negative. `n` must be a constant after inlining.
    fn shift16(self, v: Self::I, n: i32) -> Self::I;
    /// `table[v]` for every byte of `v` (< 16).
    fn lookup(self, table: &[u8; 16], v: Self::I) -> Self::I;
    /// Every 32-bit lane's bytes in the order `bytes`.
    fn shuffle(self, v: Self::I, bytes: &[u8; 4]) -> Self::I;
    /// Entries of `table`, whose length is a power of two and at least 256, under the indices whose lowest eight bits are the bytes of
    /// `low` and the others, of which there may be none more than the table has, those of `high`: of the even bytes, then of the odd ones.
    #[inline(always)]
    fn points(self, table: &[u16], low: Self::I, high: Self::I) -> [Self::I; 2] {
        let (mut bytes, mut words) = ([[0u8; 64]; 2], [[0u16; 32]; 2]);
        // SAFETY: a register has at most 64 bytes.
        unsafe {
            self.store(bytes[0].as_mut_ptr(), low);
            self.store(bytes[1].as_mut_ptr(), high);
        }
        load_entries(table, &bytes, 4 * Self::LANES, &mut words);
        // SAFETY: as above.
        words.map(|words| unsafe { self.load(words.as_ptr().cast()) })
    }
    /// Per 32-bit lane: `acc + Σ_j Σ_b weights[j].byte(b) * activations[4 j + b]`, where weight
    /// bytes are unsigned and below `2^bits` (see [`SIGNED_BYTES`](Self::SIGNED_BYTES) for 8) and
    /// activations are signed, within ±127: `4 * weights.len()` bytes at `activations`.
    unsafe fn dot(
        self,
        bits: u32,
        acc: Self::I,
        weights: &[Self::I],
        activations: *const i8,
    ) -> Self::I;
    /// Adds the products of a group with `R` rows to their `sums`.
    #[inline(always)]
    unsafe fn add_products<const SUBS: usize, const R: usize>(
        self,
        weights: &Group<SUBS>,
        x: &[Record<SUBS>; R],
        sums: &mut [[Self::F; 2]; R],
    ) {
        // SAFETY: the caller's.
        unsafe { weights.add_products(self, x, sums) }
    }
    /// 32-bit integers to f32.
    fn to_f32(self, v: Self::I) -> Self::F;
    /// Byte `b` of every 32-bit lane, unsigned, to f32.
    fn byte_to_f32(self, v: Self::I, b: i32) -> Self::F;

    /// Zeros.
    fn zero(self) -> Self::F;
    /// Every lane `v`.
    fn splat(self, v: f32) -> Self::F;
    /// `a * b + c` with one rounding.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Sum.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// Difference.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// Product.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// Larger of `|a|` and `b`.
    fn max_abs(self, a: Self::F, b: Self::F) -> Self::F;
    /// `LANES` floats from `p`.
    unsafe fn load_f32(self, p: *const f32) -> Self::F;
    /// `LANES` floats to `p`.
    unsafe fn store_f32(self, p: *mut f32, v: Self::F);
    /// `LANES` half-precision numbers from `p`.
    unsafe fn load_f16(self, p: *const u8) -> Self::F;
    /// `LANES` bfloat16 numbers from `p`.
    unsafe fn load_bf16(self, p: *const u8) -> Self::F;
    /// `LANES` numbers of type E4M3 from `p`, each divided by 256.
    unsafe fn load_e4m3(self, p: *const u8) -> Self::F;
    /// The same of bytes without a sign, seven ones being the number 480.
    unsafe fn load_ue4m3(self, p: *const u8) -> Self::F;
    /// `LANES` unsigned bytes from `p`.
    unsafe fn load_u8(self, p: *const u8) -> Self::F;
    /// `LANES` words from `p` as the f32 in their upper 24 bits and the byte below.
    unsafe fn load_scale_zero(self, p: *const u8) -> (Self::F, Self::F);
    /// `LANES` signed bytes from `p`.
    unsafe fn load_i8(self, p: *const u8) -> Self::F;
    /// The low and the high nibbles of `LANES` bytes from `p`.
    unsafe fn load_nibbles(self, p: *const u8) -> (Self::F, Self::F);
    /// `LANES` powers of two `2^(byte - 128)` from `p`, the two smallest being subnormal.
    unsafe fn load_e8m0(self, p: *const u8) -> Self::F;
    /// Lanes rounded to the nearest integer (ties to even) and written as `LANES` signed bytes;
    /// returns the integers. Lanes must be within ±127.
    unsafe fn store_i8(self, p: *mut i8, v: Self::F) -> Self::I;
    /// 32-bit sum.
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I;
    /// Sum of all 32-bit lanes.
    fn sum_i32(self, v: Self::I) -> i32;
    /// Sum of all lanes.
    fn sum(self, v: Self::F) -> f32;
    /// Largest lane.
    fn max(self, v: Self::F) -> f32;
    /// Transposes `LANES` rows of `LANES` floats in place.
    fn transpose(self, rows: &mut [Self::F]);
}
