//! What `marlin tune` found for a device, on disk.

use crate::{console, hub};
use marlin_gpu::GpuDevice;
use marlin_gpu::tune::{Key, Tuned, read};
use std::path::PathBuf;
use std::sync::Once;

/// Where choices are kept; none without a home directory.
pub fn folder() -> Option<PathBuf> {
    Some(hub::caches()?.join("marlin").join("tune"))
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
