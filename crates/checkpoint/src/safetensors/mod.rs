//! Safetensors files: the reader and the writer.
//!
//! Layout: `header_length: u64` little-endian, `header_length` bytes of JSON, then the data.
//! The header maps each tensor name to `{"dtype", "shape", "data_offsets": [begin, end]}`, offsets
//! counted from the first byte after the header, and `__metadata__` to a map of strings. Sorted by
//! offset the tensors must fill the data without gap or overlap: the rule of the format (its
//! README, "Format"), and what makes a truncated or padded file visible.
//!
//! The header is parsed as a stream, so nothing is allocated that the file did not pay for in
//! bytes; its length and the number of tensors are limited on top.

mod read;
mod write;

pub(crate) use read::read;
pub use read::{Safetensors, read_safetensors};
pub use write::write_safetensors;

/// Longest header, as in the reference implementation.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Most tensors in one file. DeepSeek-V3 in FP8 has 91 thousand, over 163 files.
const MAX_TENSORS: usize = 256 * 1024;
/// Most dimensions of one tensor.
const MAX_DIMS: usize = 8;
/// Most entries of `__metadata__`.
const MAX_METADATA: usize = 64 * 1024;

/// Name that is not a tensor but a map of strings.
const METADATA_KEY: &str = "__metadata__";
