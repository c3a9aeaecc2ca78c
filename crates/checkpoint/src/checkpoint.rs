//! An opened model: named tensors and the configuration beside them.

use crate::error::{Fault, shown};
use crate::{CheckpointError, GgmlType};
use bytes::Bytes;
use marlin_tensor::{DType, HostTensor};
use memmap2::Mmap;
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
    /// A GGUF file; metadata values as JSON (arrays of strings and numbers included). Whole
    /// numbers stay whole up to `u64::MAX`; floats are widened to `f64`, and the ones JSON lacks
    /// are the strings `NaN`, `Infinity` and `-Infinity`.
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
    /// Sorted by name.
    tensors: Vec<StoredTensor>,
    /// Small sidecar files by name (`tokenizer.json`, `chat_template.jinja`, …).
    sidecars: BTreeMap<String, Bytes>,
    /// Mapped files, for [`prefetch`](Self::prefetch).
    maps: Vec<Arc<Mmap>>,
}

impl Checkpoint {
    /// A checkpoint from parts already in memory: tests, converters. Of tensors with the same
    /// name the last one counts.
    pub fn from_parts(
        path: PathBuf,
        container: Container,
        tensors: impl IntoIterator<Item = StoredTensor>,
        sidecars: BTreeMap<String, Bytes>,
    ) -> Self {
        let mut tensors: Vec<_> = tensors.into_iter().collect();
        // The sort is stable: reversed first, the last of equal names comes to stand first.
        tensors.reverse();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        tensors.dedup_by(|a, b| a.name == b.name);
        Self { path, container, tensors, sidecars, maps: Vec::new() }
    }

    /// As [`from_parts`](Self::from_parts) for files: `maps` are those that hold the tensors.
    ///
    /// # Errors
    /// When two tensors have the same name.
    pub(crate) fn from_files(
        path: PathBuf,
        container: Container,
        mut tensors: Vec<StoredTensor>,
        sidecars: BTreeMap<String, Bytes>,
        maps: Vec<Arc<Mmap>>,
    ) -> Result<Self, CheckpointError> {
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some([a, b]) = tensors.array_windows().find(|[a, b]| a.name == b.name) {
            let field = format!("tensor {}", shown(&a.name));
            let reason = match a.file == b.file {
                true => "name appears twice".to_owned(),
                false => format!("also stored in {}; remove one of the files", b.file.display()),
            };
            return Err(Fault::corrupt(reason).at(&a.file, field));
        }
        tensors.shrink_to_fit();
        Ok(Self { path, container, tensors, sidecars, maps })
    }

    /// Asks the operating system to read the mapped files ahead; returns at once. Worth it before
    /// every weight is needed, not before a look at names and shapes. Does nothing where it is
    /// not available.
    pub fn prefetch(&self) {
        #[cfg(unix)]
        for map in &self.maps {
            // Advice only: reading works as well, if more slowly, when it is refused.
            let _ = map.advise(memmap2::Advice::WillNeed);
        }
    }

    /// The tensors whose names begin with `prefix`, sorted by name.
    pub fn under(&self, prefix: &str) -> &[StoredTensor] {
        let first = self.tensors.partition_point(|t| t.name.as_str() < prefix);
        let rest = &self.tensors[first..];
        &rest[..rest.partition_point(|t| t.name.starts_with(prefix))]
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<&StoredTensor> {
        let found = self.tensors.binary_search_by(|t| t.name.as_str().cmp(name));
        found.ok().map(|i| &self.tensors[i])
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

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = &StoredTensor> {
        self.tensors.iter()
    }

    /// A sidecar file such as `tokenizer.json`.
    pub fn sidecar(&self, name: &str) -> Option<&Bytes> {
        self.sidecars.get(name)
    }

    /// Bytes of all tensors.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.data.len() as u64).sum()
    }
}
