//! Times operators of the processor, and right beside each of them what the machine can do in that moment.

use super::cases::{Arithmetic, Case};
use super::{Row, median};
use crate::console;
use crate::{args::DeviceArgs, device};
use anyhow::Result;
use marlin_cpu::probe::{self, CACHE_BYTES, MEMORY_BYTES, Peaks, ReadProbe, SEARCH};
use marlin_cpu::{Level, Pool, system};
use serde::Serialize;
use std::time::{Duration, Instant};

/// Runs of an operator at least, and most.
const RUNS: [usize; 2] = [5, 200];
/// Runs are repeated until they took this long together.
const TOGETHER: Duration = Duration::from_millis(80);
/// Turns of the probes and the operator, each of which gives a share: a machine that others use changes within seconds.
const TURNS: usize = 5;
/// Time of each probe in a turn.
const BESIDE: Duration = Duration::from_millis(10);

/// 10⁹ bytes and operations per second, of all threads together, before the first operator.
#[derive(Debug, Serialize)]
pub struct PeaksReport {
    memory_bytes: usize,
    memory_read_gigabytes_per_second: f64,
    cache_bytes: usize,
    cache_read_gigabytes_per_second: f64,
    f32_gigaflops_per_second: f64,
    int8_gigaops_per_second: f64,
    bf16_gigaflops_per_second: Option<f64>,
    amx_int8_gigaops_per_second: Option<f64>,
    amx_bf16_gigaflops_per_second: Option<f64>,
}

/// Measures operators of the processor.
pub struct Processor {
    pool: Pool,
    level: Level,
    probe: ReadProbe,
    peaks: Peaks,
    quick: bool,
}

impl Processor {
    /// Measures the peaks.
    ///
    /// # Errors
    /// When `MARLIN_CPU` names what this machine lacks.
    pub fn new(args: &DeviceArgs, quick: bool) -> Result<Self> {
        let quarter = system::physical_bytes().map_or(usize::MAX, |bytes| (bytes / 4) as usize);
        let (bytes, search) = match quick {
            true => (CACHE_BYTES, Duration::ZERO),
            false => (MEMORY_BYTES.min(quarter), SEARCH),
        };
        let (pool, level) = (Pool::new(device::threads(args)), device::level()?);
        let probe = ReadProbe::new(bytes);
        let peaks = Peaks::measure(&pool, level, &probe, search);
        Ok(Self { pool, level, probe, peaks, quick })
    }

    /// The peaks as JSON has them.
    pub fn report(&self) -> PeaksReport {
        let peaks = &self.peaks;
        PeaksReport {
            memory_bytes: peaks.memory_bytes,
            memory_read_gigabytes_per_second: peaks.memory_read / 1e9,
            cache_bytes: CACHE_BYTES,
            cache_read_gigabytes_per_second: peaks.cache_read / 1e9,
            f32_gigaflops_per_second: peaks.f32_operations / 1e9,
            int8_gigaops_per_second: peaks.int8_operations / 1e9,
            bf16_gigaflops_per_second: peaks.bf16_operations.map(|peak| peak / 1e9),
            amx_int8_gigaops_per_second: peaks.amx_int8_operations.map(|peak| peak / 1e9),
            amx_bf16_gigaflops_per_second: peaks.amx_bf16_operations.map(|peak| peak / 1e9),
        }
    }

    /// The peaks as a terminal has them.
    pub fn print(&self) -> Result<()> {
        let peaks = &self.peaks;
        let line = |name: &str, value: f64, unit: &str| {
            console::line(&format!("{name:<34} {:>9.1} {unit}", value / 1e9))
        };
        let size = |bytes: usize| format!("read, buffer of {} MiB", bytes >> 20);
        line(&size(peaks.memory_bytes), peaks.memory_read, "GB/s")?;
        line(&size(CACHE_BYTES), peaks.cache_read, "GB/s")?;
        line("f32 multiply-adds", peaks.f32_operations, "GFLOP/s")?;
        line("int8 multiply-adds", peaks.int8_operations, "GOP/s")?;
        for (name, peak, unit) in [
            ("bf16 multiply-adds", peaks.bf16_operations, "GFLOP/s"),
            ("int8 multiply-adds, tiles", peaks.amx_int8_operations, "GOP/s"),
            ("bf16 multiply-adds, tiles", peaks.amx_bf16_operations, "GFLOP/s"),
        ] {
            peak.map_or(Ok(()), |peak| line(name, peak, unit))?;
        }
        Ok(console::line("")?)
    }

    /// Times one operator, and the reading of as many bytes and the same arithmetic in turns with it.
    pub fn measure(&self, mut case: Case<'_>) -> Result<Row> {
        let turns = if self.quick { 1 } else { TURNS };
        let (fewest, most, together) = match self.quick {
            true => (1, 1, Duration::ZERO),
            false => (RUNS[0].div_ceil(turns), RUNS[1] / turns, TOGETHER / turns as u32),
        };
        // Warms up what every run uses; cold weights stay cold, since runs take turns at them.
        (case.run)(0)?;
        let (mut reads, mut operations) = (Vec::new(), Vec::new());
        let (mut shares, mut seconds) = (Vec::new(), Vec::new());
        for _ in 0..turns {
            let (read, counted) = (self.read(&case), self.operations(case.arithmetic));
            let least = (case.bytes as f64 / read).max(case.flops as f64 / counted);
            let (start, mut runs) = (Instant::now(), Vec::new());
            while runs.len() < fewest || (start.elapsed() < together && runs.len() < most) {
                let start = Instant::now();
                (case.run)(seconds.len() + runs.len() + 1)?;
                runs.push(start.elapsed().as_secs_f64());
            }
            shares.push(least / median(&mut runs));
            reads.push(read);
            operations.push(counted);
            seconds.append(&mut runs);
        }
        let (read, counted) = (median(&mut reads), median(&mut operations));
        let (by_reading, by_counting) = (case.bytes as f64 / read, case.flops as f64 / counted);
        let place = if case.cold { "memory" } else { "cache" };
        let unit = match case.arithmetic {
            Arithmetic::F32 => "f32",
            Arithmetic::Int8 => "int8",
            Arithmetic::Bf16 => "bf16",
            Arithmetic::AmxBf16 => "amx bf16",
            Arithmetic::AmxSplit => "amx split",
        };
        let bound = if by_reading >= by_counting { place } else { unit };
        let row = Row::new(case, seconds, read, median(&mut shares), bound);
        Ok(Row { peak_gigaflops_per_second: Some(counted / 1e9), ..row })
    }

    /// Bytes per second that are read as `case` reads them, now.
    fn read(&self, case: &Case<'_>) -> f64 {
        let (all, run) = (case.working_set as usize, case.bytes as usize);
        self.probe.bandwidth(&self.pool, self.level, all, run, self.search())
    }

    /// Time to look for a peak beside an operator.
    fn search(&self) -> Duration {
        if self.quick { Duration::ZERO } else { BESIDE }
    }

    /// Operations per second of `arithmetic`, now.
    fn operations(&self, arithmetic: Arithmetic) -> f64 {
        let (pool, level, search) = (&self.pool, self.level, self.search());
        let f32_peak = || probe::f32_peak(pool, level, search);
        match arithmetic {
            Arithmetic::F32 => f32_peak(),
            Arithmetic::Int8 => probe::int8_peak(pool, level, search),
            Arithmetic::Bf16 => probe::bf16_peak(pool, level, search).unwrap_or_else(f32_peak),
            Arithmetic::AmxBf16 => {
                probe::amx_bf16_peak(pool, level, search).unwrap_or_else(f32_peak)
            }
            // Six products for one.
            Arithmetic::AmxSplit => {
                probe::amx_bf16_peak(pool, level, search).map_or_else(f32_peak, |peak| peak / 6.0)
            }
        }
    }
}
