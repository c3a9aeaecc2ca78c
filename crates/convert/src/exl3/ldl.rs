//! Block factorisation `H = L D Lᵀ` with unit lower-triangular `L` in blocks of sixteen inputs.

use crate::cholesky::{cholesky, solve_factored};
use crate::matrix::Matrix;
use ndarray::Array2;

/// Inputs of one block: the side of a tile.
pub const BLOCK: usize = 16;

/// Adds `damping · mean(diag)` to the diagonal and factors, with more damping where that is not
/// enough. Returns `L` and the damping that was used; `None` when ten tries fail.
pub fn block_ldl(h: &Matrix, damping: f32) -> Option<(Matrix, f32)> {
    let mean = (0..h.rows).map(|i| f64::from(h.row(i)[i])).sum::<f64>() / h.rows as f64;
    let mut used = damping;
    for _ in 0..10 {
        if let Some(l) = factor(h, f64::from(used) * mean) {
            return Some((l, used));
        }
        used = used * 2.0 + 1e-3;
    }
    None
}

fn factor(h: &Matrix, added: f64) -> Option<Matrix> {
    let k = h.rows;
    let a = Array2::from_shape_fn((k, k), |(i, j)| {
        f64::from(h.data[i * k + j]) + if i == j { added } else { 0.0 }
    });
    let l0 = cholesky(a)?;
    let mut l = Matrix::zeros(k, k);
    for start in (0..k).step_by(BLOCK) {
        // Columns of the block times the inverse of its diagonal: solve X · D = L0 from the right,
        // backwards since D is lower triangular.
        let size = BLOCK.min(k - start);
        for i in start..k {
            let mut row = [0.0f64; BLOCK];
            for c in (0..size).rev() {
                let known: f64 = (c + 1..size).map(|m| row[m] * l0[[start + m, start + c]]).sum();
                row[c] = (l0[[i, start + c]] - known) / l0[[start + c, start + c]];
            }
            for (c, value) in row.iter().take(size).enumerate() {
                let value = *value as f32;
                if !value.is_finite() {
                    return None;
                }
                l.data[i * k + start + c] = value;
            }
        }
    }
    Some(l)
}

/// Solves `A x = b` for a symmetric positive definite `A: [n, n]`.
pub fn solve(a: &Matrix, b: &[f64]) -> Option<Vec<f64>> {
    let n = a.rows;
    let l = cholesky(Array2::from_shape_fn((n, n), |(i, j)| f64::from(a.data[i * n + j])))?;
    let mut x = b.to_vec();
    solve_factored(&l, &mut x);
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
        let (l, used) = block_ldl(&h, 0.01).unwrap();
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
        let (l, used) = block_ldl(&h, 0.0).unwrap();
        assert!(used > 0.0 && l.data.iter().all(|v| v.is_finite()));
        assert!(block_ldl(&Matrix::new(1, 1, vec![f32::NAN]), 0.1).is_none());
    }

    #[test]
    fn solve_and_inverse_are_exact() {
        let h = example(32);
        let b: Vec<f64> = (0..32).map(|i| f64::from(i as u8) - 9.0).collect();
        let x = solve(&h, &b).unwrap();
        for (i, b) in b.iter().enumerate() {
            let found: f64 = (0..32).map(|j| f64::from(h.row(i)[j]) * x[j]).sum();
            assert!((found - b).abs() < 1e-6);
        }
        let inverse = inverse_blocks(&h).unwrap();
        let one: f32 = (0..16).map(|j| h.row(3)[j] * inverse[j * 16 + 3]).sum();
        assert!((one - 1.0).abs() < 1e-4);
    }
}
