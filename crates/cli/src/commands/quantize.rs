//! `marlin quantize`: a full-precision model to EXL3.

mod measure;
mod present;
mod progress;
mod recipe;
mod text;

use crate::args::quantize::{Format, Quantize};
use crate::args::{ActivationsArg, DeviceArgs};
use crate::fit::{Need, Use};
use crate::{console, device, exit, interrupt, loaded, locate};
use anyhow::{Context, Result};
use marlin_checkpoint::{Checkpoint, CheckpointError};
use marlin_convert::allocate::Sensitivity;
use marlin_convert::options::KEPT;
use marlin_convert::plan::Group;
use marlin_convert::{
    ConvertError, Exl3Quantizer, JobOptions, Origin, Plan, Role, allocate, memory, store,
};
use marlin_cpu::system;
use marlin_engine::evaluate::{NamedModel, PerplexityOptions, compare};
use marlin_models::Model;
use marlin_tensor::Backend;
use marlin_text::Tokenizer;
use measure::Measuring;
use progress::Progress;
use serde_json::json;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

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
        Err(e) if is_disk_full(&e) => Err(exit::coded(
            exit::DOES_NOT_FIT,
            format!("{e:#}; nothing finished is lost: make room and run the same command again"),
        )),
        result => result.map(|()| ExitCode::SUCCESS),
    }
}

/// Whether `error` is that the disk filled while something was written.
fn is_disk_full(error: &anyhow::Error) -> bool {
    let said = error.chain().find_map(|cause| match cause.downcast_ref::<ConvertError>() {
        Some(ConvertError::Io { source, .. }) => Some(source),
        Some(ConvertError::Checkpoint(CheckpointError::Io { source, .. })) => Some(source),
        _ => cause.downcast_ref::<std::io::Error>(),
    });
    said.is_some_and(|e| {
        matches!(e.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
    })
}

fn quantize(args: &Quantize) -> Result<()> {
    let Format::Exl3 = args.format;
    let checkpoint = locate::open(Some(&args.model))?;
    let tokenizer = Tokenizer::open(&checkpoint)?;
    let origin = Origin::open(&checkpoint)?;
    let plan = Plan::new(&origin.output, origin.mtp);
    let left_out = origin.left_out(&plan)?;
    if !left_out.tensors.is_empty() {
        console::note(&format!("note: {}", present::left_out(&left_out)));
    }
    let codebook = args.codebook.codebook();
    let text = text::read(args, &tokenizer, &origin.output)?;
    let threads = device::threads(&args.device);
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
    let backend = device::backend(&device, ActivationsArg::Float)?;
    let work = Work {
        args,
        checkpoint: &checkpoint,
        origin: &origin,
        plan: &plan,
        backend: backend.clone(),
        quantizer: Exl3Quantizer {
            encoder: device::encoder(&device)?,
            backend,
            codebook,
            options: choices,
        },
        threads,
        stop: interrupt::begin(),
    };
    let rates = allocate::rates(codebook);
    let measuring = args.measure.then(|| Measuring::new(&work, &text, &rates));
    let mut options = JobOptions {
        output: args.output.clone(),
        bits: work.bits(&rates, None)?,
        embedding_bits: (args.embedding_bits < 16).then_some(args.embedding_bits),
        tied: args.tied,
        calibration: text.calibration,
        seed: args.seed,
        jobs: args.jobs.unwrap_or(threads),
        threads,
        max_memory: args.max_memory.or_else(system::available_bytes),
        fresh: args.fresh,
        files,
    };
    if args.plan_only {
        let known = measuring.as_ref().filter(|m| m.is_done()).map(Measuring::known);
        options.bits = work.bits(&rates, known.as_deref())?;
        return present::plan(args, &plan, &origin, &options, measuring.as_ref(), &left_out);
    }
    // All that can be refused is, before hours are spent.
    store::refuse_finished(&options.output, options.fresh)?;
    check_room(&plan, &origin, &options, measuring.as_ref())
        .map_err(|e| about_memory(e, args.max_memory))?;
    if let Some(measuring) = &measuring {
        options.bits = work.bits(&rates, Some(&measuring.run()?))?;
    }
    let progress = Progress::new(plan.targets.len(), plan.weights(), args.json);
    let report = marlin_convert::run(
        &checkpoint,
        work.backend.clone(),
        &work.quantizer,
        &options,
        &|e| progress.show(&e),
        work.stop,
    );
    progress.end();
    let report = report.map_err(|e| about_memory(e, args.max_memory))?;
    // The measurements are only worth keeping for a job that is not finished.
    let _ = std::fs::remove_dir_all(args.output.join(MEASURED));
    // Nothing is left to finish: the next Ctrl-C ends the program.
    interrupt::end();
    interrupt::say("stopped; the model is finished, its quality is not measured");
    let quality = match args.report.is_some() || args.evaluate.is_some() {
        true => work.quality(&text.held_out, text.window)?,
        false => None,
    };
    let made = present::Made { report: &report, quality: quality.as_ref(), left_out: &left_out };
    if let Some(path) = &args.report {
        present::page(path, args, &origin, &plan, &options, &made)?;
    }
    present::report(args, &plan, &options, &made)
}

/// Refuses what disk or memory has no room for.
fn check_room(
    plan: &Plan,
    origin: &Origin,
    options: &JobOptions,
    measuring: Option<&Measuring>,
) -> Result<(), ConvertError> {
    memory::check_disk(&options.output, plan, origin, options)?;
    if let (Some(measuring), Some(allowed_bytes)) = (measuring, options.max_memory) {
        let needed_bytes = measuring.memory();
        if needed_bytes > allowed_bytes && !measuring.is_done() {
            let what = "--measure, which holds the whole source,".to_owned();
            return Err(ConvertError::Memory { what, needed_bytes, allowed_bytes });
        }
    }
    memory::check(plan, origin, options)
}

/// A limit that the user did not set is what the system had to give: says so, and how to insist.
fn about_memory(error: ConvertError, max_memory: Option<u64>) -> anyhow::Error {
    match (error, max_memory) {
        (ConvertError::Memory { what, needed_bytes, allowed_bytes }, None) => exit::coded(
            exit::DOES_NOT_FIT,
            format!(
                "{what} needs {needed_bytes} bytes of memory, {allowed_bytes} are available now; close \
                 other programs, or insist with --max-memory {needed_bytes}"
            ),
        ),
        (error, _) => error.into(),
    }
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
    /// Rates of every group: by rule or by what was measured, then by recipe.
    fn bits(&self, rates: &[f64], found: Option<&[Sensitivity]>) -> Result<Vec<f64>> {
        let Quantize { bits, head_bits, .. } = *self.args;
        let mut chosen = match found {
            None => allocate::rule(self.plan, rates, bits, head_bits)?,
            Some(found) => allocate::measured(self.plan, rates, bits, head_bits, found)?,
        };
        if let Some(path) = &self.args.recipe {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            recipe::apply_recipe(&text, self.plan, &mut chosen)
                .map_err(|e| exit::usage(format!("{}: {e}", path.display())))?;
        }
        let is_known = |(bits, group): &(&f64, &Group)| {
            rates.contains(bits) || group.role == Role::Head && **bits == KEPT
        };
        let mut groups = chosen.iter().zip(&self.plan.groups);
        if let Some((bad, group)) = groups.find(|g| !is_known(g)) {
            let name = self.quantizer.codebook.name();
            let rates: Vec<String> = rates.iter().map(f64::to_string).collect();
            let known = rates.join(", ");
            let or_not = match group.role {
                Role::Head => ", and 16 for no quantization",
                _ => "",
            };
            let what = &group.name;
            return Err(exit::usage(format!(
                "{what}: {name} has no rate {bad}; it has {known}{or_not}"
            )));
        }
        Ok(chosen)
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
        let limit = self.args.max_memory.or_else(system::available_bytes);
        if let Some(allowed) = limit.filter(|allowed| needed > *allowed) {
            console::note(&format!(
                "note: quality is not measured: source and result take {} together, {} may be taken (--max-memory)",
                console::bytes(needed),
                console::bytes(allowed)
            ));
            return Ok(None);
        }
        let options = PerplexityOptions {
            window,
            score_from: window / 2,
            windows: None,
            ..PerplexityOptions::default()
        };
        let load = |checkpoint: &Checkpoint| -> Result<Model> {
            let spec = marlin_models::spec(checkpoint)?;
            let usage = Use::reading(window, options.cache_type, &spec);
            let need = Need::of(checkpoint, &spec, self.backend.as_ref(), &usage)?;
            loaded::load(checkpoint, spec, self.backend.clone(), &need)
        };
        let (source, made) = (load(self.checkpoint)?, load(&made)?);
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
    let arguments = std::env::args_os().filter(|a| a != "--fresh");
    let arguments: Vec<String> = arguments.map(|a| quoted(&a.to_string_lossy())).collect();
    arguments.join(" ")
}

/// `argument` such that a shell reads it as it is.
fn quoted(argument: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_@%+=:,./-".contains(c);
    match !argument.is_empty() && argument.chars().all(plain) {
        true => argument.to_owned(),
        false => format!("'{}'", argument.replace('\'', "'\\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_shell_reads_quoted_arguments_as_they_were() {
        let arguments = [
            "",
            " ",
            "plain-1.0/a_b",
            "a b",
            "$HOME",
            "a&b",
            "a;b",
            "*",
            "(x)",
            "it's",
            "\"q\"",
            "`id`",
            "\\",
            "a\nb",
            "~",
            "#x",
            "!",
            "{a,b}",
            "<>|",
            "ü",
            "[a-z]?",
        ];
        for argument in arguments {
            let script = format!("printf %s {}", quoted(argument));
            let said = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
            assert_eq!(String::from_utf8(said.stdout).unwrap(), argument, "{script}");
        }
        assert_eq!(quoted("./models/a-3.0"), "./models/a-3.0");
    }
}
