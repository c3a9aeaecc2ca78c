//! Cholesky factorisation in f64, blocked so that nearly all of it is matrix products, which several threads share: pieces are
//! cut by size alone, so results are the same bytes for any number of them.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};
use rayon::prelude::*;

/// Columns factored before the rest is brought up to date, and rows of a task.
const BLOCK: usize = 128;

/// The lower-triangular `L` with `A = L Lᵀ`, zero above the diagonal; `None` when `a` is not positive
/// definite. Only the lower triangle of `a` is read.
pub fn cholesky(mut a: Array2<f64>) -> Option<Array2<f64>> {
    let n = a.nrows();
    let all = a.as_slice_mut()?;
    for start in (0..n).step_by(BLOCK) {
        let end = (start + BLOCK).min(n);
        let size = end - start;
        let (above, below) = all.split_at_mut(end * n);
        for j in start..end {
            let row = |i: usize| i * n + start..i * n + j;
            let known: f64 = above[row(j)].iter().map(|v| v * v).sum();
            let pivot = above[j * n + j] - known;
            if !(pivot > 0.0 && pivot.is_finite()) {
                return None;
            }
            let pivot = pivot.sqrt();
            above[j * n + j] = pivot;
            for i in j + 1..end {
                let known = dot(&above[row(i)], &above[row(j)]);
                above[i * n + j] = (above[i * n + j] - known) / pivot;
            }
        }
        let diagonal: Vec<&[f64]> =
            (start..end).map(|i| &above[i * n + start..i * n + end]).collect();
        let mut panel = vec![0.0; (n - end) * size];
        below.par_chunks_mut(n).zip(panel.par_chunks_mut(size)).for_each(|(row, kept)| {
            let own = &mut row[start..end];
            for (j, factor) in diagonal.iter().enumerate() {
                let known = dot(&own[..j], &factor[..j]);
                own[j] = (own[j] - known) / factor[j];
            }
            kept.copy_from_slice(own);
        });
        let panel = ArrayView2::from_shape((n - end, size), &panel).ok()?;
        below.par_chunks_mut(BLOCK * n).enumerate().for_each(|(band, rows)| {
            // Up to the diagonal only: the upper triangle is never read.
            let first = band * BLOCK;
            let last = first + rows.len() / n;
            let rows = ArrayViewMut2::from_shape((last - first, n), rows);
            let mut rows = rows.expect("whole rows");
            let (left, right) = (panel.slice(s![first..last, ..]), panel.slice(s![..last, ..]));
            let mut out = rows.slice_mut(s![.., end..end + last]);
            general_mat_mul(-1.0, &left, &right.t(), 1.0, &mut out);
        });
    }
    all.par_chunks_mut(n).enumerate().for_each(|(i, row)| row[i + 1..].fill(0.0));
    Some(a)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
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
        for n in [1, 16, 127, 128, 129, 300] {
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
