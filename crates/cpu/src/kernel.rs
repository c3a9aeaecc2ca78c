//! A loaded matrix that multiplies, and the fallback that serves every format.

use crate::order::Next;
use crate::simd::amx::{Amx, Panels};
use crate::simd::{Matrix, products};
use crate::{ColumnBand, Level, Pool, reference};
use marlin_quant::{WeightFormat, format};
use marlin_tensor::{BackendError, Weight};
use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// Inputs in a kernel's own form.
pub type Prepared = Arc<dyn Any + Send + Sync>;

/// Few rows of inputs, as they are and prepared.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// `[rows, in_features]`.
    pub x: &'a [f32],
    /// Rows.
    pub rows: usize,
    /// What [`Kernel::prepare`] made of them.
    pub prepared: &'a Prepared,
}

/// How rows of inputs may be multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowKind {
    /// The fast way for one row, also for many.
    Decode,
    /// The fast way for many rows, also for one.
    Prompt,
}

/// One matrix `W [out_features, in_features]` prepared for multiplication.
pub trait Kernel: Send + Sync {
    /// Kernel path for `inspect`, for example `"q4_0 avx512-vnni"`.
    fn name(&self) -> String;

    /// Bytes the prepared matrix occupies, repacked copies included.
    fn bytes(&self) -> u64;

    /// Columns of `x`.
    fn in_features(&self) -> usize;

    /// Columns of `out`.
    fn out_features(&self) -> usize;

    /// `out = x Wᵀ` with `x: [rows, in_features]`, `out: [rows, out_features]`; overwrites `out`.
    /// A row's result depends on that row and `kind` alone, bit for bit.
    /// Splits its work over `pool`; a call from inside a pool task runs on that thread alone.
    fn matmul(&self, x: &[f32], rows: usize, kind: RowKind, out: &mut [f32], pool: &Pool);

    /// The stored weights, in the order of the outputs; empty when they do not lie in one piece.
    fn stored(&self) -> &[u8] {
        &[]
    }

    /// The weights as bf16 tiles, where many rows may be multiplied so.
    fn panels(&self) -> Option<(Amx, &dyn Panels)> {
        None
    }

    /// Columns that [`part`](Self::part) makes multiples of; `None` when it does not exist.
    fn part_columns(&self) -> Option<usize> {
        None
    }

    /// The rows of `x` as [`part`](Self::part) reads them, or `ready` if they are that already,
    /// prepared by another kernel.
    fn prepare(&self, x: &[f32], ready: Option<&Prepared>, pool: &Pool) -> Prepared {
        let _ = (x, ready, pool);
        Arc::new(())
    }

    /// Whether [`part`](Self::part) is the way of rows of prompts too, so that several matrices can share what is
    /// prepared of them.
    fn parts_of_prompts(&self) -> bool {
        false
    }

    /// Columns `columns` of [`matmul`](Self::matmul), for few rows of an answer, on this thread; the first is a multiple of
    /// [`part_columns`](Self::part_columns). `out` begins with it.
    fn part(&self, inputs: Inputs<'_>, columns: Range<usize>, out: &mut ColumnBand<'_>) {
        let _ = (inputs, columns, out);
        unreachable!("a kernel without parts")
    }

    /// Why an earlier [`matmul`](Self::matmul) could not decode its weights, if it could not.
    fn failure(&self) -> Option<String> {
        None
    }
}

/// A loaded matrix.
pub(crate) struct LoadedLinear {
    pub(crate) kernel: Box<dyn Kernel>,
    pub(crate) bias: Option<Vec<f32>>,
    /// Weights that were read after these.
    pub(crate) next: Arc<Next>,
}

impl LoadedLinear {
    /// `out = x Wᵀ + bias`, the first `decode_rows` rows as those of answers.
    ///
    /// # Errors
    /// When the weights do not decode.
    pub(crate) fn apply(
        &self,
        x: &[f32],
        rows: usize,
        decode_rows: usize,
        out: &mut [f32],
        pool: &Pool,
    ) -> Result<(), BackendError> {
        let at = decode_rows * self.kernel.in_features();
        let (x_parts, outs) =
            ([&x[..at], &x[at..]], out.split_at_mut(decode_rows * self.kernel.out_features()));
        if decode_rows > 0 {
            self.kernel.matmul(x_parts[0], decode_rows, RowKind::Decode, outs.0, pool);
        }
        if decode_rows < rows {
            self.kernel.matmul(x_parts[1], rows - decode_rows, RowKind::Prompt, outs.1, pool);
        }
        self.finish(out)
    }

    /// Reports what went wrong in the product, and adds the bias.
    pub(crate) fn finish(&self, out: &mut [f32]) -> Result<(), BackendError> {
        if let Some(reason) = self.kernel.failure() {
            return Err(BackendError::Decode { what: self.kernel.name(), reason });
        }
        if let Some(bias) = &self.bias {
            out.chunks_exact_mut(bias.len()).for_each(|row| reference::add(row, bias));
        }
        Ok(())
    }
}

/// Rows of `W` decoded at a time: small enough to stay in cache, large enough to amortise.
const BAND: usize = 64;
/// Rows of `x` multiplied at a time.
const ROWS: usize = 32;

/// Keeps the encoded weight and decodes a band of rows before multiplying with it.
pub(crate) struct Decoded {
    weight: Weight,
    format: &'static dyn WeightFormat,
    band: usize,
    level: Level,
    failure: Mutex<Option<String>>,
}

impl Decoded {
    /// Wraps `weight`, decoding its first band to surface a corrupt encoding at load time.
    ///
    /// # Errors
    /// When the first band does not decode.
    pub(crate) fn new(weight: &Weight, level: Level) -> Result<Self, BackendError> {
        let format = format(weight.format);
        let granularity = format.row_granularity();
        let band = BAND.next_multiple_of(granularity);
        let kernel =
            Self { weight: weight.clone(), format, band, level, failure: Mutex::new(None) };
        let rows = granularity.min(weight.out_features);
        let mut scratch = vec![0.0; rows * weight.in_features];
        format.decode_rows(weight, 0..rows, &mut scratch).map_err(|e| BackendError::Decode {
            what: weight.format.to_owned(),
            reason: e.to_string(),
        })?;
        Ok(kernel)
    }

    /// Name of the path for weights of `format`.
    pub(crate) fn name_of(format: &str) -> String {
        match format {
            "f32" => "f32 reference".to_owned(),
            _ => format!("{format} decoded to f32"),
        }
    }
}

impl Kernel for Decoded {
    fn name(&self) -> String {
        Self::name_of(self.weight.format)
    }

    fn bytes(&self) -> u64 {
        self.weight.bytes()
    }

    fn in_features(&self) -> usize {
        self.weight.in_features
    }

    fn out_features(&self) -> usize {
        self.weight.out_features
    }

    fn matmul(&self, x: &[f32], rows: usize, _: RowKind, out: &mut [f32], pool: &Pool) {
        let (k, n) = (self.weight.in_features, self.weight.out_features);
        assert_eq!(x.len(), rows * k, "input fills [rows, in_features]");
        pool.run_columns(out, n, self.band, |range, band| {
            let mut scratch = vec![0.0; range.len() * k];
            let decoded = self.format.decode_rows(&self.weight, range.clone(), &mut scratch);
            if let Err(e) = decoded {
                *self.failure.lock().unwrap_or_else(|e| e.into_inner()) = Some(e.to_string());
                return;
            }
            let width = range.len();
            let mut block = vec![0.0; width * ROWS.min(rows)];
            for start in (0..rows).step_by(ROWS) {
                let count = ROWS.min(rows - start);
                let inputs = Matrix::new(&x[start * k..], count, k, k);
                let weights = Matrix::new(&scratch, width, k, k);
                products(self.level, inputs, weights, &mut block[..count * width], width);
                for (i, block) in block.chunks_exact(width).take(count).enumerate() {
                    band.row(start + i).copy_from_slice(block);
                }
            }
        });
    }

    fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use marlin_tensor::{DType, HostTensor};

    #[test]
    fn decoded_kernel_is_the_matrix_product_on_ragged_shapes() {
        for (rows, n, k) in [(1, 1, 1), (3, 65, 17), (2, 130, 33), (5, 64, 16), (40, 70, 48)] {
            let w: Vec<f32> = (0..n * k).map(|i| ((i * 37 % 101) as f32 - 50.0) / 64.0).collect();
            let x: Vec<f32> = (0..rows * k).map(|i| ((i * 53 % 89) as f32 - 44.0) / 32.0).collect();
            let bits: Vec<u8> =
                w.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
            let tensor = HostTensor::new(DType::BF16, vec![n, k], bits.into()).unwrap();
            let weight = Weight {
                format: "bf16",
                out_features: n,
                in_features: k,
                parts: vec![("weight", tensor)],
            };
            let levels = Level::ALL.into_iter().filter(|l| l.is_supported());
            for (level, threads) in levels.flat_map(|l| [(l, 1), (l, 3)]) {
                let kernel = Decoded::new(&weight, level).unwrap();
                let mut out = vec![f32::NAN; rows * n];
                kernel.matmul(&x, rows, RowKind::Decode, &mut out, &Pool::new(threads));
                for r in 0..rows {
                    for c in 0..n {
                        let bf = |v: f32| f64::from(half::bf16::from_f32(v).to_f32());
                        let expected: f64 =
                            (0..k).map(|i| f64::from(x[r * k + i]) * bf(w[c * k + i])).sum();
                        let found = f64::from(out[r * n + c]);
                        assert!((found - expected).abs() < 1e-4, "{found} {expected}");
                    }
                }
                assert_eq!(kernel.failure(), None);
            }
        }
    }
}
