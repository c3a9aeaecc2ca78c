//! Second moments of a matrix's inputs as what errors are measured by, and what multiplies with them: the device, where
//! there is one that does, or this processor.

use crate::matrix::{Matrix, add_gram, mirror};
use marlin_tensor::{Algebra, BackendError, Gram, Tensor};

type Result<T> = std::result::Result<T, BackendError>;

/// `H: [k, k]`.
pub struct Metric<'a> {
    /// On the host.
    pub h: Matrix,
    algebra: Option<&'a dyn Algebra>,
    /// On the device.
    placed: Option<Tensor>,
}

impl<'a> Metric<'a> {
    /// Of `h`, on `algebra` too where that has room.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(h: Matrix, algebra: Option<&'a dyn Algebra>) -> Result<Self> {
        let placed = match algebra {
            Some(algebra) => algebra.place(h.rows, h.columns, &h.data)?,
            None => None,
        };
        Ok(Self { h, algebra, placed })
    }

    /// `w · H`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn times(&self, w: &Matrix) -> Result<Matrix> {
        match (self.algebra, &self.placed) {
            (Some(algebra), Some(placed)) => {
                Ok(Matrix::new(w.rows, self.h.columns, algebra.times(&w.data, placed)?))
            }
            _ => Ok(w.times(&self.h)),
        }
    }

    /// An empty sum of outer products of as many columns.
    ///
    /// # Errors
    /// When the device fails.
    pub fn sum(&self) -> Result<Sum<'a>> {
        Sum::new(self.h.rows, self.algebra)
    }
}

/// A whole sum of a device, and how many rows were left out of it.
pub(crate) fn download(algebra: &dyn Algebra, gram: &Gram) -> Result<(Matrix, u64)> {
    let (values, left_out) = algebra.download_gram(gram)?;
    let mut sum = Matrix::new(gram.columns, gram.columns, values);
    mirror(&mut sum);
    Ok((sum, left_out))
}

/// `Σ xᵀ x`, where it is made.
pub enum Sum<'a> {
    /// On a device.
    Device(&'a dyn Algebra, Gram),
    /// Here.
    Host(Matrix),
}

impl<'a> Sum<'a> {
    /// Of rows of `columns` values.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(columns: usize, algebra: Option<&'a dyn Algebra>) -> Result<Self> {
        if let Some(algebra) = algebra
            && let Some(gram) = algebra.create_gram(columns)?
        {
            return Ok(Self::Device(algebra, gram));
        }
        Ok(Self::Host(Matrix::zeros(columns, columns)))
    }

    /// Adds finite rows.
    ///
    /// # Errors
    /// When the device fails.
    pub fn add(&mut self, x: &Matrix) -> Result<()> {
        match self {
            Self::Device(algebra, gram) => match algebra.place(x.rows, x.columns, &x.data)? {
                Some(placed) => algebra.add_gram(&placed, gram),
                // As many columns fit with more rows: fewer rows at a time do.
                None => {
                    let (first, last) = (x.part(0..x.rows / 2), x.part(x.rows / 2..x.rows));
                    self.add(&first)?;
                    self.add(&last)
                }
            },
            Self::Host(sum) => {
                add_gram(sum, x);
                Ok(())
            }
        }
    }

    /// The sum, `[columns, columns]`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn finish(self) -> Result<Matrix> {
        match self {
            Self::Device(algebra, gram) => Ok(download(algebra, &gram)?.0),
            Self::Host(sum) => Ok(sum),
        }
    }
}
