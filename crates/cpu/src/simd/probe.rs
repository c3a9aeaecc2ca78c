//! Loops that do nothing but read, or multiply and add, as fast as a level allows. Enough sums are kept
//! to hide the latency of one; they fit the registers. Used by `crate::probe`.

use crate::Level;
use std::hint::black_box;

/// Independent sums: multiply-adds take 4 cycles or 5, and at most two start in one.
const SUMS: usize = 12;

/// Exclusive or of all whole words of `data`, low byte first.
pub(crate) fn read(level: Level, data: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if level.is_supported() {
        if level >= Level::Avx512 {
            // SAFETY: the level, which includes AVX-512 F, is supported.
            return unsafe { x86::read_avx512(data) };
        }
        if level >= Level::Avx2 {
            // SAFETY: the level, which includes AVX2, is supported.
            return unsafe { x86::read_avx2(data) };
        }
    }
    let _ = level;
    let (words, _) = data.as_chunks();
    let (lines, rest) = words.as_chunks::<8>();
    let mut sums = [0; 8];
    for line in lines {
        sums.iter_mut().zip(line).for_each(|(sum, v)| *sum ^= u64::from_le_bytes(*v));
    }
    folded(&sums, rest)
}

/// Exclusive or of `sums` and of what is left over.
fn folded(sums: &[u64], rest: &[[u8; 8]]) -> u64 {
    let rest = rest.iter().map(|v| u64::from_le_bytes(*v));
    sums.iter().copied().chain(rest).fold(0, |all, v| all ^ v)
}

/// `rounds` times a multiply-add on every sum; returns the operations done.
pub(crate) fn multiply_f32(level: Level, rounds: u64) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if level.is_supported() {
        if level >= Level::Avx512 {
            // SAFETY: the level, which includes AVX-512 F, is supported.
            unsafe { x86::multiply_f32_avx512(rounds) };
            return rounds * SUMS as u64 * 32;
        }
        if level >= Level::Avx2 {
            // SAFETY: the level, which includes AVX2 and FMA, is supported.
            unsafe { x86::multiply_f32_avx2(rounds) };
            return rounds * SUMS as u64 * 16;
        }
    }
    let _ = level;
    let (factor, addend) = (black_box(0.5f32), black_box(1.0f32));
    let mut sums = [1.0f32; SUMS];
    for _ in 0..rounds {
        sums.iter_mut().for_each(|sum| *sum = *sum * factor + addend);
    }
    black_box(sums);
    rounds * SUMS as u64 * 2
}

/// `rounds` times products of 8-bit integers onto every sum; returns the operations done.
pub(crate) fn multiply_int8(level: Level, rounds: u64) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if level.is_supported() {
        if level >= Level::Avx512Vnni {
            // SAFETY: the level, which includes AVX-512 VNNI, is supported.
            unsafe { x86::multiply_int8_vnni(rounds) };
            return rounds * SUMS as u64 * 128;
        }
        if level >= Level::Avx512 {
            // SAFETY: the level, which includes AVX-512 BW, is supported.
            unsafe { x86::multiply_int8_avx512(rounds) };
            return rounds * SUMS as u64 * 128;
        }
        if level >= Level::Avx2 {
            // SAFETY: the level, which includes AVX2, is supported.
            unsafe { x86::multiply_int8_avx2(rounds) };
            return rounds * SUMS as u64 * 64;
        }
    }
    let _ = level;
    let (a, b) = (black_box(3i8), black_box(-5i8));
    let mut sums = [0i32; SUMS];
    for _ in 0..rounds {
        let product = i32::from(black_box(a)) * i32::from(b);
        sums.iter_mut().for_each(|sum| *sum = sum.wrapping_add(product));
    }
    black_box(sums);
    rounds * SUMS as u64 * 2
}

/// `rounds` times products of bf16 onto every sum; returns the operations done, none where there is no such instruction.
pub(crate) fn multiply_bf16(level: Level, rounds: u64) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if level.is_supported() && [Level::Avx512Bf16, Level::Amx].contains(&level) {
        // SAFETY: the level, which includes AVX-512 BF16, is supported.
        unsafe { x86::multiply_bf16(rounds) };
        return rounds * SUMS as u64 * 64;
    }
    let _ = (level, rounds);
    0
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::SUMS;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    #[target_feature(enable = "avx512f")]
    pub fn read_avx512(data: &[u8]) -> u64 {
        let (words, _) = data.as_chunks();
        let (blocks, rest) = words.as_chunks::<64>();
        let mut sums = [_mm512_setzero_si512(); 8];
        for block in blocks {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: eight of the block's 64 values, `i < 8`.
                let values = unsafe { _mm512_loadu_si512(block.as_ptr().add(8 * i).cast()) };
                *sum = _mm512_xor_si512(*sum, values);
            }
        }
        let mut all = _mm512_setzero_si512();
        for sum in sums {
            all = _mm512_xor_si512(all, sum);
        }
        let mut lanes = [0u64; 8];
        // SAFETY: 64 bytes are written to as many.
        unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().cast(), all) };
        super::folded(&lanes, rest)
    }

    #[target_feature(enable = "avx2")]
    pub fn read_avx2(data: &[u8]) -> u64 {
        let (words, _) = data.as_chunks();
        let (blocks, rest) = words.as_chunks::<32>();
        let mut sums = [_mm256_setzero_si256(); 8];
        for block in blocks {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: four of the block's 32 values, `i < 8`.
                let values = unsafe { _mm256_loadu_si256(block.as_ptr().add(4 * i).cast()) };
                *sum = _mm256_xor_si256(*sum, values);
            }
        }
        let mut all = _mm256_setzero_si256();
        for sum in sums {
            all = _mm256_xor_si256(all, sum);
        }
        let mut lanes = [0u64; 4];
        // SAFETY: 32 bytes are written to as many.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), all) };
        super::folded(&lanes, rest)
    }

    #[target_feature(enable = "avx512f")]
    pub fn multiply_f32_avx512(rounds: u64) {
        let (a, b) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(1.0)));
        let mut sums = [b; SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn multiply_f32_avx2(rounds: u64) {
        let (a, b) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(1.0)));
        let mut sums = [b; SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn multiply_bf16(rounds: u64) {
        // 0.5 and 1.0 as bf16; their sums stay finite.
        // SAFETY: both types are 64 bytes, any of which are valid.
        let [a, b]: [__m512bh; 2] = unsafe {
            std::mem::transmute([
                _mm512_set1_epi16(black_box(0x3f00)),
                _mm512_set1_epi16(black_box(0x3f80)),
            ])
        };
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, a, b);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn multiply_int8_vnni(rounds: u64) {
        let (a, b) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(-5)));
        let mut sums = [_mm512_setzero_si512(); SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn multiply_int8_avx512(rounds: u64) {
        let (b, ones) = (_mm512_set1_epi8(black_box(-5)), _mm512_set1_epi16(black_box(1)));
        let mut sums = [_mm512_setzero_si512(); SUMS];
        for _ in 0..rounds {
            // The product depends on the sum, or it would be computed once.
            for sum in &mut sums {
                let products = _mm512_madd_epi16(_mm512_maddubs_epi16(*sum, b), ones);
                *sum = _mm512_add_epi32(*sum, products);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx2")]
    pub fn multiply_int8_avx2(rounds: u64) {
        let (b, ones) = (_mm256_set1_epi8(black_box(-5)), _mm256_set1_epi16(black_box(1)));
        let mut sums = [_mm256_setzero_si256(); SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                let products = _mm256_madd_epi16(_mm256_maddubs_epi16(*sum, b), ones);
                *sum = _mm256_add_epi32(*sum, products);
            }
        }
        black_box(sums);
    }
}
