//! Which root mean square `Ŵ` should have, searched for one matrix on some of its own tiles.
//!
//! The tiles are scaled, encoded and scaled back; the scale that leaves least squared error is the matrix's. What
//! the encoder is given later also carries the errors of other inputs, so the tiles are made as much larger as
//! `L` says these will make them. The error is flat around its least value and known from few tiles, so the answer
//! is the vertex of a parabola through five scales, not the best of them. Tiles are chosen by the shape alone.

use super::basis::Scales;
use super::feedback::Coder;
use super::ldl::BLOCK;
use super::panels::Panels;
use crate::error::ConvertError;
use crate::matrix::Matrix;
use marlin_quant::exl3::hadamard;
use marlin_quant::exl3::ring::TILE;
use marlin_tensor::BackendError;
use rayon::prelude::*;

/// Distance of neighbouring scales.
const STEP: f64 = 0.07;
/// Scales on both sides of the one in the middle.
const SIDE: i32 = 2;
/// How far the middle may move from where it starts, in steps.
const FARTHEST: i32 = 6;
/// Tiles that one task encodes.
const TOGETHER: usize = 8;
/// Tiles of a band of outputs beside each other.
const IN_BAND: usize = hadamard::BLOCK / BLOCK;

/// Factor on the root mean square that `scales` give the `[n, k]` matrix of `panels`, searched on about `tiles`
/// tiles; `l` is the unit lower factor of its Hessian.
///
/// # Errors
/// When the weights cannot be read, or the encoder's device fails.
pub fn gain(
    panels: &Panels,
    coder: &Coder,
    scales: &Scales,
    l: Option<&Matrix>,
    tiles: usize,
) -> Result<f64, ConvertError> {
    let larger = l.map_or(1.0, |l| inflation(l, coder.rate.bits()));
    let mut sample = sample(panels, scales, tiles)?;
    sample.iter_mut().for_each(|v| *v *= larger);
    let at = |step: i32| 1.0 + STEP * f64::from(step);
    let mut found: Vec<(i32, f64)> = Vec::new();
    let mut middle = 0;
    loop {
        for step in middle - SIDE..=middle + SIDE {
            if found.iter().all(|f| f.0 != step) {
                found.push((step, error(coder, &sample, at(step) as f32)?));
            }
        }
        let best = found.iter().min_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |f| f.0);
        // At the rim of what was looked at: the least may lie beyond.
        if (best - middle).abs() < SIDE || best.abs() >= FARTHEST {
            break;
        }
        middle = best;
    }
    let y = |offset: i32| found.iter().find(|f| f.0 == middle + offset).map_or(0.0, |f| f.1);
    // Least squares through five points at equal distances.
    let bend = (2.0 * (y(-2) + y(2)) - y(-1) - 2.0 * y(0) - y(1)) / 14.0;
    let slope = (2.0 * (y(2) - y(-2)) + y(1) - y(-1)) / 10.0;
    let vertex = if bend > 0.0 { -slope / (2.0 * bend) } else { 0.0 };
    Ok(at(middle) + STEP * vertex.clamp(-f64::from(SIDE), f64::from(SIDE)))
}

/// Squared error of `sample`, encoded at `gain` times its size.
fn error(coder: &Coder, sample: &[f32], gain: f32) -> Result<f64, BackendError> {
    let tasks = sample.par_chunks(coder.encoder.together().max(TOGETHER) * TILE);
    let errors = tasks.map(|weights| {
        let targets: Vec<f32> = weights.iter().map(|w| w * gain).collect();
        let (mut states, mut decoded) = (vec![0; targets.len()], vec![0.0; targets.len()]);
        coder.encode(&targets, &mut states, &mut decoded)?;
        let lost = |(w, q): (&f32, &f32)| f64::from(w - q / gain).powi(2);
        Ok(weights.iter().zip(&decoded).map(lost).sum::<f64>())
    });
    let errors: Vec<f64> = errors.collect::<Result<_, BackendError>>()?;
    Ok(errors.iter().sum())
}

/// Tiles of the rotated matrix, outputs by inputs, from bands all over it.
fn sample(panels: &Panels, scales: &Scales, tiles: usize) -> Result<Vec<f32>, ConvertError> {
    let (n, k) = (scales.svh.len(), scales.suh.len());
    let (bands, columns) = (n / hadamard::BLOCK, k / BLOCK);
    let used = tiles.div_ceil(IN_BAND).clamp(1, bands);
    let of_band = tiles.div_ceil(used).min(IN_BAND * columns);
    let mut out = Vec::with_capacity(used * of_band * TILE);
    for i in 0..used {
        let first = i * bands / used * hadamard::BLOCK;
        let rows = first..first + hadamard::BLOCK;
        let w = scales.part(rows.clone()).rotate(&panels.rows(rows)?);
        for t in 0..of_band {
            let place = t * IN_BAND * columns / of_band;
            let (row, column) = ((place + i) % IN_BAND, (place / IN_BAND + i) % columns);
            for o in 0..BLOCK {
                out.extend_from_slice(&w.row(row * BLOCK + o)[column * BLOCK..][..BLOCK]);
            }
        }
    }
    Ok(out)
}

/// How much larger targets are than weights, root mean square, when errors of `bits` per weight are fed back
/// through the unit lower `l`.
fn inflation(l: &Matrix, bits: f64) -> f32 {
    let below = (0..l.rows).map(|j| {
        let group = j / BLOCK * BLOCK;
        l.row(j)[..group].iter().map(|v| f64::from(*v).powi(2)).sum::<f64>()
    });
    let fed_back = below.sum::<f64>() / l.rows as f64 * 4f64.powf(-bits);
    (1.0 + fed_back).sqrt() as f32
}
