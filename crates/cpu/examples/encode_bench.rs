//! Speed and distortion of the EXL3 encoders: `cargo run --release -p marlin-cpu --example
//! encode_bench [TILES [RATE [LEVEL]]]`. Unit Gaussian tiles on one thread, encoded at a few
//! scales; the distortion is that of the best one, relative to the values.

use marlin_cpu::{CpuEncoder, Level};
use marlin_quant::exl3::codebook::{MCG_MULTIPLIER, MUL1_MULTIPLIER};
use marlin_quant::exl3::ring::TILE;
use marlin_quant::exl3::{Codebook, Rate, TileEncoder};
use std::time::Instant;

/// Factors of the codebook's root mean square.
const SCALES: [f32; 4] = [0.85, 0.92, 1.0, 1.08];
/// Measurements, after those of the distortion.
const RUNS: usize = 5;
/// At least: the clock of a thread ticks a few hundred times a second.
const RUN_SECONDS: f64 = 0.08;

/// `n` numbers of variance 1.
fn gaussian(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        ((state >> 40) as f32 + 0.5) / (1 << 24) as f32
    };
    let mut normal = || (-2.0 * uniform().ln()).sqrt() * (uniform() * std::f32::consts::TAU).cos();
    (0..n).map(|_| normal()).collect()
}

fn mean_square(values: impl ExactSizeIterator<Item = f32>) -> f64 {
    let n = values.len() as f64;
    values.map(|v| f64::from(v).powi(2)).sum::<f64>() / n
}

/// Seconds this thread has had a core, so that other programs disturb less; elsewhere than on Linux
/// seconds that have passed.
fn seconds(start: Instant) -> f64 {
    let busy = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let busy = busy.and_then(|text| text.split(' ').next()?.parse::<f64>().ok());
    busy.map_or(start.elapsed().as_secs_f64(), |nanoseconds| nanoseconds / 1e9)
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let tiles = arguments.first().map_or(24, |n| n.parse().expect("a number of tiles"));
    let only: Option<f64> = arguments.get(1).and_then(|rate| rate.parse().ok());
    let level = |name: &String| vec![name.parse::<Level>().expect("a level")];
    let levels = arguments.get(2).map_or(vec![Level::Avx2, Level::Avx512, Level::Neon], level);
    let start = Instant::now();
    let source = gaussian(tiles * TILE);
    println!("{tiles} tiles, 1 thread; 1000 weights/s on a core: median of {RUNS} (min-max)");
    println!("rate  codebook  level   kw/s               mse");
    for level in levels.into_iter().filter(|level| level.is_supported()) {
        let encoder = CpuEncoder::new(level, 1);
        for codebook in
            [Codebook::Mul1(MUL1_MULTIPLIER), Codebook::Mcg(MCG_MULTIPLIER), Codebook::ThreeInst]
        {
            let table = codebook.table();
            let rms = mean_square(table.iter().copied()).sqrt() as f32;
            for rate in Rate::ALL {
                if only.is_some_and(|bits| rate.bits() != bits) {
                    continue;
                }
                let mut states = vec![0; source.len()];
                let distortions = SCALES.map(|scale| {
                    let scale = scale * rms;
                    let scaled: Vec<f32> = source.iter().map(|v| v * scale).collect();
                    encoder.encode(&scaled, rate, codebook, &mut states);
                    let error =
                        states.iter().zip(&source).map(|(&s, v)| table[usize::from(s)] / scale - v);
                    mean_square(error)
                });
                let mut speeds = [(); RUNS].map(|()| {
                    let (before, mut weights) = (seconds(start), 0.0);
                    while seconds(start) - before < RUN_SECONDS {
                        encoder.encode(&source, rate, codebook, &mut states);
                        weights += source.len() as f64;
                    }
                    weights / (seconds(start) - before) / 1e3
                });
                speeds.sort_by(f64::total_cmp);
                let spread = format!("({:.0}-{:.0})", speeds[0], speeds[RUNS - 1]);
                println!(
                    "{:<5} {:<9} {:<7} {:>5.0} {spread:<12} {:.3e}",
                    rate.bits(),
                    codebook.name(),
                    level.to_string(),
                    speeds[RUNS / 2],
                    distortions.into_iter().fold(f64::INFINITY, f64::min),
                );
            }
        }
    }
}
