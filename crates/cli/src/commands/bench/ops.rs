//! `marlin bench ops`: every operator by itself, beside what the machine can do.

mod cases;
mod weights;

use crate::args::ActivationsArg;
use crate::args::bench::Ops;
use crate::{console, exit, loaded};
use anyhow::Result;
use cases::{Arithmetic, Case, Table};
use marlin_cpu::Pool;
use marlin_cpu::probe::{CACHE_BYTES, MEMORY_BYTES, Peaks, SEARCH};
use serde::Serialize;
use std::time::{Duration, Instant};

/// Runs of an operator at least, and most.
const RUNS: [usize; 2] = [5, 200];
/// Runs are repeated until they took this long together.
const TOGETHER: Duration = Duration::from_millis(80);

#[derive(Debug, Serialize)]
struct Report {
    device: String,
    threads: usize,
    activations: &'static str,
    quick: bool,
    peaks: PeaksReport,
    ops: Vec<Row>,
}

/// 10⁹ bytes and operations per second, of all threads together.
#[derive(Debug, Serialize)]
struct PeaksReport {
    memory_bytes: usize,
    memory_read_gigabytes_per_second: f64,
    cache_bytes: usize,
    cache_read_gigabytes_per_second: f64,
    f32_gigaflops_per_second: f64,
    int8_gigaops_per_second: f64,
    amx_int8_gigaops_per_second: Option<f64>,
    amx_bf16_gigaflops_per_second: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Row {
    operator: String,
    shape: String,
    kernel: Option<String>,
    /// Whether weights come from memory, and not from a cache.
    cold: bool,
    median_us: f64,
    least_us: f64,
    bytes: u64,
    flops: u64,
    gigabytes_per_second: f64,
    gigaflops_per_second: f64,
    /// Peak that bounds it.
    bound: &'static str,
    /// Least time by that peak, as a part of the median.
    share: f64,
}

/// Measures the peaks, then every operator that is asked for.
pub fn run(args: &Ops) -> Result<()> {
    let backend = loaded::cpu_only(&args.device, ActivationsArg::Auto, "bench ops")?;
    let threads = loaded::threads(&args.device);
    let pattern = args.ops.as_deref().unwrap_or("*");
    let table = Table::new(backend.as_ref(), pattern, args.quick);
    if !table.any() {
        return Err(exit::usage(format!(
            "--ops: {pattern:?} fits none of: {}",
            table.names().join(", ")
        )));
    }
    let peaks = measure_peaks(threads, args.quick)?;
    if !args.json {
        print_peaks(&peaks)?;
        console::line(&format!(
            "{:<22} {:<30} {:>10} {:>8} {:>9} {:>7}  bound",
            "operator", "shape", "median", "GB/s", "GFLOP/s", "share"
        ))?;
    }
    let mut rows = Vec::new();
    table.each(&mut |case| {
        let row = measure(case, &peaks, args.quick)?;
        if !args.json {
            print(&row)?;
        }
        rows.push(row);
        Ok(())
    })?;
    if args.json {
        console::json(&Report {
            device: backend.name(),
            threads,
            activations: loaded::activations_name(backend.as_ref()),
            quick: args.quick,
            peaks: PeaksReport::new(&peaks),
            ops: rows,
        })?;
    } else {
        console::note(&backend.name());
    }
    Ok(())
}

fn measure_peaks(threads: usize, quick: bool) -> Result<Peaks> {
    let quarter = loaded::physical_memory().map_or(usize::MAX, |bytes| (bytes / 4) as usize);
    let (bytes, search) = match quick {
        true => (CACHE_BYTES, Duration::ZERO),
        false => (MEMORY_BYTES.min(quarter), SEARCH),
    };
    Ok(Peaks::measure(&Pool::new(threads), loaded::level()?, bytes, search))
}

impl PeaksReport {
    fn new(peaks: &Peaks) -> Self {
        Self {
            memory_bytes: peaks.memory_bytes,
            memory_read_gigabytes_per_second: peaks.memory_read / 1e9,
            cache_bytes: CACHE_BYTES,
            cache_read_gigabytes_per_second: peaks.cache_read / 1e9,
            f32_gigaflops_per_second: peaks.f32_operations / 1e9,
            int8_gigaops_per_second: peaks.int8_operations / 1e9,
            amx_int8_gigaops_per_second: peaks.amx_int8_operations.map(|peak| peak / 1e9),
            amx_bf16_gigaflops_per_second: peaks.amx_bf16_operations.map(|peak| peak / 1e9),
        }
    }
}

fn print_peaks(peaks: &Peaks) -> Result<()> {
    let line = |name: &str, value: f64, unit: &str| {
        console::line(&format!("{name:<34} {:>9.1} {unit}", value / 1e9))
    };
    let size = |bytes: usize| format!("read, buffer of {} MiB", bytes >> 20);
    line(&size(peaks.memory_bytes), peaks.memory_read, "GB/s")?;
    line(&size(CACHE_BYTES), peaks.cache_read, "GB/s")?;
    line("f32 multiply-adds", peaks.f32_operations, "GFLOP/s")?;
    line("int8 multiply-adds", peaks.int8_operations, "GOP/s")?;
    if let Some(peak) = peaks.amx_int8_operations {
        line("int8 multiply-adds, tiles", peak, "GOP/s")?;
    }
    if let Some(peak) = peaks.amx_bf16_operations {
        line("bf16 multiply-adds, tiles", peak, "GFLOP/s")?;
    }
    Ok(console::line("")?)
}

/// The peak of `arithmetic` and its name. A kernel that names AMX is held to the tiles' peak.
fn arithmetic_peak(arithmetic: Arithmetic, peaks: &Peaks) -> (f64, &'static str) {
    match arithmetic {
        Arithmetic::F32 => (peaks.f32_operations, "f32"),
        Arithmetic::Int8 => (peaks.int8_operations, "int8"),
        Arithmetic::AmxBf16 => {
            (peaks.amx_bf16_operations.unwrap_or(peaks.f32_operations), "amx bf16")
        }
        Arithmetic::AmxSplit => {
            (peaks.amx_bf16_operations.map_or(peaks.f32_operations, |p| p / 6.0), "amx split")
        }
    }
}

fn measure(mut case: Case<'_>, peaks: &Peaks, quick: bool) -> Result<Row> {
    let (least, together) = if quick { (1, Duration::ZERO) } else { (RUNS[0], TOGETHER) };
    // Warms up what every run uses; cold weights stay cold, since runs take turns at them.
    (case.run)(0)?;
    let mut seconds = Vec::new();
    let start = Instant::now();
    while seconds.len() < least || (start.elapsed() < together && seconds.len() < RUNS[1]) {
        let start = Instant::now();
        (case.run)(seconds.len() + 1)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2].max(1e-9);
    let (read, place) = match case.cold {
        true => (peaks.memory_read, "memory"),
        false => (peaks.cache_read, "cache"),
    };
    let (operations, unit) = arithmetic_peak(case.arithmetic, peaks);
    let (by_reading, by_counting) = (case.bytes as f64 / read, case.flops as f64 / operations);
    let bound = if by_reading >= by_counting { place } else { unit };
    Ok(Row {
        operator: case.name,
        shape: case.shape,
        kernel: case.kernel,
        cold: case.cold,
        median_us: median * 1e6,
        least_us: seconds[0] * 1e6,
        bytes: case.bytes,
        flops: case.flops,
        gigabytes_per_second: case.bytes as f64 / median / 1e9,
        gigaflops_per_second: case.flops as f64 / median / 1e9,
        bound,
        share: by_reading.max(by_counting) / median,
    })
}

fn print(row: &Row) -> Result<()> {
    let shape = if row.cold { format!("{} cold", row.shape) } else { row.shape.clone() };
    Ok(console::line(&format!(
        "{:<22} {:<30} {:>7.1} µs {:>8.2} {:>9.1} {:>5.1} %  {}",
        row.operator,
        shape,
        row.median_us,
        row.gigabytes_per_second,
        row.gigaflops_per_second,
        row.share * 100.0,
        row.bound
    ))?)
}
