//! Products of dense f32 matrices that fit in cache: attention scores and sums, per-head
//! matrices, decoded bands of weights.
// Other processors run the scalar bodies until someone writes their registers.
#![cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code))]
// Loops over registers read like the formula: every index names a row or a column of the block.
#![allow(clippy::needless_range_loop)]

use super::vector::{Lanes, Work, run};
use crate::{Level, reference};

/// A row-major matrix of which `stride` elements separate rows.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    stride: usize,
}

impl<'a> Matrix<'a> {
    /// `rows × columns` of `values`.
    ///
    /// # Panics
    /// When they do not fit: a bug of the caller.
    pub(crate) fn new(values: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(fits(values.len(), rows, columns, stride), "matrix inside its slice");
        Self { values, rows, columns, stride }
    }

    fn row(&self, i: usize) -> &'a [f32] {
        &self.values[i * self.stride..][..self.columns]
    }
}

fn fits(len: usize, rows: usize, columns: usize, stride: usize) -> bool {
    rows == 0 || columns <= stride && (rows - 1) * stride + columns <= len
}

/// `out[i][j] = a[i] · b[j]`; rows of `out` are `stride` apart.
pub(crate) fn products(level: Level, a: Matrix, b: Matrix, out: &mut [f32], stride: usize) {
    assert_eq!(a.columns, b.columns, "rows of one length");
    assert!(fits(out.len(), a.rows, b.rows, stride), "products fill the output");
    run(level, Products { a, b, out, stride });
}

struct Products<'a> {
    a: Matrix<'a>,
    b: Matrix<'a>,
    out: &'a mut [f32],
    stride: usize,
}

impl Work for Products<'_> {
    fn scalar(self) {
        for i in 0..self.a.rows {
            for j in 0..self.b.rows {
                self.out[i * self.stride + j] = reference::dot(self.a.row(i), self.b.row(j));
            }
        }
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(mut self) {
        let (m, n) = (self.a.rows, self.b.rows);
        let mut i = 0;
        // SAFETY: row and column blocks stay inside the matrices, which `products` checked.
        unsafe {
            if L::N == 16 {
                // Six rows need the fewest loads; seven and eight are better as four and the rest.
                while m - i >= 9 || m - i == 6 {
                    row_block::<L, 6, 4>(&mut self, i, n);
                    i += 6;
                }
                while m - i >= 4 {
                    row_block::<L, 4, 4>(&mut self, i, n);
                    i += 4;
                }
                if m - i == 3 {
                    row_block::<L, 3, 8>(&mut self, i, n);
                    i += 3;
                }
            }
            while m - i >= 2 {
                row_block::<L, 2, 4>(&mut self, i, n);
                i += 2;
            }
            if m - i == 1 {
                row_block::<L, 1, 8>(&mut self, i, n);
            }
        }
    }
}

/// Rows `i .. i + M` against all of `b`, `N` (a multiple of 4) at a time.
#[inline(always)]
unsafe fn row_block<L: Lanes, const M: usize, const N: usize>(
    p: &mut Products,
    i: usize,
    n: usize,
) {
    let mut j = 0;
    // SAFETY: the caller keeps `i + M` in range; `j` is.
    unsafe {
        while n - j >= N {
            block::<L, M, N>(p, i, j);
            j += N;
        }
        while n - j >= 4 {
            block::<L, M, 4>(p, i, j);
            j += 4;
        }
        while j < n {
            block::<L, M, 1>(p, i, j);
            j += 1;
        }
    }
}

/// `M × N` dot products, all sums in registers.
#[inline(always)]
unsafe fn block<L: Lanes, const M: usize, const N: usize>(p: &mut Products, i: usize, j: usize) {
    let (a, b, columns) = (p.a, p.b, p.a.columns);
    // SAFETY: rows `i .. i + M` of `a` and `j .. j + N` of `b` exist and have `columns` elements;
    // outputs were checked by `products`.
    unsafe {
        let (a_rows, b_rows) =
            (a.values.as_ptr().add(i * a.stride), b.values.as_ptr().add(j * b.stride));
        let mut sums = [[L::splat(0.0); N]; M];
        let whole = columns / L::N * L::N;
        for k in (0..whole).step_by(L::N) {
            let mut x = [L::splat(0.0); M];
            for r in 0..M {
                x[r] = L::load(a_rows.add(r * a.stride + k));
            }
            for c in 0..N {
                let y = L::load(b_rows.add(c * b.stride + k));
                for r in 0..M {
                    sums[r][c] = L::fma(x[r], y, sums[r][c]);
                }
            }
        }
        let rest = columns - whole;
        if rest > 0 {
            for c in 0..N {
                let y = L::load_first(b_rows.add(c * b.stride + whole), rest);
                for r in 0..M {
                    let x = L::load_first(a_rows.add(r * a.stride + whole), rest);
                    sums[r][c] = L::fma(x, y, sums[r][c]);
                }
            }
        }
        for r in 0..M {
            let out = p.out.as_mut_ptr().add((i + r) * p.stride + j);
            if N == 1 {
                *out = L::sum(sums[r][0]);
            } else {
                for c in (0..N).step_by(4) {
                    let four = [sums[r][c], sums[r][c + 1], sums[r][c + 2], sums[r][c + 3]];
                    out.add(c).cast::<[f32; 4]>().write_unaligned(L::sum4(four));
                }
            }
        }
    }
}

/// `out[i] += Σ_j p[i][j] v[j]`; rows of `out` are `stride` apart.
pub(crate) fn accumulate(level: Level, p: Matrix, v: Matrix, out: &mut [f32], stride: usize) {
    weighted(level, p, v, out, stride, false);
}

/// `out[i] = Σ_j p[i][j] v[j]`; rows of `out` are `stride` apart.
pub(crate) fn weighted_sums(level: Level, p: Matrix, v: Matrix, out: &mut [f32], stride: usize) {
    weighted(level, p, v, out, stride, true);
}

fn weighted(level: Level, p: Matrix, v: Matrix, out: &mut [f32], stride: usize, clear: bool) {
    assert_eq!(p.columns, v.rows, "one weight per row");
    assert!(fits(out.len(), p.rows, v.columns, stride), "sums fill the output");
    run(level, Accumulate { p, v, out, stride, clear });
}

struct Accumulate<'a> {
    p: Matrix<'a>,
    v: Matrix<'a>,
    out: &'a mut [f32],
    stride: usize,
    clear: bool,
}

impl Work for Accumulate<'_> {
    fn scalar(self) {
        for i in 0..self.p.rows {
            let out = &mut self.out[i * self.stride..][..self.v.columns];
            if self.clear {
                out.fill(0.0);
            }
            for (j, weight) in self.p.row(i).iter().enumerate() {
                for (o, v) in out.iter_mut().zip(self.v.row(j)) {
                    *o += weight * v;
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(mut self) {
        let rows = self.p.rows;
        let mut i = 0;
        // SAFETY: rows `i ..` exist; `accumulate` checked the shapes.
        unsafe {
            while L::N == 16 && (rows - i >= 9 || rows - i == 6) {
                sum_rows::<L, 6>(&mut self, i);
                i += 6;
            }
            while rows - i >= 4 {
                sum_rows::<L, 4>(&mut self, i);
                i += 4;
            }
            match rows - i {
                3 => sum_rows::<L, 3>(&mut self, i),
                2 => sum_rows::<L, 2>(&mut self, i),
                1 => sum_rows::<L, 1>(&mut self, i),
                _ => {}
            }
        }
    }
}

/// All columns of sums `i .. i + M`. Few registers of sums are each kept several times over, in
/// turn, because one cannot be added to again before the last addition is through.
#[inline(always)]
unsafe fn sum_rows<L: Lanes, const M: usize>(a: &mut Accumulate, i: usize) {
    let columns = a.v.columns;
    let mut c = 0;
    // SAFETY: column blocks stay below `columns`.
    unsafe {
        if L::N == 16 {
            while M == 1 && columns - c >= 8 * L::N {
                sum_columns::<L, M, 8, 1>(a, i, c, L::N);
                c += 8 * L::N;
            }
            while columns - c >= 4 * L::N {
                sum_columns::<L, M, 4, 1>(a, i, c, L::N);
                c += 4 * L::N;
            }
        }
        while columns - c >= 2 * L::N {
            match M {
                1 | 2 => sum_columns::<L, M, 2, 2>(a, i, c, L::N),
                _ => sum_columns::<L, M, 2, 1>(a, i, c, L::N),
            }
            c += 2 * L::N;
        }
        while c < columns {
            let last = L::N.min(columns - c);
            match M {
                1 | 2 => sum_columns::<L, M, 1, 4>(a, i, c, last),
                3 | 4 => sum_columns::<L, M, 1, 2>(a, i, c, last),
                _ => sum_columns::<L, M, 1, 1>(a, i, c, last),
            }
            c += L::N;
        }
    }
}

/// `C` registers of columns from `c` on of sums `i .. i + M`, each in `T` turns; the last register
/// has `last` lanes in use.
#[inline(always)]
unsafe fn sum_columns<L: Lanes, const M: usize, const C: usize, const T: usize>(
    a: &mut Accumulate,
    i: usize,
    c: usize,
    last: usize,
) {
    let stride = a.stride;
    // SAFETY: the caller keeps rows and columns in range.
    unsafe {
        let out = a.out.as_mut_ptr().add(i * stride + c);
        let weights = a.p.values.as_ptr().add(i * a.p.stride);
        let values = a.v.values.as_ptr().add(c);
        let mut sums = [[[L::splat(0.0); C]; M]; T];
        if !a.clear {
            for r in 0..M {
                for k in 0..C {
                    sums[0][r][k] = read::<L>(out.add(r * stride + k * L::N), last);
                }
            }
        }
        let whole = a.v.rows / T * T;
        for j in (0..whole).step_by(T) {
            for t in 0..T {
                add_row::<L, M, C>(&mut sums[t], a, weights.add(j + t), values, j + t, last);
            }
        }
        for j in whole..a.v.rows {
            add_row::<L, M, C>(&mut sums[0], a, weights.add(j), values, j, last);
        }
        for r in 0..M {
            for k in 0..C {
                let mut sum = sums[0][r][k];
                for turn in &sums[1..] {
                    sum = L::add(sum, turn[r][k]);
                }
                let out = out.add(r * stride + k * L::N);
                match last == L::N {
                    true => L::store(out, sum),
                    false => L::store_first(out, sum, last),
                }
            }
        }
    }
}

/// Adds row `j` of the values, times `M` weights, to the sums.
#[inline(always)]
unsafe fn add_row<L: Lanes, const M: usize, const C: usize>(
    sums: &mut [[L::V; C]; M],
    a: &Accumulate,
    weights: *const f32,
    values: *const f32,
    j: usize,
    last: usize,
) {
    // SAFETY: the caller keeps rows and columns in range.
    unsafe {
        let mut v = [L::splat(0.0); C];
        for k in 0..C {
            v[k] = read::<L>(values.add(j * a.v.stride + k * L::N), last);
        }
        for r in 0..M {
            let weight = L::splat(*weights.add(r * a.p.stride));
            for k in 0..C {
                sums[r][k] = L::fma(weight, v[k], sums[r][k]);
            }
        }
    }
}

/// The first `n` lanes, which may be all.
#[inline(always)]
unsafe fn read<L: Lanes>(p: *const f32, n: usize) -> L::V {
    // SAFETY: the caller vouches for `n` elements.
    unsafe { if n == L::N { L::load(p) } else { L::load_first(p, n) } }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0).collect()
    }

    #[test]
    fn every_level_computes_the_products_and_the_sums() {
        for level in Level::ALL.into_iter().filter(|l| l.is_supported()) {
            for m in [1, 2, 3, 4, 5, 9] {
                for n in [1, 3, 4, 7, 8, 13] {
                    for k in [1, 7, 8, 16, 33, 64, 100] {
                        let (a, b) = (values(m * (k + 3), 1), values(n * k, 2));
                        let mut out = vec![f32::NAN; m * (n + 1)];
                        let (a, b) = (Matrix::new(&a, m, k, k + 3), Matrix::new(&b, n, k, k));
                        products(level, a, b, &mut out, n + 1);
                        for i in 0..m {
                            for j in 0..n {
                                let expected = reference::dot(a.row(i), b.row(j));
                                let found = out[i * (n + 1) + j];
                                assert!((found - expected).abs() < 1e-5, "{level} {m} {n} {k}");
                            }
                            assert!(out[i * (n + 1) + n].is_nan());
                        }
                        // Weights `[m, n]` over values `[n, k]`.
                        let p = values(m * (n + 2), 3);
                        let p = Matrix::new(&p, m, n, n + 2);
                        let mut sums = values(m * k, 4);
                        let before = sums.clone();
                        accumulate(level, p, b, &mut sums, k);
                        let mut fresh = vec![f32::NAN; m * (k + 2)];
                        weighted_sums(level, p, b, &mut fresh, k + 2);
                        for i in 0..m {
                            for c in 0..k {
                                let add: f32 = (0..n).map(|j| p.row(i)[j] * b.row(j)[c]).sum();
                                let expected = before[i * k + c] + add;
                                assert!((sums[i * k + c] - expected).abs() < 1e-5, "{level}");
                                assert!((fresh[i * (k + 2) + c] - add).abs() < 1e-5, "{level}");
                            }
                        }
                    }
                }
            }
        }
    }
}
