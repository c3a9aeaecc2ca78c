//! AVX-512: 32 costs in a register.

use super::isa::{Isa, Job};
use std::arch::x86_64::*;

/// Proof of AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

impl Avx512 {
    /// A proof.
    ///
    /// # Safety
    /// The processor must have the features.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn enter<J: Job>(s: Avx512, job: J) -> J::Output {
    job.run(s)
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

impl Isa for Avx512 {
    const LANES: usize = 32;
    type V = __m512i;

    #[inline(always)]
    fn enter<J: Job>(self, job: J) -> J::Output {
        // SAFETY: `self` proves the features.
        unsafe { enter(self, job) }
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
        fn sub_signed(a: __m512i, b: __m512i) -> __m512i = _mm512_subs_epi16(a, b);
        fn square_high(a: __m512i) -> __m512i = _mm512_mulhrs_epi16(a, a);
        fn square_low(a: __m512i) -> __m512i = {
            let a = _mm512_min_epu16(_mm512_abs_epi16(a), _mm512_set1_epi16(255));
            _mm512_mullo_epi16(a, a)
        };
        fn add(a: __m512i, b: __m512i) -> __m512i = _mm512_adds_epu16(a, b);
        fn sub(a: __m512i, b: __m512i) -> __m512i = _mm512_sub_epi16(a, b);
        fn min(a: __m512i, b: __m512i) -> __m512i = _mm512_min_epu16(a, b);
        fn min_lane(v: __m512i) -> u16 = {
            let v = _mm256_min_epu16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64::<1>(v));
            let v = _mm_min_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
            _mm_cvtsi128_si32(_mm_minpos_epu16(v)) as u16
        };
    }
}
