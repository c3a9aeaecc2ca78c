//! What can go wrong while a model is converted.

use std::path::PathBuf;

/// An error with the file, tensor or field it is about.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The source or the output cannot be read or written.
    #[error(transparent)]
    Checkpoint(#[from] marlin_checkpoint::CheckpointError),
    /// The source is not a model that can be run.
    #[error(transparent)]
    Model(#[from] marlin_models::ModelError),
    /// A stored weight does not decode.
    #[error(transparent)]
    Quant(#[from] marlin_quant::QuantError),
    /// The device failed.
    #[error(transparent)]
    Backend(#[from] marlin_tensor::BackendError),
    /// A host tensor has the wrong type or size.
    #[error(transparent)]
    HostTensor(#[from] marlin_tensor::TensorError),
    /// Evaluation failed.
    #[error(transparent)]
    Engine(#[from] marlin_engine::EngineError),
    /// One matrix cannot be quantized.
    #[error("{key}: {reason}")]
    Tensor {
        /// Checkpoint key.
        key: String,
        /// Reason, and what to do.
        reason: String,
    },
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// Less disk space than the job needs.
    #[error(
        "{}: {needed_bytes} bytes are needed, {free_bytes} are free; make room and run the same command again",
        path.display()
    )]
    DiskFull {
        /// Output directory.
        path: PathBuf,
        /// Bytes the job writes at most.
        needed_bytes: u64,
        /// Bytes free.
        free_bytes: u64,
    },
    /// More memory than the user allows.
    #[error("{what} needs {needed_bytes} bytes, --max-memory allows {allowed_bytes}")]
    Memory {
        /// What does not fit.
        what: String,
        /// Bytes needed.
        needed_bytes: u64,
        /// Bytes allowed.
        allowed_bytes: u64,
    },
    /// An option is out of range or contradicts another.
    #[error("{field}: {reason}")]
    Option {
        /// Option as the user writes it.
        field: String,
        /// Reason, and what is possible.
        reason: String,
    },
    /// The output holds another job.
    #[error("{}: {reason}", path.display())]
    Job {
        /// File of the job.
        path: PathBuf,
        /// Reason, and what to do.
        reason: String,
    },
    /// The user stopped it; everything finished so far is kept.
    #[error("stopped")]
    Stopped,
}
