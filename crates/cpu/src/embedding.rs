//! Tables whose rows are looked up: token embeddings.

use crate::{Level, simd};
use marlin_quant::{WeightFormat, format};
use marlin_tensor::{BackendError, Weight};

/// A matrix read by rows.
pub(crate) trait Rows: Send + Sync {
    /// Row `row` to `out`, which has its width.
    ///
    /// # Errors
    /// When the row is damaged.
    fn row(&self, row: usize, out: &mut [f32]) -> Result<(), BackendError>;
}

/// The rows of `weight`: where `level` has a kernel by that, else as its format decodes them.
pub(crate) fn load(weight: &Weight, level: Level) -> Box<dyn Rows> {
    simd::rows(weight, level).unwrap_or_else(|| {
        Box::new(Decoded { weight: weight.clone(), format: format(weight.format) })
    })
}

struct Decoded {
    weight: Weight,
    format: &'static dyn WeightFormat,
}

impl Rows for Decoded {
    fn row(&self, row: usize, out: &mut [f32]) -> Result<(), BackendError> {
        self.format.decode_row(&self.weight, row, out).map_err(|error| BackendError::Decode {
            what: format!("embedding of token {row}"),
            reason: error.to_string(),
        })
    }
}
