//! An opened model: named tensors and the configuration beside them.

use crate::{CheckpointError, GgmlType};
use bytes::Bytes;
use marlin_tensor::{DType, HostTensor};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How the elements of a stored tensor are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// One element after another.
    Plain(DType),
    /// Blocks of a ggml type along the fastest dimension.
    Ggml(GgmlType),
}

/// A tensor as it lies in a file. `data` is exactly the bytes that `shape` and `encoding` need.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    /// Name in the container.
    pub name: String,
    /// Element layout.
    pub encoding: Encoding,
    /// Dimensions, slowest first (GGUF's order reversed).
    pub shape: Vec<usize>,
    /// View into the mapped file.
    pub data: Bytes,
    /// File it lies in, for messages.
    pub file: Arc<Path>,
}

impl StoredTensor {
    /// The tensor as plain elements; `None` when it is block-encoded.
    pub fn plain(&self) -> Option<HostTensor> {
        match self.encoding {
            Encoding::Plain(dtype) => {
                HostTensor::new(dtype, self.shape.clone(), self.data.clone()).ok()
            }
            Encoding::Ggml(_) => None,
        }
    }
}

/// Which container a checkpoint came in.
#[derive(Debug, Clone)]
pub enum Container {
    /// A Hugging Face directory: `config.json` and safetensors. Values are the parsed files.
    HuggingFace {
        /// `config.json`.
        config: Value,
        /// `generation_config.json`, if present.
        generation_config: Option<Value>,
    },
    /// A GGUF file; metadata values as JSON (arrays of strings and numbers included).
    Gguf {
        /// Key-value metadata in file order.
        metadata: serde_json::Map<String, Value>,
    },
}

/// An opened model.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// Directory or file it was opened from.
    pub path: PathBuf,
    /// Container and configuration.
    pub container: Container,
    tensors: BTreeMap<String, StoredTensor>,
    /// Small sidecar files by name (`tokenizer.json`, `chat_template.jinja`, …).
    sidecars: BTreeMap<String, Bytes>,
}

impl Checkpoint {
    /// A checkpoint from parts already in memory: the embedded model, tests, converters.
    pub fn from_parts(
        path: PathBuf,
        container: Container,
        tensors: impl IntoIterator<Item = StoredTensor>,
        sidecars: BTreeMap<String, Bytes>,
    ) -> Self {
        let tensors = tensors.into_iter().map(|t| (t.name.clone(), t)).collect();
        Self { path, container, tensors, sidecars }
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<&StoredTensor> {
        self.tensors.get(name)
    }

    /// The tensor called `name`, which must have `shape`.
    ///
    /// # Errors
    /// When it is missing or shaped otherwise.
    pub fn require(&self, name: &str, shape: &[usize]) -> Result<&StoredTensor, CheckpointError> {
        self.require_if(name, shape, |found| found == shape)
    }

    /// The tensor called `name` as a matrix: its fastest dimension is `columns`, the others
    /// multiply to `rows` (stacked experts are `[experts, rows, columns]`).
    ///
    /// # Errors
    /// When it is missing or shaped otherwise.
    pub fn require_matrix(
        &self,
        name: &str,
        rows: usize,
        columns: usize,
    ) -> Result<&StoredTensor, CheckpointError> {
        self.require_if(name, &[rows, columns], |found| match found.split_last() {
            Some((&last, rest)) => {
                last == columns
                    && !rest.is_empty()
                    && rest.iter().try_fold(1usize, |n, &d| n.checked_mul(d)) == Some(rows)
            }
            None => false,
        })
    }

    fn require_if(
        &self,
        name: &str,
        expected: &[usize],
        fits: impl Fn(&[usize]) -> bool,
    ) -> Result<&StoredTensor, CheckpointError> {
        let tensor = self.get(name).ok_or_else(|| CheckpointError::Missing {
            path: self.path.clone(),
            key: name.to_owned(),
        })?;
        if !fits(&tensor.shape) {
            return Err(CheckpointError::Shape {
                path: tensor.file.to_path_buf(),
                key: name.to_owned(),
                expected: expected.to_vec(),
                found: tensor.shape.clone(),
            });
        }
        Ok(tensor)
    }

    /// All tensors by name.
    pub fn tensors(&self) -> impl Iterator<Item = &StoredTensor> {
        self.tensors.values()
    }

    /// A sidecar file such as `tokenizer.json`.
    pub fn sidecar(&self, name: &str) -> Option<&Bytes> {
        self.sidecars.get(name)
    }

    /// Bytes of all tensors.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.values().map(|t| t.data.len() as u64).sum()
    }
}
