//! Blocks whose GGUF file keeps one more factor beside them: `KEY.scale: F32 [1]`, or one per
//! expert of a stack, multiplies the matrix (ModelOpt's second NVFP4 scale, BitNet's per-matrix
//! scale; some converters spell it `KEY.weight.scale`). Other types with such a tensor are refused
//! rather than read without it.
//!
//! Parts: `blocks` as in the plain type, `scale: F32 [out_features]`.

use super::{Blocks, NVFP4, TQ1_0, TQ2_0};
use crate::{Description, QuantError, WeightFormat, parts};
use marlin_checkpoint::{Checkpoint, StoredTensor};
use marlin_tensor::{DType, HostTensor, Weight};
use std::ops::Range;

/// A block type under a factor per row.
pub struct Scaled {
    id: &'static str,
    blocks: &'static Blocks,
}

/// NVFP4 with its per-tensor scale.
pub static NVFP4_SCALED: Scaled = Scaled { id: "nvfp4_scaled", blocks: &NVFP4 };
/// TQ1_0 with a per-tensor scale.
pub static TQ1_0_SCALED: Scaled = Scaled { id: "tq1_0_scaled", blocks: &TQ1_0 };
/// TQ2_0 with a per-tensor scale.
pub static TQ2_0_SCALED: Scaled = Scaled { id: "tq2_0_scaled", blocks: &TQ2_0 };

/// The factor stored beside `key`'s blocks.
pub fn stored_scale<'a>(checkpoint: &'a Checkpoint, key: &str) -> Option<&'a StoredTensor> {
    let named = |suffix| checkpoint.get(&format!("{key}.{suffix}"));
    named("scale").or_else(|| named("weight.scale"))
}

impl WeightFormat for Scaled {
    fn id(&self) -> &'static str {
        self.id
    }

    fn describe(&self) -> Description {
        let Description { bits_per_weight, detected_by } = self.blocks.describe();
        Description { bits_per_weight, detected_by: format!("{detected_by}, and `KEY.scale`") }
    }

    fn detect(&self, checkpoint: &Checkpoint, key: &str) -> bool {
        self.blocks.detect(checkpoint, key) && stored_scale(checkpoint, key).is_some()
    }

    fn load(
        &self,
        checkpoint: &Checkpoint,
        key: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError> {
        let mut weight = self.blocks.read(checkpoint, key, out_features, in_features)?;
        weight.format = self.id;
        let stored = stored_scale(checkpoint, key);
        let name = stored.map_or_else(|| format!("{key}.scale"), |t| t.name.clone());
        let invalid = |reason| QuantError::Invalid { key: name.clone(), reason };
        let plain = stored.and_then(StoredTensor::plain).filter(|t| t.dtype() == DType::F32);
        let scale = plain.ok_or_else(|| invalid("expected F32 values".to_owned()))?.to_f32()?;
        if scale.is_empty() || !out_features.is_multiple_of(scale.len()) {
            let found = scale.len();
            return Err(invalid(format!("{found} scales do not divide {out_features} rows")));
        }
        let rows = out_features / scale.len();
        let scale: Vec<f32> = scale.iter().flat_map(|&s| std::iter::repeat_n(s, rows)).collect();
        weight.parts.push(("scale", HostTensor::from_f32(vec![out_features], &scale)));
        Ok(weight)
    }

    fn decode_rows(
        &self,
        weight: &Weight,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), QuantError> {
        let scale =
            parts::require(weight, "scale", DType::F32, &[weight.out_features])?.to_f32()?;
        self.blocks.decode_rows(weight, rows.clone(), out)?;
        for (row, scale) in out.chunks_exact_mut(weight.in_features.max(1)).zip(&scale[rows]) {
            for x in row {
                *x *= scale;
            }
        }
        Ok(())
    }
}
