//! [`Backend`](marlin_tensor::Backend) on GPUs. Kernels are written once, in CubeCL, and reach CUDA as C++ text (compiled
//! by NVRTC when they are first launched), Vulkan as SPIR-V and Metal as its own language.
//!
//! * `runtime/`: one file or folder per runtime, each behind a feature of its name: which devices there are, and how to open one.
//!   Without a feature this crate finds no device and needs nothing.
//! * `decode/`: one file per row format: its layout on the device, and eight of its weights in registers.
//! * `ops/`: the kernels, by family. `weights`: matrices. `experts`: stacks of them. `step`: a batch on the device.
//! * `tune/`: which variant of a kernel a shape has, and the file that keeps it; `measure/` finds it out.
//! * `encoder`: the search that encodes EXL3 tiles, and LDLQ around it. `algebra`: products of whole matrices.
//! * `recordings`: a pass over decoding sequences is recorded once and launched as a whole from then on.
//!
//! Activations are f32. Nothing inside a pass is read back.

#[cfg(feature = "device")]
mod algebra;
#[cfg(feature = "device")]
mod backend;
#[cfg(feature = "device")]
mod decode;
#[cfg(feature = "device")]
mod encoder;
#[cfg(feature = "device")]
mod experts;
#[cfg(feature = "device")]
mod gpu;
#[cfg(feature = "device")]
mod measure;
#[cfg(feature = "device")]
mod ops;
#[cfg(feature = "device")]
mod recordings;
mod runtime;
#[cfg(feature = "device")]
mod step;
pub mod tune;
#[cfg(feature = "device")]
mod weights;

pub use runtime::{
    CudaKernels, Emulation, GpuDevice, Runtime, compile_cuda, devices, emulate, encoder, open,
    open_tuned, tuner,
};
