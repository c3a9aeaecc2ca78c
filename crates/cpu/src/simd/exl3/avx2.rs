//! AVX2, FMA and F16C: 16 lanes of 16 bits.

use super::isa::{Isa, Job};
use marlin_quant::exl3::codebook::{MUL1_OFFSET, MUL1_SLOPE};
use std::arch::asm;
use std::arch::x86_64::*;

/// Proof of AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    /// A proof.
    ///
    /// # Safety
    /// The processor must have the features.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn enter<J: Job>(s: Avx2, job: J) {
    job.run(s)
}

/// 16-bit unsigned products, high halves. As assembly, because the compiler takes the intrinsic
/// apart, hoists the widened constant out of the loop and then multiplies in wider lanes.
#[target_feature(enable = "avx2")]
#[inline]
fn mul_high(a: __m256i, b: __m256i) -> __m256i {
    let high;
    // SAFETY: one instruction on registers, of a feature this function has.
    unsafe {
        asm!("vpmulhuw {}, {}, {}", lateout(ymm_reg) high, in(ymm_reg) a, in(ymm_reg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    high
}

/// fp16 rounding of every lane.
///
/// # Safety
/// The processor must have F16C.
#[inline(always)]
unsafe fn round_to_half(v: __m256) -> __m256 {
    // SAFETY: the caller's.
    unsafe { _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
}

impl Isa for Avx2 {
    const LANES: usize = 8;
    const HALF_ARITHMETIC: bool = false;
    type I = __m256i;
    type F = __m256;

    #[inline(always)]
    fn enter<J: Job>(self, job: J) {
        // SAFETY: `self` proves the features.
        unsafe { enter(self, job) }
    }

    fn sum_halves_8192(self, _: __m256i, _: __m256i) -> __m256i {
        unreachable!("no fp16 arithmetic at this level")
    }

    accesses! {
        fn load(p: *const u16) -> __m256i = _mm256_loadu_si256(p.cast());
        fn store(p: *mut u16, v: __m256i) -> () = _mm256_storeu_si256(p.cast(), v);
        fn load_f32(p: *const f32) -> __m256 = _mm256_loadu_ps(p);
        fn store_f32(p: *mut f32, v: __m256) -> () = _mm256_storeu_ps(p, v);
        fn splat_pair(p: *const f32) -> __m256 =
            _mm256_castpd_ps(_mm256_set1_pd(p.cast::<f64>().read_unaligned()));
    }

    values! {
        fn splat16(v: u16) -> __m256i = _mm256_set1_epi16(v as i16);
        fn splat32(v: i32) -> __m256i = _mm256_set1_epi32(v);
        fn rotate8(v: __m256i) -> __m256i =
            _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6));
        fn funnel(high: __m256i, low: __m256i, shift: u32) -> __m256i = {
            let right = _mm256_srl_epi16(low, _mm_cvtsi32_si128(shift as i32));
            let left = _mm256_sll_epi16(high, _mm_cvtsi32_si128(16 - shift as i32));
            _mm256_or_si256(left, right)
        };
        fn mul_low(a: __m256i, b: __m256i) -> __m256i = _mm256_mullo_epi16(a, b);
        fn mul_high(a: __m256i, b: __m256i) -> __m256i = mul_high(a, b);
        fn add16(a: __m256i, b: __m256i) -> __m256i = _mm256_add_epi16(a, b);
        fn add_carry(a: __m256i, sum: __m256i, addend: __m256i) -> __m256i = {
            // All ones where there is no carry.
            let none = _mm256_cmpeq_epi16(_mm256_max_epu16(sum, addend), sum);
            _mm256_add_epi16(_mm256_add_epi16(a, _mm256_set1_epi16(1)), none)
        };
        fn add_bytes(v: __m256i) -> __m256i = _mm256_maddubs_epi16(v, _mm256_set1_epi8(1));
        fn mask_flip(v: __m256i, mask: __m256i, flip: __m256i) -> __m256i =
            _mm256_xor_si256(_mm256_and_si256(v, mask), flip);
        fn dot(acc: __m256i, a: __m256i, b: __m256i) -> __m256i =
            _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
        fn add32(a: __m256i, b: __m256i) -> __m256i = _mm256_add_epi32(a, b);
        fn pair(low: __m256i, high: __m256i) -> __m256i =
            _mm256_blend_epi16::<0b1010_1010>(low, _mm256_slli_epi32::<16>(high));
        fn sum32(v: __m256i) -> i32 = {
            let v = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
            let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b01_00_11_10>(v));
            _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32::<0b10_11_00_01>(v)))
        };

        fn mul1_values(sums: __m256i) -> [__m256; 2] = {
            let (slope, offset) = (_mm256_set1_ps(MUL1_SLOPE), _mm256_set1_ps(MUL1_OFFSET));
            let low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(sums));
            let high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256::<1>(sums));
            let low = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low), slope, offset);
            let high = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), slope, offset);
            [round_to_half(low), round_to_half(high)]
        };
        fn sum_halves(a: __m256i, b: __m256i) -> [__m256; 2] = {
            let (a0, a1) = (_mm256_castsi256_si128(a), _mm256_extracti128_si256::<1>(a));
            let (b0, b1) = (_mm256_castsi256_si128(b), _mm256_extracti128_si256::<1>(b));
            let low = _mm256_add_ps(_mm256_cvtph_ps(a0), _mm256_cvtph_ps(b0));
            let high = _mm256_add_ps(_mm256_cvtph_ps(a1), _mm256_cvtph_ps(b1));
            [round_to_half(low), round_to_half(high)]
        };

        fn splat(v: f32) -> __m256 = _mm256_set1_ps(v);
        fn fma(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
        fn add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        fn sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
        fn mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        fn max_abs(a: __m256, b: __m256) -> __m256 =
            _mm256_max_ps(b, _mm256_andnot_ps(_mm256_set1_ps(-0.0), a));
        fn max(v: __m256) -> f32 = {
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        };
        fn butterfly(v: __m256, h: usize) -> __m256 = {
            let (sum, swapped);
            match h {
                1 => {
                    swapped = _mm256_permute_ps::<0b10_11_00_01>(v);
                    sum = _mm256_add_ps(v, swapped);
                    _mm256_blend_ps::<0xaa>(sum, _mm256_sub_ps(swapped, v))
                }
                2 => {
                    swapped = _mm256_permute_ps::<0b01_00_11_10>(v);
                    sum = _mm256_add_ps(v, swapped);
                    _mm256_blend_ps::<0xcc>(sum, _mm256_sub_ps(swapped, v))
                }
                _ => {
                    swapped = _mm256_permute2f128_ps::<1>(v, v);
                    sum = _mm256_add_ps(v, swapped);
                    _mm256_blend_ps::<0xf0>(sum, _mm256_sub_ps(swapped, v))
                }
            }
        };
        fn to_f32(v: __m256i) -> __m256 = _mm256_cvtepi32_ps(v);
        fn round(v: __m256) -> __m256i = _mm256_cvtps_epi32(v);
    }
}
