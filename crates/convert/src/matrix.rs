//! Dense row-major matrices and the few products that a quantizer needs.
//!
//! Work is cut into pieces by size alone, each piece is computed by one thread from start to end, and
//! no sum crosses pieces: results are the same bytes for any number of threads. Threads are those
//! of the rayon pool the caller runs in.

use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayViewMut2, ShapeBuilder, s};
use rayon::prelude::*;

/// Rows that one task computes.
pub const BAND: usize = 128;

/// A row-major matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// `[rows, columns]`.
    pub data: Vec<f32>,
}

impl Matrix {
    /// All zero.
    pub fn zeros(rows: usize, columns: usize) -> Self {
        Self { rows, columns, data: vec![0.0; rows * columns] }
    }

    /// Wraps values.
    ///
    /// # Panics
    /// When `data` does not fill the shape: a bug of the caller.
    pub fn new(rows: usize, columns: usize, data: Vec<f32>) -> Self {
        assert_eq!(data.len(), rows * columns, "values fill [{rows}, {columns}]");
        Self { rows, columns, data }
    }

    /// One row.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.columns..][..self.columns]
    }

    /// One row, to be written.
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.data[i * self.columns..][..self.columns]
    }

    /// Rows `rows` as a matrix of their own.
    pub fn part(&self, rows: std::ops::Range<usize>) -> Self {
        let data = self.data[rows.start * self.columns..rows.end * self.columns].to_vec();
        Self { rows: rows.len(), columns: self.columns, data }
    }

    /// The same values in the upper left corner of `[rows, columns]`, zero elsewhere.
    pub fn padded(&self, rows: usize, columns: usize) -> Self {
        if (rows, columns) == (self.rows, self.columns) {
            return self.clone();
        }
        let mut out = Self::zeros(rows, columns);
        for i in 0..self.rows {
            out.row_mut(i)[..self.columns].copy_from_slice(self.row(i));
        }
        out
    }

    /// `self · other`.
    pub fn times(&self, other: &Self) -> Self {
        let mut out = Self::zeros(self.rows, other.columns);
        out.data.par_chunks_mut(BAND * other.columns).enumerate().for_each(|(band, out)| {
            let rows = out.len() / other.columns;
            let left = &self.data[band * BAND * self.columns..][..rows * self.columns];
            let right = View::whole(&other.data, other.rows, other.columns);
            product(out, other.columns, View::whole(left, rows, self.columns), right);
        });
        out
    }

    /// `selfᵀ · self`.
    pub fn gram(&self) -> Self {
        let mut out = Self::zeros(self.columns, self.columns);
        add_gram(&mut out, self);
        out
    }
}

/// `out ← out + xᵀ x` for `out: [k, k]`, `x: [rows, k]`.
pub fn add_gram(out: &mut Matrix, x: &Matrix) {
    let k = x.columns;
    assert_eq!((out.rows, out.columns), (k, k), "the sum is [{k}, {k}]");
    if x.rows == 0 {
        return;
    }
    // The lower triangle, a band of rows a task; then its mirror image.
    out.data.par_chunks_mut(BAND * k).enumerate().for_each(|(band, out)| {
        let (first, rows) = (band * BAND, out.len() / k);
        let x = View::whole(&x.data, x.rows, k).array();
        let left = x.slice(s![.., first..first + rows]);
        let right = x.slice(s![.., ..first + rows]);
        let mut out = strided_mut(out, rows, first + rows, k);
        general_mat_mul(1.0, &left.t(), &right, 1.0, &mut out);
    });
    mirror(out);
}

/// Copies the lower triangle to the upper one.
pub fn mirror(m: &mut Matrix) {
    let n = m.columns;
    // A band of columns below its diagonal block becomes the band of rows right of it, by blocks that stay in the cache.
    for first in (0..m.rows).step_by(BAND) {
        let end = (first + BAND).min(m.rows);
        let (above, below) = m.data.split_at_mut(end * n);
        let rows = &mut above[first * n..];
        for i in 0..end - first {
            for j in 0..i {
                rows[j * n + first + i] = rows[i * n + first + j];
            }
        }
        let below = &*below;
        rows.par_chunks_mut(n).enumerate().for_each(|(j, row)| {
            for (value, from) in row[end..].iter_mut().zip(below.chunks_exact(n)) {
                *value = from[first + j];
            }
        });
    }
}

/// A rectangle of a row-major matrix.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// From its first element on.
    pub data: &'a [f32],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Elements from one row to the next.
    pub stride: usize,
}

impl<'a> View<'a> {
    /// All of `data: [rows, columns]`.
    pub fn whole(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self { data, rows, columns, stride: columns }
    }

    fn array(self) -> ArrayView2<'a, f32> {
        let shape = (self.rows, self.columns).strides((self.stride, 1));
        ArrayView2::from_shape(shape, self.data).expect("the rectangle lies inside its matrix")
    }
}

fn strided_mut(
    data: &mut [f32],
    rows: usize,
    columns: usize,
    stride: usize,
) -> ArrayViewMut2<'_, f32> {
    ArrayViewMut2::from_shape((rows, columns).strides((stride, 1)), data)
        .expect("the rectangle lies inside its matrix")
}

/// `out ← out + a · b` on this thread; `out` has `stride` elements a row.
pub fn product(out: &mut [f32], stride: usize, a: View, b: View) {
    let mut out = strided_mut(out, a.rows, b.columns, stride);
    general_mat_mul(1.0, &a.array(), &b.array(), 1.0, &mut out);
}

/// `Σ a·b` in f64.
pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut s = seed;
        let mut next = || {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (s >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn products_are_the_definition_for_any_number_of_threads() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 2), (130, 33, 257), (300, 140, 129)] {
            let a = Matrix::new(m, k, numbers(m * k, 1));
            let b = Matrix::new(k, n, numbers(k * n, 2));
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| (a.times(&b), a.gram()))
            };
            let (c, gram) = run(1);
            assert_eq!((&c, &gram), (&run(3).0, &run(3).1));
            for i in 0..m {
                for j in 0..n {
                    let column: Vec<f32> = (0..k).map(|l| b.data[l * n + j]).collect();
                    let expected = dot(a.row(i), &column);
                    let found = f64::from(c.data[i * n + j]);
                    assert!((found - expected).abs() < 1e-4, "[{i}, {j}] of {m}x{k}x{n}");
                }
            }
            for i in 0..k {
                for j in 0..k {
                    let expected: f64 = (0..m).map(|l| dot(&[a.row(l)[i]], &[a.row(l)[j]])).sum();
                    let found = f64::from(gram.data[i * k + j]);
                    assert!((found - expected).abs() < 1e-4, "gram [{i}, {j}] of {m}x{k}");
                }
            }
        }
    }
}
