//! `marlin quantize`: a full-precision model to EXL3.

use crate::args::quantize::{CodebookArg, Format, Quantize};
use crate::args::{ActivationsArg, DeviceArgs};
use crate::{console, exit, loaded, locate};
use anyhow::{Context, Result};
use indicatif::ProgressBar;
use marlin_convert::{
    Calibration, ConvertError, Event, Exl3Options, Exl3Quantizer, JobOptions, JobReport, Origin,
    Plan, Role, allocate, memory,
};
use marlin_quant::exl3::Codebook;
use marlin_quant::exl3::codebook::{MCG_MULTIPLIER, MUL1_MULTIPLIER};
use marlin_text::{Specials, Tokenizer};
use serde_json::{Value, json};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Set by Ctrl-C; the job stops at the next matrix.
static STOP: AtomicBool = AtomicBool::new(false);

/// Share of calibration rows that are random tokens.
const RANDOM_SHARE: f64 = 0.06;

/// Plans, quantizes and reports.
pub fn run(args: &Quantize) -> Result<ExitCode> {
    let Format::Exl3 = args.format;
    let checkpoint = locate::open(Some(&args.model))?;
    let tokenizer = Tokenizer::open(&checkpoint)?;
    let origin = Origin::open(&checkpoint)?;
    let plan = Plan::new(&origin.output, origin.mtp);
    let codebook = match args.codebook {
        CodebookArg::Mul1 => Codebook::Mul1(MUL1_MULTIPLIER),
        CodebookArg::Mcg => Codebook::Mcg(MCG_MULTIPLIER),
        CodebookArg::ThreeInst => Codebook::ThreeInst,
    };
    let rates = allocate::rates(codebook);
    let mut bits = allocate::rule(&plan, &rates, args.bits, args.head_bits)?;
    if let Some(path) = &args.recipe {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        apply_recipe(&text, &plan, &mut bits)
            .map_err(|e| exit::usage(format!("{}: {e}", path.display())))?;
    }
    if let Some(bad) = bits.iter().find(|b| !rates.contains(b)) {
        let rates: Vec<String> = rates.iter().map(f64::to_string).collect();
        let name = codebook.name();
        return Err(exit::usage(format!("{name} has no rate {bad}; it has {}", rates.join(", "))));
    }
    let calibration = calibration(args, &tokenizer, origin.output.vocab_size)?;
    let threads = args
        .device
        .threads
        .map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), usize::from);
    let options = JobOptions {
        output: args.output.clone(),
        bits,
        requested_bits: args.bits,
        embedding_bits: (args.embedding_bits < 16).then_some(args.embedding_bits),
        calibration,
        seed: args.seed,
        jobs: args.jobs.unwrap_or(threads),
        threads,
        max_memory: args.max_memory,
        fresh: args.fresh,
        files: Vec::new(),
    };
    if args.plan_only {
        return print_plan(args, &plan, &origin, &options).map(|()| ExitCode::SUCCESS);
    }
    let quantizer = Exl3Quantizer {
        encoder: loaded::encoder()?,
        codebook,
        options: settings(&args.set)?,
    };
    let backend = loaded::backend(
        &DeviceArgs {
            activations: Some(ActivationsArg::Float),
            threads: args.device.threads,
            device: args.device.device,
        },
        ActivationsArg::Float,
    )?;
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::SeqCst) {
            std::process::exit(exit::INTERRUPTED.into());
        }
        console::note("stopping after this matrix; press Ctrl-C again to stop at once");
    })
    .context("cannot catch Ctrl-C")?;
    let total: u64 =
        plan.targets.iter().map(|t| t.spec.out_features as u64 * t.spec.in_features as u64).sum();
    let bar = Mutex::new(console::bar(total, "quantizing", false));
    let report =
        marlin_convert::run(&checkpoint, backend, &quantizer, &options, &|e| show(&bar, &e), &STOP);
    bar.lock().unwrap_or_else(|e| e.into_inner()).finish_and_clear();
    match report {
        Err(ConvertError::Stopped) => {
            console::note(
                "stopped; every finished matrix is kept. To go on, run the same command again:",
            );
            console::note(&format!("  {}", command_line()));
            Ok(ExitCode::from(exit::INTERRUPTED))
        }
        Err(e) => Err(e.into()),
        Ok(report) => print_report(args, &plan, &options, &report).map(|()| ExitCode::SUCCESS),
    }
}

/// What the user typed, without what would start over.
fn command_line() -> String {
    let quoted = |arg: String| match arg.contains([' ', '"', '\'']) {
        true => format!("'{}'", arg.replace('\'', "'\\''")),
        false => arg,
    };
    let arguments: Vec<String> = std::env::args().filter(|a| a != "--fresh").map(quoted).collect();
    arguments.join(" ")
}

fn show(bar: &Mutex<ProgressBar>, event: &Event) {
    let bar = bar.lock().unwrap_or_else(|e| e.into_inner());
    match event {
        Event::Resumed { matrices, weights } => {
            bar.inc(*weights);
            bar.reset_eta();
            bar.suspend(|| console::note(&format!("resuming: {matrices} matrices are done")));
        }
        Event::Rows { part, capture, row, rows } => {
            let doing = if *capture { "calibrating" } else { "advancing" };
            bar.set_message(format!("{doing} {part}, row {} of {rows}", row + 1));
        }
        Event::Matrix { report, weights } => {
            bar.inc(*weights);
            bar.set_message(report.key.clone());
            let fallback = report.fallback.as_deref().map_or(String::new(), |f| format!(" ({f})"));
            let line = format!(
                "{}: {} bits, output error {:.4}, {:.1} s{fallback}",
                report.key, report.bits, report.relative_output_error, report.seconds
            );
            bar.suspend(|| console::detail(&line));
        }
        Event::Writing => bar.set_message("writing and reading back"),
    }
}

/// The quantizer's choices with `KEY=VALUE`s applied.
fn settings(changes: &[String]) -> Result<Exl3Options> {
    let mut value = serde_json::to_value(Exl3Options::default())?;
    for change in changes {
        let (key, text) = change
            .split_once('=')
            .ok_or_else(|| exit::usage(format!("--set {change}: expected KEY=VALUE")))?;
        let known = flat_keys(&value).join(", ");
        let unknown = || exit::usage(format!("--set {change}: unknown key; there are {known}"));
        let place = key.split('.').try_fold(&mut value, |v, k| v.get_mut(k)).ok_or_else(unknown)?;
        *place =
            serde_json::from_str(text).map_err(|e| exit::usage(format!("--set {change}: {e}")))?;
    }
    serde_json::from_value(value).map_err(|e| exit::usage(format!("--set: {e}")))
}

fn flat_keys(value: &Value) -> Vec<String> {
    let Some(object) = value.as_object() else { return Vec::new() };
    let of = |(key, value): (&String, &Value)| match value.is_object() {
        true => flat_keys(value).into_iter().map(|k| format!("{key}.{k}")).collect(),
        false => vec![key.clone()],
    };
    object.iter().flat_map(of).collect()
}

/// Tokens of the calibration text.
fn calibration(args: &Quantize, tokenizer: &Tokenizer, vocab_size: usize) -> Result<Calibration> {
    let mut documents = Vec::new();
    for path in &args.calibration {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        documents.push(tokenizer.encode(&text, Specials::NONE)?);
    }
    if args.calibration.is_empty() {
        return Err(exit::usage("--calibration FILE is needed"));
    }
    Ok(Calibration::new(
        documents,
        args.calibration_tokens,
        args.calibration_columns,
        vocab_size,
        RANDOM_SHARE,
        args.seed,
    )?)
}

/// Sets the rates that the lines of a recipe name: `PATTERN BITS`, `*` matching anything, `#` a comment.
fn apply_recipe(text: &str, plan: &Plan, bits: &mut [f64]) -> Result<(), String> {
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let at = number + 1;
        let (pattern, rate) = line
            .rsplit_once(char::is_whitespace)
            .ok_or(format!("line {at}: expected PATTERN BITS"))?;
        let rate: f64 = rate.parse().map_err(|e| format!("line {at}: {rate:?}: {e}"))?;
        let pattern = pattern.trim();
        let mut matched = false;
        for (g, group) in plan.groups.iter().enumerate() {
            let keys = plan.targets.iter().filter(|t| t.group == g).map(|t| t.spec.key.as_str());
            if keys.chain([group.name.as_str()]).any(|key| glob(pattern, key)) {
                bits[g] = rate;
                matched = true;
            }
        }
        if !matched {
            return Err(format!("line {at}: {pattern} matches no matrix"));
        }
    }
    Ok(())
}

/// Whether `text` matches `pattern`, whose `*` stand for anything.
fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut last = None;
    for part in parts {
        last = Some(part);
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    match last {
        None => rest.is_empty(),
        Some(part) => part.is_empty() || rest.is_empty() || text.ends_with(part),
    }
}

fn print_plan(args: &Quantize, plan: &Plan, origin: &Origin, options: &JobOptions) -> Result<()> {
    let weights: u64 = plan.groups.iter().map(|g| g.weights).sum();
    let disk = memory::disk_bytes(plan, origin, options);
    if args.json {
        let groups: Vec<Value> = plan
            .groups
            .iter()
            .zip(&options.bits)
            .map(|(g, bits)| json!({"name": g.name, "role": g.role, "layer": g.layer, "weights": g.weights, "bits": bits}))
            .collect();
        return console::json(&json!({
            "model": args.model,
            "matrices": plan.targets.len(),
            "weights": weights,
            "calibration_tokens": options.calibration.tokens(),
            "disk_bytes": disk,
            "groups": groups,
        }));
    }
    for (group, bits) in plan.groups.iter().zip(&options.bits) {
        console::line(&format!(
            "{:>4} bits  {:>8}  {}",
            bits,
            console::count(group.weights),
            group.name
        ))?;
    }
    console::line(&format!(
        "{} matrices, {} weights, {} calibration tokens; at most {} of disk while it runs",
        plan.targets.len(),
        console::count(weights),
        options.calibration.tokens(),
        console::bytes(disk)
    ))?;
    Ok(())
}

fn print_report(
    args: &Quantize,
    plan: &Plan,
    options: &JobOptions,
    report: &JobReport,
) -> Result<()> {
    if args.json {
        let mut document = serde_json::to_value(report)?;
        document["model"] = json!(args.model);
        document["output"] = json!(options.output);
        document["groups"] = plan
            .groups
            .iter()
            .zip(&options.bits)
            .map(|(g, bits)| json!({"name": g.name, "bits": bits}))
            .collect();
        return console::json(&document);
    }
    let shown = |path: &Path| path.display().to_string();
    console::line(&format!(
        "{}: {:.2} bits per weight ({:.3} stored; head {:.3}; all {:.3}), {} in {:.0} s",
        shown(&options.output),
        report.bits,
        report.stored_bits,
        report.head_stored_bits,
        report.all_stored_bits,
        console::bytes(report.file_bytes),
        report.seconds
    ))?;
    let worst = report.tensors.iter().filter(|t| t.proxy_error.is_finite());
    if let Some(worst) = worst.max_by(|a, b| a.proxy_error.total_cmp(&b.proxy_error)) {
        console::line(&format!(
            "largest output error {:.4}: {}",
            worst.relative_output_error, worst.key
        ))?;
    }
    let starved = report.tensors.iter().filter(|t| t.fallback.is_some()).count();
    if starved > 0 {
        console::line(&format!(
            "{starved} matrices without calibration of their own (--json says why)"
        ))?;
    }
    let _ = plan.groups.iter().any(|g| g.role == Role::Head);
    Ok(())
}
