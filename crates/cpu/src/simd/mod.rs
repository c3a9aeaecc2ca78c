//! Matrix kernels of single formats and vectorised operators, chosen at run time by [`Level`].
//!
//! * `isa`: what a kernel may use of a processor; `avx2`, `avx512`, `neon`: the implementations.
//! * `tile`: block-quantized weights repacked for sixteen output rows at a time; `block/`: how the
//!   blocks of each format come apart, the only code a new block format needs.
//!   They lie in memory of their own (`region`).
//!   `points`: those of them that store points of a lattice.
//! * `integer`: those weights times activations in 8 bits (`quantized`).
//! * `amx/`: any weights times many rows of activations, both as bf16.
//! * `panel`: any weights times f32 activations; `float`: F32, F16, BF16 and E4M3 in place.
//! * `kernels`: the [`Kernel`]s made of these; `ordered`: one whose inputs come in another order; `scaled`: one
//!   whose outputs are multiplied by a factor each.
//! * `vector`: registers of f32 for the operators between matrix products, which are in
//!   `elementwise`, `dense` (products of matrices in cache) and `attention`.

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[macro_use]
mod methods;

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(not(target_arch = "x86_64"))]
#[path = "no_amx.rs"]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod block;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod float;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod integer;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod isa;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod kernels;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod ordered;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod panel;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod points;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod quantized;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod region;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod scaled;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod tile;

#[cfg(all(test, any(target_arch = "x86_64", target_arch = "aarch64")))]
mod tests;

mod attention;
mod dense;
mod elementwise;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) mod exl3;
pub(crate) mod probe;
mod quants;
mod scatter;
mod single;
mod vector;

pub(crate) use attention::Attention;
pub(crate) use dense::{Matrix, products};
pub(crate) use elementwise::{
    add, add_scaled, gated, narrow_f16, rms_norm, rope, softcap, widen_bf16, widen_f16,
};
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) use kernels::multiply_amx;
pub(crate) use quants::widen_quants;
pub(crate) use region::Piece;
pub(crate) use scatter::transpose_f16;

/// Never called: there is no [`amx::Amx`].
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) fn multiply_amx(
    amx: amx::Amx,
    _: &[&dyn amx::Panels],
    _: &[f32],
    _: usize,
    _: Vec<&mut [f32]>,
    _: &crate::Pool,
) {
    match amx {}
}

use crate::embedding::Rows;
use crate::{Kernel, Level};
use marlin_tensor::Weight;

/// One line of the list of kernels.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
struct Entry {
    format: &'static str,
    load: fn(&Weight, Level, bool) -> Option<Box<dyn Kernel>>,
    name: fn(Level, bool) -> String,
    /// Bytes that it makes of a weight; `None` where it reads the weight's own.
    bytes: fn(&Weight) -> Option<usize>,
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn tiled<F: tile::Format>() -> Entry {
    Entry {
        format: F::ID,
        load: |weight, level, float| {
            Some(Box::new(kernels::Tiled::<F>::new(weight, level, float)?))
        },
        name: kernels::Tiled::<F>::name_of,
        bytes: |w| Some(F::LAYOUT.bytes(w.out_features, w.in_features)),
    }
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn ordered<F: tile::Format>(format: &'static str) -> Entry {
    Entry {
        format,
        load: |weight, level, float| {
            Some(Box::new(ordered::Ordered::<F>::new(weight, level, float)?))
        },
        name: ordered::Ordered::<F>::name_of,
        bytes: |w| Some(F::LAYOUT.bytes(w.out_features, w.in_features) + 4 * w.in_features),
    }
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn scaled<F: tile::Format>(format: &'static str) -> Entry {
    Entry {
        format,
        load: |weight, level, float| {
            Some(Box::new(scaled::Scaled::<F>::new(weight, level, float)?))
        },
        name: scaled::Scaled::<F>::name_of,
        bytes: |w| Some(F::LAYOUT.bytes(w.out_features, w.in_features) + 4 * w.out_features),
    }
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn plain<E: float::Element>() -> Entry {
    Entry {
        format: E::ID,
        load: |weight, level, float| {
            Some(Box::new(kernels::Plain::<E>::new(weight, level, float)?))
        },
        name: kernels::Plain::<E>::name_of,
        bytes: |_| None,
    }
}

/// Every format with a kernel of its own.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn entries() -> [Entry; 42] {
    [
        plain::<float::F32>(),
        plain::<float::F16>(),
        plain::<float::Bf16>(),
        plain::<float::E4m3<1>>(),
        plain::<float::E4m3<128>>(),
        tiled::<block::Q4_0>(),
        tiled::<block::Q4_1>(),
        tiled::<block::Q5_0>(),
        tiled::<block::Q5_1>(),
        tiled::<block::Q8_0>(),
        tiled::<block::Q2K>(),
        tiled::<block::Q3K>(),
        tiled::<block::Q4K>(),
        tiled::<block::Q5K>(),
        tiled::<block::Q6K>(),
        tiled::<block::Iq1S>(),
        tiled::<block::Iq1M>(),
        tiled::<block::Iq2Xxs>(),
        tiled::<block::Iq2Xs>(),
        tiled::<block::Iq2S>(),
        tiled::<block::Iq3Xxs>(),
        tiled::<block::Iq3S>(),
        tiled::<block::Iq4Nl>(),
        tiled::<block::Iq4Xs>(),
        tiled::<block::Mxfp4>(),
        tiled::<block::Nvfp4>(),
        tiled::<block::Tq1_0>(),
        tiled::<block::Tq2_0>(),
        scaled::<block::Nvfp4>("nvfp4_scaled"),
        scaled::<block::Tq1_0>("tq1_0_scaled"),
        scaled::<block::Tq2_0>("tq2_0_scaled"),
        tiled::<block::Int4<128>>(),
        tiled::<block::Int4<64>>(),
        tiled::<block::Int4<32>>(),
        tiled::<block::Int8<128>>(),
        tiled::<block::Int8<32>>(),
        ordered::<block::Int4<128>>("int4_g128_ordered"),
        ordered::<block::Int4<64>>("int4_g64_ordered"),
        ordered::<block::Int4<32>>("int4_g32_ordered"),
        ordered::<block::Int8<128>>("int8_g128_ordered"),
        ordered::<block::Int8<32>>("int8_g32_ordered"),
        Entry { format: "exl3", load: exl3::load, name: exl3::name, bytes: exl3::bytes },
    ]
}

/// The fastest kernel for `weight` at `level`, or `None` when it has to be decoded on the fly.
/// With `float_activations` the inputs must not be quantized.
pub fn load(weight: &Weight, level: Level, float_activations: bool) -> Option<Box<dyn Kernel>> {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    if level > Level::Scalar && level.is_supported() {
        return match entries().iter().find(|e| e.format == weight.format) {
            Some(entry) => (entry.load)(weight, level, float_activations),
            None => Some(Box::new(kernels::DecodedBands::new(weight, level, float_activations)?)),
        };
    }
    let _ = (weight, level, float_activations);
    None
}

/// Bytes that [`load`] would make of `weight`, beside the parts that it goes on reading; `None` where it makes none.
pub(crate) fn bytes(weight: &Weight, level: Level) -> Option<usize> {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    if level > Level::Scalar && level.is_supported() {
        let entries = entries();
        let entry = entries.iter().find(|e| e.format == weight.format)?;
        return (entry.bytes)(weight);
    }
    let _ = (weight, level);
    None
}

/// The fastest way to rows of `weight` at `level`, where there is a faster one than its format's.
pub(crate) fn rows(weight: &Weight, level: Level) -> Option<Box<dyn Rows>> {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    if level > Level::Scalar && level.is_supported() {
        return exl3::rows(weight, level);
    }
    let _ = (weight, level);
    None
}

/// Name of the kernel that [`load`] would choose for a weight of `format`, where there is one.
pub fn kernel_name(format: &str, level: Level, float_activations: bool) -> Option<String> {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    if level > Level::Scalar && level.is_supported() {
        return Some(match entries().iter().find(|e| e.format == format) {
            Some(entry) => (entry.name)(level, float_activations),
            None => kernels::DecodedBands::name_of(format, level, float_activations),
        });
    }
    let _ = (format, level, float_activations);
    None
}
