//! Second moments of a layer's inputs, `H = Σ xᵀ x / n`: what a unit of error in a weight costs at the
//! layer's output. Matrices with the same calibration label see the same input and share one.

use crate::matrix::{Matrix, add_gram};
use crate::metric;
use marlin_tensor::{Backend, BackendError, Gram, Tensor};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// By calibration label.
pub type Hessians = BTreeMap<String, Hessian>;

/// Sum of outer products of the rows a label has seen.
#[derive(Debug, Clone)]
pub struct Hessian {
    /// `Σ xᵀ x`, `[size, size]`.
    sum: Matrix,
    /// Rows in the sum.
    rows: u64,
    /// Rows that were borrowed from a pool.
    borrowed: u64,
    /// Rows left out because they were not finite.
    dropped: u64,
}

impl Hessian {
    /// Of inputs of `size` columns, nothing seen yet.
    pub fn new(size: usize) -> Self {
        Self { sum: Matrix::zeros(size, size), rows: 0, borrowed: 0, dropped: 0 }
    }

    /// Of inputs of `size` columns of which `rows` were seen; its values are [`set`](Self::set) next.
    pub fn seen(size: usize, rows: u64, dropped: u64) -> Self {
        Self { sum: Matrix::zeros(size, size), rows, borrowed: 0, dropped }
    }

    /// One row of the sum.
    pub fn row(&self, i: usize) -> &[f32] {
        self.sum.row(i)
    }

    /// Sets the element `(i, j)` of the sum and its mirror image.
    pub fn set(&mut self, i: usize, j: usize, value: f32) {
        self.sum.row_mut(i)[j] = value;
        self.sum.row_mut(j)[i] = value;
    }

    /// Columns of the inputs.
    pub fn size(&self) -> usize {
        self.sum.rows
    }

    /// Rows seen.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Rows that were left out because they held NaN or infinity.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Adds `x: [rows, size]`; rows that are not finite are left out and counted.
    pub fn add(&mut self, mut x: Matrix) {
        let size = self.size();
        let before = x.rows;
        if x.data.iter().any(|v| !v.is_finite()) {
            let finite = |row: &&[f32]| row.iter().all(|v| v.is_finite());
            x.data = x.data.chunks_exact(size).filter(finite).flatten().copied().collect();
            x.rows = x.data.len() / size;
        }
        self.dropped += (before - x.rows) as u64;
        self.rows += x.rows as u64;
        add_gram(&mut self.sum, &x);
    }

    /// Adds what another has seen of the same inputs.
    pub fn merge(&mut self, other: &Self) {
        self.sum.data.iter_mut().zip(&other.sum.data).for_each(|(a, b)| *a += b);
        self.rows += other.rows;
        self.dropped += other.dropped;
    }

    /// Adds `rows` rows that look like the mean of `pool`.
    pub fn lean_on(&mut self, pool: &Self, rows: u64) {
        let share = rows as f32 / pool.rows as f32;
        self.sum.data.iter_mut().zip(&pool.sum.data).for_each(|(a, b)| *a += share * b);
        self.borrowed += rows;
    }

    /// Takes the sum of `pool` for its own; the rows are still those it saw itself.
    pub fn lean_only_on(&mut self, pool: &Self) {
        self.sum.clone_from(&pool.sum);
        self.borrowed = pool.rows - self.rows.min(pool.rows);
    }

    /// Lets input `order[i]` stand where input `i` stood.
    pub fn exchange(&mut self, order: &[usize]) {
        let sum = self.sum.clone();
        for (i, &from) in order.iter().enumerate() {
            for (value, &column) in self.sum.row_mut(i).iter_mut().zip(order) {
                *value = sum.row(from)[column];
            }
        }
    }

    /// The mean, `[size, size]`; `None` when it says nothing: no row, all zero, or not finite.
    pub fn mean(&self) -> Option<Matrix> {
        let rows = self.rows + self.borrowed;
        if rows == 0 {
            return None;
        }
        let scale = 1.0 / rows as f32;
        let mut mean = self.sum.clone();
        mean.data.par_iter_mut().for_each(|v| *v *= scale);
        let diagonal = (0..mean.rows).map(|i| f64::from(mean.row(i)[i])).sum::<f64>();
        let useful =
            diagonal / mean.rows as f64 > 1e-20 && mean.data.par_iter().all(|v| v.is_finite());
        useful.then_some(mean)
    }
}

/// A Hessian in the making, on the device whose tensors it is made of, where that can.
pub enum Gathering {
    /// There.
    Device {
        /// The sum.
        gram: Gram,
        /// Rows that were given to it.
        rows: u64,
    },
    /// Here.
    Host(Hessian),
}

impl Gathering {
    /// Of inputs of `columns` values on `backend`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(backend: &dyn Backend, columns: usize) -> Result<Self, BackendError> {
        let gram = backend.algebra().map(|a| a.create_gram(columns)).transpose()?.flatten();
        Ok(match gram {
            Some(gram) => Self::Device { gram, rows: 0 },
            None => Self::Host(Hessian::new(columns)),
        })
    }

    /// Adds `x: [rows, columns]` of the same backend; rows that are not finite are left out and counted.
    ///
    /// # Errors
    /// When the device fails.
    pub fn add(&mut self, backend: &dyn Backend, x: &Tensor) -> Result<(), BackendError> {
        match (self, backend.algebra()) {
            (Self::Device { gram, rows }, Some(algebra)) => {
                *rows += x.rows as u64;
                algebra.add_gram(x, gram)
            }
            (Self::Host(hessian), _) => {
                hessian.add(Matrix::new(x.rows, x.columns, backend.download(x)?));
                Ok(())
            }
            (Self::Device { .. }, None) => Err(other_backend()),
        }
    }

    /// What was gathered.
    ///
    /// # Errors
    /// When the device fails.
    pub fn finish(self, backend: &dyn Backend) -> Result<Hessian, BackendError> {
        match self {
            Self::Host(hessian) => Ok(hessian),
            Self::Device { gram, rows } => {
                let algebra = backend.algebra().ok_or_else(other_backend)?;
                let (sum, dropped) = metric::download(algebra, &gram)?;
                Ok(Hessian { sum, rows: rows - dropped, borrowed: 0, dropped })
            }
        }
    }
}

fn other_backend() -> BackendError {
    BackendError::Device("a sum belongs to another backend".to_owned())
}
