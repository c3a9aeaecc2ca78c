//! Integers under a scale and a zero point per group of inputs: GPTQ, AWQ and the `pack-quantized`
//! layout of compressed-tensors. A weight is `scale (code - zero)`.
//!
//! | container | tensors | read by |
//! | --- | --- | --- |
//! | GPTQ | `qweight`, `qzeros`, `scales`, `g_idx` | `gptq` |
//! | AWQ | `qweight`, `qzeros`, `scales` | `awq` |
//! | compressed-tensors | `weight_packed`, `weight_scale`, `weight_zero_point`, `weight_shape`, `weight_g_idx` | `packed` |
//!
//! All three become `Grouped`, and that one of the listed formats that holds it exactly: blocks of
//! 128, 64 or 32 inputs, which kernels multiply (`blocks`), the same with the inputs in another order
//! (`ordered`), or, where groups or scales do not fit those, one code after another (`any`).

mod any;
mod awq;
mod blocks;
mod codes;
mod gptq;
mod ordered;
mod packed;
mod settings;

pub use any::INT;
pub use blocks::{INT4_G32, INT4_G64, INT4_G128, INT8_G32, INT8_G128};
pub use ordered::{
    INT4_G32_ORDERED, INT4_G64_ORDERED, INT4_G128_ORDERED, INT8_G32_ORDERED, INT8_G128_ORDERED,
    blocks_and_order,
};

use crate::QuantError;
use codes::Codes;
use marlin_checkpoint::{Checkpoint, StoredTensor};
use marlin_tensor::Weight;
use settings::Settings;

/// Which inputs share a scale.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Groups {
    /// So many neighbours; the last group may be smaller.
    Even(usize),
    /// The group of every input.
    Listed(Vec<u32>),
}

impl Groups {
    /// From the group of every input: neighbours where they are that.
    fn listed(groups: Vec<u32>) -> Self {
        let size = groups.iter().position(|&g| g != 0).unwrap_or(groups.len()).max(1);
        match groups.iter().enumerate().all(|(i, &g)| g as usize == i / size) {
            true => Self::Even(size),
            false => Self::Listed(groups),
        }
    }

    /// The group of `input`.
    fn of(&self, input: usize) -> usize {
        match self {
            Self::Even(size) => input / size,
            Self::Listed(groups) => groups[input] as usize,
        }
    }
}

/// A matrix as its container describes it.
struct Grouped {
    out_features: usize,
    in_features: usize,
    /// Bits that hold every code: 4 or 8.
    bits: u32,
    codes: Codes,
    /// `[out_features, groups]`.
    scales: Vec<f32>,
    /// `[out_features, groups]`.
    zeros: Vec<u8>,
    groups: usize,
    group_of: Groups,
}

impl Grouped {
    /// In the format that holds it exactly and is multiplied fastest.
    fn into_weight(self) -> Result<Weight, QuantError> {
        if let Some(weight) = blocks::hold(&self)? {
            return Ok(weight);
        }
        match ordered::hold(&self)? {
            Some(weight) => Ok(weight),
            None => any::hold(&self),
        }
    }
}

/// Reads the matrix stored under `key`.
fn read(
    checkpoint: &Checkpoint,
    key: &str,
    out_features: usize,
    in_features: usize,
) -> Result<Grouped, QuantError> {
    let shape = (out_features, in_features);
    let settings = Settings::of(checkpoint)?;
    if checkpoint.get(&format!("{key}.weight_packed")).is_some() {
        return packed::read(checkpoint, settings.as_ref(), key, shape);
    }
    let Some(settings) = settings else {
        return Err(Settings::missing(checkpoint, "how the zero points of qzeros are stored"));
    };
    match settings.method()? {
        Some("gptq") => gptq::read(checkpoint, &settings, key, shape),
        Some("awq") => awq::read(checkpoint, &settings, key, shape),
        found => Err(settings.unsupported(
            "quant_method",
            format!("{} beside {key}.qweight; gptq or awq is read", found.unwrap_or("nothing")),
        )),
    }
}

/// The values of `stored` as f32.
fn floats(stored: &StoredTensor) -> Result<Vec<f32>, QuantError> {
    match stored.plain().filter(|t| t.dtype().is_float()) {
        Some(tensor) => Ok(tensor.to_f32()?),
        None => Err(invalid(&stored.name, "scales must be stored as floats")),
    }
}

/// The group of every input from a tensor of indices; `None` where it says nothing.
fn group_indices(
    checkpoint: &Checkpoint,
    name: &str,
    in_features: usize,
    groups: usize,
) -> Result<Option<Vec<u32>>, QuantError> {
    if checkpoint.get(name).is_none() {
        return Ok(None);
    }
    let stored = checkpoint.require(name, &[in_features])?;
    let indices = stored.plain().and_then(|t| t.to_i64().ok());
    let indices = indices.ok_or_else(|| invalid(name, "indices must be stored as I32 or I64"))?;
    // compressed-tensors writes -1 where no order was found.
    if indices.iter().all(|&g| g == -1) {
        return Ok(None);
    }
    let group = |(input, &g): (usize, &i64)| {
        let known = u32::try_from(g).ok().filter(|&g| (g as usize) < groups);
        known.ok_or_else(|| invalid(name, format!("input {input} is in group {g} of {groups}")))
    };
    indices.iter().enumerate().map(group).collect::<Result<_, _>>().map(Some)
}

/// `values: [rows, columns]` as `[columns, rows]`.
fn transposed<T: Copy>(values: &[T], rows: usize, columns: usize) -> Vec<T> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| values[r * columns + c])).collect()
}

fn invalid(key: &str, reason: impl Into<String>) -> QuantError {
    QuantError::Invalid { key: key.to_owned(), reason: reason.into() }
}
