//! Every operator as plain loops over `[rows, columns]` slices, on one thread, accumulating in
//! f64 where order would matter. The fast versions are tested against these.

mod attention;
mod elementwise;
mod moe;
mod norm;
mod rope;

pub(crate) use attention::{attention, first_visible};
pub(crate) use elementwise::{add, concat_heads, gated, slice_heads, softcap};
pub(crate) use moe::route;
pub(crate) use norm::rms_norm;
pub(crate) use rope::rope;

/// Inner product in f64.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32
}
