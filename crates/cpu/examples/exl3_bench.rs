//! Speed of the EXL3 kernels per rate: `cargo run --release -p marlin-cpu --example exl3_bench
//! [OUT IN [THREADS [K]]]`. Random rings; the best is what an undisturbed core does.

use marlin_cpu::{Kernel, Level, Pool, RowKind, simd};
use marlin_quant::exl3::Rate;
use marlin_quant::exl3::codebook::{MCG_MULTIPLIER, MUL1_MULTIPLIER};
use marlin_tensor::{DType, HostTensor, Weight};
use std::time::{Duration, Instant};

fn weight(rate: Rate, marker: Option<(&'static str, u32)>, n: usize, k: usize) -> Weight {
    let mut state = 1u64;
    let mut noise = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 48) as u16
    };
    let shape = vec![k / 16, n / 16, rate.half_words()];
    let words: usize = shape.iter().product();
    let trellis: Vec<u8> = (0..words).flat_map(|_| noise().to_le_bytes()).collect();
    // fp16 1.0
    let scales = |n: usize| HostTensor::new(DType::F16, vec![n], [0x00, 0x3c].repeat(n).into());
    let mut parts = vec![
        ("trellis", HostTensor::new(DType::I16, shape, trellis.into()).expect("shape")),
        ("suh", scales(k).expect("shape")),
        ("svh", scales(n).expect("shape")),
    ];
    if let Some((name, m)) = marker {
        let marker = HostTensor::new(DType::I32, vec![], m.to_le_bytes().to_vec().into());
        parts.push((name, marker.expect("shape")));
    }
    Weight { format: "exl3", out_features: n, in_features: k, parts }
}

/// Median and best seconds of a call, over half a second of samples of at least 0.3 ms.
fn time(kernel: &dyn Kernel, rows: usize, pool: &Pool) -> [f64; 2] {
    let x: Vec<f32> = (0..rows * kernel.in_features()).map(|i| (i % 17) as f32 - 8.0).collect();
    let mut out = vec![0.0; rows * kernel.out_features()];
    let kind = if rows <= 8 { RowKind::Decode } else { RowKind::Prompt };
    let mut sample = || {
        let (start, mut calls) = (Instant::now(), 0);
        while calls == 0 || start.elapsed() < Duration::from_micros(300) {
            kernel.matmul(&x, rows, kind, &mut out, pool);
            calls += 1;
        }
        start.elapsed().as_secs_f64() / f64::from(calls)
    };
    sample();
    let mut seconds = Vec::new();
    let start = Instant::now();
    while seconds.len() < 7 || start.elapsed() < Duration::from_millis(500) {
        seconds.push(sample());
    }
    seconds.sort_by(f64::total_cmp);
    [seconds[seconds.len() / 2], seconds[0]]
}

fn main() {
    let arguments: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let at = |i: usize, default: usize| arguments.get(i).copied().unwrap_or(default);
    let (n, k, threads) = (at(0, 4096), at(1, 4096), at(2, 2));
    let pool = Pool::new(threads);
    println!("[{n}, {k}], {threads} threads, median (best); Gw/s: 1e9 weights times rows a second");
    println!(
        "level        codebook activations    K           1 row: us    GB/s         Gw/s  256 rows: Gw/s"
    );
    for level in Level::ALL.into_iter().filter(|l| l.is_supported()) {
        for (codebook, marker, float) in [
            ("mul1", Some(("mul1", MUL1_MULTIPLIER)), false),
            ("mul1", Some(("mul1", MUL1_MULTIPLIER)), true),
            ("mcg", Some(("mcg", MCG_MULTIPLIER)), false),
            ("mcg", Some(("mcg", MCG_MULTIPLIER)), true),
            ("3inst", None, false),
            ("3inst", None, true),
        ] {
            for rate in Rate::ALL {
                let half = rate.is_half() && codebook != "mul1";
                if half || arguments.get(3).is_some_and(|&b| rate.twice_bits() != 2 * b) {
                    continue;
                }
                let weight = weight(rate, marker, n, k);
                let Some(kernel) = simd::load(&weight, level, float) else { continue };
                let ([one, one_best], [many, many_best]) =
                    (time(&*kernel, 1, &pool), time(&*kernel, 256, &pool));
                let (weights, bytes) = ((n * k) as f64 / 1e9, kernel.bytes() as f64 / 1e9);
                println!(
                    "{:12} {codebook:8} {:11} {:4} {:9.1} ({:7.1}) {:7.2} {:5.2} ({:5.2}) {:8.1} ({:5.1})",
                    level.to_string(),
                    if float { "float" } else { "auto" },
                    rate.bits(),
                    one * 1e6,
                    one_best * 1e6,
                    bytes / one,
                    weights / one,
                    weights / one_best,
                    256.0 * weights / many,
                    256.0 * weights / many_best,
                );
            }
        }
    }
}
