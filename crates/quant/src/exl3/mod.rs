//! EXL3: trellis-coded matrices in a doubly rotated basis (the format of exllamav3).
//!
//! A linear layer `y = x W`, `W: [k, n]` (`k` inputs, `n` outputs, both padded to multiples of
//! 128), is stored as
//!
//! ```text
//! W = diag(suh) · P_k · Ŵ · P_n · diag(svh)      P = blockdiag(H_128) / √128
//! ```
//!
//! where `Ŵ` is cut into 16×16 tiles, each one tail-biting ring of `256·K` bits ([`ring`]); the
//! weight at a ring position is a fixed function of the 16 bits that end there ([`codebook`]).
//! There are no tables and no group scales: `K` bits per weight plus 16 per channel.
//!
//! * [`codebook`]: state to value, three generators.
//! * [`ring`]: rates, bit order, states of a tile, where a position lies in the tile.
//! * [`hadamard`]: the rotation.
//! * [`mod@format`]: stored tensors to [`Weight`](marlin_tensor::Weight), and the scalar decode.
//! * [`encode`]: values to the nearest ring.
//! * [`embedding`]: the quantized token-embedding table, which packs its rings differently.
//!
//! Checked bit for bit against vectors that exllamav3 1.6.5 computed (`fixtures/exl3_*`).

pub mod codebook;
pub mod embedding;
pub mod encode;
pub mod format;
pub mod hadamard;
pub mod ring;
#[cfg(test)]
mod tests;

pub use codebook::Codebook;
pub use embedding::Exl3Embedding;
pub use encode::{ReferenceEncoder, TileEncoder};
pub use format::{Exl3, Exl3Parts};
pub use ring::{Rate, Ring, pack_ring};
