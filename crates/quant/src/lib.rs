//! Weight encodings. One file is one family of [`WeightFormat`]s: how to recognise it in a
//! checkpoint, how to load it, and the scalar decode that defines what its bytes mean. Backends
//! may have faster kernels; they are tested against [`WeightFormat::decode_rows`].

mod error;
pub mod exl3;
mod float;
mod format;
pub mod fp8;
mod ggml;
pub mod integer;
mod parts;

pub use error::QuantError;
pub use format::{Description, WeightFormat, decode, format, formats, load, slice_rows};
pub use ggml::{IQ4_LEVELS, grids};
