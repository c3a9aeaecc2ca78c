//! The vocabulary every other crate speaks: data types, host tensors, encoded
//! weights, batches, and the [`Backend`] trait. No I/O and no arithmetic beyond
//! shapes and element conversion.
//!
//! * [`DType`], [`HostTensor`]: plain arrays in host memory, usually a view into a mapped file.
//! * [`Weight`]: one matrix in some storage format, still encoded.
//! * [`Batch`]: the rows of one forward pass, and where their keys and values live.
//! * [`Algebra`]: products of whole matrices, for a converter.
//! * [`Draw`]: how a token is to be chosen from a row of logits.
//! * [`Backend`]: the operators a device implements; [`Tensor`] and the loaded
//!   handles ([`Linear`], [`Vector`], …) are opaque outside the backend that made them.

mod algebra;
mod backend;
mod batch;
mod cache_type;
mod draw;
mod dtype;
mod host;
mod op;
mod weight;

pub use algebra::{Algebra, Factored, Gram};
pub use backend::{
    Backend, BackendError, DeviceMemory, Embedding, Experts, GatedLinears, HeadLinear, Linear,
    LinearOptions, Opaque, Placed, Role, RopeTable, Routing, Tensor, Vector,
};
pub use batch::{Batch, BatchSequence, Cache, CacheLayerSpec, CacheSpec};
pub use cache_type::{CACHE_GROUP, CacheType};
pub use draw::{Adjustment, Draw, Drawn, DrawnLogits};
pub use dtype::DType;
pub use host::{HostTensor, TensorError};
pub use op::{Activation, AttentionParams, Heads, LongRope, Rope, RopeStyle, Router, Scoring};
pub use weight::Weight;
