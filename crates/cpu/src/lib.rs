//! [`Backend`](marlin_tensor::Backend) on the CPU.
//!
//! * `reference/`: every operator as a plain loop over slices; the truth the others are tested
//!   against, and what [`Level::Scalar`] runs.
//! * `simd/`: the same operators and the matrix kernels of single formats, chosen at run time by
//!   [`Level`]. A format without a kernel there keeps its bytes and is decoded on the fly.
//! * [`CpuEncoder`]: values to EXL3 tiles.
//! * [`Pool`]: threads that wait by spinning, then yielding, then parking, since one token is
//!   hundreds of parallel regions of a few microseconds.
//! * `memory`: aligned, recycled activation buffers; `cache`: paged keys and values.
//! * [`system`]: what the operating system says of memory.

mod backend;
mod cache;
mod embedding;
mod encoder;
mod frequencies;
mod kernel;
mod level;
mod memory;
mod moe;
mod order;
mod pool;
pub mod probe;
mod reference;
pub mod simd;

pub use backend::{Activations, CpuBackend, CpuOptions};
pub use encoder::CpuEncoder;
pub use kernel::{Inputs, Kernel, Prepared, RowKind};
pub use level::{Level, UnknownLevel};
pub use memory::pages::HugePages;
pub use memory::system;
pub use pool::{ColumnBand, Pool};
