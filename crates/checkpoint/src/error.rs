//! Why a checkpoint cannot be opened or a tensor cannot be had.

use std::path::PathBuf;

/// Error of this crate. Every variant names the file and, where there is one, the key.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Nothing there.
    #[error("{}: {what} not found", path.display())]
    NotFound {
        /// File or directory asked for.
        path: PathBuf,
        /// What was looked for.
        what: String,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// The file contradicts itself or its format.
    #[error("{}: {field}: {reason}; the file is damaged or incomplete, fetch it again", path.display())]
    Corrupt {
        /// File.
        path: PathBuf,
        /// Header field or tensor.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Well-formed but not something this program reads.
    #[error("{}: {field}: {reason}", path.display())]
    Unsupported {
        /// File.
        path: PathBuf,
        /// Header field or tensor.
        field: String,
        /// What is not supported.
        reason: String,
    },
    /// A tensor the model needs is absent.
    #[error("{}: tensor {key} is missing", path.display())]
    Missing {
        /// File or directory.
        path: PathBuf,
        /// Tensor name.
        key: String,
    },
    /// A tensor has another shape than the model needs.
    #[error("{}: {key}: expected shape {expected:?}, found {found:?}", path.display())]
    Shape {
        /// File.
        path: PathBuf,
        /// Tensor name.
        key: String,
        /// Shape the model needs, slowest dimension first.
        expected: Vec<usize>,
        /// Stored shape.
        found: Vec<usize>,
    },
}
