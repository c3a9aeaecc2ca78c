//! Least-squares scales for tiles that are already chosen.
//!
//! With `Q = P Ŵ P` and inputs of second moment `H`, the output error of `diag(svh) Q diag(suh)` is quadratic
//! in either side's scales. Outputs have a closed form each; the inputs share one linear system
//! `((QᵀQ) ∘ H) suh = diag-sum(Q ∘ (W H))`, where `Q` carries the outputs' scales.

use super::basis::{Scales, round};
use super::ldl::solve;
use crate::matrix::{Matrix, add_gram, dot};

/// Ridge that keeps input scales near what they were where the data says little.
const RIDGE: f32 = 1e-3;
/// Alternations between the sides; outputs are fitted once more at the end.
pub const ROUNDS: usize = 2;

/// Fits the outputs of `scales` to `unscaled: [n, k]` under `h: [k, k]`; `wh: [n, k]` is `W · H`.
pub fn fit_outputs(scales: &mut Scales, unscaled: &Matrix, h: &Matrix, wh: &Matrix) {
    let mut q = unscaled.clone();
    for row in q.data.chunks_exact_mut(q.columns) {
        row.iter_mut().zip(&scales.suh).for_each(|(v, s)| *v *= s);
    }
    let qh = q.times(h);
    for (o, s) in scales.svh.iter_mut().enumerate() {
        let norm = dot(qh.row(o), q.row(o));
        let fitted = dot(wh.row(o), q.row(o)) / norm;
        // A sign never turns, and a row that is zero stays zero.
        if *s != 0.0 && fitted.is_finite() && fitted * f64::from(*s) > 0.0 {
            *s = round(fitted);
        }
    }
}

/// The linear system of the inputs, summed over panels of outputs. Works with factors on the present scales,
/// which lie near one.
pub struct Inputs {
    /// `QᵀQ`, `[k, k]`.
    a: Matrix,
    b: Vec<f64>,
}

impl Inputs {
    /// Of `k` inputs, no output added.
    pub fn new(k: usize) -> Self {
        Self { a: Matrix::zeros(k, k), b: vec![0.0; k] }
    }

    /// Adds a panel of outputs.
    pub fn add(&mut self, scales: &Scales, unscaled: &Matrix, wh: &Matrix) {
        let q = scales.apply(unscaled);
        add_gram(&mut self.a, &q);
        for o in 0..unscaled.rows {
            for ((b, &q), &wh) in self.b.iter_mut().zip(q.row(o)).zip(wh.row(o)) {
                *b += f64::from(q) * f64::from(wh);
            }
        }
    }

    /// Fits the inputs of `scales` under `h`.
    pub fn fit(mut self, scales: &mut Scales, h: &Matrix) {
        let k = h.rows;
        let a = &mut self.a;
        a.data.iter_mut().zip(&h.data).for_each(|(a, h)| *a *= h);
        let mean = (0..k).map(|i| a.row(i)[i]).sum::<f32>() / k as f32;
        for (i, b) in self.b.iter_mut().enumerate() {
            let ridge = RIDGE * (a.row(i)[i] + mean);
            a.row_mut(i)[i] += ridge;
            *b += f64::from(ridge);
        }
        let Some(factors) = solve(a, &self.b) else { return };
        for (s, f) in scales.suh.iter_mut().zip(factors) {
            if f > 0.0 {
                *s = round(f64::from(*s) * f);
            }
        }
    }
}
