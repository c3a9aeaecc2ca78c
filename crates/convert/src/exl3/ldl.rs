//! Block factorisation `H = L D Lᵀ` with unit lower-triangular `L` in blocks of sixteen inputs.

use crate::cholesky::{cholesky, solve_factored};
use crate::matrix::Matrix;
use marlin_tensor::{Algebra, BackendError, Factored};
use ndarray::Array2;
use rayon::prelude::*;

/// Inputs of one block: the side of a tile.
pub const BLOCK: usize = 16;

/// Share of the right-hand side that a solution may leave: far below what fp16 tells apart.
const RESIDUAL: f64 = 1e-7;
/// Steps towards a solution at most.
const MOST_STEPS: usize = 1000;

/// Adds `damping · mean(diag)` to the diagonal and factors, with more damping where that is not
/// enough, on `algebra` where it can, else here in f64. Returns `L` and the damping that was used; `None` when ten
/// tries fail.
///
/// # Errors
/// When the device fails.
pub fn block_ldl(
    h: &Matrix,
    damping: f32,
    algebra: Option<&dyn Algebra>,
) -> Result<Option<(Matrix, f32)>, BackendError> {
    let mean = (0..h.rows).map(|i| f64::from(h.row(i)[i])).sum::<f64>() / h.rows as f64;
    let mut used = damping;
    for _ in 0..10 {
        let added = f64::from(used) * mean;
        let there = algebra.map(|algebra| factor_there(h, added, algebra)).transpose()?;
        let l = match there {
            Some(Factored::Done(l)) => Some(Matrix::new(h.rows, h.rows, l)),
            Some(Factored::Indefinite) => None,
            Some(Factored::Elsewhere) | None => factor(h, added),
        };
        if let Some(l) = l {
            return Ok(Some((l, used)));
        }
        used = used * 2.0 + 1e-3;
    }
    Ok(None)
}

fn factor_there(h: &Matrix, added: f64, algebra: &dyn Algebra) -> Result<Factored, BackendError> {
    let mut a = h.clone();
    for i in 0..a.rows {
        let value = &mut a.row_mut(i)[i];
        *value = (f64::from(*value) + added) as f32;
    }
    algebra.block_ldl(&a.data, a.rows)
}

fn factor(h: &Matrix, added: f64) -> Option<Matrix> {
    let k = h.rows;
    let mut a = vec![0.0; k * k];
    a.par_chunks_mut(k).zip(h.data.par_chunks(k)).enumerate().for_each(|(i, (to, from))| {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = f64::from(*from));
        to[i] += added;
    });
    let l0 = cholesky(Array2::from_shape_vec((k, k), a).ok()?)?;
    let l0 = l0.as_slice()?;
    let mut l = Matrix::zeros(k, k);
    let finite = l.data.par_chunks_mut(k).enumerate().map(|(i, out)| {
        let own = &l0[i * k..][..k];
        for start in (0..=i).step_by(BLOCK) {
            // Columns of the block times the inverse of its diagonal: solve X · D = L0 from the right,
            // backwards since D is lower triangular.
            let size = BLOCK.min(k - start);
            let mut row = [0.0f64; BLOCK];
            for c in (0..size).rev() {
                let diagonal = |m: usize| l0[(start + m) * k + start + c];
                let known: f64 = (c + 1..size).map(|m| row[m] * diagonal(m)).sum();
                row[c] = (own[start + c] - known) / diagonal(c);
            }
            for (out, value) in out[start..].iter_mut().zip(&row[..size]) {
                *out = *value as f32;
            }
        }
        out[..=i].iter().all(|v| v.is_finite())
    });
    finite.reduce(|| true, |a, b| a && b).then_some(l)
}

/// Solves `A x = b` for a symmetric positive definite `A: [n, n]` with conjugate gradients, scaled by the diagonal, from all
/// ones on: every step lowers `xᵀAx/2 − bᵀx`, so that one too few does no harm. `None` when the result is not finite.
pub fn solve(a: &Matrix, b: &[f64]) -> Option<Vec<f64>> {
    let n = a.rows;
    let times = |x: &[f64]| -> Vec<f64> {
        let row = |row: &[f32]| row.iter().zip(x).map(|(a, x)| f64::from(*a) * x).sum();
        a.data.par_chunks(n).map(row).collect()
    };
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let inverse: Vec<f64> = (0..n).map(|i| f64::from(a.row(i)[i]).recip()).collect();
    let scaled = |x: &[f64]| x.iter().zip(&inverse).map(|(x, d)| x * d).collect::<Vec<f64>>();
    let enough = dot(b, &scaled(b)) * RESIDUAL.powi(2);
    let mut x = vec![1.0; n];
    let mut r: Vec<f64> = b.iter().zip(times(&x)).map(|(b, ax)| b - ax).collect();
    let mut z = scaled(&r);
    let mut left = dot(&r, &z);
    let mut direction = z.clone();
    for _ in 0..MOST_STEPS {
        // What is not a number stays that.
        if left <= enough || !left.is_finite() {
            break;
        }
        let along = times(&direction);
        let step = left / dot(&direction, &along);
        x.iter_mut().zip(&direction).for_each(|(x, d)| *x += step * d);
        r.iter_mut().zip(&along).for_each(|(r, a)| *r -= step * a);
        z = scaled(&r);
        let before = std::mem::replace(&mut left, dot(&r, &z));
        let share = left / before;
        direction.iter_mut().zip(&z).for_each(|(d, z)| *d = z + share * *d);
    }
    x.iter().all(|v| v.is_finite()).then_some(x)
}

/// Inverses of the diagonal blocks of `h`, each `[16, 16]`, one after the other.
pub fn inverse_blocks(h: &Matrix) -> Option<Vec<f32>> {
    let k = h.rows;
    let mut out = vec![0.0; k * BLOCK];
    for (start, out) in (0..k).step_by(BLOCK).zip(out.chunks_exact_mut(BLOCK * BLOCK)) {
        let a = Array2::from_shape_fn((BLOCK, BLOCK), |(i, j)| {
            f64::from(h.data[(start + i) * k + start + j])
        });
        let l = cholesky(a)?;
        for j in 0..BLOCK {
            let mut column = [0.0; BLOCK];
            column[j] = 1.0;
            solve_factored(&l, &mut column);
            (0..BLOCK).for_each(|i| out[i * BLOCK + j] = column[i] as f32);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exl3::basis::Random;

    fn example(k: usize) -> Matrix {
        let mut random = Random(5);
        let mut next = || (random.draw() >> 40) as f32 / (1 << 24) as f32 - 0.5;
        let x = (0..3 * k * k).map(|_| next()).collect();
        Matrix::new(3 * k, k, x).gram()
    }

    #[test]
    fn factors_multiply_back() {
        let k = 48;
        let h = example(k);
        let (l, used) = block_ldl(&h, 0.01, None).unwrap().unwrap();
        assert_eq!(used, 0.01);
        let mean = (0..k).map(|i| h.row(i)[i]).sum::<f32>() / k as f32;
        // L⁻¹ H L⁻ᵀ is block diagonal: forward substitution on both sides.
        let mut m = h.clone();
        (0..k).for_each(|i| m.data[i * k + i] += 0.01 * mean);
        for side in 0..2 {
            for i in 0..k {
                for j in 0..i / BLOCK * BLOCK {
                    let factor = l.data[i * k + j];
                    for c in 0..k {
                        let (from, to) = match side {
                            0 => (j * k + c, i * k + c),
                            _ => (c * k + j, c * k + i),
                        };
                        m.data[to] -= factor * m.data[from];
                    }
                }
            }
        }
        for i in 0..k {
            assert_eq!(l.data[i * k + i], 1.0);
            for j in (0..k).filter(|j| j / BLOCK != i / BLOCK) {
                assert!(m.data[i * k + j].abs() < 2e-3 * mean, "[{i}, {j}] {}", m.data[i * k + j]);
            }
        }
    }

    #[test]
    fn singular_matrices_get_more_damping() {
        let mut h = Matrix::zeros(32, 32);
        h.data[0] = 1.0;
        let (l, used) = block_ldl(&h, 0.0, None).unwrap().unwrap();
        assert!(used > 0.0 && l.data.iter().all(|v| v.is_finite()));
        let nan = Matrix::new(1, 1, vec![f32::NAN]);
        assert!(block_ldl(&nan, 0.1, None).unwrap().is_none());
    }

    #[test]
    fn solve_and_inverse_are_exact() {
        let h = example(32);
        let b: Vec<f64> = (0..32).map(|i| f64::from(i as u8) - 9.0).collect();
        let x = solve(&h, &b).unwrap();
        for (i, b) in b.iter().enumerate() {
            let found: f64 = (0..32).map(|j| f64::from(h.row(i)[j]) * x[j]).sum();
            assert!((found - b).abs() < 1e-5);
        }
        let inverse = inverse_blocks(&h).unwrap();
        let one: f32 = (0..16).map(|j| h.row(3)[j] * inverse[j * 16 + 3]).sum();
        assert!((one - 1.0).abs() < 1e-4);
    }
}
