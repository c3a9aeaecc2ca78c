//! `marlin tune`: the fastest variant of every kernel that a model needs, kept for later.

use crate::args::Device;
use crate::args::tune::Tune;
use crate::{console, device, exit, interrupt, locate, tuned};
use anyhow::{Result, anyhow};
use indicatif::ProgressBar;
use marlin_checkpoint::Checkpoint;
use marlin_gpu::tune::{
    Contestant, Key, Outcome, Shape, Subject, Tuned, Tuner, Variant, file, read, write,
};
use marlin_gpu::{GpuDevice, Runtime};
use marlin_models::{FeedForwardSpec, GatedSpec, LinearSpec, MixerSpec, ModelSpec, Source};
use marlin_tensor::{AttentionParams, CacheType};
use serde::Serialize;
use std::collections::HashSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

/// Columns of shapes and of variants.
const SHAPE: usize = 46;
const VARIANT: usize = 30;

/// A class that was measured.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    shape: Shape,
    /// Rows of the class at most; none where the choice is the same for every number of rows.
    rows: Option<usize>,
    rule: Variant,
    /// None where the rule's own kernel failed.
    variant: Option<Variant>,
    rule_us: Option<f64>,
    best_us: Option<f64>,
    /// How many times as fast as the rule.
    gain: Option<f64>,
    /// Whether the variant's outputs are right.
    verified: bool,
    variants: Vec<Contestant>,
}

#[derive(Debug, Serialize)]
struct Report {
    key: Key,
    file: PathBuf,
    /// Classes that were tuned before.
    kept: usize,
    interrupted: bool,
    results: Vec<Row>,
    /// What could not be tuned, and why.
    problems: Vec<String>,
}

/// A class to be tuned, of one of the subjects.
type Job = (usize, Option<usize>);

/// Tunes what is not tuned yet.
pub fn run(args: &Tune) -> Result<ExitCode> {
    let device = gpu(args)?;
    let name = args.path.as_deref().or(args.model.as_deref());
    let checkpoint = locate::open(name)?;
    let spec = marlin_models::spec(&checkpoint)?;
    let folder = tuned::folder()
        .ok_or_else(|| anyhow!("no home directory to keep choices in; set XDG_CACHE_HOME"))?;
    let key = Key::of(&device);
    let mut known = read(&folder, &key).unwrap_or_else(|error| {
        console::note(&format!("note: choices of before are not used: {error}"));
        None
    });
    let mut tuned = known.take().unwrap_or_default();

    let mut tuner = marlin_gpu::tuner(&device)?;
    let subjects = subjects(&checkpoint, &spec, tuner.as_ref())?;
    let rows: Vec<usize> = args.rows.iter().map(|rows| usize::from(*rows)).collect();
    let every = subjects.iter().enumerate().flat_map(|(i, (shape, _))| {
        tuner.classes(shape, &rows).into_iter().map(move |rows| (i, rows))
    });
    let (kept, jobs): (Vec<Job>, Vec<Job>) =
        every.partition(|&(i, rows)| !args.force && tuned.get(&subjects[i].0, rows).is_some());
    let mut report = Report {
        file: file(&folder, &key),
        key: key.clone(),
        kept: kept.len(),
        interrupted: false,
        results: Vec::new(),
        problems: Vec::new(),
    };

    if !args.json {
        console::line(&format!("{} on {}", locate::name(name), tuner.name()))?;
        if !kept.is_empty() {
            console::line(&format!(
                "{} tuned before; --force does them again",
                classes(kept.len())
            ))?;
        }
        if !jobs.is_empty() {
            console::line(&format!("{} to tune", classes(jobs.len())))?;
            console::line(&format!(
                "{:<SHAPE$} {:>4}  {:<VARIANT$} {:>9} {:>9} {:>6}  verified",
                "shape", "rows", "variant", "rule us", "best us", "gain"
            ))?;
        }
    }
    let bar = console::bar(jobs.len() as u64, "tuning", false);
    let stop = interrupt::begin();
    interrupt::say("stopping after this class; what is tuned is kept");
    for (i, rows) in jobs {
        if stop.load(Ordering::SeqCst) {
            report.interrupted = true;
            break;
        }
        let (shape, subject) = &subjects[i];
        bar.set_message(shape.to_string());
        match tuner.tune(subject, rows, &tuned) {
            Ok(outcome) => {
                if let Some(choice) = &outcome.choice {
                    tuned.insert(choice.clone());
                    let mut one = Tuned::default();
                    one.insert(choice.clone());
                    // What others found in between is theirs.
                    write(&folder, &key, &one)?;
                }
                tell(&outcome, &bar, args.json, &mut report)?;
            }
            Err(error) => {
                let problem = format!("{}: {error}", label(shape, rows));
                bar.suspend(|| console::note(&format!("note: not tuned: {problem}")));
                report.problems.push(problem);
            }
        }
        bar.inc(1);
    }
    interrupt::end();
    bar.finish_and_clear();
    finish(args, &report)
}

/// The GPU to tune for.
fn gpu(args: &Tune) -> Result<GpuDevice> {
    if args.device == Device::Cpu {
        let message = "--device cpu: only kernels of GPUs are tuned; those of the processor follow its instruction set";
        return Err(exit::usage(message));
    }
    let has_none = Runtime::ALL.iter().all(|runtime| !runtime.is_built());
    if args.device == Device::Auto && has_none {
        let message = "this build has no GPU to tune for; build it with --features cuda or vulkan, or on a Mac";
        return Err(exit::usage(message));
    }
    device::gpu(args.device)?.ok_or_else(|| {
        let built = Runtime::ALL.iter().filter(|runtime| runtime.is_built());
        let needs: Vec<String> =
            built.map(|runtime| format!("{} needs {}", runtime.name(), runtime.needs())).collect();
        exit::coded(exit::NOT_FOUND, format!("no GPU found: {}", needs.join("; ")))
    })
}

/// What the model multiplies and attends with, each shape once.
fn subjects(
    checkpoint: &Checkpoint,
    spec: &ModelSpec,
    tuner: &dyn Tuner,
) -> Result<Vec<(Shape, Subject)>> {
    let at = || checkpoint.path.display();
    if checkpoint.tensors().next().is_none() {
        return Err(exit::coded(
            exit::NOT_FOUND,
            format!("{}: no weights here, and so no formats to tune for", at()),
        ));
    }
    let source = Source::new(checkpoint);
    let mut all: Vec<(Shape, Subject)> = Vec::new();
    let mut seen = HashSet::new();
    let mut add = |subject: Subject| -> Result<()> {
        let shape = tuner.shape(&subject)?;
        if seen.insert(shape.to_string()) {
            all.push((shape, subject));
        }
        Ok(())
    };
    let mut experts = false;
    for block in &spec.blocks {
        let (linears, attention) = mixer(&block.mixer);
        for linear in linears {
            add(Subject::Linear(source.linear(linear)?))?;
        }
        let (params, latent) = attention;
        add(Subject::Attention { params, cache_type: CacheType::F16, latent })?;
        let linears: Vec<&LinearSpec> = match &block.feed_forward {
            FeedForwardSpec::Gated(gated) => gated.linears().to_vec(),
            FeedForwardSpec::Moe(moe) => {
                experts = true;
                let shared = moe.shared.iter().flat_map(GatedSpec::linears);
                std::iter::once(&moe.gate).chain(shared).collect()
            }
        };
        for linear in linears {
            add(Subject::Linear(source.linear(linear)?))?;
        }
    }
    if source.has(&spec.head.linear.key) {
        add(Subject::Linear(source.linear(&spec.head.linear)?))?;
    }
    if experts {
        console::note("note: routed experts are not tuned; their kernels follow the rules");
    }
    Ok(all)
}

/// Matrices that are multiplied as they are, and attention in the form it runs in.
fn mixer(mixer: &MixerSpec) -> (Vec<&LinearSpec>, (AttentionParams, bool)) {
    let linears = mixer.linears();
    match mixer {
        MixerSpec::Gqa(gqa) => (linears, (gqa.params, false)),
        MixerSpec::Mla(mla) => {
            // Its halves are absorbed, head by head.
            let linears = linears.into_iter().filter(|linear| linear.key != mla.kv_b.key).collect();
            (linears, (mla.attention(), true))
        }
    }
}

/// Prints and keeps what came of a class.
fn tell(outcome: &Outcome, bar: &ProgressBar, json: bool, report: &mut Report) -> Result<()> {
    let Outcome { shape, rows, rule, contestants, choice } = outcome;
    let verified = contestants.iter().filter(|c| c.verified).count();
    let row = Row {
        shape: shape.clone(),
        rows: *rows,
        rule: *rule,
        variant: choice.as_ref().map(|c| c.variant),
        rule_us: choice.as_ref().map(|c| c.rule_us),
        best_us: choice.as_ref().map(|c| c.best_us),
        gain: choice.as_ref().map(|c| c.rule_us / c.best_us),
        verified: choice.is_some(),
        variants: contestants.clone(),
    };
    bar.suspend(|| -> Result<()> {
        for c in contestants {
            if let Some(problem) = &c.problem {
                let place = label(shape, *rows);
                console::note(&format!("note: {place}: \"{}\" is out: {problem}", c.variant));
            }
        }
        if json {
            return Ok(());
        }
        let rows = rows.map_or("any".to_owned(), |rows| rows.to_string());
        let shape = shape.to_string();
        let verified = format!("{verified} of {}", contestants.len());
        Ok(console::line(&match choice {
            Some(c) => format!(
                "{shape:<SHAPE$} {rows:>4}  {:<VARIANT$} {:>9.2} {:>9.2} {:>6.2}  {verified}",
                c.variant.to_string(),
                c.rule_us,
                c.best_us,
                c.rule_us / c.best_us
            ),
            None => {
                format!(
                    "{shape:<SHAPE$} {rows:>4}  {:<VARIANT$} {:>28}",
                    "none: the rule's is wrong", "no"
                )
            }
        })?)
    })?;
    if choice.is_none() {
        report.problems.push(format!("{}: the rule's own kernel failed", label(shape, *rows)));
    }
    report.results.push(row);
    Ok(())
}

/// Says what it came to.
fn finish(args: &Tune, report: &Report) -> Result<ExitCode> {
    if args.json {
        console::json(report)?;
    } else {
        let better =
            report.results.iter().filter(|r| r.variant.is_some_and(|v| v != r.rule)).count();
        console::line(&format!(
            "{better} of {} faster than the rule; {}",
            classes(report.results.len()),
            report.file.display()
        ))?;
    }
    if report.interrupted {
        return Ok(ExitCode::from(exit::INTERRUPTED));
    }
    match &report.problems[..] {
        [] => Ok(ExitCode::SUCCESS),
        [first, ..] => {
            Err(anyhow!("{} not tuned, the first is {first}", classes(report.problems.len())))
        }
    }
}

/// A class as a note calls it.
fn label(shape: &Shape, rows: Option<usize>) -> String {
    match rows {
        Some(1) => format!("{shape}, 1 row"),
        Some(rows) => format!("{shape}, {rows} rows"),
        None => shape.to_string(),
    }
}

fn classes(count: usize) -> String {
    if count == 1 { "1 class".to_owned() } else { format!("{count} classes") }
}
