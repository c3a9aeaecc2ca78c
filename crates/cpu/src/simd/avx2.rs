//! AVX2 with FMA and F16C: eight lanes, half a tile column per register.

mod products;

use super::integer::Group;
use super::isa::{Isa, Job};
use super::quantized::Record;
use std::arch::x86_64::*;

/// Proof of AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// A proof.
    ///
    /// # Safety
    /// The processor must have the features.
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn enter<J: Job>(s: Avx2, job: J) -> J::Output {
    job.run(s)
}

impl Isa for Avx2 {
    const LANES: usize = 8;
    const ROWS: usize = 4;
    const WHOLE_ROWS: usize = 2;
    const SIGNED_BYTES: bool = true;
    type I = __m256i;
    type F = __m256;

    #[inline(always)]
    fn enter<J: Job>(self, job: J) -> J::Output {
        // SAFETY: `self` proves the features.
        unsafe { enter(self, job) }
    }

    accesses! {
        fn load(p: *const u8) -> __m256i = _mm256_loadu_si256(p.cast());
        fn store(p: *mut u8, v: __m256i) -> () = _mm256_storeu_si256(p.cast(), v);
        fn load_f32(p: *const f32) -> __m256 = _mm256_loadu_ps(p);
        fn store_f32(p: *mut f32, v: __m256) -> () = _mm256_storeu_ps(p, v);
        fn load_f16(p: *const u8) -> __m256 = _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
        fn load_bf16(p: *const u8) -> __m256 = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(
            _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))
        ));
        fn load_e4m3(p: *const u8) -> __m256 = {
            let words = _mm256_castsi128_si256(_mm_cvtepi8_epi16(_mm_loadl_epi64(p.cast())));
            _mm256_cvtph_ps(_mm256_castsi256_si128(e4m3_to_half(words)))
        };
        fn load_ue4m3(p: *const u8) -> __m256 = {
            let words = _mm_cvtepu8_epi16(_mm_loadl_epi64(p.cast()));
            _mm256_cvtph_ps(_mm_slli_epi16::<7>(words))
        };
        fn load_u8(p: *const u8) -> __m256 =
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())));
        fn load_scale_zero(p: *const u8) -> (__m256, __m256) = {
            let (words, low) = (_mm256_loadu_si256(p.cast()), _mm256_set1_epi32(255));
            let scale = _mm256_andnot_si256(low, words);
            (_mm256_castsi256_ps(scale), _mm256_cvtepi32_ps(_mm256_and_si256(words, low)))
        };
        fn load_i8(p: *const u8) -> __m256 =
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())));
        fn load_nibbles(p: *const u8) -> (__m256, __m256) = {
            let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
            let low = _mm256_and_si256(bytes, _mm256_set1_epi32(15));
            (_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(bytes)))
        };
        fn load_e8m0(p: *const u8) -> __m256 = {
            let e = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
            let bits = _mm256_slli_epi32::<23>(_mm256_sub_epi32(e, _mm256_set1_epi32(1)));
            let tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e);
            let subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(0x0020_0000), e);
            _mm256_castsi256_ps(_mm256_blendv_epi8(bits, subnormal, tiny))
        };
        fn store_i8(p: *mut i8, v: __m256) -> __m256i = {
            let i = _mm256_cvtps_epi32(v);
            let words = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256::<1>(i));
            _mm_storel_epi64(p.cast(), _mm_packs_epi16(words, words));
            i
        };
    }

    /// `vpmaddubsw` adds two products into 16 bits; as many of its results as cannot overflow are added there before they
    /// are widened.
    #[inline(always)]
    unsafe fn dot(
        self,
        bits: u32,
        mut acc: __m256i,
        weights: &[__m256i],
        activations: *const i8,
    ) -> __m256i {
        let together = match bits {
            ..=4 => 8,
            5 => 4,
            6 => 2,
            _ => 1,
        };
        for (i, weights) in weights.chunks(together).enumerate() {
            let mut words = self.splat_i32(0);
            for (j, &w) in weights.iter().enumerate() {
                // SAFETY: the caller vouches for `4 * weights.len()` bytes.
                unsafe {
                    words = add_column(bits, words, w, activations.add(4 * (i * together + j)));
                }
            }
            // SAFETY: `self` proves the features.
            acc = self.add_i32(acc, unsafe { widen(words) });
        }
        acc
    }

    #[inline(always)]
    unsafe fn add_products<const SUBS: usize, const R: usize>(
        self,
        weights: &Group<SUBS>,
        x: &[Record<SUBS>; R],
        sums: &mut [[__m256; 2]; R],
    ) {
        // SAFETY: `self` proves the features; the caller vouches for the rest.
        unsafe {
            let done = match (x.first_chunk(), sums.first_chunk_mut()) {
                (Some(x), Some(sums)) if R == 4 => products::add(weights, x, sums),
                _ => false,
            };
            if !done {
                weights.add_products(self, x, sums);
            }
        }
    }

    values! {
        fn splat_u8(v: u8) -> __m256i = _mm256_set1_epi8(v as i8);
        fn splat_i32(v: i32) -> __m256i = _mm256_set1_epi32(v);
        fn and(a: __m256i, b: __m256i) -> __m256i = _mm256_and_si256(a, b);
        fn or(a: __m256i, b: __m256i) -> __m256i = _mm256_or_si256(a, b);
        fn shift16(v: __m256i, n: i32) -> __m256i = match n {
            0 => v,
            1.. => _mm256_srl_epi16(v, _mm_cvtsi32_si128(n)),
            _ => _mm256_sll_epi16(v, _mm_cvtsi32_si128(-n)),
        };
        fn lookup(table: &[u8; 16], v: __m256i) -> __m256i = {
            let table = u128::from_le_bytes(*table);
            let table = _mm_set_epi64x((table >> 64) as i64, table as i64);
            _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), v)
        };
        fn shuffle(v: __m256i, bytes: &[u8; 4]) -> __m256i =
            _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(in_lanes(bytes)));
        fn to_f32(v: __m256i) -> __m256 = _mm256_cvtepi32_ps(v);
        fn byte_to_f32(v: __m256i, b: i32) -> __m256 = {
            let low = _mm256_srl_epi32(v, _mm_cvtsi32_si128(8 * b));
            _mm256_cvtepi32_ps(_mm256_and_si256(low, _mm256_set1_epi32(255)))
        };
        fn zero() -> __m256 = _mm256_setzero_ps();
        fn splat(v: f32) -> __m256 = _mm256_set1_ps(v);
        fn fma(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
        fn add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        fn sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
        fn mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        fn max_abs(a: __m256, b: __m256) -> __m256 =
            _mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0), a), b);
        fn add_i32(a: __m256i, b: __m256i) -> __m256i = _mm256_add_epi32(a, b);
        fn sum_i32(v: __m256i) -> i32 = {
            let v = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
            let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0x4e>(v));
            _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32::<0xb1>(v)))
        };
        fn sum(v: __m256) -> f32 = {
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
        };
        fn max(v: __m256) -> f32 = {
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps::<1>(v, v)))
        };
        fn transpose(rows: &mut [__m256]) -> () = {
            let r: &mut [__m256; 8] = rows.try_into().expect("eight rows");
            transpose8(r)
        };
    }
}

/// `sums`, of 16 bits, and the products of a column with four activations.
///
/// # Safety
/// The processor must have AVX2.
#[inline(always)]
unsafe fn add_column(
    bits: u32,
    sums: __m256i,
    weights: __m256i,
    activations: *const i8,
) -> __m256i {
    // SAFETY: the caller's, who vouches for four bytes.
    unsafe {
        let a = _mm256_set1_epi32(activations.cast::<i32>().read_unaligned());
        let products = if bits == 8 {
            let w = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
            _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w))
        } else {
            _mm256_maddubs_epi16(weights, a)
        };
        _mm256_add_epi16(sums, products)
    }
}

/// 16-bit sums added in pairs.
///
/// # Safety
/// The processor must have AVX2.
#[inline(always)]
unsafe fn widen(sums: __m256i) -> __m256i {
    // SAFETY: the caller's; registers only.
    unsafe { _mm256_madd_epi16(sums, _mm256_set1_epi16(1)) }
}

/// Indices of `bytes` of each of four 32-bit lanes.
#[inline(always)]
pub(super) unsafe fn in_lanes(bytes: &[u8; 4]) -> __m128i {
    // SAFETY: called with the features; registers only.
    unsafe {
        let bytes = _mm_set1_epi32(i32::from_le_bytes(*bytes));
        _mm_add_epi8(bytes, _mm_setr_epi32(0, 0x0404_0404, 0x0808_0808, 0x0c0c_0c0c))
    }
}

/// E4M3 bytes widened with their sign to halves of a 256th: the bits have the same order, and subnormal ones stay so.
///
/// # Safety
/// The processor must have AVX2.
#[inline(always)]
pub(super) unsafe fn e4m3_to_half(words: __m256i) -> __m256i {
    // SAFETY: the caller's; registers only.
    unsafe {
        let half = _mm256_slli_epi16::<7>(words);
        let largest = _mm256_set1_epi16(0x3f80);
        // Seven ones are not a number in either.
        let nan = _mm256_cmpeq_epi16(_mm256_and_si256(half, largest), largest);
        let half = _mm256_and_si256(half, _mm256_set1_epi16(!0x4000));
        _mm256_or_si256(half, nan)
    }
}

/// Three rounds: 32-bit and 64-bit interleaves inside 128-bit halves, then the halves.
#[inline(always)]
unsafe fn transpose8(r: &mut [__m256; 8]) {
    // SAFETY: called with proof of the features; registers only.
    unsafe {
        let mut t = *r;
        for i in 0..4 {
            t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..2 {
            let (a, b) = (4 * i, 4 * i + 2);
            r[4 * i] = _mm256_shuffle_ps::<0x44>(t[a], t[b]);
            r[4 * i + 1] = _mm256_shuffle_ps::<0xee>(t[a], t[b]);
            r[4 * i + 2] = _mm256_shuffle_ps::<0x44>(t[a + 1], t[b + 1]);
            r[4 * i + 3] = _mm256_shuffle_ps::<0xee>(t[a + 1], t[b + 1]);
        }
        for c in 0..4 {
            t[c] = _mm256_permute2f128_ps::<0x20>(r[c], r[4 + c]);
            t[4 + c] = _mm256_permute2f128_ps::<0x31>(r[c], r[4 + c]);
        }
        *r = t;
    }
}
