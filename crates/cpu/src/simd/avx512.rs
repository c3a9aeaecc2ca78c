//! AVX-512: sixteen lanes, one register per tile column.

use super::avx2;
use super::isa::{Isa, Job};
use std::arch::x86_64::*;

/// Proof of AVX-512 F, BW, DQ and VL, and of VNNI when `VNNI`.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const VNNI: bool>(());

impl<const VNNI: bool> Avx512<VNNI> {
    /// A proof.
    ///
    /// # Safety
    /// The processor must have the features.
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn enter_plain<J: Job>(s: Avx512<false>, job: J) -> J::Output {
    job.run(s)
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn enter_vnni<J: Job>(s: Avx512<true>, job: J) -> J::Output {
    job.run(s)
}

/// One function per set of features, so that a job is compiled only for those it runs with.
trait Enter: Copy {
    fn enter_level<J: Job>(self, job: J) -> J::Output;
}

impl Enter for Avx512<false> {
    #[inline(always)]
    fn enter_level<J: Job>(self, job: J) -> J::Output {
        // SAFETY: `self` proves the features.
        unsafe { enter_plain(self, job) }
    }
}

impl Enter for Avx512<true> {
    #[inline(always)]
    fn enter_level<J: Job>(self, job: J) -> J::Output {
        // SAFETY: `self` proves the features.
        unsafe { enter_vnni(self, job) }
    }
}

#[allow(private_bounds)]
impl<const VNNI: bool> Isa for Avx512<VNNI>
where
    Self: Enter,
{
    const LANES: usize = 16;
    const ROWS: usize = 8;
    const WHOLE_ROWS: usize = 8;
    const SIGNED_BYTES: bool = false;
    type I = __m512i;
    type F = __m512;

    #[inline(always)]
    fn enter<J: Job>(self, job: J) -> J::Output {
        self.enter_level(job)
    }

    accesses! {
        fn load(p: *const u8) -> __m512i = _mm512_loadu_si512(p.cast());
        fn store(p: *mut u8, v: __m512i) -> () = _mm512_storeu_si512(p.cast(), v);
        fn load_f32(p: *const f32) -> __m512 = _mm512_loadu_ps(p);
        fn store_f32(p: *mut f32, v: __m512) -> () = _mm512_storeu_ps(p, v);
        fn load_f16(p: *const u8) -> __m512 = _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()));
        fn load_bf16(p: *const u8) -> __m512 = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))
        ));
        fn load_e4m3(p: *const u8) -> __m512 = {
            let words = _mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast()));
            _mm512_cvtph_ps(avx2::e4m3_to_half(words))
        };
        fn load_ue4m3(p: *const u8) -> __m512 = {
            let words = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast()));
            _mm512_cvtph_ps(_mm256_slli_epi16::<7>(words))
        };
        fn load_u8(p: *const u8) -> __m512 =
            _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())));
        fn load_scale_zero(p: *const u8) -> (__m512, __m512) = {
            let (words, low) = (_mm512_loadu_si512(p.cast()), _mm512_set1_epi32(255));
            let scale = _mm512_andnot_si512(low, words);
            (_mm512_castsi512_ps(scale), _mm512_cvtepi32_ps(_mm512_and_si512(words, low)))
        };
        fn load_i8(p: *const u8) -> __m512 =
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())));
        fn load_nibbles(p: *const u8) -> (__m512, __m512) = {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            let low = _mm512_and_si512(bytes, _mm512_set1_epi32(15));
            (_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(bytes)))
        };
        fn load_e8m0(p: *const u8) -> __m512 = {
            let e = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            let bits = _mm512_slli_epi32::<23>(_mm512_sub_epi32(e, _mm512_set1_epi32(1)));
            let tiny = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
            let subnormal = _mm512_sllv_epi32(_mm512_set1_epi32(0x0020_0000), e);
            _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, tiny, subnormal))
        };
        fn store_i8(p: *mut i8, v: __m512) -> __m512i = {
            let i = _mm512_cvtps_epi32(v);
            _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(i));
            i
        };
    }

    #[inline(always)]
    unsafe fn dot(
        self,
        _bits: u32,
        mut acc: __m512i,
        weights: &[__m512i],
        activations: *const i8,
    ) -> __m512i {
        for (j, &w) in weights.iter().enumerate() {
            // SAFETY: `self` proves the features; the caller vouches for `4 * weights.len()` bytes.
            unsafe {
                let a = activations.cast::<i32>().add(j).read_unaligned();
                acc = _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(a));
            }
        }
        acc
    }

    values! {
        fn splat_u8(v: u8) -> __m512i = _mm512_set1_epi8(v as i8);
        fn splat_i32(v: i32) -> __m512i = _mm512_set1_epi32(v);
        fn and(a: __m512i, b: __m512i) -> __m512i = _mm512_and_si512(a, b);
        fn or(a: __m512i, b: __m512i) -> __m512i = _mm512_or_si512(a, b);
        fn shift16(v: __m512i, n: i32) -> __m512i = match n {
            0 => v,
            1.. => _mm512_srl_epi16(v, _mm_cvtsi32_si128(n)),
            _ => _mm512_sll_epi16(v, _mm_cvtsi32_si128(-n)),
        };
        fn lookup(table: &[u8; 16], v: __m512i) -> __m512i = {
            let table = u128::from_le_bytes(*table);
            let table = _mm_set_epi64x((table >> 64) as i64, table as i64);
            _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), v)
        };
        fn shuffle(v: __m512i, bytes: &[u8; 4]) -> __m512i =
            _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(avx2::in_lanes(bytes)));
        fn points(table: &[u16], low: __m512i, high: __m512i) -> [__m512i; 2] = {
            let byte = _mm512_set1_epi16(255);
            let even = _mm512_and_si512(low, byte);
            let even = _mm512_or_si512(even, _mm512_slli_epi16::<8>(high));
            let odd = _mm512_andnot_si512(byte, high);
            let odd = _mm512_or_si512(odd, _mm512_srli_epi16::<8>(low));
            [entries(table, even), entries(table, odd)]
        };
        fn to_f32(v: __m512i) -> __m512 = _mm512_cvtepi32_ps(v);
        fn byte_to_f32(v: __m512i, b: i32) -> __m512 = {
            let low = _mm512_srl_epi32(v, _mm_cvtsi32_si128(8 * b));
            _mm512_cvtepi32_ps(_mm512_and_si512(low, _mm512_set1_epi32(255)))
        };
        fn zero() -> __m512 = _mm512_setzero_ps();
        fn splat(v: f32) -> __m512 = _mm512_set1_ps(v);
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        fn add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        fn sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        fn mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        fn max_abs(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(_mm512_abs_ps(a), b);
        fn add_i32(a: __m512i, b: __m512i) -> __m512i = _mm512_add_epi32(a, b);
        fn sum_i32(v: __m512i) -> i32 = _mm512_reduce_add_epi32(v);
        fn sum(v: __m512) -> f32 = _mm512_reduce_add_ps(v);
        fn max(v: __m512) -> f32 = _mm512_reduce_max_ps(v);
        fn transpose(rows: &mut [__m512]) -> () = {
            let r: &mut [__m512; 16] = rows.try_into().expect("sixteen rows");
            transpose16(r)
        };
    }
}

/// Entries of `table` under 16-bit indices below its length.
#[inline(always)]
unsafe fn entries(table: &[u16], index: __m512i) -> __m512i {
    // SAFETY: called with the features.
    unsafe {
        match table.len() {
            256 => entries256(table, index),
            512 => entries512(table, index),
            1024 => entries1024(table, index),
            2048 => entries2048(table, index),
            len => unreachable!("a table of {len} points"),
        }
    }
}

#[inline(always)]
unsafe fn entries64(table: &[u16], index: __m512i) -> __m512i {
    let (first, second) = (&table[..32], &table[32..64]);
    // SAFETY: called with the features; either slice is a register.
    unsafe {
        let first = _mm512_loadu_si512(first.as_ptr().cast());
        let second = _mm512_loadu_si512(second.as_ptr().cast());
        _mm512_permutex2var_epi16(first, index, second)
    }
}

/// Of two halves the one that a bit of the index names.
macro_rules! entries {
    ($($name:ident = 2 * $part:ident of $half:literal;)*) => {$(
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw")]
        unsafe fn $name(table: &[u16], index: __m512i) -> __m512i {
            // SAFETY: as this one.
            unsafe {
                let (lower, upper) = ($part(table, index), $part(&table[$half..], index));
                let mask = _mm512_test_epi16_mask(index, _mm512_set1_epi16($half));
                _mm512_mask_mov_epi16(lower, mask, upper)
            }
        }
    )*};
}

entries! {
    entries128 = 2 * entries64 of 64;
    entries256 = 2 * entries128 of 128;
    entries512 = 2 * entries256 of 256;
    entries1024 = 2 * entries512 of 512;
    entries2048 = 2 * entries1024 of 1024;
}

/// Four rounds: 32-bit and 64-bit interleaves inside 128-bit quarters, then the quarters.
#[inline(always)]
unsafe fn transpose16(r: &mut [__m512; 16]) {
    // SAFETY: called with proof of the features; registers only.
    unsafe {
        let mut t = *r;
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..4 {
            let (a, b) = (4 * i, 4 * i + 2);
            r[4 * i] = _mm512_shuffle_ps::<0x44>(t[a], t[b]);
            r[4 * i + 1] = _mm512_shuffle_ps::<0xee>(t[a], t[b]);
            r[4 * i + 2] = _mm512_shuffle_ps::<0x44>(t[a + 1], t[b + 1]);
            r[4 * i + 3] = _mm512_shuffle_ps::<0xee>(t[a + 1], t[b + 1]);
        }
        // Quarter q of r[4 i + c] now holds column 4 q + c of rows 4 i .. 4 i + 4.
        for c in 0..4 {
            let low = _mm512_shuffle_f32x4::<0x88>(r[c], r[4 + c]);
            let high = _mm512_shuffle_f32x4::<0xdd>(r[c], r[4 + c]);
            let low2 = _mm512_shuffle_f32x4::<0x88>(r[8 + c], r[12 + c]);
            let high2 = _mm512_shuffle_f32x4::<0xdd>(r[8 + c], r[12 + c]);
            t[c] = _mm512_shuffle_f32x4::<0x88>(low, low2);
            t[8 + c] = _mm512_shuffle_f32x4::<0xdd>(low, low2);
            t[4 + c] = _mm512_shuffle_f32x4::<0x88>(high, high2);
            t[12 + c] = _mm512_shuffle_f32x4::<0xdd>(high, high2);
        }
        *r = t;
    }
}
