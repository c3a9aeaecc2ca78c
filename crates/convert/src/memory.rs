//! What a job needs of memory and disk, and how it is cut to fit. Mapped files (the source, finished
//! matrices) are not counted: the system takes their pages back when it needs room.

use crate::error::ConvertError;
use crate::exl3::PADDING;
use crate::exl3::panels::PANEL;
use crate::moments::{LIMIT, file_bytes};
use crate::options::JobOptions;
use crate::origin::Origin;
use crate::plan::{Plan, Role, Target};
use crate::pooling::pool_of;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

type Result<T> = std::result::Result<T, ConvertError>;

/// Copies of a panel of a matrix that exist at once while it is quantized, f32.
const COPIES: u64 = 8;
/// Bytes per element of the Hessian while it is factored: f32 forms and the f64 factor.
const HESSIAN_BYTES: u64 = 44;
/// Bytes for everything else: code, calibration tokens, buffers.
const BASE: u64 = 24 << 20;
/// Bytes that a tokenizer takes per token, while the calibration text is read.
const TOKEN: u64 = 512;
/// Bytes that a thread of the encoder works in.
const THREAD: u64 = 4 << 20;
/// Rows of activations that exist at once, in units of the widest input or output of a block.
const WIDTHS: u64 = 6;

fn padded(n: usize) -> u64 {
    n.next_multiple_of(PADDING) as u64
}

/// Bytes that are taken whatever is at work.
fn base(origin: &Origin, options: &JobOptions) -> u64 {
    BASE + TOKEN * origin.output.vocab_size as u64 + THREAD * options.threads as u64
}

/// Bytes while `target` is quantized: a panel of it as floats, the codes of all of it twice (at most a byte a
/// weight), and what is made of the moments.
fn quantizing(target: &Target) -> u64 {
    let (n, k) = (padded(target.spec.out_features), padded(target.spec.in_features));
    COPIES * 4 * n.min(PANEL as u64) * k + 2 * n * k + HESSIAN_BYTES * k * k
}

/// Bytes of the moments of one label.
fn moments(target: &Target) -> u64 {
    4 * (target.spec.in_features as u64).pow(2)
}

/// Bytes of the sums over experts, which starved ones borrow from.
fn pools(targets: &[&Target]) -> u64 {
    let sums: BTreeMap<String, u64> =
        targets.iter().filter_map(|t| Some((pool_of(&t.spec.label)?, moments(t)))).collect();
    sums.into_values().sum()
}

/// Bytes of a block as it runs: its weights as they are loaded, and one row of text.
fn running(targets: &[&Target], options: &JobOptions) -> u64 {
    // The head's inputs are gathered without it.
    let blocks = || targets.iter().filter(|t| !t.is_head());
    let weights: u64 = blocks().map(|t| 4 * t.weights()).sum();
    let widest = blocks().map(|t| t.spec.out_features.max(t.spec.in_features)).max();
    let columns = options.calibration.columns() as u64;
    weights + WIDTHS * 4 * columns * widest.unwrap_or(0) as u64
}

/// Bytes that `targets` take at the least: one matrix at a time, one label at a time.
fn least(targets: &[&Target], origin: &Origin, options: &JobOptions) -> u64 {
    let one = |f: fn(&Target) -> u64| targets.iter().map(|t| f(t)).max().unwrap_or(0);
    base(origin, options)
        + pools(targets)
        + one(moments)
        + one(quantizing).max(running(targets, options))
}

/// What has to be in memory at once, part by part of the job, at the least.
///
/// # Errors
/// When the source has no embedding.
pub fn needs(plan: &Plan, origin: &Origin, options: &JobOptions) -> Result<Vec<(String, u64)>> {
    let spec = &origin.output;
    let columns = spec.hidden_size as u64;
    let table = match options.embedding_bits {
        _ if options.tied => 0,
        None => origin.embedding_memory()?,
        Some(bits) => {
            spec.vocab_size as u64 * padded(spec.hidden_size + 128) * (bits as u64 + 1) / 4
        }
    };
    let table = base(origin, options) + table + 3 * 4 * PANEL as u64 * columns;
    let mut needs = vec![("the embedding".to_owned(), table)];
    for layer in 0..plan.layers {
        needs.push((format!("layer {layer}"), least(&plan.targets_of(layer), origin, options)));
    }
    for (role, what) in [(Role::Head, "the head"), (Role::Prediction, "the prediction layer")] {
        let targets = plan.targets_with(role);
        if !targets.is_empty() {
            needs.push((what.to_owned(), least(&targets, origin, options)));
        }
    }
    Ok(needs)
}

/// Refuses a job that cannot stay under its limit.
///
/// # Errors
/// When the largest block or matrix, or the embedding, does not fit.
pub fn check(plan: &Plan, origin: &Origin, options: &JobOptions) -> Result<()> {
    let Some(allowed_bytes) = options.max_memory else { return Ok(()) };
    let needs = needs(plan, origin, options)?;
    match needs.into_iter().max_by_key(|n| n.1).filter(|n| n.1 > allowed_bytes) {
        Some((what, needed_bytes)) => {
            Err(ConvertError::Memory { what, needed_bytes, allowed_bytes })
        }
        None => Ok(()),
    }
}

/// Bytes that measuring sensitivities takes: the source, the probe's logits (`probe_bytes`) and a block at
/// work.
pub fn measure_bytes(plan: &Plan, origin: &Origin, probe_bytes: u64) -> u64 {
    let source = origin.source.checkpoint().tensor_bytes();
    let block = (0..plan.layers).map(|layer| {
        let targets = plan.targets_of(layer);
        let weights: u64 = targets.iter().map(|t| 4 * t.weights()).sum();
        let each = targets.iter().map(|t| quantizing(t) + moments(t)).sum::<u64>();
        weights + each + pools(&targets)
    });
    let tokenizer = TOKEN * origin.output.vocab_size as u64;
    BASE + tokenizer + source + probe_bytes + block.max().unwrap_or(0)
}

/// Labels whose moments are gathered together, in passes that fit.
pub fn passes(targets: &[&Target], origin: &Origin, options: &JobOptions) -> Vec<BTreeSet<String>> {
    let used = base(origin, options) + pools(targets) + running(targets, options);
    let room = options.max_memory.map_or(u64::MAX, |m| m.saturating_sub(used));
    let mut passes: Vec<BTreeSet<String>> = Vec::new();
    let mut filled = 0;
    for target in targets {
        let label = &target.spec.label;
        if passes.iter().any(|p| p.contains(label)) {
            continue;
        }
        let bytes = moments(target);
        match passes.last_mut().filter(|_| filled + bytes <= room) {
            Some(pass) => {
                pass.insert(label.clone());
                filled += bytes;
            }
            None => {
                passes.push(BTreeSet::from([label.clone()]));
                filled = bytes;
            }
        }
    }
    passes
}

/// Matrices that may be quantized at once.
pub fn jobs(targets: &[&Target], origin: &Origin, options: &JobOptions) -> usize {
    let Some(allowed) = options.max_memory else { return options.jobs.max(1) };
    let labels: BTreeSet<&str> = targets.iter().map(|t| t.spec.label.as_str()).collect();
    let kept: u64 = labels
        .iter()
        .filter_map(|l| targets.iter().find(|t| t.spec.label == *l))
        .map(|t| moments(t))
        .sum();
    let room = allowed.saturating_sub(base(origin, options) + pools(targets) + kept);
    let one = targets.iter().map(|t| quantizing(t)).max().unwrap_or(1);
    options.jobs.clamp(1, (room / one.max(1)).max(1) as usize)
}

/// Refuses a job for which the disk has no room: the finished model twice (its parts, then its files) and
/// two sets of hidden states.
///
/// # Errors
/// When it does not fit, or the file system does not say.
pub fn check_disk(output: &Path, plan: &Plan, origin: &Origin, options: &JobOptions) -> Result<()> {
    let needed_bytes = disk_bytes(plan, origin, options);
    let free_bytes = free_disk(output)?;
    // What an earlier run wrote is part of the need.
    let written = folder_bytes(output);
    if free_bytes + written < needed_bytes {
        let needed_bytes = needed_bytes - written;
        return Err(ConvertError::DiskFull { path: output.to_owned(), needed_bytes, free_bytes });
    }
    Ok(())
}

/// Bytes free where `output` is, or will be made.
///
/// # Errors
/// When the file system does not say.
pub fn free_disk(output: &Path) -> Result<u64> {
    let io = |source| ConvertError::Io { path: output.to_owned(), source };
    let whole = std::path::absolute(output).map_err(io)?;
    let there = whole.ancestors().find(|p| p.exists()).unwrap_or(&whole);
    let about = rustix::fs::statvfs(there).map_err(|e| io(e.into()))?;
    Ok(about.f_bavail.saturating_mul(about.f_frsize))
}

/// Most bytes the job has on disk at once.
pub fn disk_bytes(plan: &Plan, origin: &Origin, options: &JobOptions) -> u64 {
    let packed: u64 = plan
        .groups
        .iter()
        .zip(&options.bits)
        .map(|(g, bits)| (g.weights as f64 * bits / 8.0) as u64 + 2 * g.channels)
        .sum();
    let spec = &origin.output;
    let table_bits = match options.embedding_bits {
        _ if options.tied => 0,
        Some(bits) => bits as u64 + 1,
        None => 16,
    };
    let table = (spec.vocab_size * spec.hidden_size) as u64 * table_bits / 8;
    let states = (options.calibration.tokens() * spec.hidden_size * 4) as u64;
    2 * (packed + table) + 2 * states + kept_moments(plan) + (16 << 20)
}

/// Most bytes of moments on disk: those of one block.
fn kept_moments(plan: &Plan) -> u64 {
    let of_layer = |layer| {
        let targets = plan.targets_of(layer);
        let sizes: BTreeMap<&str, usize> =
            targets.iter().map(|t| (t.spec.label.as_str(), t.spec.in_features)).collect();
        let own = sizes.into_values().map(|size| file_bytes(size as u64)).sum::<u64>();
        own.min(LIMIT) + pools(&targets)
    };
    (0..=plan.layers).map(of_layer).max().unwrap_or(0)
}

fn folder_bytes(path: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(path) else { return 0 };
    entries
        .flatten()
        .map(|e| match e.metadata() {
            Ok(m) if m.is_dir() => folder_bytes(&e.path()),
            Ok(m) => m.len(),
            Err(_) => 0,
        })
        .sum()
}
