//! What this machine can do, measured: reading memory, and multiply-adds in registers. Operators are
//! compared with it. A peak is the best of many short runs; a share of it is so never flattered
//! by a moment in which a neighbour was busy.

use crate::simd::amx::{self, Amx};
use crate::simd::probe as loops;
use crate::{Level, Pool};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes that fit no processor's last cache.
pub const MEMORY_BYTES: usize = 512 << 20;
/// Bytes that many processors' last caches hold.
pub const CACHE_BYTES: usize = 64 << 20;
/// Usual time to look for each peak.
pub const SEARCH: Duration = Duration::from_millis(400);
/// How long one run in registers takes, about.
const RUN: Duration = Duration::from_millis(2);
/// Pieces of a buffer for each thread.
const PIECES: usize = 16;

/// Peaks of all threads of a pool together. Operations count a multiply-add as two.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Peaks {
    /// Bytes of the buffer that lies in memory.
    pub memory_bytes: usize,
    /// Bytes read from it per second.
    pub memory_read: f64,
    /// Bytes read per second from [`CACHE_BYTES`].
    pub cache_read: f64,
    /// f32 operations per second, in vectors.
    pub f32_operations: f64,
    /// Products of 8-bit integers summed in 32 bits, operations per second, in vectors.
    pub int8_operations: f64,
    /// The same in tiles, where there are any.
    pub amx_int8_operations: Option<f64>,
    /// bf16 products summed in f32, in tiles.
    pub amx_bf16_operations: Option<f64>,
}

impl Peaks {
    /// Measures each for `search`, reading `memory_bytes` for the first ([`MEMORY_BYTES`] where there is room).
    pub fn measure(pool: &Pool, level: Level, memory_bytes: usize, search: Duration) -> Self {
        Self {
            memory_bytes,
            memory_read: read_bandwidth(pool, level, memory_bytes, search),
            cache_read: read_bandwidth(pool, level, CACHE_BYTES, search),
            f32_operations: f32_peak(pool, level, search),
            int8_operations: int8_peak(pool, level, search),
            amx_int8_operations: amx_int8_peak(pool, level, search),
            amx_bf16_operations: amx_bf16_peak(pool, level, search),
        }
    }
}

/// Bytes per second at which all threads read a buffer of `bytes`.
pub fn read_bandwidth(pool: &Pool, level: Level, bytes: usize, search: Duration) -> f64 {
    let mut buffer = vec![0u64; bytes / 8];
    let piece = buffer.len().div_ceil(PIECES * pool.threads()).max(1);
    // Written by the threads, so that pages exist and lie near.
    pool.run_chunks(&mut buffer, piece, |i, part| part.fill(i as u64 | 1));
    let total = AtomicU64::new(0);
    let pieces: Vec<&[u64]> = buffer.chunks(piece).collect();
    let seconds = best(search, || {
        let start = Instant::now();
        pool.run(pieces.len(), |i| {
            total.fetch_xor(loops::read(level, pieces[i]), Ordering::Relaxed);
        });
        start.elapsed().as_secs_f64()
    });
    black_box(total.into_inner());
    (buffer.len() * 8) as f64 / seconds
}

/// f32 operations per second of all threads.
pub fn f32_peak(pool: &Pool, level: Level, search: Duration) -> f64 {
    arithmetic(pool, search, |rounds| loops::multiply_f32(level, rounds))
}

/// 8-bit integer operations per second of all threads, in vectors.
pub fn int8_peak(pool: &Pool, level: Level, search: Duration) -> f64 {
    arithmetic(pool, search, |rounds| loops::multiply_int8(level, rounds))
}

/// bf16 operations per second of all threads in AMX tiles, where there are any.
pub fn amx_bf16_peak(pool: &Pool, level: Level, search: Duration) -> Option<f64> {
    let amx = Amx::with_registers(level)?;
    Some(arithmetic(pool, search, |rounds| amx::exercise_bf16(amx, rounds)))
}

/// 8-bit integer operations per second of all threads in AMX tiles, where there are any.
pub fn amx_int8_peak(pool: &Pool, level: Level, search: Duration) -> Option<f64> {
    let amx = Amx::with_registers(level)?;
    Some(arithmetic(pool, search, |rounds| amx::exercise_int8(amx, rounds)))
}

/// Operations per second when every thread calls `run(rounds)`, which returns the operations it did.
fn arithmetic(pool: &Pool, search: Duration, run: impl Fn(u64) -> u64 + Sync) -> f64 {
    let once = |rounds: u64| {
        let done = AtomicU64::new(0);
        let start = Instant::now();
        pool.run(pool.threads(), |_| {
            done.fetch_add(run(rounds), Ordering::Relaxed);
        });
        (start.elapsed().as_secs_f64(), done.into_inner())
    };
    let mut rounds = 1 << 10;
    while once(rounds).0 < RUN.as_secs_f64() && rounds < 1 << 40 {
        rounds *= 2;
    }
    let mut operations = 0;
    let seconds = best(search, || {
        let (seconds, done) = once(rounds);
        operations = done;
        seconds
    });
    operations as f64 / seconds
}

/// Least of what `run` returns within `search`, at least three times.
fn best(search: Duration, mut run: impl FnMut() -> f64) -> f64 {
    let start = Instant::now();
    let mut least = f64::INFINITY;
    let mut times = 0;
    while times < 3 || start.elapsed() < search {
        least = least.min(run());
        times += 1;
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_reads_and_multiplies() {
        let data: Vec<u64> =
            (0..1003).map(|i: u64| i.wrapping_mul(0x9E37_79B9_7F4A_7C15)).collect();
        let expected = data.iter().fold(0, |all, v| all ^ v);
        for level in Level::ALL.into_iter().filter(|level| level.is_supported()) {
            for len in [0, 1, 7, 8, 63, 64, 1003] {
                let expected = data[..len].iter().fold(0, |all, v| all ^ v);
                assert_eq!(loops::read(level, &data[..len]), expected, "{level} {len}");
            }
            assert_eq!(loops::read(level, &data), expected, "{level}");
            let (one, two) = (loops::multiply_f32(level, 1), loops::multiply_f32(level, 2));
            assert!(one > 0 && two == 2 * one, "{level}");
            let (one, two) = (loops::multiply_int8(level, 1), loops::multiply_int8(level, 2));
            assert!(one > 0 && two == 2 * one, "{level}");
        }
    }

    #[test]
    fn peaks_are_positive() {
        let peaks = Peaks::measure(&Pool::new(2), Level::detect(), 1 << 20, Duration::ZERO);
        let Peaks { memory_read, cache_read, f32_operations, int8_operations, .. } = peaks;
        for peak in [memory_read, cache_read, f32_operations, int8_operations] {
            assert!(peak > 0.0 && peak.is_finite(), "{peaks:?}");
        }
    }
}
