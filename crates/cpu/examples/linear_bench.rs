//! Speed of every matrix kernel: `cargo run --release -p marlin-cpu --example linear_bench --
//! [FORMAT …] [--rows R,…] [--threads T,…] [--seconds S] [--level LEVEL] [--working-set MEGABYTES]
//! [--cpu-time]`. Per format, shape, activation path, thread count and rows: weight
//! bytes read (or repacked, for `load`) and products computed per second, the median of at least five timed batches.
//!
//! Matrices are laid out several times, 64 MB in all by default, and used in turn, so that decode (1 row)
//! reads from beyond the second-level cache as it does in a model. `--cpu-time` counts the time
//! this thread ran (Linux) and uses one thread: for machines that are not quiet.

use marlin_cpu::{Kernel, Level, Pool, RowKind, simd};
use marlin_quant::format;
use marlin_tensor::{DType, HostTensor, Weight};
use std::sync::OnceLock;
use std::time::Instant;

const FORMATS: [&str; 22] = [
    "f32",
    "f16",
    "bf16",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "q2_k",
    "q3_k",
    "q4_k",
    "q5_k",
    "q6_k",
    "iq4_nl",
    "iq4_xs",
    "mxfp4",
    "tq2_0",
    "iq3_s",
    "int4_g128",
    "int4_g32",
    "int8_g128",
    "int4_g128_ordered",
];

/// Bytes of matrices used in turn, unless `--working-set MEGABYTES` says otherwise.
const WORKING_SET: u64 = 64;

fn main() {
    let mut formats: Vec<String> = Vec::new();
    let mut seconds = 0.2;
    let mut working_set = WORKING_SET;
    let mut cpu_time = false;
    let (mut rows, mut threads) = (vec![1, 8, 512], vec![1, 2]);
    let numbers = |list: String| list.split(',').map(|n| n.parse().ok()).collect();
    let mut only: Option<Level> = None;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--seconds" => {
                seconds = arguments.next().and_then(|s| s.parse().ok()).expect("--seconds S");
            }
            "--level" => {
                only = Some(arguments.next().and_then(|s| s.parse().ok()).expect("--level LEVEL"));
            }
            "--working-set" => {
                working_set =
                    arguments.next().and_then(|s| s.parse().ok()).expect("--working-set MEGABYTES");
            }
            "--rows" => rows = arguments.next().and_then(numbers).expect("--rows R,…"),
            "--threads" => threads = arguments.next().and_then(numbers).expect("--threads T,…"),
            "--cpu-time" => cpu_time = true,
            id => formats.push(id.to_owned()),
        }
    }
    if formats.is_empty() {
        formats = FORMATS.iter().map(|&id| id.to_owned()).collect();
    }
    if cpu_time {
        threads = vec![1];
    }
    let clock = if cpu_time { thread_time } else { wall_time };
    println!(
        "{:34} {:>11} {:>3} {:>4} {:>8} {:>9}",
        "kernel", "out x in", "thr", "rows", "GB/s", "GFLOP/s"
    );
    for id in &formats {
        for (n, k) in [(576, 1536), (2048, 8192)] {
            let weight = weight(id, n, k);
            let copies = ((working_set << 20) / weight.bytes()).clamp(1, 64);
            for level in Level::ALL.into_iter().filter(|&l| l > Level::Scalar && l.is_supported()) {
                if only.is_some_and(|only| only != level) {
                    continue;
                }
                for float in [true, false] {
                    let names = [true, false].map(|float| simd::kernel_name(id, level, float));
                    if !float && names[0] == names[1] {
                        continue;
                    }
                    let start = clock();
                    let kernels: Option<Vec<_>> =
                        (0..copies).map(|_| simd::load(&weight, level, float)).collect();
                    let Some(kernels) = kernels else { continue };
                    let bytes: u64 = kernels.iter().map(|k| k.bytes()).sum();
                    println!(
                        "{:34} {:>11} load     {:>8.2}",
                        kernels[0].name(),
                        format!("{n}x{k}"),
                        bytes as f64 / (clock() - start) / 1e9,
                    );
                    for &threads in &threads {
                        let pool = Pool::new(threads);
                        for &rows in &rows {
                            measure(&kernels, rows, &pool, seconds, clock);
                        }
                    }
                }
            }
        }
    }
}

fn weight(id: &str, out_features: usize, in_features: usize) -> Weight {
    let mut state = 1u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    };
    let values: Vec<f32> =
        (0..out_features * in_features).map(|_| random() as f32 / (1 << 23) as f32 - 1.0).collect();
    if let Ok(weight) = format(id).pack(&values, out_features, in_features) {
        return weight;
    }
    // No encoder: speed does not depend on the values, so any bytes do.
    let bits: f64 = format(id).describe().bits_per_weight.parse().expect("a block format");
    let width = (in_features as f64 * bits / 8.0) as usize;
    let bytes: Vec<u8> = (0..out_features * width).map(|_| random() as u8).collect();
    let blocks = HostTensor::new(DType::U8, vec![out_features, width], bytes.into());
    let parts = vec![("blocks", blocks.expect("whole rows"))];
    Weight { format: format(id).id(), out_features, in_features, parts }
}

/// Seconds since the first call.
fn wall_time() -> f64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}

/// Seconds this thread has run; advances in scheduler ticks.
fn thread_time() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat");
    let nanoseconds = text.split(' ').next().and_then(|n| n.parse::<f64>().ok());
    nanoseconds.expect("nanoseconds") / 1e9
}

fn measure(
    kernels: &[Box<dyn Kernel>],
    rows: usize,
    pool: &Pool,
    seconds: f64,
    clock: fn() -> f64,
) {
    let (n, k) = (kernels[0].out_features(), kernels[0].in_features());
    let x: Vec<f32> = (0..rows * k).map(|i| ((i * 37 % 101) as f32 - 50.0) / 64.0).collect();
    let mut out = vec![0.0; rows * n];
    let kind = if rows <= 8 { RowKind::Decode } else { RowKind::Prompt };
    let mut turn = kernels.iter().cycle();
    let mut run = |times: usize| {
        let start = clock();
        for kernel in turn.by_ref().take(times) {
            kernel.matmul(&x, rows, kind, &mut out, pool);
        }
        (clock() - start) / times as f64
    };
    let mut times = 1;
    while run(times) * (times as f64) < seconds / 5.0 {
        times *= 2;
    }
    let mut samples: Vec<f64> = (0..5).map(|_| run(times)).collect();
    samples.sort_by(f64::total_cmp);
    let median = samples[samples.len() / 2];
    println!(
        "{:34} {:>11} {:>3} {rows:>4} {:>8.2} {:>9.1}",
        kernels[0].name(),
        format!("{n}x{k}"),
        pool.threads(),
        kernels[0].bytes() as f64 / median / 1e9,
        2.0 * (rows * n * k) as f64 / median / 1e9,
    );
}
