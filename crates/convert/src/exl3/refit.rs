//! Least-squares scales for tiles that are already chosen.
//!
//! With `Q = P Ŵ P` and inputs of second moment `H`, the output error of `diag(svh) Q diag(suh)` is quadratic
//! in either side's scales. Outputs have a closed form each; the inputs share one linear system
//! `((QᵀQ) ∘ H) suh = diag-sum(Q ∘ (W H))`, where `Q` carries the outputs' scales.

use super::basis::{Scales, round};
use super::ldl::solve;
use crate::matrix::{Matrix, dot};
use crate::metric::{Metric, Sum};
use marlin_tensor::BackendError;
use rayon::prelude::*;

/// Ridge that keeps input scales near what they were where the data says little.
const RIDGE: f32 = 1e-3;
/// Alternations between the sides; outputs are fitted once more at the end.
pub const ROUNDS: usize = 2;

/// Fits the outputs of `scales` to `unscaled: [n, k]` under `h: [k, k]`; `wh: [n, k]` is `W · H`.
///
/// # Errors
/// When the device fails.
pub fn fit_outputs(
    scales: &mut Scales,
    unscaled: &Matrix,
    h: &Metric,
    wh: &Matrix,
) -> Result<(), BackendError> {
    let mut q = unscaled.clone();
    q.data.par_chunks_mut(q.columns).for_each(|row| {
        row.iter_mut().zip(&scales.suh).for_each(|(v, s)| *v *= s);
    });
    let qh = h.times(&q)?;
    scales.svh.par_iter_mut().enumerate().for_each(|(o, s)| {
        let norm = dot(qh.row(o), q.row(o));
        let fitted = dot(wh.row(o), q.row(o)) / norm;
        // A sign never turns, and a row that is zero stays zero.
        if *s != 0.0 && fitted.is_finite() && fitted * f64::from(*s) > 0.0 {
            *s = round(fitted);
        }
    });
    Ok(())
}

/// The linear system of the inputs, summed over panels of outputs. Works with factors on the present scales,
/// which lie near one.
pub struct Inputs<'a> {
    /// `QᵀQ`, `[k, k]`.
    a: Sum<'a>,
    b: Vec<f64>,
}

impl<'a> Inputs<'a> {
    /// Of the inputs of `h`, no output added.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(h: &Metric<'a>) -> Result<Self, BackendError> {
        Ok(Self { a: h.sum()?, b: vec![0.0; h.h.rows] })
    }

    /// Adds a panel of outputs.
    ///
    /// # Errors
    /// When the device fails.
    pub fn add(
        &mut self,
        scales: &Scales,
        unscaled: &Matrix,
        wh: &Matrix,
    ) -> Result<(), BackendError> {
        let q = scales.apply(unscaled);
        self.a.add(&q)?;
        for o in 0..unscaled.rows {
            for ((b, &q), &wh) in self.b.iter_mut().zip(q.row(o)).zip(wh.row(o)) {
                *b += f64::from(q) * f64::from(wh);
            }
        }
        Ok(())
    }

    /// Fits the inputs of `scales` under `h`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn fit(mut self, scales: &mut Scales, h: &Matrix) -> Result<(), BackendError> {
        let k = h.rows;
        let mut a = self.a.finish()?;
        a.data.par_iter_mut().zip(&h.data).for_each(|(a, h)| *a *= h);
        let mean = (0..k).map(|i| a.row(i)[i]).sum::<f32>() / k as f32;
        for (i, b) in self.b.iter_mut().enumerate() {
            let ridge = RIDGE * (a.row(i)[i] + mean);
            a.row_mut(i)[i] += ridge;
            *b += f64::from(ridge);
        }
        let Some(factors) = solve(&a, &self.b) else { return Ok(()) };
        for (s, f) in scales.suh.iter_mut().zip(factors) {
            if f > 0.0 {
                *s = round(f64::from(*s) * f);
            }
        }
        Ok(())
    }
}
