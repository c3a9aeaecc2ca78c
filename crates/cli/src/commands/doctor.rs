//! `marlin doctor`: what this machine and this binary can do.

use crate::args::Doctor;
use crate::{console, loaded};
use anyhow::Result;
use marlin_cpu::Level;
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
    let memory = loaded::physical_memory();
    if args.json {
        console::json(&json!({
            "version": env!("CARGO_PKG_VERSION"),
            "cpu": {"cores": cores, "level": level.to_string(), "levels": levels},
            "memory_bytes": memory,
            "devices": ["cpu"],
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
    console::line("devices        cpu; this build has no GPU backend")?;
    let embedded = if cfg!(feature = "embedded-model") { crate::embedded::NAME } else { "none" };
    console::line(&format!("embedded model {embedded}"))?;
    console::line(&format!("architectures  {}", architectures.join(" · ")))?;
    console::line(&format!("formats        {}", formats.join(" ")))?;
    Ok(ExitCode::SUCCESS)
}
