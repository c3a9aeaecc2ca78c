//! `marlin bench ops`: every operator by itself, beside what the machine can do.

mod cases;
mod draws;
mod gpu;
mod host;
mod processor;
mod weights;

use crate::args::ActivationsArg;
use crate::args::bench::Ops;
use crate::{console, device, exit};
use anyhow::Result;
use cases::{Case, Table};
use gpu::Gpu;
use processor::{PeaksReport, Processor};
use serde::Serialize;

#[derive(Debug, Serialize)]
struct Report {
    device: String,
    threads: usize,
    activations: &'static str,
    quick: bool,
    /// Of a processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    peaks: Option<PeaksReport>,
    /// Of a GPU: bytes that a large copy reads and writes, and 10⁹ of them a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    copy: Option<CopyReport>,
    ops: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct CopyReport {
    bytes: usize,
    gigabytes_per_second: f64,
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
    /// Reading, or on a GPU copying, as many bytes as it works on, measured beside it.
    peak_gigabytes_per_second: f64,
    /// The arithmetic it uses, measured beside it; not known of a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_gigaflops_per_second: Option<f64>,
    /// Peak that bounds it.
    bound: &'static str,
    /// Least time by that peak, as a part of the time it took.
    share: f64,
}

impl Row {
    /// Of `case`, which took `seconds`, and by the peak called `bound` could take `share` of that.
    fn new(
        case: Case<'_>,
        mut seconds: Vec<f64>,
        read: f64,
        share: f64,
        bound: &'static str,
    ) -> Self {
        let median = median(&mut seconds);
        Self {
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
            peak_gigabytes_per_second: read / 1e9,
            peak_gigaflops_per_second: None,
            bound,
            share,
        }
    }
}

/// Median of `values`, which it sorts, and more than nothing.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2].max(1e-9)
}

/// What times operators.
enum Meter<'a> {
    Processor(Box<Processor>),
    Gpu(Box<Gpu<'a>>),
}

/// Measures the peaks, then every operator that is asked for.
pub fn run(args: &Ops) -> Result<()> {
    let found = device::gpu(args.device.device)?;
    let backend = device::backend(&args.device, ActivationsArg::Auto)?;
    let pattern = args.ops.as_deref().unwrap_or("*");
    let table = Table::new(backend.as_ref(), pattern, args.quick, found.is_none());
    if !table.any() {
        return Err(exit::usage(format!(
            "--ops: {pattern:?} fits none of: {}",
            table.names().join(", ")
        )));
    }
    let mut meter = match &found {
        None => Meter::Processor(Box::new(Processor::new(&args.device, args.quick)?)),
        Some(gpu) => {
            let gpu = Gpu::new(backend.as_ref(), gpu.is_software, args.quick)?;
            Meter::Gpu(Box::new(gpu))
        }
    };
    if !args.json {
        head(&meter)?;
    }
    let mut rows = Vec::new();
    table.each(&mut |case| {
        let row = match &mut meter {
            Meter::Processor(processor) => processor.measure(case)?,
            Meter::Gpu(gpu) => gpu.measure(case)?,
        };
        if !args.json {
            print(&row)?;
        }
        rows.push(row);
        Ok(())
    })?;
    if !args.json {
        console::note(&backend.name());
        return Ok(());
    }
    let (peaks, copy) = match &meter {
        Meter::Processor(processor) => (Some(processor.report()), None),
        Meter::Gpu(gpu) => {
            let (bytes, speed) = gpu.large_copy();
            (None, Some(CopyReport { bytes, gigabytes_per_second: speed / 1e9 }))
        }
    };
    console::json(&Report {
        device: backend.name(),
        threads: device::threads(&args.device),
        activations: device::activations_name(backend.as_ref()),
        quick: args.quick,
        peaks,
        copy,
        ops: rows,
    })
}

fn head(meter: &Meter<'_>) -> Result<()> {
    match meter {
        Meter::Processor(processor) => processor.print()?,
        Meter::Gpu(gpu) => {
            let (bytes, speed) = gpu.large_copy();
            let name = format!("copy, {} MiB read and written", bytes >> 20);
            console::line(&format!("{name:<34} {:>9.1} GB/s\n", speed / 1e9))?;
        }
    }
    Ok(console::line(&format!(
        "{:<22} {:<30} {:>10} {:>8} {:>9} {:>7}  bound",
        "operator", "shape", "median", "GB/s", "GFLOP/s", "share"
    ))?)
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
