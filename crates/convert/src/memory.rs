//! What a job needs of memory and disk, and how it is cut to fit.

use crate::error::ConvertError;
use crate::exl3::PADDING;
use crate::job::JobOptions;
use crate::origin::Origin;
use crate::plan::{Plan, Target};
use std::collections::BTreeSet;
use std::path::Path;

type Result<T> = std::result::Result<T, ConvertError>;

/// Copies of a matrix that exist at once while it is quantized, f32.
const COPIES: u64 = 8;
/// Bytes per element of the Hessian while it is factored: f32 forms and the f64 factor.
const HESSIAN_BYTES: u64 = 36;
/// Bytes for everything else: code, buffers, a row of activations.
const BASE: u64 = 96 << 20;

fn padded(n: usize) -> u64 {
    n.next_multiple_of(PADDING) as u64
}

/// Bytes while `target` is quantized.
fn quantizing(target: &Target) -> u64 {
    let (n, k) = (padded(target.spec.out_features), padded(target.spec.in_features));
    COPIES * 4 * n * k + HESSIAN_BYTES * k * k
}

/// Bytes of the moments of one label.
fn moments(target: &Target) -> u64 {
    4 * (target.spec.in_features as u64).pow(2)
}

/// Bytes of the targets' weights as they are loaded to run.
fn loaded(targets: &[&Target]) -> u64 {
    targets.iter().map(|t| 4 * t.spec.out_features as u64 * t.spec.in_features as u64).sum()
}

/// Bytes that `layer`'s targets take at the least: one matrix at a time, one label at a time.
fn least(targets: &[&Target]) -> u64 {
    let one = |f: fn(&Target) -> u64| targets.iter().map(|t| f(t)).max().unwrap_or(0);
    BASE + one(moments) + one(quantizing).max(loaded(targets))
}

/// Refuses a job that cannot stay under its limit.
///
/// # Errors
/// When the largest block or matrix does not fit.
pub fn check(plan: &Plan, origin: &Origin, options: &JobOptions) -> Result<()> {
    let Some(allowed_bytes) = options.max_memory else { return Ok(()) };
    for layer in 0..=plan.layers {
        let targets = plan.targets_of(layer);
        let needed_bytes = least(&targets);
        if needed_bytes > allowed_bytes {
            let what = match layer == plan.layers {
                true => format!("the head of {}", origin.output.model_type),
                false => format!("layer {layer}"),
            };
            return Err(ConvertError::Memory { what, needed_bytes, allowed_bytes });
        }
    }
    Ok(())
}

/// Labels whose moments are gathered together, in passes that fit.
pub fn passes(targets: &[&Target], max_memory: &Option<u64>) -> Vec<BTreeSet<String>> {
    let room = max_memory.map_or(u64::MAX, |m| m.saturating_sub(BASE + loaded(targets)));
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
pub fn jobs(targets: &[&Target], options: &JobOptions) -> usize {
    let Some(allowed) = options.max_memory else { return options.jobs.max(1) };
    let labels: BTreeSet<&str> = targets.iter().map(|t| t.spec.label.as_str()).collect();
    let kept: u64 = labels
        .iter()
        .filter_map(|l| targets.iter().find(|t| t.spec.label == *l))
        .map(|t| moments(t))
        .sum();
    let room = allowed.saturating_sub(BASE + kept);
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
    let about = rustix::fs::statvfs(output)
        .map_err(|e| ConvertError::Io { path: output.to_owned(), source: e.into() })?;
    let free_bytes = about.f_bavail.saturating_mul(about.f_frsize);
    // What an earlier run wrote is part of the need.
    let written = folder_bytes(output);
    if free_bytes + written < needed_bytes {
        let needed_bytes = needed_bytes - written;
        return Err(ConvertError::DiskFull { path: output.to_owned(), needed_bytes, free_bytes });
    }
    Ok(())
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
    let table = (spec.vocab_size * spec.hidden_size) as u64
        * options.embedding_bits.map_or(16, |b| b as u64 + 1)
        / 8;
    let states = (options.calibration.tokens() * spec.hidden_size * 4) as u64;
    2 * (packed + table) + 2 * states + (16 << 20)
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
