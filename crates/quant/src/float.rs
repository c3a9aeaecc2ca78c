//! Unquantized matrices: `KEY.weight [out_features, in_features]` in F32, F16 or BF16.

use crate::{Description, QuantError, WeightFormat, parts};
use half::{bf16, f16};
use marlin_checkpoint::{Checkpoint, Encoding};
use marlin_tensor::{DType, HostTensor, Weight};
use std::ops::Range;

/// A float format of one element type.
pub struct Float {
    id: &'static str,
    dtype: DType,
}

/// IEEE single precision.
pub static F32: Float = Float { id: "f32", dtype: DType::F32 };
/// IEEE half precision.
pub static F16: Float = Float { id: "f16", dtype: DType::F16 };
/// bfloat16.
pub static BF16: Float = Float { id: "bf16", dtype: DType::BF16 };

impl WeightFormat for Float {
    fn id(&self) -> &'static str {
        self.id
    }

    fn describe(&self) -> Description {
        Description {
            bits_per_weight: (self.dtype.size_bytes() * 8).to_string(),
            detected_by: format!("`KEY.weight` of type {}", self.dtype),
        }
    }

    fn detect(&self, checkpoint: &Checkpoint, key: &str) -> bool {
        checkpoint
            .get(&format!("{key}.weight"))
            .is_some_and(|t| t.encoding == Encoding::Plain(self.dtype))
    }

    fn load(
        &self,
        checkpoint: &Checkpoint,
        key: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError> {
        let name = format!("{key}.weight");
        let stored = checkpoint.require_matrix(&name, out_features, in_features)?;
        let bytes = stored.data.clone();
        let tensor = HostTensor::new(self.dtype, vec![out_features, in_features], bytes)?;
        Ok(Weight { format: self.id, out_features, in_features, parts: vec![("weight", tensor)] })
    }

    fn decode_rows(
        &self,
        weight: &Weight,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), QuantError> {
        let shape = [weight.out_features, weight.in_features];
        let values = parts::require(weight, "weight", self.dtype, &shape)?;
        parts::check_rows(weight, &rows, out)?;
        out.copy_from_slice(&values.slice_rows(rows).to_f32()?);
        Ok(())
    }

    fn pack(
        &self,
        values: &[f32],
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError> {
        let data: Vec<u8> = match self.dtype {
            DType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            DType::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        let tensor = HostTensor::new(self.dtype, vec![out_features, in_features], data.into())?;
        Ok(Weight { format: self.id, out_features, in_features, parts: vec![("weight", tensor)] })
    }
}
