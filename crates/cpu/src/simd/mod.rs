//! Matrix kernels of single formats and vectorised operators, chosen at run time by [`Level`].

mod attention;
mod dense;
mod elementwise;
#[cfg(target_arch = "x86_64")]
mod exl3;
mod vector;

pub(crate) use attention::Attention;
pub(crate) use dense::{Matrix, products};
pub(crate) use elementwise::{
    add, add_scaled, gated, narrow_f16, rms_norm, rope, softcap, widen_bf16, widen_f16,
};

use crate::{Kernel, Level};
use marlin_tensor::Weight;

/// The fastest kernel for `weight` at `level`, or `None` when it has to be decoded on the fly.
/// With `float_activations` the inputs must not be quantized.
pub fn load(weight: &Weight, level: Level, float_activations: bool) -> Option<Box<dyn Kernel>> {
    match weight.format {
        #[cfg(target_arch = "x86_64")]
        "exl3" => exl3::load(weight, level, float_activations),
        _ => None,
    }
}

/// Name of the kernel that [`load`] would choose for a weight of `format`, where there is one.
pub fn kernel_name(format: &str, level: Level, _float_activations: bool) -> Option<String> {
    match format {
        #[cfg(target_arch = "x86_64")]
        "exl3" if level > Level::Scalar => Some(exl3::name(level)),
        _ => None,
    }
}
