//! [`Algebra`] on a GPU.

use crate::backend::{GpuBackend, open, tensor};
use crate::gpu::{Buffer, Reservation, WORD};
use crate::ops::cholesky;
use crate::ops::product::{Into, Part, finite, product, turned};
use marlin_tensor::{Algebra, BackendError, Factored, Gram, Tensor};
use std::sync::Arc;

type Result<T> = std::result::Result<T, BackendError>;

/// Values that a kernel reads at once.
const VECTOR: usize = 4;

/// A sum on the device.
struct Sum {
    /// `[columns, columns]`, blocks above the diagonal left out.
    sum: Buffer,
    left_out: Buffer,
    _reservation: Reservation,
}

impl GpuBackend {
    /// Whether `rows` by `columns` values fit an array of the device.
    fn fits(&self, rows: usize, columns: usize) -> bool {
        let most = self.gpu.client.properties().memory.max_page_size;
        columns.is_multiple_of(VECTOR) && ((rows * columns * WORD) as u64) <= most
    }
}

impl Algebra for GpuBackend {
    fn create_gram(&self, columns: usize) -> Result<Option<Gram>> {
        let bytes = (columns * columns * WORD) as u64;
        // Whatever is missing, the host has a way.
        let Ok(reservation) = self.gpu.reserve("second moments", bytes) else { return Ok(None) };
        if !self.fits(columns, columns) {
            return Ok(None);
        }
        let (sum, left_out) = (self.gpu.zeros(columns * columns), self.gpu.zeros(1));
        let handle = Arc::new(Sum { sum, left_out, _reservation: reservation });
        Ok(Some(Gram { columns, handle }))
    }

    fn add_gram(&self, x: &Tensor, sum: &Gram) -> Result<()> {
        let (columns, known) = (sum.columns, open::<Sum>(&sum.handle)?);
        if x.columns != columns {
            let found = x.columns;
            return Err(BackendError::Device(format!(
                "rows of {found} values for a sum of {columns}"
            )));
        }
        if x.rows == 0 {
            return Ok(());
        }
        let x_rows = finite(&self.gpu, open(&x.handle)?, x.rows, columns, &known.left_out);
        let part = Part::whole(&x_rows, columns);
        product(&self.gpu, part, part, x.rows, (&known.sum, columns), Into::LowerSum);
        Ok(())
    }

    fn download_gram(&self, sum: &Gram) -> Result<(Vec<f32>, u64)> {
        let (columns, known) = (sum.columns, open::<Sum>(&sum.handle)?);
        let values = self.gpu.read_floats(&known.sum, columns * columns)?;
        let left_out = self.gpu.read(&known.left_out, 1)?;
        let left_out = u32::from_le_bytes([left_out[0], left_out[1], left_out[2], left_out[3]]);
        Ok((values, left_out.into()))
    }

    fn place(&self, rows: usize, columns: usize, values: &[f32]) -> Result<Option<Tensor>> {
        assert_eq!(values.len(), rows * columns, "values fill their shape");
        let fits = self.fits(rows, columns);
        Ok(fits.then(|| tensor(rows, columns, self.gpu.floats(values))))
    }

    fn block_ldl(&self, a: &[f32], k: usize) -> Result<Factored> {
        assert_eq!(a.len(), k * k, "values fill their shape");
        if !cholesky::has(k) || !self.fits(k, k) {
            return Ok(Factored::Elsewhere);
        }
        let (l, failed) = cholesky::block_ldl(&self.gpu, &self.gpu.floats(a), k);
        if self.gpu.read(&failed, 1)?[..WORD] != [0; WORD] {
            return Ok(Factored::Indefinite);
        }
        let l = self.gpu.read_floats(&l, k * k)?;
        Ok(if l.iter().all(|v| v.is_finite()) { Factored::Done(l) } else { Factored::Indefinite })
    }

    fn times(&self, a: &[f32], b: &Tensor) -> Result<Vec<f32>> {
        let (depth, columns) = (b.rows, b.columns);
        assert!(a.len().is_multiple_of(depth), "values fill their rows");
        let rows = a.len() / depth;
        let mut out = Vec::with_capacity(rows * columns);
        let most = self.gpu.client.properties().memory.max_page_size as usize;
        // Rows are computed in parts that fit an array each.
        let part = (most / (depth.max(columns) * WORD)).min(rows) / VECTOR * VECTOR;
        let part = part.max(VECTOR);
        for own in a.chunks(part * depth) {
            let rows = own.len() / depth;
            let padded = rows.next_multiple_of(VECTOR);
            let values = match rows == padded {
                true => self.gpu.floats(own),
                false => self.gpu.floats(&[own, &vec![0.0; (padded - rows) * depth]].concat()),
            };
            let left = turned(&self.gpu, &values, padded, depth);
            let found = self.gpu.empty(padded * columns);
            let left = Part::whole(&left, padded);
            let right = Part::whole(open(&b.handle)?, columns);
            product(&self.gpu, left, right, depth, (&found, columns), Into::Fresh);
            out.extend(self.gpu.read_floats(&found, rows * columns)?);
        }
        Ok(out)
    }
}
