//! AVX-512: 32 lanes of 16 bits.

use super::isa::{Isa, Job};
use crate::simd::amx::Part;
use marlin_quant::exl3::codebook::{MUL1_OFFSET, MUL1_SLOPE};
use std::arch::asm;
use std::arch::x86_64::*;

/// AVX-512 F, BW, DQ and VL.
pub(super) const BASE: u8 = 0;
/// And VNNI and VBMI2.
pub(super) const EXTENDED: u8 = 1;
/// And BF16.
pub(super) const ROUNDED: u8 = 2;
/// And FP16.
pub(super) const HALF: u8 = 3;

/// Proof of the features of `TIER`.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const TIER: u8>(());

impl<const TIER: u8> Avx512<TIER> {
    /// A proof.
    ///
    /// # Safety
    /// The processor must have the features.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn enter_plain<J: Job>(s: Avx512<BASE>, job: J) {
    job.run(s)
}

#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi2"
)]
fn enter_extended<J: Job>(s: Avx512<EXTENDED>, job: J) {
    job.run(s)
}

#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi2,avx512bf16"
)]
fn enter_rounded<J: Job>(s: Avx512<ROUNDED>, job: J) {
    job.run(s)
}

#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi2,avx512fp16,avx512bf16"
)]
fn enter_half<J: Job>(s: Avx512<HALF>, job: J) {
    job.run(s)
}

/// 16-bit unsigned products, high halves. As assembly, because the compiler takes the intrinsic
/// apart, hoists the widened constant out of the loop and then multiplies in wider lanes.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn mul_high(a: __m512i, b: __m512i) -> __m512i {
    let high;
    // SAFETY: one instruction on registers, of a feature this function has.
    unsafe {
        asm!("vpmulhuw {}, {}, {}", lateout(zmm_reg) high, in(zmm_reg) a, in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    high
}

/// fp16 lanes to f32: the lower and the upper lanes.
///
/// # Safety
/// The processor must have AVX-512 F.
#[inline(always)]
unsafe fn widen(v: __m512i) -> [__m512; 2] {
    // SAFETY: the caller's.
    unsafe {
        let high = _mm512_extracti64x4_epi64::<1>(v);
        [_mm512_cvtph_ps(_mm512_castsi512_si256(v)), _mm512_cvtph_ps(high)]
    }
}

/// fp16 rounding of every lane.
///
/// # Safety
/// The processor must have AVX-512 F.
#[inline(always)]
unsafe fn round_to_half(v: __m512) -> __m512 {
    // SAFETY: the caller's.
    unsafe {
        _mm512_cvtph_ps(_mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v))
    }
}

impl<const TIER: u8> Isa for Avx512<TIER> {
    const LANES: usize = 16;
    const HALF_ARITHMETIC: bool = TIER >= HALF;
    type I = __m512i;
    type F = __m512;

    #[inline(always)]
    fn enter<J: Job>(self, job: J) {
        // SAFETY: `self` proves the features.
        unsafe {
            match TIER {
                BASE => enter_plain(Avx512(()), job),
                EXTENDED => enter_extended(Avx512(()), job),
                ROUNDED => enter_rounded(Avx512(()), job),
                _ => enter_half(Avx512(()), job),
            }
        }
    }

    #[inline(always)]
    fn narrow(self, part: Part, v: [__m512; 2]) -> __m512i {
        if TIER < ROUNDED {
            unreachable!("no bf16 at this level")
        }
        // SAFETY: `self` proves the features; registers only.
        unsafe {
            let narrowed = _mm512_cvtne2ps_pbh(part.of(v[1]), part.of(v[0]));
            std::mem::transmute::<__m512bh, __m512i>(narrowed)
        }
    }

    accesses! {
        fn load(p: *const u16) -> __m512i = _mm512_loadu_si512(p.cast());
        fn store(p: *mut u16, v: __m512i) -> () = _mm512_storeu_si512(p.cast(), v);
        fn load_f32(p: *const f32) -> __m512 = _mm512_loadu_ps(p);
        fn load_eights(low: *const f32, high: *const f32) -> __m512 = _mm512_castpd_ps(
            _mm512_insertf64x4::<1>(
                _mm512_castpd256_pd512(_mm256_castps_pd(_mm256_loadu_ps(low))),
                _mm256_castps_pd(_mm256_loadu_ps(high)),
            ),
        );
        fn store_f32(p: *mut f32, v: __m512) -> () = _mm512_storeu_ps(p, v);
        fn splat_pair(p: *const f32) -> __m512 =
            _mm512_castpd_ps(_mm512_set1_pd(p.cast::<f64>().read_unaligned()));
    }

    values! {
        fn splat16(v: u16) -> __m512i = _mm512_set1_epi16(v as i16);
        fn splat32(v: i32) -> __m512i = _mm512_set1_epi32(v);
        fn rotate8(v: __m512i) -> __m512i = {
            let from = _mm512_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6, 15, 8, 9, 10, 11, 12, 13, 14);
            _mm512_permutexvar_epi32(from, v)
        };
        fn funnel(high: __m512i, low: __m512i, shift: u32) -> __m512i = if TIER >= EXTENDED {
            _mm512_shrdv_epi16(low, high, _mm512_set1_epi16(shift as i16))
        } else {
            let right = _mm512_srl_epi16(low, _mm_cvtsi32_si128(shift as i32));
            let left = _mm512_sll_epi16(high, _mm_cvtsi32_si128(16 - shift as i32));
            _mm512_or_si512(left, right)
        };
        fn mul_low(a: __m512i, b: __m512i) -> __m512i = _mm512_mullo_epi16(a, b);
        fn mul_high(a: __m512i, b: __m512i) -> __m512i = mul_high(a, b);
        fn add16(a: __m512i, b: __m512i) -> __m512i = _mm512_add_epi16(a, b);
        fn add_carry(a: __m512i, sum: __m512i, addend: __m512i) -> __m512i =
            _mm512_sub_epi16(a, _mm512_movm_epi16(_mm512_cmplt_epu16_mask(sum, addend)));
        fn add_bytes(v: __m512i) -> __m512i = _mm512_maddubs_epi16(v, _mm512_set1_epi8(1));
        fn mask_flip(v: __m512i, mask: __m512i, flip: __m512i) -> __m512i =
            _mm512_ternarylogic_epi32::<0x78>(flip, v, mask);
        fn dot(acc: __m512i, a: __m512i, b: __m512i) -> __m512i = if TIER >= EXTENDED {
            _mm512_dpwssd_epi32(acc, a, b)
        } else {
            _mm512_add_epi32(acc, _mm512_madd_epi16(a, b))
        };
        fn add32(a: __m512i, b: __m512i) -> __m512i = _mm512_add_epi32(a, b);
        fn pair(low: __m512i, high: __m512i) -> __m512i =
            _mm512_mask_blend_epi16(0xaaaa_aaaa, low, _mm512_slli_epi32::<16>(high));
        fn sum32(v: __m512i) -> i32 = _mm512_reduce_add_epi32(v);

        fn mul1_values(sums: __m512i) -> [__m512; 2] = if TIER >= HALF {
            // The definition: fp16(1024 + t) * 0x1eee + 0xc931, rounded once.
            let t = _mm512_cvtepu16_ph(_mm512_add_epi16(sums, _mm512_set1_epi16(1024)));
            let slope = _mm512_castsi512_ph(_mm512_set1_epi16(0x1eee));
            let offset = _mm512_castsi512_ph(_mm512_set1_epi16(0xc931_u16 as i16));
            widen(_mm512_castph_si512(_mm512_fmadd_ph(t, slope, offset)))
        } else {
            let (slope, offset) = (_mm512_set1_ps(MUL1_SLOPE), _mm512_set1_ps(MUL1_OFFSET));
            let low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(sums));
            let high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<1>(sums));
            let low = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low), slope, offset);
            let high = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), slope, offset);
            [round_to_half(low), round_to_half(high)]
        };
        fn sum_halves(a: __m512i, b: __m512i) -> [__m512; 2] = if TIER >= HALF {
            let sum = _mm512_add_ph(_mm512_castsi512_ph(a), _mm512_castsi512_ph(b));
            widen(_mm512_castph_si512(sum))
        } else {
            let ([a0, a1], [b0, b1]) = (widen(a), widen(b));
            [round_to_half(_mm512_add_ps(a0, b0)), round_to_half(_mm512_add_ps(a1, b1))]
        };
        fn sum_halves_8192(a: __m512i, b: __m512i) -> __m512i = if TIER >= HALF {
            let sum = _mm512_add_ph(_mm512_castsi512_ph(a), _mm512_castsi512_ph(b));
            let scale = _mm512_castsi512_ph(_mm512_set1_epi16(0x7000));
            _mm512_cvtph_epi16(_mm512_mul_ph(sum, scale))
        } else {
            unreachable!("no fp16 arithmetic at this level")
        };

        fn splat(v: f32) -> __m512 = _mm512_set1_ps(v);
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        fn add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        fn sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        fn mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        fn max_abs(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(b, _mm512_abs_ps(a));
        fn max(v: __m512) -> f32 = _mm512_reduce_max_ps(v);
        fn butterfly(v: __m512, h: usize) -> __m512 = {
            let (swapped, minus): (_, __mmask16) = match h {
                1 => (_mm512_permute_ps::<0b10_11_00_01>(v), 0xaaaa),
                2 => (_mm512_permute_ps::<0b01_00_11_10>(v), 0xcccc),
                4 => (_mm512_shuffle_f32x4::<0b10_11_00_01>(v, v), 0xf0f0),
                _ => (_mm512_shuffle_f32x4::<0b01_00_11_10>(v, v), 0xff00),
            };
            _mm512_mask_sub_ps(_mm512_add_ps(v, swapped), minus, swapped, v)
        };
        fn to_f32(v: __m512i) -> __m512 = _mm512_cvtepi32_ps(v);
        fn round(v: __m512) -> __m512i = _mm512_cvtps_epi32(v);
    }
}
