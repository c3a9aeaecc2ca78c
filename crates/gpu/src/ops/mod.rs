//! Kernels and their launches: one file is one family. Activations are f32 `[rows, columns]`.
//!
//! The width of a plane (subgroup) is a comptime value taken from the device: 32 on NVIDIA and Apple, 8 on
//! software Vulkan. A cube is `[plane, planes]`, so that `UNIT_POS_X` is the lane.

pub(crate) mod attention;
pub(crate) mod cache;
pub(crate) mod columns;
pub(crate) mod elementwise;
pub(crate) mod exl3;
pub(crate) mod matrix;
pub(crate) mod moe;
pub(crate) mod norm;
pub(crate) mod rope;
pub(crate) mod text;
pub(crate) mod tiles;
