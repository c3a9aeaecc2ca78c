//! What this machine can do, measured: reading memory, and multiply-adds in registers. Operators are
//! compared with it. A peak is the best of many short runs; a share of it is so never flattered
//! by a moment in which a neighbour was busy.

use crate::simd::Piece;
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
/// How long one run in registers takes, about: shorter than what the system gives a thread at a time.
const RUN: Duration = Duration::from_micros(200);
/// Tasks for each thread: one whose core others use as well leaves some to the rest, as it does in operators.
const PIECES: usize = 16;
/// Bytes of a large buffer.
const LARGE: usize = 1 << 20;
/// Bytes that are read between two barriers at least, so that these count for little.
const TOGETHER: usize = 8 << 20;
/// Bytes that a loop reads at a time.
const BLOCK: usize = 512;

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
    /// bf16 products summed in f32, in vectors (`vdpbf16ps`), where there are any.
    pub bf16_operations: Option<f64>,
    /// 8-bit integers in tiles, where there are any.
    pub amx_int8_operations: Option<f64>,
    /// bf16 products summed in f32, in tiles.
    pub amx_bf16_operations: Option<f64>,
}

impl Peaks {
    /// Measures each for `search`, reading all of `probe` for the first ([`MEMORY_BYTES`] where there is room).
    pub fn measure(pool: &Pool, level: Level, probe: &ReadProbe, search: Duration) -> Self {
        let memory_bytes = probe.buffer.len();
        Self {
            memory_bytes,
            memory_read: probe.bandwidth(pool, level, memory_bytes, TOGETHER, search),
            cache_read: probe.bandwidth(pool, level, CACHE_BYTES, TOGETHER, search),
            f32_operations: f32_peak(pool, level, search),
            int8_operations: int8_peak(pool, level, search),
            bf16_operations: bf16_peak(pool, level, search),
            amx_int8_operations: amx_int8_peak(pool, level, search),
            amx_bf16_operations: amx_bf16_peak(pool, level, search),
        }
    }
}

/// A buffer that is read to learn how fast that goes, in the pages that weights lie in.
pub struct ReadProbe {
    buffer: Piece,
}

impl ReadProbe {
    /// Of `bytes`, at least one block.
    pub fn new(bytes: usize) -> Self {
        Self { buffer: Piece::zeroed(bytes.max(BLOCK)) }
    }

    /// Bytes per second at which all threads read the first `bytes`, or all there are, again and again, `run_bytes` at a
    /// time: what takes turns at several matrices reads as much in a run, and is as seldom disturbed.
    pub fn bandwidth(
        &self,
        pool: &Pool,
        level: Level,
        bytes: usize,
        run_bytes: usize,
        search: Duration,
    ) -> f64 {
        let data = &self.buffer[..bytes.clamp(BLOCK, self.buffer.len())];
        let run_bytes = run_bytes.clamp(BLOCK, data.len());
        let mut runs = data.chunks_exact(run_bytes).cycle();
        let is_large = run_bytes >= LARGE;
        let parts = if is_large { PIECES * pool.threads() } else { pool.threads() };
        let piece = run_bytes.div_ceil(parts).next_multiple_of(BLOCK);
        let pieces = run_bytes.div_ceil(piece);
        // A large run is walked through as a whole. A thread keeps to its piece of a small one, which is then near it.
        let (tasks, times) = match is_large {
            true => (1, 1),
            false => {
                let tasks = (PIECES * pool.threads()).div_ceil(pieces);
                (tasks, TOGETHER.div_ceil(run_bytes * tasks))
            }
        };
        let total = AtomicU64::new(0);
        let seconds = best(search, || {
            let run = runs.next().unwrap_or(data);
            let start = Instant::now();
            pool.run(pieces * tasks, |i| {
                let start = i / tasks * piece;
                let part = &run[start..run.len().min(start + piece)];
                let all = (0..times).fold(0, |all, _| all ^ loops::read(level, black_box(part)));
                total.fetch_xor(all, Ordering::Relaxed);
            });
            start.elapsed().as_secs_f64()
        });
        black_box(total.into_inner());
        (run_bytes * times * tasks) as f64 / seconds
    }
}

/// f32 operations per second of all threads.
pub fn f32_peak(pool: &Pool, level: Level, search: Duration) -> f64 {
    arithmetic(pool, search, |rounds| loops::multiply_f32(level, rounds))
}

/// 8-bit integer operations per second of all threads, in vectors.
pub fn int8_peak(pool: &Pool, level: Level, search: Duration) -> f64 {
    arithmetic(pool, search, |rounds| loops::multiply_int8(level, rounds))
}

/// bf16 operations per second of all threads in vectors, where there are any.
pub fn bf16_peak(pool: &Pool, level: Level, search: Duration) -> Option<f64> {
    (loops::multiply_bf16(level, 1) > 0)
        .then(|| arithmetic(pool, search, |rounds| loops::multiply_bf16(level, rounds)))
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
        pool.run(PIECES * pool.threads(), |_| {
            done.fetch_add(run(rounds), Ordering::Relaxed);
        });
        (start.elapsed().as_secs_f64(), done.into_inner())
    };
    let mut rounds = 1 << 6;
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
        let data: Vec<u8> =
            (0..1803u64).map(|i| (i.wrapping_mul(0x9E37_79B9) >> 7) as u8).collect();
        let xor = |data: &[u8]| {
            let (words, _) = data.as_chunks();
            words.iter().fold(0, |all, v| all ^ u64::from_le_bytes(*v))
        };
        for level in Level::ALL.into_iter().filter(|level| level.is_supported()) {
            for len in [0, 8, 56, 64, 504, 512, 1024, 1800] {
                assert_eq!(loops::read(level, &data[..len]), xor(&data[..len]), "{level} {len}");
            }
            let (one, two) = (loops::multiply_f32(level, 1), loops::multiply_f32(level, 2));
            assert!(one > 0 && two == 2 * one, "{level}");
            let (one, two) = (loops::multiply_int8(level, 1), loops::multiply_int8(level, 2));
            assert!(one > 0 && two == 2 * one, "{level}");
            let (one, two) = (loops::multiply_bf16(level, 1), loops::multiply_bf16(level, 2));
            let has = [Level::Avx512Bf16, Level::Amx].contains(&level);
            assert!((one > 0) == has && two == 2 * one, "{level}");
        }
    }

    #[test]
    fn peaks_are_positive() {
        let (pool, level, probe) = (Pool::new(2), Level::detect(), ReadProbe::new(1 << 20));
        let peaks = Peaks::measure(&pool, level, &probe, Duration::ZERO);
        let Peaks { memory_read, cache_read, f32_operations, int8_operations, .. } = peaks;
        for peak in [memory_read, cache_read, f32_operations, int8_operations] {
            assert!(peak > 0.0 && peak.is_finite(), "{peaks:?}");
        }
        for bytes in [0, 1, 512, 513, 4096, 1 << 20, 1 << 30] {
            let speed = probe.bandwidth(&pool, level, bytes, bytes / 3, Duration::ZERO);
            assert!(speed > 0.0 && speed.is_finite(), "{bytes}");
        }
    }
}
