//! Why a weight cannot be loaded or decoded.

use marlin_checkpoint::CheckpointError;
use marlin_tensor::{DType, TensorError};

/// Error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum QuantError {
    /// The checkpoint lacks it or it has another shape.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// No format recognises the tensors stored under this key.
    #[error("{key}: no known weight format; stored are: {}", found.join(", "))]
    Unknown {
        /// Key of the linear layer.
        key: String,
        /// Names, types and shapes stored under that key.
        found: Vec<String>,
    },
    /// Stored in an element type that cannot be a weight.
    #[error("{key}: element type {dtype} cannot hold weights")]
    Type {
        /// Tensor name.
        key: String,
        /// Its type.
        dtype: DType,
    },
    /// The parts contradict each other or the format.
    #[error("{key}: {reason}")]
    Invalid {
        /// Tensor name.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// The format is only read.
    #[error("{format} weights can be read but not made; choose another format")]
    NoPacker {
        /// Format identifier.
        format: &'static str,
    },
    /// A part has the wrong type or length.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}
