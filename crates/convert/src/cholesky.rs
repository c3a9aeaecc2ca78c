//! Cholesky factorisation in f64, blocked so that nearly all of it is matrix products.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, s};

/// Columns factored before the rest is brought up to date.
const BLOCK: usize = 64;

/// The lower-triangular `L` with `A = L Lᵀ`, zero above the diagonal; `None` when `a` is not positive
/// definite. Only the lower triangle of `a` is read.
pub fn cholesky(mut a: Array2<f64>) -> Option<Array2<f64>> {
    let n = a.nrows();
    for start in (0..n).step_by(BLOCK) {
        let end = (start + BLOCK).min(n);
        for j in start..end {
            let known: f64 = (start..j).map(|m| a[[j, m]].powi(2)).sum();
            let pivot = a[[j, j]] - known;
            if !(pivot > 0.0 && pivot.is_finite()) {
                return None;
            }
            let pivot = pivot.sqrt();
            a[[j, j]] = pivot;
            for i in j + 1..n {
                let known: f64 = (start..j).map(|m| a[[i, m]] * a[[j, m]]).sum();
                a[[i, j]] = (a[[i, j]] - known) / pivot;
            }
        }
        let panel = a.slice(s![end.., start..end]).to_owned();
        for first in (end..n).step_by(BLOCK) {
            // Below and on the diagonal only: the upper triangle is never read.
            let last = (first + BLOCK).min(n);
            let left = panel.slice(s![first - end.., ..]);
            let right = panel.slice(s![first - end..last - end, ..]);
            general_mat_mul(
                -1.0,
                &left,
                &right.t(),
                1.0,
                &mut a.slice_mut(s![first.., first..last]),
            );
        }
    }
    for i in 0..n {
        a.slice_mut(s![i, i + 1..]).fill(0.0);
    }
    Some(a)
}

/// Solves `L Lᵀ x = b` in place.
pub fn solve_factored(l: &Array2<f64>, x: &mut [f64]) {
    let n = x.len();
    for i in 0..n {
        let known: f64 = (0..i).map(|j| l[[i, j]] * x[j]).sum();
        x[i] = (x[i] - known) / l[[i, i]];
    }
    for i in (0..n).rev() {
        x[i] /= l[[i, i]];
        let value = x[i];
        (0..i).for_each(|j| x[j] -= l[[i, j]] * value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factor_multiplies_back_and_solves() {
        for n in [1, 16, 63, 64, 65, 200] {
            let x = Array2::from_shape_fn((2 * n, n), |(i, j)| {
                ((i * 31 + j * 17) % 101) as f64 / 50.0 - 1.0
            });
            let mut a = x.t().dot(&x);
            (0..n).for_each(|i| a[[i, i]] += 1.0);
            let l = cholesky(a.clone()).unwrap();
            let back = l.dot(&l.t());
            assert!(a.iter().zip(&back).all(|(a, b)| (a - b).abs() < 1e-9 * n as f64), "size {n}");
            let b: Vec<f64> = (0..n).map(|i| i as f64 - 3.0).collect();
            let mut solved = b.clone();
            solve_factored(&l, &mut solved);
            let found = a.dot(&ndarray::Array1::from(solved));
            assert!(found.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-7), "size {n}");
        }
        assert!(cholesky(Array2::from_elem((3, 3), 1.0)).is_none());
        assert!(cholesky(Array2::from_elem((1, 1), f64::NAN)).is_none());
    }
}
