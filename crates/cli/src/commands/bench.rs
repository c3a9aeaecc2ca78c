//! `marlin bench`: prompt and generation speed in the shape of llama-bench.

mod encode;
mod memory;
mod ops;
mod profile;
mod serve;
mod table;
mod test;

use crate::args::bench::{Bench, Output, Speed, What};
use crate::args::{ActivationsArg, Device, DeviceArgs};
use crate::fit::{Need, Use};
use crate::{console, device, exit, loaded, locate};
use anyhow::Result;
use marlin_engine::profile::Profiler;
use marlin_tensor::{Backend, CacheType};
use serde::Serialize;
use std::process::ExitCode;
use std::sync::Arc;
use table::Table;
use test::{Test, Tokens, pass_name};

/// One test's result.
#[derive(Debug, Serialize)]
struct Row {
    model: String,
    test: String,
    batch: usize,
    /// Tokens in the cache before it.
    depth: usize,
    cache_type: &'static str,
    threads: usize,
    tokens_per_second: f64,
    stddev: f64,
    model_bytes: u64,
    /// Weight bytes read per second: every weight once per forward pass.
    gigabytes_per_second: f64,
    device: String,
    activations: &'static str,
    /// With `--profile`: the time of every operator.
    #[serde(skip_serializing_if = "Option::is_none")]
    profile: Option<Vec<profile::Row>>,
}

/// Runs one kind of measurement.
pub fn run(args: &Bench) -> Result<ExitCode> {
    match &args.what {
        None => speed(&args.speed)?,
        Some(What::Ops(args)) => ops::run(args)?,
        Some(What::Encode(args)) => encode::run(args)?,
        Some(What::Memory(args)) => memory::run(args)?,
        Some(What::Serve(args)) => return serve::run(args),
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs every test on every device and prints a table.
fn speed(args: &Speed) -> Result<()> {
    let checkpoint = locate::open(args.model.model.as_deref())?;
    let spec = marlin_models::spec(&checkpoint)?;
    let tests = tests(args, spec.max_position_embeddings)?;
    let usage = usage(&tests, args.cache_type.into());
    let devices = args.devices();
    // What is not there is told before anything is loaded.
    let backends = devices.iter().map(|device| open(args, device)).collect::<Result<Vec<_>>>()?;
    let trace = args.profile.as_deref().map(profile::create).transpose()?;
    let output = args.output();
    let names: Vec<String> = tests.iter().map(|(tokens, _)| tokens.name()).collect();
    let on: Vec<String> = backends.iter().map(|backend| backend.name()).collect();
    let table = Table::new(output, &names, &on);
    table.head()?;
    let model_name = locate::name(args.model.model.as_deref());
    let (mut rows, mut profiled) = (Vec::new(), Vec::new());
    for (device, backend) in devices.iter().zip(backends) {
        let profiler = args.profile.as_ref().map(|_| Arc::new(Profiler::new(backend.clone())));
        let backend = match &profiler {
            Some(profiler) => profiler.clone() as Arc<dyn Backend>,
            None => backend,
        };
        let need = Need::of(&checkpoint, &spec, backend.as_ref(), &usage)?;
        let model = loaded::load(&checkpoint, spec.clone(), backend, &need)?;
        for &(tokens, batch) in &tests {
            let test = Test {
                model: &model,
                batch,
                tokens,
                cache_type: args.cache_type.into(),
                profiler: profiler.as_deref(),
            };
            let (tokens_per_second, stddev) = test.measure(usize::from(args.repetitions))?;
            let seconds = (batch * tokens.measured()) as f64 / tokens_per_second;
            let model_bytes = checkpoint.tensor_bytes();
            let read = tokens.passes() as f64 * model_bytes as f64;
            let row = Row {
                model: model_name.to_owned(),
                test: tokens.name(),
                batch,
                depth: tokens.depth,
                cache_type: test.cache_type.name(),
                threads: device::threads(device),
                tokens_per_second,
                stddev,
                model_bytes,
                gigabytes_per_second: read / seconds / 1e9,
                device: model.backend().name(),
                activations: device::activations_name(model.backend().as_ref()),
                profile: None,
            };
            table.row(&row)?;
            rows.push(row);
        }
        if let Some(profiler) = profiler {
            let profile = profiler.take();
            let first = rows.len() - tests.len();
            for row in &mut rows[first..] {
                row.profile = Some(profile::rows(&profile, &pass_name(&row.test, row.batch)));
            }
            profiled.push(profile);
        }
    }
    if let (Some(path), Some(file), [profile]) = (&args.profile, trace, &profiled[..]) {
        profile::write(profile, file, path)?;
        if output == Output::Text {
            rows.iter().try_for_each(|row| {
                let rows = row.profile.as_deref().unwrap_or_default();
                profile::print(&pass_name(&row.test, row.batch), rows)
            })?;
        }
    }
    match output {
        Output::Json => console::json(&rows)?,
        Output::Text => console::note(&format!("{model_name} · {}", on.join(" · "))),
        Output::Md | Output::Csv => {}
    }
    Ok(())
}

/// What is measured, and with how many sequences at once, in the order in which it is.
///
/// # Errors
/// When there is nothing, or more than `limit` tokens.
fn tests(args: &Speed, limit: usize) -> Result<Vec<(Tokens, usize)>> {
    let prompts = args.prompt.iter().map(|&n| (n, 0));
    let answers = args.generate.iter().map(|&n| (0, n));
    let kinds = prompts.chain(answers).chain(args.both.iter().copied());
    let kinds: Vec<_> = kinds.filter(|&(prompt, generate)| (prompt, generate) != (0, 0)).collect();
    let mut tests = Vec::new();
    for &depth in &args.depth {
        for &batch in &args.batch {
            let tokens = kinds.iter().map(|&(prompt, generate)| Tokens { prompt, generate, depth });
            tests.extend(tokens.map(|tokens| (tokens, batch as usize)));
        }
    }
    if tests.is_empty() {
        return Err(exit::usage("nothing to measure: -p, -n and --pg name no tokens"));
    }
    match tests.iter().find(|(tokens, _)| tokens.all() > limit) {
        Some((tokens, _)) => Err(exit::usage(format!(
            "{}: {} tokens do not fit the model's context of {limit}; lower -p, -n or --depth",
            tokens.name(),
            tokens.all()
        ))),
        None => Ok(tests),
    }
}

/// What the largest of the tests takes.
fn usage(tests: &[(Tokens, usize)], cache_type: CacheType) -> Use {
    let most = |of: fn(&Tokens) -> usize| tests.iter().map(|(t, batch)| of(t) * batch).max();
    Use {
        tokens: most(Tokens::room).unwrap_or(0),
        cache_type,
        rows: most(Tokens::rows).unwrap_or(0),
        outputs: most(|_| 1).unwrap_or(0),
    }
}

/// A device of the comparison.
fn open(args: &Speed, device: &DeviceArgs) -> Result<Arc<dyn Backend>> {
    if args.profile.is_none() {
        return device::backend(device, ActivationsArg::Auto);
    }
    // A GPU works on while its operators have returned, and repeats a recorded pass without calling them.
    if args.device.len() > 1 || args.threads.len() > 1 {
        return Err(exit::usage("--profile is of one device and one number of threads"));
    }
    match device.device {
        Device::Gpu { .. } => Err(exit::usage(format!(
            "--profile times operators as the processor runs them, but a GPU records a pass and repeats it as a whole; \
             `marlin bench ops --device {}` times its operators one by one",
            device.device
        ))),
        Device::Auto | Device::Cpu => {
            if device.device == Device::Auto && device::gpu(Device::Auto)?.is_some() {
                console::note("note: --profile measures the cpu; other verbs take the GPU");
            }
            device::cpu(device, ActivationsArg::Auto)
        }
    }
}
