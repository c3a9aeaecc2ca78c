//! What is kept of a device on disk: what `marlin tune` found, and compiled kernels.

use crate::{console, hub};
use marlin_gpu::tune::{Key, Tuned, read};
use marlin_gpu::{CudaKernels, GpuDevice};
use std::path::PathBuf;
use std::sync::Once;

/// Where choices are kept; none without a home directory.
pub fn folder() -> Option<PathBuf> {
    Some(hub::caches()?.join("marlin").join("tune"))
}

/// Says with what kernels are compiled, and where they are kept.
pub fn compile_kernels() {
    let toolkit = ["CUDA_PATH", "CUDA_HOME"].into_iter().find_map(std::env::var_os);
    marlin_gpu::compile_cuda(CudaKernels {
        toolkit: toolkit.map(PathBuf::from),
        kept_in: hub::caches().map(|caches| caches.join("marlin").join("kernels")),
    });
}

/// Choices for `device`. Without any, or with some that are not for it, its kernels follow their rules, and a line says so.
pub fn choices(device: &GpuDevice) -> Tuned {
    let Some(folder) = folder() else { return Tuned::default() };
    match read(&folder, &Key::of(device)) {
        Ok(Some(tuned)) => {
            console::detail(&format!("kernels tuned for {}: {} choices", device.name, tuned.len()));
            tuned
        }
        Ok(None) => {
            static TOLD: Once = Once::new();
            if !device.is_software {
                TOLD.call_once(|| {
                    console::note(&format!(
                        "note: kernels are not tuned for {}; `marlin tune MODEL` does it once",
                        device.name
                    ));
                });
            }
            Tuned::default()
        }
        Err(error) => {
            console::note(&format!("note: tuned kernels are not used: {error}"));
            Tuned::default()
        }
    }
}
