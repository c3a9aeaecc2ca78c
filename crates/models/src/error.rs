//! Why a model cannot be described, loaded or run.

use marlin_checkpoint::CheckpointError;
use marlin_quant::QuantError;
use marlin_tensor::{BackendError, TensorError};
use std::path::PathBuf;

/// Error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A configuration field is missing, of the wrong type, or holds a value nobody implements.
    #[error("{}: {field}: {reason}", file.display())]
    Config {
        /// `config.json` or the GGUF file.
        file: PathBuf,
        /// Field, as spelt in the file.
        field: String,
        /// What is wrong and what is accepted.
        reason: String,
    },
    /// A tensor is missing or has another shape.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A weight cannot be loaded.
    #[error("{}: {source}", file.display())]
    Weight {
        /// File that holds it.
        file: PathBuf,
        /// Cause.
        source: QuantError,
    },
    /// A stored tensor has the wrong type.
    #[error("{key}: {source}")]
    Tensor {
        /// Tensor name.
        key: String,
        /// Cause.
        source: TensorError,
    },
    /// The device refused.
    #[error("{key}: {source}")]
    Load {
        /// Tensor being placed.
        key: String,
        /// Cause.
        source: BackendError,
    },
    /// An operator failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A token id outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    Token {
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocab_size: usize,
    },
}
