//! `marlin doctor`: what this machine and this binary can do, and what is missing.

mod machine;

use crate::args::Doctor;
use crate::hub::Cache;
use crate::{console, device, hub, tuned};
use anyhow::Result;
use machine::{Card, Machine};
use marlin_cpu::{Level, system};
use marlin_gpu::tune::{CacheError, Key, file, read};
use marlin_gpu::{GpuDevice, Runtime};
use marlin_models::ARCHITECTURES;
use serde::Serialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// A runtime, or what a runtime needs, that is not here.
#[derive(Debug, Serialize)]
struct Missing {
    runtime: &'static str,
    built: bool,
    /// What is missing and how to get it.
    reason: String,
    /// Cards that it would run on.
    cards: Vec<String>,
}

/// Whether kernels are tuned for a device.
#[derive(Debug, Serialize)]
struct TuneState {
    device: String,
    file: PathBuf,
    /// `valid`, `none`, `stale` or `unreadable`.
    state: &'static str,
    choices: usize,
    /// Why it is not used.
    problem: Option<String>,
}

/// The processor.
#[derive(Debug, Serialize)]
struct Processor {
    cores: usize,
    /// What is used, after `MARLIN_CPU`.
    level: String,
    /// What would be used without it.
    best: String,
    levels: Vec<String>,
    /// What `MARLIN_CPU` says, if it is set.
    forced: Option<String>,
    /// What AMX would need; nothing where it is there.
    amx_needs: Vec<&'static str>,
    huge_pages: Option<String>,
}

/// The models that were downloaded.
#[derive(Debug, Default, Serialize)]
struct Hub {
    cache: Option<PathBuf>,
    models: usize,
    bytes: u64,
    offline: bool,
    /// Whether this build has `pull`.
    pull: bool,
    /// Why the cache cannot be read.
    problem: Option<String>,
}

impl Hub {
    fn look() -> Self {
        let (offline, pull) = (hub::offline(), cfg!(feature = "hub"));
        let base = Self { offline, pull, ..Self::default() };
        let cache = match Cache::from_environment() {
            Ok(cache) => cache,
            Err(error) => return Self { problem: Some(format!("{error:#}")), ..base },
        };
        let base = Self { cache: Some(cache.root().to_owned()), ..base };
        match cache.models() {
            Ok(models) => {
                let bytes = models.iter().map(|model| model.bytes).sum();
                Self { models: models.len(), bytes, ..base }
            }
            Err(error) => Self { problem: Some(format!("{error:#}")), ..base },
        }
    }

    fn line(&self) -> String {
        let at = self.cache.as_ref().map(|path| format!("{}, ", path.display()));
        let at = at.unwrap_or_default();
        let what = match (&self.problem, self.models) {
            (Some(problem), _) => problem.clone(),
            (None, 0) => "empty".to_owned(),
            (None, 1) => format!("1 model, {}", console::bytes(self.bytes)),
            (None, n) => format!("{n} models, {}", console::bytes(self.bytes)),
        };
        let offline = if self.offline { ", offline" } else { "" };
        let pull = if self.pull { "" } else { ", no pull in this build" };
        format!("{at}{what}{offline}{pull}")
    }
}

/// Everything that is looked up.
struct Findings {
    processor: Processor,
    gpus: Vec<GpuDevice>,
    missing: Vec<Missing>,
    tune: Vec<TuneState>,
    hub: Hub,
}

/// Prints the findings.
pub fn run(args: &Doctor) -> Result<ExitCode> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let machine = Machine { root: Path::new("/"), variable: &variable };
    // What is wrong with it is told after what is known.
    let level = device::level();
    let best = Level::detect();
    let processor = Processor {
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        level: level.as_ref().unwrap_or(&best).to_string(),
        best: best.to_string(),
        levels: Level::ALL.iter().filter(|l| l.is_supported()).map(Level::to_string).collect(),
        forced: variable(device::LEVEL),
        amx_needs: Level::Amx.missing(),
        huge_pages: machine.huge_pages(),
    };
    let gpus = marlin_gpu::devices();
    let missing = missing(&machine, &gpus);
    let tune = gpus.iter().filter_map(tune_state).collect();
    let findings = Findings { processor, gpus, missing, tune, hub: Hub::look() };
    if args.json {
        json_report(&findings)?
    } else {
        print(&findings)?
    }
    level.map(|_| ExitCode::SUCCESS)
}

fn architectures() -> Vec<&'static str> {
    ARCHITECTURES.iter().map(|a| a.name).collect()
}

fn formats() -> Vec<&'static str> {
    marlin_quant::formats().iter().map(|f| f.id()).collect()
}

fn json_report(findings: &Findings) -> Result<()> {
    let Findings { processor, gpus, missing, tune, hub } = findings;
    console::json(&json!({
        "version": env!("CARGO_PKG_VERSION"),
        "cpu": processor,
        "memory_bytes": system::physical_bytes(),
        "available_memory_bytes": system::available_bytes(),
        "devices": devices(gpus),
        "gpus": gpus.iter().map(gpu_json).collect::<Vec<_>>(),
        "missing": missing,
        "tune": {"folder": tuned::folder(), "devices": tune},
        "hub": hub,
        "embedded_model": cfg!(feature = "embedded-model"),
        "architectures": architectures(),
        "formats": formats(),
    }))
}

fn print(findings: &Findings) -> Result<()> {
    let Findings { processor, gpus, missing, tune, hub } = findings;
    let line = |name: &str, text: &str| console::line(&format!("{name:<14} {text}"));
    line("marlin", env!("CARGO_PKG_VERSION"))?;
    let Processor { cores, level, best, levels, forced, amx_needs, huge_pages } = processor;
    line("cpu", &format!("{cores} cores, {level} (of {})", levels.join(", ")))?;
    if let Some(forced) = forced {
        line("", &format!("{}={forced} is set; without it {best}", device::LEVEL))?;
    }
    if cfg!(target_arch = "x86_64") && !amx_needs.is_empty() {
        line("", &format!("no amx: it needs {}", amx_needs.join(", ")))?;
    }
    let size = |bytes: Option<u64>| bytes.map_or_else(|| "unknown".to_owned(), console::bytes);
    let (all, free) = (size(system::physical_bytes()), size(system::available_bytes()));
    line("memory", &format!("{all}, {free} available"))?;
    match huge_pages.as_deref() {
        Some("never") => {
            let file = "/sys/kernel/mm/transparent_hugepage/enabled";
            line(
                "huge pages",
                &format!("never: weights are read slower; `echo madvise > {file}`"),
            )?;
        }
        Some(given) => line("huge pages", given)?,
        None => {}
    }
    line("devices", "cpu")?;
    for gpu in gpus {
        line("", &gpu_line(gpu))?;
    }
    for lack in missing {
        let cards = match lack.cards.is_empty() {
            true => String::new(),
            false => format!("; there is {}", lack.cards.join(", ")),
        };
        line("", &format!("{}{cards}", lack.reason))?;
    }
    for TuneState { device, file, state, choices, problem } in tune {
        let file = file.display();
        let text = match problem {
            _ if *state == "valid" => format!("{choices} choices for {device} in {file}"),
            Some(problem) => format!("not used for {device}: {problem}"),
            None => format!("nothing for {device}; `marlin tune MODEL` does it once"),
        };
        line("tuned kernels", &text)?;
    }
    line("hub cache", &hub.line())?;
    let embedded = if cfg!(feature = "embedded-model") { crate::embedded::NAME } else { "none" };
    line("embedded model", embedded)?;
    line("architectures", &architectures().join(" · "))?;
    Ok(line("formats", &formats().join(" "))?)
}

/// Runtimes that cannot be used, and runtimes that would fail at the first kernel.
fn missing(machine: &Machine<'_>, gpus: &[GpuDevice]) -> Vec<Missing> {
    let cards = machine.cards();
    let of = |wanted: &dyn Fn(&Card) -> bool| -> Vec<String> {
        cards.iter().filter(|card| wanted(card)).map(|card| card.name.clone()).collect()
    };
    let mut missing = Vec::new();
    for runtime in Runtime::ALL {
        let name = runtime.name();
        let built = runtime.is_built();
        let is_found = gpus.iter().any(|gpu| gpu.runtime == runtime);
        let cards = match runtime {
            Runtime::Cuda => of(&|card| card.vendor == "NVIDIA"),
            Runtime::Vulkan => of(&|_| true),
            Runtime::Metal => Vec::new(),
        };
        let reason = match (built, is_found) {
            (false, _) => match runtime {
                Runtime::Metal => "no metal: only builds for a Mac have it".to_owned(),
                _ => format!("no {name}: build with --features {name}"),
            },
            (true, false) => format!("no {name} device found: it needs {}", runtime.needs()),
            (true, true) if runtime == Runtime::Cuda => {
                let nvrtc = machine.nvrtc().is_none().then_some(
                    "libnvrtc.so, which compiles them (put its folder into LD_LIBRARY_PATH)",
                );
                let headers = machine.cuda_headers().is_none().then_some(
                    "CUDA's headers (set CUDA_PATH to the folder with include/cuda_fp16.h)",
                );
                let lacks: Vec<&str> = [nvrtc, headers].into_iter().flatten().collect();
                if lacks.is_empty() {
                    continue;
                }
                format!(
                    "cuda kernels will not compile: no {}; CUDA 13's toolkit has both",
                    lacks.join(", no ")
                )
            }
            (true, true) => continue,
        };
        missing.push(Missing { runtime: name, built, reason, cards });
    }
    missing
}

fn tune_state(gpu: &GpuDevice) -> Option<TuneState> {
    let folder = tuned::folder()?;
    let key = Key::of(gpu);
    let (state, choices, problem) = match read(&folder, &key) {
        Ok(Some(tuned)) => ("valid", tuned.len(), None),
        Ok(None) => ("none", 0, None),
        Err(error @ CacheError::Foreign { .. }) => ("stale", 0, Some(error.to_string())),
        Err(error) => ("unreadable", 0, Some(error.to_string())),
    };
    let file = file(&folder, &key);
    Some(TuneState { device: device::name(gpu), file, state, choices, problem })
}

/// What `--device` takes here, but for numbers.
fn devices(gpus: &[GpuDevice]) -> Vec<&'static str> {
    let mut names = vec!["cpu"];
    names.extend(gpus.iter().map(|gpu| gpu.runtime.name()));
    names.dedup();
    names
}

fn gpu_json(gpu: &GpuDevice) -> Value {
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
