//! A matrix in a storage format.

use crate::HostTensor;

/// One encoded matrix of a linear layer or embedding: `y = W x`, `W: [out_features, in_features]`.
///
/// `format` names the encoding that can read `parts`; nothing here interprets them.
/// Row-wise formats keep one part whose slowest dimension is `out_features`.
#[derive(Debug, Clone)]
pub struct Weight {
    /// Identifier of the encoding, for example `"bf16"`, `"q4_k"`, `"exl3"`.
    pub format: &'static str,
    /// Rows of the matrix as the model sees it (without padding).
    pub out_features: usize,
    /// Columns of the matrix as the model sees it (without padding).
    pub in_features: usize,
    /// Named stored tensors.
    pub parts: Vec<(&'static str, HostTensor)>,
}

impl Weight {
    /// The part called `name`, if the encoding stores one.
    pub fn part(&self, name: &str) -> Option<&HostTensor> {
        self.parts.iter().find(|(n, _)| *n == name).map(|(_, t)| t)
    }

    /// Stored bytes over all parts.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|(_, t)| t.bytes().len() as u64).sum()
    }

    /// Stored bits per weight of the unpadded matrix.
    pub fn bits_per_weight(&self) -> f64 {
        self.bytes() as f64 * 8.0 / (self.out_features as f64 * self.in_features as f64)
    }
}
