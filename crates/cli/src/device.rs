//! From `--device` to a backend.

use crate::args::{ActivationsArg, Device, DeviceArgs};
use crate::{exit, tuned};
use anyhow::Result;
use marlin_cpu::{Activations, CpuBackend, CpuEncoder, CpuOptions, Level};
use marlin_gpu::tune::Tuned;
use marlin_gpu::{GpuDevice, Runtime};
use marlin_quant::exl3::TileEncoder;
use marlin_tensor::Backend;
use std::sync::Arc;

/// Variable that forces an instruction set.
pub const LEVEL: &str = "MARLIN_CPU";

/// The instruction set to use: the best there is, or what `MARLIN_CPU` says, in whatever case; empty is as if it were not set.
///
/// # Errors
/// When it names what this machine lacks.
pub fn level() -> Result<Level> {
    let name = match std::env::var(LEVEL) {
        Ok(name) if !name.trim().is_empty() => name.trim().to_ascii_lowercase(),
        _ => return Ok(Level::detect()),
    };
    let level: Level = name.parse().map_err(|e| exit::usage(format!("{LEVEL}: {e}")))?;
    match level.is_supported() {
        true => Ok(level),
        false => Err(exit::usage(format!("{LEVEL}: this machine has no {level}"))),
    }
}

/// Threads the arguments ask for; all cores if none.
pub fn threads(args: &DeviceArgs) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    args.threads.map_or_else(cores, usize::from)
}

/// The GPU that `device` names, `None` for the processor. `auto` takes no GPU that is a program on the processor.
///
/// # Errors
/// When it names a runtime that this build lacks, or a device that is not there.
pub fn gpu(device: Device) -> Result<Option<GpuDevice>> {
    tuned::compile_kernels();
    let (runtime, index) = match device {
        Device::Cpu => return Ok(None),
        Device::Auto => {
            let mut found = marlin_gpu::devices();
            found.retain(|d| !d.is_software);
            let rank = |d: &GpuDevice| Runtime::ALL.iter().position(|r| *r == d.runtime);
            return Ok(found.into_iter().min_by_key(rank));
        }
        Device::Gpu { runtime, index } => (runtime, index),
    };
    let found = marlin_gpu::devices();
    if !runtime.is_built() {
        let message = format!(
            "--device {device}: {}; there are {}",
            not_built(runtime),
            names(&found).join(", ")
        );
        return Err(exit::usage(message));
    }
    let of_runtime = found.iter().filter(|d| d.runtime == runtime);
    match of_runtime.clone().nth(index.unwrap_or(0)) {
        Some(device) => Ok(Some(device.clone())),
        None => {
            let why = match of_runtime.count() {
                0 => format!("no {} device found; it needs {}", runtime.name(), runtime.needs()),
                _ => "no such device".to_owned(),
            };
            let message =
                format!("--device {device}: {why}; there are {}", names(&found).join(", "));
            Err(exit::coded(exit::NOT_FOUND, message))
        }
    }
}

/// Why this build cannot use `runtime`, and what would.
pub fn not_built(runtime: Runtime) -> String {
    let name = runtime.name();
    match runtime {
        Runtime::Metal => format!("this build has no {name}, which only builds for a Mac have"),
        _ => format!("this build has no {name}; build it with --features {name}"),
    }
}

/// What a device is called, and how `--device` reaches it.
pub fn name(device: &GpuDevice) -> String {
    format!("{}:{} ({})", device.runtime.name(), device.index, device.name)
}

/// Everything `--device` can reach here.
fn names(gpus: &[GpuDevice]) -> Vec<String> {
    std::iter::once("cpu".to_owned()).chain(gpus.iter().map(name)).collect()
}

/// The backend the arguments ask for. `activations` is what the verb defaults to.
///
/// # Errors
/// As [`gpu`] and [`cpu`]; when the device does not start.
pub fn backend(args: &DeviceArgs, activations: ActivationsArg) -> Result<Arc<dyn Backend>> {
    if let Some(device) = gpu(args.device)? {
        let tuned = match activations {
            ActivationsArg::Auto => tuned::choices(&device),
            // What these verbs print does not depend on what somebody measured before.
            ActivationsArg::Float => Tuned::default(),
        };
        return Ok(marlin_gpu::open_tuned(&device, tuned)?);
    }
    cpu(args, activations)
}

/// The processor as a backend.
///
/// # Errors
/// When `MARLIN_CPU` names what this machine lacks.
pub fn cpu(args: &DeviceArgs, activations: ActivationsArg) -> Result<Arc<dyn Backend>> {
    let level = level()?;
    let threads = threads(args);
    let activations = match args.activations.unwrap_or(activations) {
        ActivationsArg::Auto => Activations::Auto,
        ActivationsArg::Float => Activations::Float,
    };
    Ok(Arc::new(CpuBackend::new(CpuOptions { threads, level, activations })?))
}

/// What encodes EXL3 tiles: the GPU the arguments ask for, or one thread, since matrices are spread over threads.
///
/// # Errors
/// As [`backend`].
pub fn encoder(args: &DeviceArgs) -> Result<Arc<dyn TileEncoder>> {
    if let Some(device) = gpu(args.device)? {
        return Ok(marlin_gpu::encoder(&device)?);
    }
    Ok(Arc::new(CpuEncoder::new(level()?, 1)))
}

/// How the JSON of a verb calls its activations.
pub fn activations_name(backend: &dyn Backend) -> &'static str {
    if backend.rounds_inputs() { "auto" } else { "float" }
}
