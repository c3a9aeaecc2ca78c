//! Products of whole matrices, which a converter needs beside a model: second moments of inputs, fits of scales.

use crate::{BackendError, Opaque, Tensor};

/// A sum of outer products `Σ xᵀ x` on a device.
pub struct Gram {
    /// Columns of the rows, and both sides of the sum.
    pub columns: usize,
    /// Storage of the device.
    pub handle: Opaque,
}

/// What a device multiplies beside a model. All is f32, and so are sums: those of one call are made one after the other.
pub trait Algebra: Send + Sync {
    /// An empty sum for rows of `columns` values; `None` when the device has no room or no kernel for it, and the
    /// host is to make it.
    ///
    /// # Errors
    /// When the device fails.
    fn create_gram(&self, columns: usize) -> Result<Option<Gram>, BackendError>;

    /// Adds the rows of `x: [rows, columns]` that hold neither NaN nor infinity.
    ///
    /// # Errors
    /// When `x` has other columns or is not of this device.
    fn add_gram(&self, x: &Tensor, sum: &Gram) -> Result<(), BackendError>;

    /// The sum, `[columns, columns]`, of which only the lower triangle is right, and how many rows were left out of it.
    ///
    /// # Errors
    /// When the device fails.
    fn download_gram(&self, sum: &Gram) -> Result<(Vec<f32>, u64), BackendError>;

    /// Values `[rows, columns]` on the device; `None` when it has no room, or no kernel for so many columns.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When `values` does not fill the shape.
    fn place(
        &self,
        rows: usize,
        columns: usize,
        values: &[f32],
    ) -> Result<Option<Tensor>, BackendError>;

    /// `a · b` for `a: [rows, b.rows]` of the host, brought back.
    ///
    /// # Errors
    /// When `b` is not of this device, or it fails.
    ///
    /// # Panics
    /// When `a` does not fill its rows.
    fn times(&self, a: &[f32], b: &Tensor) -> Result<Vec<f32>, BackendError>;

    /// `L` of `A = L D Lᵀ` for the symmetric `a: [k, k]`, the identity in the blocks of sixteen on its diagonal and zero above
    /// them.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When `a` does not fill its shape.
    fn block_ldl(&self, a: &[f32], k: usize) -> Result<Factored, BackendError>;
}

/// What became of a factorisation.
pub enum Factored {
    /// `L: [k, k]`.
    Done(Vec<f32>),
    /// The matrix is not positive definite, as far as the device can tell.
    Indefinite,
    /// The device has no room or no kernel for it, and the host is to do it.
    Elsewhere,
}
