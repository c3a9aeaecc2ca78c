//! Containers on disk to named tensors: safetensors (single, sharded), GGUF, `config.json`.
//!
//! Everything is memory-mapped and bounds-checked before a byte is interpreted: a tensor that
//! [`Checkpoint::get`] returns lies wholly inside its file and has exactly the bytes its shape
//! and encoding need. Which tensors a model wants, and in which shape, is the caller's business
//! ([`Checkpoint::require`]).

mod atomic;
mod checkpoint;
mod error;
mod ggml_type;
mod gguf;
mod json;
mod open;
mod safetensors;
mod source;

pub use atomic::write_file;
pub use checkpoint::{Checkpoint, Container, Encoding, StoredTensor};
pub use error::CheckpointError;
pub use ggml_type::GgmlType;
pub use gguf::{GgufTensor, GgufType, GgufValue, write_gguf};
pub use json::check_json;
pub use safetensors::{Safetensors, read_safetensors, write_safetensors};
