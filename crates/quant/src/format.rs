//! The trait of a weight encoding and the list of all of them.

use crate::{QuantError, exl3, float, fp8, ggml, integer};
use marlin_checkpoint::{Checkpoint, CheckpointError, Encoding};
use marlin_tensor::Weight;
use std::ops::Range;

/// What the generated page of formats says about one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Stored bits per weight, scales included: `"4.5"`, `"1 to 8"`.
    pub bits_per_weight: String,
    /// Tensors it is recognised by, `KEY` being the name of the layer.
    pub detected_by: String,
}

/// A way of storing a matrix.
pub trait WeightFormat: Sync {
    /// Identifier, equal to [`Weight::format`].
    fn id(&self) -> &'static str;

    /// Facts for the documentation.
    fn describe(&self) -> Description;

    /// Whether the tensors stored under `key` (without `.weight`) are in this format.
    /// Looks at names and encodings only.
    fn detect(&self, checkpoint: &Checkpoint, key: &str) -> bool;

    /// Loads the matrix `[out_features, in_features]` stored under `key`, in this format or a listed one
    /// that it says to become.
    ///
    /// # Errors
    /// When tensors are missing, shaped otherwise, or contradict the format.
    fn load(
        &self,
        checkpoint: &Checkpoint,
        key: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError>;

    /// Rows `rows` of the matrix as f32, `out: [rows.len(), in_features]`. The definition of the
    /// format: slow and obvious.
    ///
    /// # Errors
    /// When stored values are invalid.
    fn decode_rows(
        &self,
        weight: &Weight,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), QuantError>;

    /// Row `row` alone, for embeddings: [`decode_rows`](Self::decode_rows), by a shorter way where a format has one.
    ///
    /// # Errors
    /// As for several rows.
    fn decode_row(&self, weight: &Weight, row: usize, out: &mut [f32]) -> Result<(), QuantError> {
        self.decode_rows(weight, row..row + 1, out)
    }

    /// Encodes `values: [out_features, in_features]` by rounding to nearest, without calibration:
    /// for tests, benches and plain conversions.
    ///
    /// # Errors
    /// When the format has no such encoder, or cannot hold the shape or a value.
    fn pack(
        &self,
        values: &[f32],
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError> {
        let _ = (values, out_features, in_features);
        Err(QuantError::NoPacker { format: self.id() })
    }

    /// Output rows that must be sliced, and are best decoded, together (EXL3: 128).
    fn row_granularity(&self) -> usize {
        1
    }

    /// Rows `rows` as a weight of its own, sharing the bytes. The default serves formats whose
    /// parts all have one entry per output row.
    ///
    /// # Errors
    /// When the range does not fall on [`row_granularity`](Self::row_granularity).
    fn slice_rows(&self, weight: &Weight, rows: Range<usize>) -> Result<Weight, QuantError> {
        let parts = weight.parts.iter().map(|(n, t)| (*n, t.slice_rows(rows.clone()))).collect();
        Ok(Weight {
            format: weight.format,
            out_features: rows.len(),
            in_features: weight.in_features,
            parts,
        })
    }
}

/// Every format, most specific first: the first that detects a key loads it.
pub fn formats() -> &'static [&'static dyn WeightFormat] {
    static FORMATS: &[&dyn WeightFormat] = &[
        &exl3::format::EXL3,
        &exl3::embedding::EXL3_EMBEDDING,
        &float::F32,
        &float::F16,
        &float::BF16,
        &fp8::FP8_BLOCK128,
        &fp8::FP8,
        &integer::INT,
        &integer::INT4_G128,
        &integer::INT4_G64,
        &integer::INT4_G32,
        &integer::INT8_G128,
        &integer::INT8_G32,
        &integer::INT4_G128_ORDERED,
        &integer::INT4_G64_ORDERED,
        &integer::INT4_G32_ORDERED,
        &integer::INT8_G128_ORDERED,
        &integer::INT8_G32_ORDERED,
        &ggml::NVFP4_SCALED,
        &ggml::TQ1_0_SCALED,
        &ggml::TQ2_0_SCALED,
        &ggml::Q4_0,
        &ggml::Q4_1,
        &ggml::Q5_0,
        &ggml::Q5_1,
        &ggml::Q8_0,
        &ggml::Q2_K,
        &ggml::Q3_K,
        &ggml::Q4_K,
        &ggml::Q5_K,
        &ggml::Q6_K,
        &ggml::IQ1_S,
        &ggml::IQ1_M,
        &ggml::IQ2_XXS,
        &ggml::IQ2_XS,
        &ggml::IQ2_S,
        &ggml::IQ3_XXS,
        &ggml::IQ3_S,
        &ggml::IQ4_NL,
        &ggml::IQ4_XS,
        &ggml::TQ1_0,
        &ggml::TQ2_0,
        &ggml::MXFP4,
        &ggml::NVFP4,
    ];
    FORMATS
}

/// The format called `id`.
///
/// # Panics
/// When no such format exists: identifiers come from [`load`].
pub fn format(id: &str) -> &'static dyn WeightFormat {
    *formats().iter().find(|f| f.id() == id).expect("identifier of a listed format")
}

/// Finds the format of `key` and loads it.
///
/// # Errors
/// When no format recognises the key, or loading fails.
pub fn load(
    checkpoint: &Checkpoint,
    key: &str,
    out_features: usize,
    in_features: usize,
) -> Result<Weight, QuantError> {
    match formats().iter().find(|f| f.detect(checkpoint, key)) {
        Some(f) => f.load(checkpoint, key, out_features, in_features),
        None => {
            let prefix = format!("{key}.");
            let found: Vec<String> = checkpoint
                .tensors()
                .filter(|t| t.name.starts_with(&prefix))
                .map(|t| match t.encoding {
                    Encoding::Plain(dtype) => format!("{} {dtype} {:?}", t.name, t.shape),
                    Encoding::Ggml(kind) => format!("{} {kind} {:?}", t.name, t.shape),
                })
                .collect();
            if found.is_empty() {
                let (path, key) = (checkpoint.path.clone(), format!("{key}.weight"));
                return Err(CheckpointError::Missing { path, key }.into());
            }
            Err(QuantError::Unknown { key: key.to_owned(), found })
        }
    }
}

/// The whole matrix as f32, `[out_features, in_features]`.
///
/// # Errors
/// When stored values are invalid.
pub fn decode(weight: &Weight) -> Result<Vec<f32>, QuantError> {
    let mut out = vec![0.0; weight.out_features * weight.in_features];
    format(weight.format).decode_rows(weight, 0..weight.out_features, &mut out)?;
    Ok(out)
}

/// Rows `rows` of `weight` as a weight of its own.
///
/// # Errors
/// When the format cannot be cut there.
pub fn slice_rows(weight: &Weight, rows: Range<usize>) -> Result<Weight, QuantError> {
    format(weight.format).slice_rows(weight, rows)
}
