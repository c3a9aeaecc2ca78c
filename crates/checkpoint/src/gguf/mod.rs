//! GGUF files: the reader, typed metadata values, and the writer.
//!
//! Layout, all little-endian: `GGUF`, `version: u32` (2 or 3, which differ only in that 3 allows
//! big-endian files), `tensor_count: u64`, `metadata_count: u64`, the metadata as `(key, type: u32,
//! value)`, the tensor infos as `(name, n_dims: u32, dims: [u64], type: u32, offset: u64)` with
//! `dims` fastest first, padding to `general.alignment` (32 unless set), then the data, to which
//! offsets refer. A string is `length: u64` and UTF-8 bytes; an array is `element type: u32`,
//! `count: u64` and the elements, which may be arrays again. Source: `docs/gguf.md` of ggml and the
//! `gguf` Python package 0.19.0.

mod read;
mod split;
mod value;
mod write;

pub(crate) use read::is_gguf;
pub(crate) use split::open;
pub use value::{GgufType, GgufValue};
pub use write::{GgufTensor, write_gguf};

/// First four bytes of a file.
const MAGIC: &[u8; 4] = b"GGUF";
/// Alignment of tensor data unless [`ALIGNMENT_KEY`] says otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Metadata key of the alignment, a `u32`.
const ALIGNMENT_KEY: &str = "general.alignment";
/// Most dimensions of a tensor.
const MAX_DIMS: usize = 4;
/// Most tensors in one file.
const MAX_TENSORS: u64 = 256 * 1024;
/// Most metadata keys.
const MAX_KEYS: u64 = 64 * 1024;
/// Most metadata values, array elements included. Gemma 4's vocabulary takes 1.3 million.
const MAX_VALUES: usize = 2 * 1024 * 1024;
/// Longest key or tensor name, as the format says of keys.
const MAX_NAME_BYTES: u64 = 65_535;
/// Deepest nesting of arrays; an array of numbers has depth 1.
const MAX_DEPTH: usize = 8;

/// Whether data can be aligned to `alignment` bytes.
fn valid_alignment(alignment: u64) -> bool {
    alignment.is_power_of_two() && (8..=64 * 1024).contains(&alignment)
}
