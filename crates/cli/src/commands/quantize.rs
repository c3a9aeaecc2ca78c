//! `marlin quantize`: a full-precision model to EXL3.

mod present;
mod recipe;
mod text;

use crate::args::quantize::{Format, Quantize};
use crate::args::{ActivationsArg, DeviceArgs};
use crate::{console, exit, interrupt, loaded, locate};
use anyhow::{Context, Result};
use indicatif::ProgressBar;
use marlin_checkpoint::Checkpoint;
use marlin_convert::allocate::{self, Sensitivity};
use marlin_convert::measure::Probe;
use marlin_convert::{
    ConvertError, Event, Exl3Options, Exl3Quantizer, JobOptions, Origin, Plan, memory,
};
use marlin_engine::evaluate::{NamedModel, PerplexityOptions, compare};
use marlin_models::Model;
use marlin_tensor::Backend;
use marlin_text::Tokenizer;
use serde_json::{Value, json};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Tokens per row of the probe that groups are measured on, and rows.
const PROBE: (usize, usize) = (256, 24);
/// Most bytes of the probe's log-probabilities.
const PROBE_BYTES: usize = 1 << 30;
/// Tokens that the probe's Hessians are made from, at most.
const PROBE_CALIBRATION: usize = 32_768;

/// Plans, quantizes and reports.
pub fn run(args: &Quantize) -> Result<ExitCode> {
    match quantize(args) {
        Err(e) if matches!(e.downcast_ref(), Some(ConvertError::Stopped)) => {
            console::note(
                "stopped; every finished matrix is kept. To go on, run the same command:",
            );
            console::note(&format!("  {}", command_line()));
            Ok(ExitCode::from(exit::INTERRUPTED))
        }
        result => result.map(|()| ExitCode::SUCCESS),
    }
}

fn quantize(args: &Quantize) -> Result<()> {
    let Format::Exl3 = args.format;
    let checkpoint = locate::open(Some(&args.model))?;
    let tokenizer = Tokenizer::open(&checkpoint)?;
    let origin = Origin::open(&checkpoint)?;
    let plan = Plan::new(&origin.output, origin.mtp);
    let codebook = args.codebook.codebook();
    let text = text::read(args, &tokenizer, &origin.output)?;
    let threads = loaded::threads(&args.device);
    let files = match origin.is_gguf() {
        true => gguf_files(&checkpoint, &tokenizer)?,
        false => Vec::new(),
    };
    // A large vocabulary takes more memory than a block of a small model.
    drop(tokenizer);
    let choices = recipe::settings(&args.set)?;
    let device = DeviceArgs {
        activations: Some(ActivationsArg::Float),
        threads: args.device.threads,
        device: args.device.device,
    };
    let found = text.calibration.tokens();
    if found < args.calibration_tokens {
        let asked = args.calibration_tokens;
        console::note(&format!("note: the text gives {found} calibration tokens of {asked}"));
    }
    interrupt::say("stopping; press Ctrl-C again to stop at once");
    let work = Work {
        args,
        checkpoint: &checkpoint,
        origin: &origin,
        plan: &plan,
        backend: loaded::backend(&device, ActivationsArg::Float)?,
        quantizer: Exl3Quantizer { encoder: loaded::encoder(&device)?, codebook, options: choices },
        threads,
        stop: interrupt::begin(),
    };
    let options = JobOptions {
        output: args.output.clone(),
        bits: work.bits(&text)?,
        embedding_bits: (args.embedding_bits < 16).then_some(args.embedding_bits),
        tied: args.tied,
        calibration: text.calibration,
        seed: args.seed,
        jobs: args.jobs.unwrap_or(threads),
        threads,
        max_memory: args.max_memory,
        fresh: args.fresh,
        files,
    };
    if args.plan_only {
        return present::plan(args, &plan, &origin, &options);
    }
    let bar = Mutex::new(console::bar(plan.weights(), "quantizing", false));
    let report = marlin_convert::run(
        &checkpoint,
        work.backend.clone(),
        &work.quantizer,
        &options,
        &|e| show(&bar, &e),
        work.stop,
    );
    bar.lock().unwrap_or_else(|e| e.into_inner()).finish_and_clear();
    let report = report?;
    // The measurements are only worth keeping for a job that is not finished.
    let _ = std::fs::remove_dir_all(args.output.join(MEASURED));
    let quality = match args.report.is_some() || args.evaluate.is_some() {
        true => work.quality(&text.held_out, text.window)?,
        false => None,
    };
    if let Some(path) = &args.report {
        let bytes = checkpoint.tensor_bytes();
        present::page(path, args, bytes, &plan, &report, quality.as_ref())?;
    }
    present::report(args, &plan, &options, &report, quality.as_ref())
}

/// Files that a GGUF's vocabulary becomes; its end tokens are more than those files can name.
fn gguf_files(checkpoint: &Checkpoint, tokenizer: &Tokenizer) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = marlin_text::hugging_face_files(checkpoint)?;
    let generation = json!({ "eos_token_id": tokenizer.end_ids() });
    files.push(("generation_config.json".to_owned(), format!("{generation:#}\n").into_bytes()));
    Ok(files)
}

/// Folder of measurements inside the output.
const MEASURED: &str = ".measure";

/// What the steps of a job share.
struct Work<'a> {
    args: &'a Quantize,
    checkpoint: &'a Checkpoint,
    origin: &'a Origin<'a>,
    plan: &'a Plan,
    backend: Arc<dyn Backend>,
    quantizer: Exl3Quantizer,
    threads: usize,
    stop: &'static AtomicBool,
}

impl Work<'_> {
    /// Rates of every group: by rule or by measurement, then by recipe.
    fn bits(&self, text: &text::Text) -> Result<Vec<f64>> {
        let Quantize { bits, head_bits, .. } = *self.args;
        let rates = allocate::rates(self.quantizer.codebook);
        let mut chosen = allocate::rule(self.plan, &rates, bits, head_bits)?;
        if self.args.measure {
            let found = self.sensitivities(text, &rates)?;
            chosen = allocate::measured(self.plan, &rates, bits, head_bits, &found)?;
        }
        if let Some(path) = &self.args.recipe {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            recipe::apply_recipe(&text, self.plan, &mut chosen)
                .map_err(|e| exit::usage(format!("{}: {e}", path.display())))?;
        }
        if let Some(bad) = chosen.iter().find(|b| !rates.contains(b)) {
            let name = self.quantizer.codebook.name();
            let rates: Vec<String> = rates.iter().map(f64::to_string).collect();
            let known = rates.join(", ");
            return Err(exit::usage(format!("{name} has no rate {bad}; it has {known}")));
        }
        Ok(chosen)
    }

    /// Measured on rows of the calibration text, or read back from an earlier run of the same job.
    fn sensitivities(&self, text: &text::Text, rates: &[f64]) -> Result<Vec<Sensitivity>> {
        let directory = self.args.output.join(MEASURED);
        let file = directory.join("sensitivities.json");
        let floor = rates.iter().rev().find(|r| **r <= self.args.bits).copied().unwrap_or(1.0);
        let around: Vec<f64> =
            rates.iter().copied().filter(|r| *r == floor - 1.0 || *r == floor + 1.0).collect();
        let measured = if around.is_empty() { vec![floor] } else { around };
        let settings = json!({
            "source": marlin_convert::report::fingerprint(self.checkpoint),
            "rates": measured,
            "codebook": self.quantizer.codebook.name(),
            "text": marlin_convert::report::hash(&json!(text.calibration.rows)),
            "seed": self.args.seed,
            "quantizer": self.quantizer.options,
            "version": env!("CARGO_PKG_VERSION"),
        });
        let kept: Option<Value> =
            std::fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        if let Some(kept) = kept.filter(|k| k["settings"] == settings && !self.args.fresh) {
            return Ok(serde_json::from_value(kept["sensitivities"].clone())?);
        }
        std::fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
        let columns = PROBE.0;
        let vocab_size = self.origin.output.vocab_size;
        let fit = PROBE_BYTES / (vocab_size * 4 * columns / 2);
        let all: Vec<&[u32]> =
            text.calibration.rows.iter().flat_map(|r| r.chunks_exact(columns)).collect();
        let rows = PROBE.1.min(fit.max(1)).min(all.len().max(1));
        let rows: Vec<Vec<u32>> =
            (0..rows.min(all.len())).map(|i| all[i * all.len() / rows].to_vec()).collect();
        let positions: usize = rows.iter().map(|r| r.len().div_ceil(2)).sum();
        // Log-probabilities of the source and of what is measured.
        let probe_bytes = 3 * 4 * (positions * vocab_size) as u64;
        memory::check_measure(self.plan, self.origin, probe_bytes, self.args.max_memory)?;
        let mut calibration = text.calibration.clone();
        let keep = (PROBE_CALIBRATION / calibration.columns().max(1)).max(1);
        calibration.rows.truncate(keep);
        let bar = console::bar(1, "measuring", false);
        let tick = |done: usize, total: usize| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
            match self.stop.load(Ordering::SeqCst) {
                true => Err(ConvertError::Stopped),
                false => Ok(()),
            }
        };
        let quick = Exl3Options { passes: 0, ..self.quantizer.options.clone() };
        let quantizer = Exl3Quantizer {
            encoder: self.quantizer.encoder.clone(),
            codebook: self.quantizer.codebook,
            options: quick,
        };
        let probe = Probe {
            origin: self.origin,
            plan: self.plan,
            backend: self.backend.clone(),
            quantizer: &quantizer,
            calibration: &calibration,
            rows: &rows,
            rates: &measured,
            directory: &directory,
            seed: self.args.seed,
            threads: self.threads,
            tick: &tick,
        };
        let found = probe.run();
        bar.finish_and_clear();
        let found = found?;
        let document = json!({ "settings": settings, "sensitivities": found });
        std::fs::write(&file, format!("{document:#}\n"))
            .with_context(|| file.display().to_string())?;
        Ok(found)
    }

    /// Source and output on the held-out text; `None` when there is none.
    fn quality(&self, held_out: &[u32], window: usize) -> Result<Option<present::Quality>> {
        if held_out.len() < window {
            console::note(
                "note: quality is not measured, there is too little text to hold any out",
            );
            return Ok(None);
        }
        let made = Checkpoint::open(&self.args.output)?;
        let needed = self.checkpoint.tensor_bytes() + made.tensor_bytes();
        if let Some(allowed) = self.args.max_memory.filter(|allowed| needed > *allowed) {
            console::note(&format!(
                "note: quality is not measured: source and result take {} together, --max-memory allows {}",
                console::bytes(needed),
                console::bytes(allowed)
            ));
            return Ok(None);
        }
        let load = |checkpoint: &Checkpoint| -> Result<Model> {
            let spec = marlin_models::spec(checkpoint)?;
            Ok(Model::load(checkpoint, spec, self.backend.clone(), &mut |_| {})?)
        };
        let (source, made) = (load(self.checkpoint)?, load(&made)?);
        let options = PerplexityOptions {
            window,
            score_from: window / 2,
            windows: None,
            ..PerplexityOptions::default()
        };
        let source = NamedModel { name: &self.args.model, model: &source };
        let output = self.args.output.to_string_lossy();
        let made = NamedModel { name: &output, model: &made };
        let reports = compare(source, &[made], held_out, &options, &mut |_| {})?;
        let [before, after] = &reports[..] else { unreachable!("a report per model") };
        Ok(Some(present::Quality {
            before: before.perplexity,
            after: after.perplexity,
            kl_divergence: after.kl_divergence.unwrap_or_default(),
            top1_agreement: after.top1_agreement.unwrap_or_default(),
            tokens: after.tokens_scored,
        }))
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
        Event::Matrix(report) => {
            bar.inc(report.weights());
            bar.set_message(report.key.clone());
            let fallback = report.fallback.as_deref().map_or(String::new(), |f| format!(" ({f})"));
            let line = format!(
                "{}: {} bits, output error {:.4}, {:.1} s{fallback}",
                report.key, report.bits, report.relative_output_error, report.seconds
            );
            bar.suspend(|| console::detail(&line));
        }
        Event::Writing => bar.set_message("writing"),
        Event::Verifying => bar.set_message("reading back"),
    }
}
