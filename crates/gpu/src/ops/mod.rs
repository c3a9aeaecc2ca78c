//! Kernels and their launches: one file is one family. Activations are f32 `[rows, columns]`.
//!
//! The width of a plane (subgroup) is a comptime value taken from the device: 32 on NVIDIA and Apple, 8 on
//! software Vulkan. A cube is `[plane, planes]`, so that `UNIT_POS_X` is the lane.

// Kernels are written in CubeCL's language, which has no chains of conditions, no methods of integers and no constants of `std`.
#![allow(
    clippy::approx_constant,
    clippy::assign_op_pattern,
    clippy::collapsible_if,
    clippy::excessive_precision,
    clippy::manual_is_multiple_of
)]

pub(crate) mod attention;
pub(crate) mod cache;
pub(crate) mod cholesky;
pub(crate) mod columns;
pub(crate) mod draw;
pub(crate) mod elementwise;
pub(crate) mod exl3;
mod flash;
pub(crate) mod gemm;
pub(crate) mod integer;
pub(crate) mod latent;
pub(crate) mod ldlq;
pub(crate) mod matrix;
pub(crate) mod moe;
pub(crate) mod norm;
pub(crate) mod product;
pub(crate) mod rope;
mod simdgroup;
pub(crate) mod text;
pub(crate) mod tiles;
pub(crate) mod viterbi;
