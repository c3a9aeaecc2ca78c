//! The doubly rotated, scaled basis in which weights are quantized, and how its scales are chosen.
//!
//! Matrices here are `[out_features, in_features]`, both padded to 128, so
//!
//! ```text
//! W = diag(svh) · P · Ŵ · P · diag(suh)        P = blockdiag(H_128) / √128
//! ```
//!
//! The trellis makes an error of the same size everywhere in `Ŵ`; at the layer's output, the error of
//! input `i` costs `suhᵢ² Hᵢᵢ` and that of output `o` costs `svhₒ²`, while `Ŵ` must have unit variance in
//! every block. Minimising the sum under that constraint would give `suhᵢ ∝ (Σₒ Wₒᵢ² / Hᵢᵢ)^¼` and
//! `svhₒ ∝ (Σᵢ Wₒᵢ²)^¼` within a block. Measured at the logits, scales that follow the channels' RMS are a
//! little better (`docs/quantization.md`), and are the default; between blocks both follow the block's energy.

use crate::error::ConvertError;
use crate::matrix::Matrix;
use half::f16;
use marlin_quant::exl3::hadamard::{BLOCK, rotate, rotate_rows};
use rayon::prelude::*;
use std::ops::Range;

/// Shows panels of rows of a matrix, each with the number of its first row, in order.
pub type Visit<'a> = dyn Fn(&mut dyn FnMut(usize, &Matrix)) -> Result<(), ConvertError> + 'a;

/// How channel scales follow the energy of their channels.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ScaleRule {
    /// Exponent of a channel's RMS: 1 makes all channels of `Ŵ` alike, ½ minimises the sum of errors.
    pub exponent: f32,
    /// Exponent of `1 / Hᵢᵢ` for inputs: ¼ minimises the sum of errors, 0 ignores the inputs.
    pub hessian_exponent: f32,
}

/// Scales of both sides, signs included; every value is exactly an fp16.
#[derive(Debug, Clone)]
pub struct Scales {
    /// Per input, `[k]`.
    pub suh: Vec<f32>,
    /// Per output, `[n]`; 0 where the whole row is zero.
    pub svh: Vec<f32>,
}

impl Scales {
    /// Scales of the `[n, k]` matrix that `visit` shows a panel of rows at a time, with the first row's
    /// number, such that blocks of `Ŵ` have root mean square `rms`. `diagonal` is that of the Hessian; signs
    /// are drawn from the seeds.
    ///
    /// # Errors
    /// Those of `visit`.
    pub fn choose(
        [n, k]: [usize; 2],
        visit: &Visit,
        diagonal: Option<&[f32]>,
        rule: ScaleRule,
        rms: f32,
        seeds: (u64, u64),
    ) -> Result<Self, ConvertError> {
        let mut row_energy = vec![0.0f64; n];
        visit(&mut |first, w| {
            row_energy[first..first + w.rows].par_iter_mut().enumerate().for_each(|(o, energy)| {
                *energy = w.row(o).iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
            });
        })?;
        let mut svh = side(&row_energy, |e, _| e.powf(f64::from(rule.exponent) / 2.0));
        // Outputs of unit mean: the magnitude of the matrix goes to the inputs.
        let mean = svh.iter().sum::<f64>() / n as f64;
        svh.iter_mut().for_each(|s| *s /= mean);
        let mut column_energy = vec![0.0f64; k];
        visit(&mut |first, w| {
            for o in (0..w.rows).filter(|o| row_energy[first + o] > 0.0) {
                for (sum, &v) in column_energy.iter_mut().zip(w.row(o)) {
                    *sum += (f64::from(v) / svh[first + o]).powi(2);
                }
            }
        })?;
        let suh = side(&column_energy, |e, i| {
            let own = e.powf(f64::from(rule.exponent) / 2.0);
            match diagonal {
                Some(h) => own * f64::from(h[i]).max(1e-30).powf(-f64::from(rule.hessian_exponent)),
                None => own,
            }
        });
        // `side` leaves one unit of energy per element of its own side: n·k in all, over k inputs.
        let gain = f64::from(rms).recip() / (n as f64).sqrt();
        let suh = suh.iter().map(|s| s * gain);
        let signed = |values: &mut dyn Iterator<Item = f64>, seed: u64| {
            let mut random = Random(seed);
            values.map(|v| round(if random.draw() >> 63 == 0 { v } else { -v })).collect()
        };
        let mut scales = Self {
            suh: signed(&mut suh.into_iter(), seeds.0),
            svh: signed(&mut svh.into_iter(), seeds.1),
        };
        for (s, _) in scales.svh.iter_mut().zip(&row_energy).filter(|(_, e)| **e == 0.0) {
            *s = 0.0;
        }
        Ok(scales)
    }

    /// Of the outputs `rows` alone.
    pub fn part(&self, rows: Range<usize>) -> Self {
        Self { suh: self.suh.clone(), svh: self.svh[rows].to_vec() }
    }

    /// `Ŵ` of `w`.
    pub fn rotate(&self, w: &Matrix) -> Matrix {
        let mut out = w.clone();
        out.data.par_chunks_mut(BLOCK * w.columns).enumerate().for_each(|(band, rows)| {
            for (row, &s) in rows.chunks_exact_mut(w.columns).zip(&self.svh[band * BLOCK..]) {
                let inverse = if s == 0.0 { 0.0 } else { 1.0 / s };
                row.iter_mut().zip(&self.suh).for_each(|(v, u)| *v *= inverse / u);
                rotate(row);
            }
            rotate_rows(rows, w.columns);
        });
        out
    }

    /// `P · Ŵ · P`: the decoded weights in the original basis, before the scales.
    pub fn unscaled(rotated: &Matrix) -> Matrix {
        let mut out = rotated.clone();
        out.data.par_chunks_mut(BLOCK * out.columns).for_each(|rows| {
            rows.chunks_exact_mut(rotated.columns).for_each(rotate);
            rotate_rows(rows, rotated.columns);
        });
        out
    }

    /// `diag(svh) · unscaled · diag(suh)`.
    pub fn apply(&self, unscaled: &Matrix) -> Matrix {
        let mut out = unscaled.clone();
        out.data.par_chunks_mut(unscaled.columns).zip(&self.svh).for_each(|(row, &s)| {
            row.iter_mut().zip(&self.suh).for_each(|(v, u)| *v *= s * u);
        });
        out
    }

    /// The Hessian of the rotated, scaled inputs: `P · (suh suhᵀ ∘ H) · P`.
    pub fn hessian(&self, h: &Matrix) -> Matrix {
        let mut out = h.clone();
        out.data.par_chunks_mut(BLOCK * h.columns).enumerate().for_each(|(band, rows)| {
            for (row, &s) in rows.chunks_exact_mut(h.columns).zip(&self.suh[band * BLOCK..]) {
                row.iter_mut().zip(&self.suh).for_each(|(v, u)| *v *= s * u);
                rotate(row);
            }
            rotate_rows(rows, h.columns);
        });
        out
    }
}

/// Scales of one side: `shape` within each block of 128 channels, times what leaves every block with
/// one unit of energy per channel. Channels without energy get their block's mean.
fn side(energy: &[f64], shape: impl Fn(f64, usize) -> f64) -> Vec<f64> {
    let mut scales = vec![0.1; energy.len()];
    for (b, (energy, scales)) in energy.chunks(BLOCK).zip(scales.chunks_mut(BLOCK)).enumerate() {
        let used = energy.iter().filter(|e| **e > 0.0).count();
        if used == 0 {
            continue;
        }
        for (i, (s, &e)) in scales.iter_mut().zip(energy).enumerate() {
            *s = if e > 0.0 { shape(e, b * BLOCK + i) } else { 0.0 };
        }
        let left: f64 = scales
            .iter()
            .zip(energy)
            .filter(|(s, _)| **s > 0.0)
            .map(|(s, e)| e / (s * s))
            .sum::<f64>()
            / scales.len() as f64;
        scales.iter_mut().for_each(|s| *s *= left.sqrt());
        let mean = scales.iter().sum::<f64>() / used as f64;
        scales.iter_mut().filter(|s| **s == 0.0).for_each(|s| *s = mean);
    }
    scales
}

/// To the nearest normal fp16.
pub fn round(value: f64) -> f32 {
    let limit = f64::from(f16::MIN_POSITIVE);
    let magnitude = value.abs().clamp(limit, f64::from(f16::MAX));
    f16::from_f64(magnitude.copysign(value)).to_f32()
}

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(n: usize, k: usize) -> Matrix {
        let mut random = Random(7);
        let mut next = || (random.draw() >> 40) as f32 / (1 << 24) as f32 - 0.5;
        let mut w = Matrix::new(n, k, (0..n * k).map(|_| next()).collect());
        for o in 0..n {
            let gain = 0.01 * (1 + o % 7) as f32;
            w.row_mut(o).iter_mut().enumerate().for_each(|(i, v)| *v *= gain * (1 + i % 3) as f32);
        }
        w.row_mut(5).fill(0.0);
        w
    }

    fn choose(
        w: &Matrix,
        diagonal: Option<&[f32]>,
        rule: ScaleRule,
        rms: f32,
        seeds: (u64, u64),
    ) -> Scales {
        let visit = |each: &mut dyn FnMut(usize, &Matrix)| {
            each(0, &w.part(0..w.rows / 2));
            each(w.rows / 2, &w.part(w.rows / 2..w.rows));
            Ok(())
        };
        Scales::choose([w.rows, w.columns], &visit, diagonal, rule, rms, seeds).unwrap()
    }

    /// Rotating there and back is the identity, and a rotated weight with a rotated input gives the
    /// output of the plain ones.
    #[test]
    fn rotated_and_plain_weights_give_the_same_outputs() {
        let (n, k) = (256, 128);
        let w = example(n, k);
        for exponent in [0.5, 1.0] {
            let rule = ScaleRule { exponent, hessian_exponent: 0.25 };
            let diagonal: Vec<f32> = (0..k).map(|i| 0.1 + (i % 5) as f32).collect();
            let scales = choose(&w, Some(&diagonal), rule, 0.9, (1, 2));
            let rotated = scales.rotate(&w);
            let back = scales.apply(&Scales::unscaled(&rotated));
            for (a, b) in w.data.iter().zip(&back.data) {
                assert!((a - b).abs() < 2e-6, "{a} {b}");
            }
            for block in rotated.data.chunks(BLOCK * k) {
                let mean = block.iter().map(|v| v * v).sum::<f32>() / block.len() as f32;
                assert!((mean.sqrt() - 0.9).abs() < 0.02, "{}", mean.sqrt());
            }
            assert_eq!(scales.svh[5], 0.0);
        }
    }

    /// The quadratic form of the Hessian does not change with the basis.
    #[test]
    fn hessian_follows_the_basis() {
        let (n, k) = (128, 256);
        let w = example(n, k);
        let x = example(300, k);
        let h = x.gram();
        let scales =
            choose(&w, None, ScaleRule { exponent: 1.0, hessian_exponent: 0.0 }, 1.0, (3, 4));
        let form = |w: &Matrix, h: &Matrix, row: usize| {
            crate::matrix::dot(w.times(h).row(row), w.row(row))
        };
        // Output rotation mixes rows: compare what one input-side row gives.
        let mut scaled = w.clone();
        for o in 0..n {
            scaled.row_mut(o).iter_mut().zip(&scales.suh).for_each(|(v, s)| *v /= s);
            rotate(scaled.row_mut(o));
        }
        let rotated = scales.hessian(&h);
        for row in [0, 17, 90] {
            let (a, b) = (form(&w, &h, row), form(&scaled, &rotated, row));
            assert!((a - b).abs() < 1e-3 * a.abs(), "{a} {b}");
        }
    }
}
