//! `marlin doctor`: what this machine and this binary can do.

use crate::args::Doctor;
use crate::console;
use anyhow::Result;
use marlin_cpu::{Level, system};
use marlin_gpu::{GpuDevice, Runtime};
use marlin_models::ARCHITECTURES;
use serde_json::json;
use std::process::ExitCode;

/// Prints the findings.
pub fn run(args: &Doctor) -> Result<ExitCode> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let level = Level::detect();
    let levels: Vec<String> =
        Level::ALL.iter().filter(|l| l.is_supported()).map(Level::to_string).collect();
    let architectures: Vec<&str> = ARCHITECTURES.iter().map(|a| a.name).collect();
    let formats: Vec<&str> = marlin_quant::formats().iter().map(|f| f.id()).collect();
    let memory = system::physical_bytes();
    let gpus = marlin_gpu::devices();
    if args.json {
        console::json(&json!({
            "version": env!("CARGO_PKG_VERSION"),
            "cpu": {"cores": cores, "level": level.to_string(), "levels": levels},
            "memory_bytes": memory,
            "devices": devices(&gpus),
            "gpus": gpus.iter().map(gpu_json).collect::<Vec<_>>(),
            "embedded_model": cfg!(feature = "embedded-model"),
            "architectures": architectures,
            "formats": formats,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let memory = memory.map_or("unknown".into(), console::bytes);
    console::line(&format!("marlin         {}", env!("CARGO_PKG_VERSION")))?;
    console::line(&format!("cpu            {cores} cores, {level} (of {})", levels.join(", ")))?;
    console::line(&format!("memory         {memory}"))?;
    console::line("devices        cpu")?;
    for gpu in &gpus {
        console::line(&format!("               {}", gpu_line(gpu)))?;
    }
    for runtime in Runtime::ALL {
        let name = runtime.name();
        if !runtime.is_built() {
            console::line(&format!("               no {name}: build with --features {name}"))?;
        } else if !gpus.iter().any(|gpu| gpu.runtime == runtime) {
            let needs = runtime.needs();
            console::line(&format!("               no {name} device found: it needs {needs}"))?;
        }
    }
    let embedded = if cfg!(feature = "embedded-model") { crate::embedded::NAME } else { "none" };
    console::line(&format!("embedded model {embedded}"))?;
    console::line(&format!("architectures  {}", architectures.join(" · ")))?;
    console::line(&format!("formats        {}", formats.join(" ")))?;
    Ok(ExitCode::SUCCESS)
}

/// What `--device` takes here.
fn devices(gpus: &[GpuDevice]) -> Vec<&'static str> {
    let mut names = vec!["cpu"];
    names.extend(gpus.iter().map(|gpu| gpu.runtime.name()));
    names.dedup();
    names
}

fn gpu_json(gpu: &GpuDevice) -> serde_json::Value {
    json!({
        "device": gpu.runtime.name(),
        "index": gpu.index,
        "name": gpu.name,
        "memory_bytes": gpu.memory_bytes,
        "driver": gpu.driver,
        "is_software": gpu.is_software,
    })
}

fn gpu_line(gpu: &GpuDevice) -> String {
    let mut line = format!("{}:{} {}", gpu.runtime.name(), gpu.index, gpu.name);
    if let Some(bytes) = gpu.memory_bytes {
        line += &format!(", {}", console::bytes(bytes));
    }
    if let Some(driver) = &gpu.driver {
        line += &format!(", driver {driver}");
    }
    if gpu.is_software {
        line += ", a program on the processor: for tests, not for speed";
    }
    line
}
