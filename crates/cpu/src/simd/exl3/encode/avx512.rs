//! AVX-512: 32 costs in a register.

use super::isa::{Isa, Job};
use super::square::MAX_FINE;
use std::arch::x86_64::*;

/// Proof of AVX-512 F, BW, DQ and VL, and of FP16 where `HALF`.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const HALF: bool>(());

impl<const HALF: bool> Avx512<HALF> {
    /// A proof.
    ///
    /// # Safety
    /// The processor must have the features.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn enter<S: Isa, J: Job>(s: S, job: J) -> J::Output {
    job.run(s)
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512fp16")]
fn enter_half<S: Isa, J: Job>(s: S, job: J) -> J::Output {
    job.run(s)
}

#[inline]
#[target_feature(enable = "avx512fp16")]
fn half_sub(a: __m512i, b: __m512i) -> __m512i {
    _mm512_castph_si512(_mm512_sub_ph(_mm512_castsi512_ph(a), _mm512_castsi512_ph(b)))
}

#[inline]
#[target_feature(enable = "avx512fp16")]
fn half_add_square(sum: __m512i, a: __m512i) -> __m512i {
    let a = _mm512_castsi512_ph(a);
    _mm512_castph_si512(_mm512_fmadd_ph(a, a, _mm512_castsi512_ph(sum)))
}

/// For every `E`, the lane that each lane of [`Isa::interleave`] comes from.
const INTERLEAVED: [[u16; 32]; 5] = {
    let mut from = [[0; 32]; 5];
    let mut e = 0;
    while e < 5 {
        let mut lane = 0;
        while lane < 32 {
            from[e][lane] = ((lane % (1 << e)) * (32 >> e) + (lane >> e)) as u16;
            lane += 1;
        }
        e += 1;
    }
    from
};

impl<const HALF: bool> Isa for Avx512<HALF> {
    const LANES: usize = 32;
    const HALF: bool = HALF;
    type V = __m512i;

    #[inline(always)]
    fn enter<J: Job>(self, job: J) -> J::Output {
        // SAFETY: `self` proves the features.
        unsafe { if HALF { enter_half(self, job) } else { enter(self, job) } }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const u16) -> __m512i {
        // SAFETY: the caller vouches for the pointer.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut u16, v: __m512i) {
        // SAFETY: the caller vouches for the pointer.
        unsafe { _mm512_storeu_si512(p.cast(), v) }
    }

    #[inline(always)]
    unsafe fn repeat<const E: usize>(self, p: *const u16) -> __m512i {
        // SAFETY: the caller vouches for `32 >> E` numbers, at least one.
        unsafe {
            match E {
                1 => _mm512_broadcast_i64x4(_mm256_loadu_si256(p.cast())),
                2 => _mm512_broadcast_i32x4(_mm_loadu_si128(p.cast())),
                3 => _mm512_set1_epi64(p.cast::<i64>().read_unaligned()),
                4 => _mm512_set1_epi32(p.cast::<i32>().read_unaligned()),
                _ => _mm512_set1_epi16(p.cast::<i16>().read()),
            }
        }
    }

    #[inline(always)]
    fn interleave<const E: usize>(self, v: __m512i) -> __m512i {
        if E > 4 {
            return v;
        }
        // SAFETY: `self` proves the features; a row of the table is one register.
        unsafe {
            let from = _mm512_loadu_si512(INTERLEAVED[E].as_ptr().cast());
            _mm512_permutexvar_epi16(from, v)
        }
    }

    values! {
        fn splat(v: u16) -> __m512i = _mm512_set1_epi16(v as i16);
        fn sub(a: __m512i, b: __m512i) -> __m512i = _mm512_sub_epi16(a, b);
        fn add(a: __m512i, b: __m512i) -> __m512i = _mm512_add_epi16(a, b);
        fn square_high(a: __m512i) -> __m512i = _mm512_mulhrs_epi16(a, a);
        fn square_fine(a: __m512i) -> __m512i = {
            let most = _mm512_set1_epi16(MAX_FINE as i16);
            let a = _mm512_min_epu16(_mm512_abs_epi16(a), most);
            _mm512_mullo_epi16(a, a)
        };
        fn half_sub(a: __m512i, b: __m512i) -> __m512i = {
            assert!(HALF, "no fp16 arithmetic");
            half_sub(a, b)
        };
        fn half_add_square(sum: __m512i, a: __m512i) -> __m512i = {
            assert!(HALF, "no fp16 arithmetic");
            half_add_square(sum, a)
        };
        fn min(a: __m512i, b: __m512i) -> __m512i = _mm512_min_epu16(a, b);
        fn min_lane(v: __m512i) -> u16 = {
            let v = _mm256_min_epu16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64::<1>(v));
            let v = _mm_min_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
            _mm_cvtsi128_si32(_mm_minpos_epu16(v)) as u16
        };
    }
}
