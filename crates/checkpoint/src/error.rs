//! Why a checkpoint cannot be opened or a tensor cannot be had.

use std::path::{Path, PathBuf};

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

/// What a parser found wrong, before it is known under which name the user knows the place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    Corrupt(String),
    Unsupported(String),
}

impl Fault {
    pub(crate) fn corrupt(reason: impl Into<String>) -> Self {
        Self::Corrupt(reason.into())
    }

    pub(crate) fn unsupported(reason: impl Into<String>) -> Self {
        Self::Unsupported(reason.into())
    }

    /// The error about `field` of `file`.
    pub(crate) fn at(self, file: &Path, field: impl Into<String>) -> CheckpointError {
        let (path, field) = (file.to_path_buf(), field.into());
        match self {
            Self::Corrupt(reason) => CheckpointError::Corrupt { path, field, reason },
            Self::Unsupported(reason) => CheckpointError::Unsupported { path, field, reason },
        }
    }
}

/// A name from a file as a message may show it: one line, no control characters, not endless.
pub(crate) fn shown(name: &str) -> String {
    const LONGEST: usize = 120;
    let mut out: String = name.chars().take(LONGEST).flat_map(char::escape_debug).collect();
    if name.chars().nth(LONGEST).is_some() {
        out.push('…');
    }
    out
}
