//! The block formats of ggml, as GGUF files store them.
//!
//! Layout: a row of `in_features` weights is a run of blocks, each a few scales followed by
//! packed codes; rows lie one after another, so the one part is `blocks: U8 [out_features,
//! row_bytes]`. All numbers are little-endian. One file here is one family; one function is one
//! type and says what its bytes mean.
//!
//! Source: the layouts that the `gguf` Python package (0.19.0) dequantizes. Every type decodes to
//! the same bits as that package, so the order of the f32 operations is part of the definition.

pub mod grids;
mod i_quants;
mod k_pack;
mod k_quants;
mod legacy;
mod microscaling;
mod scaled;
mod ternary;

pub use i_quants::{
    IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS, IQ4_LEVELS, IQ4_NL, IQ4_XS,
};
pub use k_quants::{Q2_K, Q3_K, Q4_K, Q5_K, Q6_K};
pub use legacy::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
pub use microscaling::{MXFP4, NVFP4};
pub use scaled::{NVFP4_SCALED, TQ1_0_SCALED, TQ2_0_SCALED};
pub use ternary::{TQ1_0, TQ2_0};

use crate::{Description, QuantError, WeightFormat, parts};
use half::f16;
use marlin_checkpoint::{Checkpoint, Encoding, GgmlType};
use marlin_tensor::{DType, HostTensor, Weight};
use std::ops::Range;

/// One block type.
pub struct Blocks {
    id: &'static str,
    ggml_type: GgmlType,
    /// Decodes whole blocks.
    decode: Decode,
    /// Encodes whole blocks of finite values.
    pack: Option<Pack>,
}

type Decode = fn(&[u8], &mut [f32]);
type Pack = fn(&[f32], &mut [u8]);

impl Blocks {
    fn read(
        &self,
        checkpoint: &Checkpoint,
        key: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError> {
        let name = format!("{key}.weight");
        let stored = checkpoint.require_matrix(&name, out_features, in_features)?;
        let shape = vec![out_features, self.row_bytes(&name, in_features)?];
        let blocks = HostTensor::new(DType::U8, shape, stored.data.clone())?;
        Ok(Weight { format: self.id, out_features, in_features, parts: vec![("blocks", blocks)] })
    }

    fn row_bytes(&self, key: &str, in_features: usize) -> Result<usize, QuantError> {
        let (name, elements) = (self.ggml_type, self.ggml_type.block_elements());
        if !in_features.is_multiple_of(elements) {
            return Err(QuantError::Invalid {
                key: key.to_owned(),
                reason: format!(
                    "{in_features} columns are not whole {name} blocks of {elements}; store it in another type"
                ),
            });
        }
        Ok(in_features / elements * self.ggml_type.block_bytes())
    }
}

impl WeightFormat for Blocks {
    fn id(&self) -> &'static str {
        self.id
    }

    fn describe(&self) -> Description {
        let bits = self.ggml_type.block_bytes() as f64 * 8.0;
        Description {
            bits_per_weight: (bits / self.ggml_type.block_elements() as f64).to_string(),
            detected_by: format!("`KEY.weight` of GGUF type {}", self.ggml_type),
        }
    }

    fn detect(&self, checkpoint: &Checkpoint, key: &str) -> bool {
        checkpoint
            .get(&format!("{key}.weight"))
            .is_some_and(|t| t.encoding == Encoding::Ggml(self.ggml_type))
    }

    fn load(
        &self,
        checkpoint: &Checkpoint,
        key: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError> {
        if let Some(scale) = scaled::stored_scale(checkpoint, key) {
            return Err(QuantError::Invalid {
                key: scale.name.clone(),
                reason: format!("a scale beside {} blocks is not supported", self.ggml_type),
            });
        }
        self.read(checkpoint, key, out_features, in_features)
    }

    fn decode_rows(
        &self,
        weight: &Weight,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), QuantError> {
        let shape = [weight.out_features, self.row_bytes(self.id, weight.in_features)?];
        let blocks = parts::require(weight, "blocks", DType::U8, &shape)?;
        parts::check_rows(weight, &rows, out)?;
        (self.decode)(blocks.slice_rows(rows).bytes(), out);
        Ok(())
    }

    fn pack(
        &self,
        values: &[f32],
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError> {
        let pack = self.pack.ok_or(QuantError::NoPacker { format: self.id })?;
        parts::check_values(self.id, values, out_features, in_features)?;
        let shape = vec![out_features, self.row_bytes(self.id, in_features)?];
        let mut data = vec![0; shape[0] * shape[1]];
        pack(values, &mut data);
        let mut decoded = vec![0.0; values.len()];
        (self.decode)(&data, &mut decoded);
        // Half-precision scales end at 65504: a larger one reads back as infinity.
        if let Some(i) = decoded.iter().position(|v| !v.is_finite()) {
            return Err(QuantError::Invalid {
                key: self.id.to_owned(),
                reason: format!("{} is too large for the block scale", values[i]),
            });
        }
        let blocks = HostTensor::new(DType::U8, shape, data.into())?;
        Ok(Weight { format: self.id, out_features, in_features, parts: vec![("blocks", blocks)] })
    }
}

/// Applies a block's decode along `data`.
fn decode_each<const BYTES: usize, const VALUES: usize>(
    data: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; VALUES]),
) {
    for (block, out) in data.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        decode(block, out);
    }
}

/// Applies a block's encode along `values`.
fn pack_each<const BYTES: usize, const VALUES: usize>(
    values: &[f32],
    data: &mut [u8],
    pack: impl Fn(&[f32; VALUES], &mut [u8; BYTES]),
) {
    for (values, block) in values.as_chunks().0.iter().zip(data.as_chunks_mut().0) {
        pack(values, block);
    }
}

fn u16_at(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

fn u32_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

fn f16_at(block: &[u8], at: usize) -> f32 {
    f16::from_bits(u16_at(block, at)).to_f32()
}

fn put_f16(block: &mut [u8], at: usize, value: f32) {
    block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

/// Nibble `i` of `bytes`, low half first.
fn nibble(bytes: &[u8], i: usize) -> u8 {
    (bytes[i / 2] >> (4 * (i % 2))) & 15
}
