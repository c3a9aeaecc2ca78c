//! GPUs without a GPU, for tests: kernels become the text that they would be there, and the text is compiled, run on the processor,
//! and held to the same results as on any device.
//!
//! * An Apple GPU: Metal text is C++ enough to be compiled with a header in place of Apple's (`metal_stdlib`), in which the
//!   threads of a threadgroup are fibers. It is thousands of times slower than a GPU.
//! * An NVIDIA GPU of compute capability 9.0: what CubeCL makes becomes CUDA text, which is left for that maker's compiler to see
//!   (`.ci/check_cuda.py`), and runs as Metal text; the search for EXL3's states, which asks for an instruction of that maker's, is not run, and what it would
//!   have written is not there. What is written in CUDA C++ runs as it is, with a header (`cuda`) for the
//!   compiler's names and the instructions of `ops/ptx.cuh`
//!   and `ops/gemm/warpgroups.cuh`.

mod program;
mod properties;
mod server;

use super::{EMULATION, GpuDevice, Runtime};
use cubecl::prelude::Client;
use cubecl_common::device::DeviceId;

/// Whose GPU a device stands for; the kind of its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Apple = 0,
    Nvidia = 1,
}

impl Target {
    /// What the device is called.
    fn name(self) -> &'static str {
        match self {
            Self::Apple => "Metal text on the processor",
            Self::Nvidia => "CUDA text on the processor",
        }
    }
}

pub(super) fn devices() -> Vec<GpuDevice> {
    let all = [(Runtime::Metal, Target::Apple), (Runtime::Cuda, Target::Nvidia)];
    let device = |(runtime, target): (Runtime, Target)| GpuDevice {
        runtime,
        index: 0,
        name: target.name().to_owned(),
        memory_bytes: None,
        is_software: true,
        driver: None,
    };
    EMULATION.get().map_or_else(Vec::new, |_| all.map(device).to_vec())
}

/// Whether a device that [`devices`](crate::devices) found is one of these: those of Vulkan are software too.
pub(super) fn is_one(device: &GpuDevice) -> bool {
    device.is_software && device.runtime != Runtime::Vulkan
}

pub(super) fn client(runtime: Runtime) -> Client {
    let target = if runtime == Runtime::Metal { Target::Apple } else { Target::Nvidia };
    Client::load::<server::Emulated>(DeviceId { type_id: target as u16, index_id: 0 })
}
