//! Least-squares scales for tiles that are already chosen.
//!
//! With `Q = P Ŵ P` and inputs of second moment `H`, the output error of `diag(svh) Q diag(suh)` is quadratic
//! in either side's scales. Outputs have a closed form each; the inputs share one linear system
//! `((QᵀQ) ∘ H) suh = diag-sum(Q ∘ (W H))`, where `Q` carries the outputs' scales.

use super::basis::{Scales, round};
use super::ldl::solve;
use crate::matrix::{Matrix, dot};

/// What every fit of a matrix needs.
pub struct Moments {
    /// Second moments of the inputs, `[k, k]`.
    pub h: Matrix,
    /// `W · H`, `[n, k]`.
    pub wh: Matrix,
}

impl Moments {
    /// Of `w: [n, k]` under `h: [k, k]`.
    pub fn new(w: &Matrix, h: Matrix) -> Self {
        Self { wh: w.times(&h), h }
    }
}

/// Ridge that keeps input scales near what they were where the data says little.
const RIDGE: f32 = 1e-3;
/// Alternations between the sides.
const ROUNDS: usize = 2;

/// Fits both sides of `scales` to `unscaled: [n, k]`.
pub fn fit(scales: &mut Scales, unscaled: &Matrix, moments: &Moments) {
    for _ in 0..ROUNDS {
        fit_outputs(scales, unscaled, moments);
        fit_inputs(scales, unscaled, moments);
    }
    fit_outputs(scales, unscaled, moments);
}

fn fit_outputs(scales: &mut Scales, unscaled: &Matrix, moments: &Moments) {
    let mut q = unscaled.clone();
    for row in q.data.chunks_exact_mut(q.columns) {
        row.iter_mut().zip(&scales.suh).for_each(|(v, s)| *v *= s);
    }
    let qh = q.times(&moments.h);
    for (o, s) in scales.svh.iter_mut().enumerate() {
        let norm = dot(qh.row(o), q.row(o));
        let fitted = dot(moments.wh.row(o), q.row(o)) / norm;
        // A sign never turns, and a row that is zero stays zero.
        if *s != 0.0 && fitted.is_finite() && fitted * f64::from(*s) > 0.0 {
            *s = round(fitted);
        }
    }
}

fn fit_inputs(scales: &mut Scales, unscaled: &Matrix, moments: &Moments) {
    let (n, k) = (unscaled.rows, unscaled.columns);
    // Work with factors on the present scales, which lie near one.
    let q = scales.apply(unscaled);
    let mut a = q.gram();
    a.data.iter_mut().zip(&moments.h.data).for_each(|(a, h)| *a *= h);
    let mut b = vec![0.0f64; k];
    for o in 0..n {
        for ((b, &q), &wh) in b.iter_mut().zip(q.row(o)).zip(moments.wh.row(o)) {
            *b += f64::from(q) * f64::from(wh);
        }
    }
    let mean = (0..k).map(|i| a.row(i)[i]).sum::<f32>() / k as f32;
    for (i, b) in b.iter_mut().enumerate() {
        let ridge = RIDGE * (a.row(i)[i] + mean);
        a.row_mut(i)[i] += ridge;
        *b += f64::from(ridge);
    }
    let Some(factors) = solve(&a, &b) else { return };
    for (s, f) in scales.suh.iter_mut().zip(factors) {
        if f > 0.0 {
            *s = round(f64::from(*s) * f);
        }
    }
}
