//! Runtimes and their devices.

#[cfg(feature = "server")]
mod cpp;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "emulated")]
mod emulated;
#[cfg(feature = "metal")]
mod metal;
#[cfg(feature = "vulkan")]
mod vulkan;

#[cfg(not(feature = "device"))]
use crate::tune::{Tuned, Tuner};
#[cfg(not(feature = "device"))]
use marlin_quant::exl3::TileEncoder;
#[cfg(not(feature = "device"))]
use marlin_tensor::Backend;
use marlin_tensor::BackendError;
use std::path::PathBuf;
#[cfg(not(feature = "device"))]
use std::sync::Arc;
use std::sync::OnceLock;

/// A way to reach GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Runtime {
    /// NVIDIA's.
    Cuda,
    /// Any vendor's, on Linux and Windows.
    Vulkan,
    /// Apple's.
    Metal,
}

impl Runtime {
    /// Every runtime, in the order in which `auto` prefers them.
    pub const ALL: [Self; 3] = [Self::Cuda, Self::Metal, Self::Vulkan];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::Vulkan => "vulkan",
            Self::Metal => "metal",
        }
    }

    /// Whether this build can use it.
    pub fn is_built(self) -> bool {
        match self {
            Self::Cuda => cfg!(feature = "cuda"),
            Self::Vulkan => cfg!(feature = "vulkan"),
            Self::Metal => cfg!(feature = "metal"),
        }
    }

    /// What must be on the machine for it.
    pub fn needs(self) -> &'static str {
        match self {
            Self::Cuda => "NVIDIA's driver, and of CUDA 13 NVRTC and the headers (CUDA_PATH)",
            Self::Vulkan => "a Vulkan loader and driver",
            Self::Metal => "macOS on an Apple GPU",
        }
    }
}

/// A device that a runtime of this build found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuDevice {
    /// How it is reached.
    pub runtime: Runtime,
    /// Its number among the runtime's devices.
    pub index: usize,
    /// What the driver calls it.
    pub name: String,
    /// Bytes of memory, where the driver says.
    pub memory_bytes: Option<u64>,
    /// Whether it computes on the processor: for tests, not for speed.
    pub is_software: bool,
    /// Version of the driver, in its own words.
    pub driver: Option<String>,
}

/// What emulated devices need (feature `emulated`; for tests).
#[derive(Debug, Clone)]
pub struct Emulation {
    /// Where texts of kernels and what is compiled of them are left.
    pub folder: PathBuf,
    /// A compiler of C++20 that knows `_Float16`: clang, or GCC from 12 on.
    pub compiler: String,
}

static EMULATION: OnceLock<Emulation> = OnceLock::new();

/// How kernels are compiled for an NVIDIA GPU.
#[derive(Debug, Clone, Default)]
pub struct CudaKernels {
    /// CUDA's folder, for its headers; without one it is looked for where it usually is.
    pub toolkit: Option<PathBuf>,
    /// Where compiled kernels are kept, if anywhere.
    pub kept_in: Option<PathBuf>,
}

static CUDA_KERNELS: OnceLock<CudaKernels> = OnceLock::new();

/// Says how kernels are compiled from now on. What the first call says stays.
pub fn compile_cuda(kernels: CudaKernels) {
    let _ = CUDA_KERNELS.set(kernels);
}

/// From now on [`devices`] has the emulated ones too, in a build that has them. What the first call says stays.
pub fn emulate(emulation: Emulation) {
    let _ = EMULATION.set(emulation);
}

/// Every device of the runtimes of this build.
pub fn devices() -> Vec<GpuDevice> {
    #[allow(unused_mut)]
    let mut found: Vec<GpuDevice> = Vec::new();
    #[cfg(feature = "cuda")]
    found.extend(cuda::devices());
    #[cfg(feature = "metal")]
    found.extend(metal::devices());
    #[cfg(feature = "emulated")]
    found.extend(emulated::devices());
    #[cfg(feature = "vulkan")]
    found.extend(vulkan::devices());
    found
}

#[cfg(not(feature = "device"))]
pub use absent::{encoder, open, open_tuned, tuner};
#[cfg(feature = "device")]
pub use found::{encoder, open, open_tuned, tuner};

/// What is said of a device whose runtime is not built.
fn not_built(runtime: Runtime) -> BackendError {
    let name = runtime.name();
    BackendError::Unsupported {
        backend: name.to_owned(),
        what: format!("a device of a runtime that this build lacks; build with --features {name}"),
    }
}

/// What a build without runtimes has instead.
#[cfg(not(feature = "device"))]
mod absent {
    use super::*;

    /// There is nothing to open.
    ///
    /// # Errors
    /// Always.
    pub fn open(device: &GpuDevice) -> Result<Arc<dyn Backend>, BackendError> {
        Err(not_built(device.runtime))
    }

    /// As [`open`].
    ///
    /// # Errors
    /// Always.
    pub fn open_tuned(device: &GpuDevice, _: Tuned) -> Result<Arc<dyn Backend>, BackendError> {
        open(device)
    }

    /// There is nothing to tune.
    ///
    /// # Errors
    /// Always.
    pub fn tuner(device: &GpuDevice) -> Result<Box<dyn Tuner>, BackendError> {
        Err(not_built(device.runtime))
    }

    /// There is nothing that encodes.
    ///
    /// # Errors
    /// Always.
    pub fn encoder(device: &GpuDevice) -> Result<Arc<dyn TileEncoder>, BackendError> {
        Err(not_built(device.runtime))
    }
}

#[cfg(feature = "device")]
pub(crate) mod found {
    use super::GpuDevice;
    use crate::backend::GpuBackend;
    use crate::encoder::GpuEncoder;
    use crate::measure::GpuTuner;
    use crate::tune::{Tuned, Tuner};
    use cubecl::prelude::Client;
    use marlin_quant::exl3::TileEncoder;
    use marlin_tensor::{Backend, BackendError};
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Arc;

    /// The devices among `all` that are described.
    #[cfg(any(feature = "vulkan", feature = "metal"))]
    pub(super) fn describe(
        runtime: super::Runtime,
        all: impl IntoIterator<Item = cubecl::Device>,
    ) -> Vec<GpuDevice> {
        let mut found = Vec::new();
        for device in all {
            let Some(about) = device.description() else { continue };
            found.push(GpuDevice {
                runtime,
                index: found.len(),
                name: about.name,
                memory_bytes: about.max_memory,
                is_software: about.kind == cubecl::device::DeviceKind::Cpu,
                driver: about.driver_version,
            });
        }
        found
    }

    /// Opens a device that [`devices`] found.
    ///
    /// # Errors
    /// When this build has no such runtime, or the device does not start.
    pub fn open(device: &GpuDevice) -> Result<Arc<dyn Backend>, BackendError> {
        open_tuned(device, Tuned::default())
    }

    /// The same with kernels as they were tuned for the device.
    ///
    /// # Errors
    /// As [`open`].
    pub fn open_tuned(device: &GpuDevice, tuned: Tuned) -> Result<Arc<dyn Backend>, BackendError> {
        let made = |client| GpuBackend::new(client, device.clone(), tuned);
        Ok(Arc::new(start(device, made)?))
    }

    /// Bytes of its memory that no program holds, where the driver says.
    pub(crate) fn free_bytes(device: &GpuDevice) -> Option<u64> {
        match device.runtime {
            #[cfg(feature = "emulated")]
            _ if super::emulated::is_one(device) => None,
            #[cfg(feature = "cuda")]
            super::Runtime::Cuda => super::cuda::free_bytes(device),
            _ => None,
        }
    }

    /// What tunes kernels for a device.
    ///
    /// # Errors
    /// As [`open`].
    pub fn tuner(device: &GpuDevice) -> Result<Box<dyn Tuner>, BackendError> {
        let made = start(device, |client| GpuTuner::new(client, device))?;
        Ok(Box::new(made))
    }

    /// The same device as what encodes EXL3 tiles.
    ///
    /// # Errors
    /// As [`open`].
    pub fn encoder(device: &GpuDevice) -> Result<Arc<dyn TileEncoder>, BackendError> {
        let made = start(device, |client| GpuEncoder::new(&client, device.runtime, &device.name))?;
        Ok(Arc::new(made))
    }

    /// What `make` makes of a client of `device`.
    ///
    /// # Errors
    /// When this build has no such runtime, or it does not start; it panics then.
    pub(crate) fn start<T>(
        device: &GpuDevice,
        make: impl FnOnce(Client) -> T,
    ) -> Result<T, BackendError> {
        let client = || match device.runtime {
            #[cfg(feature = "emulated")]
            runtime if super::emulated::is_one(device) => Ok(super::emulated::client(runtime)),
            #[cfg(feature = "cuda")]
            super::Runtime::Cuda => super::cuda::client(device),
            #[cfg(feature = "metal")]
            super::Runtime::Metal => super::metal::client(device),
            #[cfg(feature = "vulkan")]
            super::Runtime::Vulkan => super::vulkan::client(device),
            #[allow(unreachable_patterns)]
            other => Err(super::not_built(other)),
        };
        match catch_unwind(AssertUnwindSafe(|| client().map(make))) {
            Ok(made) => made,
            Err(cause) => {
                let said = cause.downcast_ref::<String>().map(String::as_str);
                let said = said.or_else(|| cause.downcast_ref::<&str>().copied());
                let (name, runtime) = (&device.name, device.runtime);
                Err(BackendError::Device(format!(
                    "{} of {name} does not start: {}; it needs {}",
                    runtime.name(),
                    said.unwrap_or("no reason given"),
                    runtime.needs()
                )))
            }
        }
    }
}
