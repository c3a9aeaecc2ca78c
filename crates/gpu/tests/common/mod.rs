//! The devices that tests run on.
#![allow(dead_code, reason = "each test program uses a part")]

use marlin_gpu::GpuDevice;

/// Every device that this build finds, where they are built also the emulated ones: their texts are left in
/// `tmp/kernels` of the target folder.
pub fn devices() -> Vec<GpuDevice> {
    marlin_gpu::emulate(marlin_gpu::Emulation {
        folder: std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels"),
        compiler: std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned()),
    });
    let devices = marlin_gpu::devices();
    if devices.is_empty() {
        eprintln!("skipped: no GPU, or no runtime in this build");
    }
    devices
}

/// Whether kernels in NVIDIA's own instructions run on the device, or the backend on it, that is called this: without, what they should
/// have written is not there.
pub fn runs_everything(name: &str) -> bool {
    !name.contains("tensor cores not run")
}
