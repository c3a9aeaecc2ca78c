//! `marlin bench encode`: speed and distortion of what encodes EXL3 tiles.

use crate::args::bench::Encode;
use crate::{console, device, exit};
use anyhow::Result;
use marlin_quant::exl3::ring::TILE;
use marlin_quant::exl3::{Codebook, Rate, TileEncoder};
use serde::Serialize;
use std::time::Instant;

/// Factors of the codebook's root mean square, of which the best counts.
const SCALES: [f32; 4] = [0.85, 0.92, 1.0, 1.08];
/// Tiles a processor's thread encodes at a time; a device says how many it wants.
const FEWEST_TILES: usize = 24;
/// Least seconds of a run.
const RUN_SECONDS: f64 = 0.1;

/// One rate's result.
#[derive(Debug, Serialize)]
struct Row {
    bits: f64,
    codebook: &'static str,
    /// Median of the runs; on the processor one thread's, since matrices are spread over threads.
    weights_per_second: f64,
    least: f64,
    most: f64,
    /// Mean squared error of weights of variance 1.
    distortion: f64,
    tiles: usize,
    device: String,
}

/// Measures every rate.
pub fn run(args: &Encode) -> Result<()> {
    let encoder = device::encoder(&args.device)?;
    let codebook = args.codebook.codebook();
    let known = marlin_convert::allocate::rates(codebook);
    if let Some(bits) = args.bits.iter().find(|bits| !known.contains(bits)) {
        return Err(exit::usage(format!("--bits {bits}: {} has no such rate", codebook.name())));
    }
    let bits = if args.bits.is_empty() { &known } else { &args.bits };
    let tiles = args.tiles.map_or(encoder.together().max(FEWEST_TILES), |n| n as usize);
    let weights = gaussian(tiles * TILE);
    if !args.json {
        console::line(&format!(
            "{tiles} tiles of Gaussian weights on {}; median of {} runs\n\
             bits  codebook  weights/s (least to most)            distortion",
            encoder.name(),
            args.repetitions
        ))?;
    }
    let mut rows = Vec::new();
    for rate in bits.iter().filter_map(|&bits| Rate::from_bits(bits)) {
        let row = measure(encoder.as_ref(), &weights, rate, codebook, args.repetitions)?;
        if !args.json {
            let spread = format!("({:.0} to {:.0})", row.least, row.most);
            console::line(&format!(
                "{:<5} {:<9} {:>9.0} {spread:<26} {:.3e}",
                row.bits, row.codebook, row.weights_per_second, row.distortion
            ))?;
        }
        rows.push(row);
    }
    if args.json { console::json(&rows) } else { Ok(()) }
}

fn measure(
    encoder: &dyn TileEncoder,
    weights: &[f32],
    rate: Rate,
    codebook: Codebook,
    runs: u16,
) -> Result<Row> {
    let table = codebook.table();
    let mut states = vec![0; weights.len()];
    let rms = mean_square(table.iter().copied()).sqrt() as f32;
    let mut distortion = f64::INFINITY;
    for scale in SCALES.map(|scale| scale * rms) {
        let scaled: Vec<f32> = weights.iter().map(|w| w * scale).collect();
        encoder.encode(&scaled, rate, codebook, &mut states)?;
        let error = states.iter().zip(weights).map(|(&s, w)| table[usize::from(s)] / scale - w);
        distortion = distortion.min(mean_square(error));
    }
    let mut speeds = Vec::new();
    for _ in 0..runs {
        let (start, mut done) = (Instant::now(), 0);
        while start.elapsed().as_secs_f64() < RUN_SECONDS {
            encoder.encode(weights, rate, codebook, &mut states)?;
            done += weights.len();
        }
        speeds.push(done as f64 / start.elapsed().as_secs_f64());
    }
    speeds.sort_by(f64::total_cmp);
    Ok(Row {
        bits: rate.bits(),
        codebook: codebook.name(),
        weights_per_second: speeds[speeds.len() / 2],
        least: speeds[0],
        most: speeds[speeds.len() - 1],
        distortion,
        tiles: weights.len() / TILE,
        device: encoder.name(),
    })
}

fn mean_square(values: impl ExactSizeIterator<Item = f32>) -> f64 {
    let n = values.len() as f64;
    values.map(|v| f64::from(v).powi(2)).sum::<f64>() / n
}

/// `n` numbers of variance 1, always the same.
fn gaussian(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        ((state >> 40) as f32 + 0.5) / (1 << 24) as f32
    };
    let mut normal = || (-2.0 * uniform().ln()).sqrt() * (uniform() * std::f32::consts::TAU).cos();
    (0..n).map(|_| normal()).collect()
}
