//! AVX2: 16 costs in a register.

use super::isa::{Isa, Job};
use super::square::MAX_FINE;
use std::arch::x86_64::*;

/// Proof of AVX2.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    /// A proof.
    ///
    /// # Safety
    /// The processor must have the feature.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn enter<J: Job>(s: Avx2, job: J) -> J::Output {
    job.run(s)
}

impl Isa for Avx2 {
    const LANES: usize = 16;
    const HALF: bool = false;
    type V = __m256i;

    #[inline(always)]
    fn enter<J: Job>(self, job: J) -> J::Output {
        // SAFETY: `self` proves the features.
        unsafe { enter(self, job) }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const u16) -> __m256i {
        // SAFETY: the caller vouches for the pointer.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut u16, v: __m256i) {
        // SAFETY: the caller vouches for the pointer.
        unsafe { _mm256_storeu_si256(p.cast(), v) }
    }

    #[inline(always)]
    unsafe fn repeat<const E: usize>(self, p: *const u16) -> __m256i {
        // SAFETY: the caller vouches for `16 >> E` numbers, at least one.
        unsafe {
            match E {
                1 => _mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast())),
                2 => _mm256_set1_epi64x(p.cast::<i64>().read_unaligned()),
                3 => _mm256_set1_epi32(p.cast::<i32>().read_unaligned()),
                _ => _mm256_set1_epi16(p.cast::<i16>().read()),
            }
        }
    }

    #[inline(always)]
    fn interleave<const E: usize>(self, v: __m256i) -> __m256i {
        // SAFETY: `self` proves the features; registers only, no memory.
        unsafe {
            match E {
                // Both halves first gather what they end with, then order it.
                1 => {
                    let v = _mm256_permute4x64_epi64::<0b11_01_10_00>(v);
                    let from = _mm256_broadcastsi128_si256(_mm_setr_epi8(
                        0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15,
                    ));
                    _mm256_shuffle_epi8(v, from)
                }
                2 => {
                    let from = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
                    let v = _mm256_permutevar8x32_epi32(v, from);
                    let from = _mm256_broadcastsi128_si256(_mm_setr_epi8(
                        0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,
                    ));
                    _mm256_shuffle_epi8(v, from)
                }
                3 => {
                    let from = _mm256_broadcastsi128_si256(_mm_setr_epi8(
                        0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,
                    ));
                    let v = _mm256_shuffle_epi8(v, from);
                    _mm256_permute4x64_epi64::<0b11_01_10_00>(v)
                }
                _ => v,
            }
        }
    }

    values! {
        fn splat(v: u16) -> __m256i = _mm256_set1_epi16(v as i16);
        fn sub(a: __m256i, b: __m256i) -> __m256i = _mm256_sub_epi16(a, b);
        fn add(a: __m256i, b: __m256i) -> __m256i = _mm256_add_epi16(a, b);
        fn square_high(a: __m256i) -> __m256i = _mm256_mulhrs_epi16(a, a);
        fn square_fine(a: __m256i) -> __m256i = {
            let most = _mm256_set1_epi16(MAX_FINE as i16);
            let a = _mm256_min_epu16(_mm256_abs_epi16(a), most);
            _mm256_mullo_epi16(a, a)
        };
        fn min(a: __m256i, b: __m256i) -> __m256i = _mm256_min_epu16(a, b);
        fn min_lane(v: __m256i) -> u16 = {
            let v = _mm_min_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
            _mm_cvtsi128_si32(_mm_minpos_epu16(v)) as u16
        };
    }
}
