//! Registers of f32 for the operators between matrix products, and the choice of level.
//!
//! An operator is a [`Work`]: its `vector` body is generic over [`Lanes`], `#[inline(always)]`,
//! and inlined by [`run`] into one function per level compiled for that level's instructions;
//! its `scalar` body is the reference.
// Other processors run the scalar bodies until someone writes their registers.
#![cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code))]

#[cfg(target_arch = "aarch64")]
mod neon;

use crate::Level;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// An operator with its arguments.
pub(crate) trait Work {
    /// Without intrinsics.
    fn scalar(self);

    /// With the registers of `L`; `#[inline(always)]`, as must be all it calls with `L`.
    ///
    /// # Safety
    /// The processor has the instructions of `L`.
    unsafe fn vector<L: Lanes>(self);
}

/// Runs `work` at `level`, which [`CpuBackend::new`](crate::CpuBackend::new) found supported.
#[inline]
pub(crate) fn run(level: Level, work: impl Work) {
    match level {
        Level::Scalar => work.scalar(),
        // SAFETY: the backend refuses levels that this machine does not support.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { enter_avx2(work) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        _ => unsafe { enter_avx512(work) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        _ => unsafe { neon::enter(work) },
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        _ => work.scalar(),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn enter_avx2<W: Work>(work: W) {
    // SAFETY: the caller's.
    unsafe { work.vector::<Avx2>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn enter_avx512<W: Work>(work: W) {
    // SAFETY: the caller's.
    unsafe { work.vector::<Avx512>() }
}

/// One register of `N` f32 lanes. Every method needs the level's instructions; those that take a
/// pointer access the lanes they name.
#[allow(clippy::missing_safety_doc)]
pub(crate) trait Lanes {
    /// Lanes.
    const N: usize;
    /// The register.
    type V: Copy;

    unsafe fn splat(v: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// The first `n < N` lanes, zeros behind them.
    unsafe fn load_first(p: *const f32, n: usize) -> Self::V;
    /// Writes the first `n < N` lanes.
    unsafe fn store_first(p: *mut f32, v: Self::V, n: usize);
    unsafe fn load_f16(p: *const u16) -> Self::V;
    unsafe fn load_bf16(p: *const u16) -> Self::V;
    unsafe fn load_i8(p: *const i8) -> Self::V;
    /// Low and high halves of `N` bytes.
    unsafe fn load_u4(p: *const u8) -> [Self::V; 2];
    /// Rounds to nearest, ties to even.
    unsafe fn store_f16(p: *mut u16, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// To the nearest integer.
    unsafe fn round(v: Self::V) -> Self::V;
    /// `v * 2^n` for integral `-126 <= n <= 127`.
    unsafe fn scale(v: Self::V, n: Self::V) -> Self::V;
    /// Sum of the lanes.
    unsafe fn sum(v: Self::V) -> f32;
    /// Sums of the lanes of four registers.
    unsafe fn sum4(v: [Self::V; 4]) -> [f32; 4];
    /// Largest lane.
    unsafe fn largest(v: Self::V) -> f32;
}

/// Eight lanes.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Avx2;

/// Sixteen lanes.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Avx512;

/// Methods of one expression.
#[cfg(target_arch = "x86_64")]
macro_rules! lanes {
    ($($name:ident($($arg:ident: $ty:ty),*) $(-> $out:ty)? = $body:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $ty),*) $(-> $out)? {
            // SAFETY: the caller has the instructions and vouches for the pointer.
            unsafe { $body }
        }
    )*};
}

/// Ones for the lanes to touch, read from `8 - n`.
#[cfg(target_arch = "x86_64")]
static FIRST: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

#[cfg(target_arch = "x86_64")]
impl Lanes for Avx2 {
    const N: usize = 8;
    type V = __m256;

    lanes! {
        splat(v: f32) -> __m256 = _mm256_set1_ps(v);
        load(p: *const f32) -> __m256 = _mm256_loadu_ps(p);
        store(p: *mut f32, v: __m256) = _mm256_storeu_ps(p, v);
        load_first(p: *const f32, n: usize) -> __m256 =
            _mm256_maskload_ps(p, _mm256_loadu_si256(FIRST.as_ptr().add(8 - n).cast()));
        store_first(p: *mut f32, v: __m256, n: usize) =
            _mm256_maskstore_ps(p, _mm256_loadu_si256(FIRST.as_ptr().add(8 - n).cast()), v);
        load_f16(p: *const u16) -> __m256 = _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
        load_bf16(p: *const u16) -> __m256 = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(
            _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))
        ));
        load_i8(p: *const i8) -> __m256 =
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())));
        load_u4(p: *const u8) -> [__m256; 2] = {
            let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
            let low = _mm256_and_si256(bytes, _mm256_set1_epi32(15));
            [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(bytes))]
        };
        store_f16(p: *mut u16, v: __m256) =
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v));
        add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
        mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
        min(a: __m256, b: __m256) -> __m256 = _mm256_min_ps(a, b);
        max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
        fma(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
        round(v: __m256) -> __m256 =
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
        scale(v: __m256, n: __m256) -> __m256 = {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
        };
        sum(v: __m256) -> f32 = {
            let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        };
        sum4(v: [__m256; 4]) -> [f32; 4] = {
            let [a, b, c, d] = v;
            let sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
            let sums = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps::<1>(sums));
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), sums);
            out
        };
        largest(v: __m256) -> f32 = {
            let four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        };
    }
}

/// Sum of the two halves.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn halves(v: __m512) -> __m256 {
    // SAFETY: the caller has the instructions.
    unsafe { _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)) }
}

#[cfg(target_arch = "x86_64")]
impl Lanes for Avx512 {
    const N: usize = 16;
    type V = __m512;

    lanes! {
        splat(v: f32) -> __m512 = _mm512_set1_ps(v);
        load(p: *const f32) -> __m512 = _mm512_loadu_ps(p);
        store(p: *mut f32, v: __m512) = _mm512_storeu_ps(p, v);
        load_first(p: *const f32, n: usize) -> __m512 = _mm512_maskz_loadu_ps((1 << n) - 1, p);
        store_first(p: *mut f32, v: __m512, n: usize) =
            _mm512_mask_storeu_ps(p, (1 << n) - 1, v);
        load_f16(p: *const u16) -> __m512 = _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()));
        load_bf16(p: *const u16) -> __m512 = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))
        ));
        load_i8(p: *const i8) -> __m512 =
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())));
        load_u4(p: *const u8) -> [__m512; 2] = {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            let low = _mm512_and_si512(bytes, _mm512_set1_epi32(15));
            [_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(bytes))]
        };
        store_f16(p: *mut u16, v: __m512) =
            _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v));
        add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
        min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
        max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
        fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        round(v: __m512) -> __m512 =
            _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
        scale(v: __m512, n: __m512) -> __m512 = _mm512_scalef_ps(v, n);
        sum(v: __m512) -> f32 = _mm512_reduce_add_ps(v);
        sum4(v: [__m512; 4]) -> [f32; 4] =
            Avx2::sum4([halves(v[0]), halves(v[1]), halves(v[2]), halves(v[3])]);
        largest(v: __m512) -> f32 = _mm512_reduce_max_ps(v);
    }
}

/// `e^x`, relative error below 3e-7; the argument is held within ±87, so that nothing overflows
/// and the least result is 1.6e-38. Reduction to `2^n e^r` and Cephes' polynomial.
///
/// # Safety
/// The processor has the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn exp<L: Lanes>(x: L::V) -> L::V {
    // SAFETY: the caller's.
    unsafe {
        // The second operand is returned when one is not a number: such inputs stay visible.
        let x = L::min(L::splat(87.0), L::max(L::splat(-87.0), x));
        let n = L::round(L::mul(x, L::splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts, the first with few enough bits for an exact product.
        let r = L::fma(n, L::splat(-0.693_359_4), x);
        let r = L::fma(n, L::splat(2.121_944_4e-4), r);
        let mut p = L::splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = L::fma(p, r, L::splat(c));
        }
        let p = L::fma(L::mul(r, r), p, L::add(r, L::splat(1.0)));
        L::scale(p, n)
    }
}

/// A function of two registers. A trait because closures cannot be made to inline, and a call
/// that is not inlined passes registers through memory.
pub(crate) trait Binary: Copy {
    /// The function; `#[inline(always)]`.
    ///
    /// # Safety
    /// The processor has the instructions of `L`.
    unsafe fn apply<L: Lanes>(self, x: L::V, y: L::V) -> L::V;
}

/// `x = f(x, y)` element by element.
///
/// # Safety
/// The processor has the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn map<L: Lanes>(x: &mut [f32], y: &[f32], f: impl Binary) {
    assert_eq!(x.len(), y.len(), "operands of one shape");
    let whole = x.len() / L::N * L::N;
    let rest = x.len() - whole;
    // SAFETY: whole registers lie inside both slices of equal length; the rest is masked.
    unsafe {
        for i in (0..whole).step_by(L::N) {
            let v = f.apply::<L>(L::load(x.as_ptr().add(i)), L::load(y.as_ptr().add(i)));
            L::store(x.as_mut_ptr().add(i), v);
        }
        if rest > 0 {
            let a = L::load_first(x.as_ptr().add(whole), rest);
            let v = f.apply::<L>(a, L::load_first(y.as_ptr().add(whole), rest));
            L::store_first(x.as_mut_ptr().add(whole), v, rest);
        }
    }
}
