//! `marlin eval compare`: several models against a reference, in one table.
//!
//! The reference stays loaded. The others are loaded together as far as memory allows and read each
//! window side by side with it, so that its logits are computed once per group, not per model.

use super::{different_tokens, open_text, perplexity_text};
use crate::args::{ActivationsArg, DeviceArgs, TextArgs};
use crate::commands::inspect::{self, Storage};
use crate::fit::{Need, Room, Use};
use crate::{console, device, exit, loaded, locate};
use anyhow::{Context, Result};
use marlin_checkpoint::Checkpoint;
use marlin_engine::evaluate::{NamedModel, PerplexityOptions, PerplexityReport, compare};
use marlin_models::ModelSpec;
use marlin_tensor::Backend;
use marlin_text::{Specials, Tokenizer};
use serde::Serialize;
use serde_json::json;
use std::collections::VecDeque;
use std::sync::Arc;

/// Share of the free memory that weights may take when the user names no limit.
const MEMORY_SHARE: f64 = 0.85;

/// A model before its weights are loaded.
struct Candidate {
    name: String,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    need: Need,
    storage: Storage,
    tokens: Vec<u32>,
}

#[derive(Debug, Serialize)]
struct Row {
    model: String,
    is_reference: bool,
    #[serde(flatten)]
    storage: Storage,
    perplexity: f64,
    perplexity_error: Option<f64>,
    nll: f64,
    kl_divergence: Option<f64>,
    kl_median: Option<f64>,
    kl_p99: Option<f64>,
    top1_agreement: Option<f64>,
}

/// Compares `models` with `reference`, or with the first of them.
pub fn run(
    models: &[String],
    reference: Option<&str>,
    max_memory: Option<u64>,
    text: &TextArgs,
    json: bool,
    device: &DeviceArgs,
) -> Result<()> {
    let reference = reference.unwrap_or(&models[0]);
    let mut names: Vec<&str> = Vec::new();
    for name in models.iter().map(String::as_str) {
        if !same(name, reference) && !names.iter().any(|other| same(name, other)) {
            names.push(name);
        }
    }
    if names.is_empty() {
        let message =
            format!("nothing to compare {reference} with; name another model, or a --reference");
        return Err(exit::usage(message));
    }
    let (content, file, options) = open_text(text)?;
    let backend = device::backend(device, ActivationsArg::Float)?;
    // What can be wrong is found before any weight is loaded.
    let open = |name: &str| open(name, &content, backend.as_ref(), &options);
    let reference = open(reference)?;
    let total = options.windows_of(reference.tokens.len()).with_context(|| file.clone())?;
    let mut waiting = VecDeque::new();
    for name in names {
        let candidate = open(name)?;
        if candidate.tokens != reference.tokens {
            return Err(different_tokens(name, &reference.name));
        }
        waiting.push_back(candidate);
    }

    let load = |c: &Candidate| {
        let model = loaded::load(&c.checkpoint, c.spec.clone(), Arc::clone(&backend), &c.need);
        model.with_context(|| c.name.clone())
    };
    let reference_model = load(&reference)?;
    let named = NamedModel { name: &reference.name, model: &reference_model };
    let mut own = None;
    let mut rows = Vec::new();
    while !waiting.is_empty() {
        let room = || Room::of(backend.as_ref()).map(|room| room.unswapped());
        let free = || room().map(|free| (free as f64 * MEMORY_SHARE) as u64);
        let fits = fitting(&waiting, max_memory.or_else(free));
        if fits < waiting.len() {
            console::note(&format!(
                "{fits} of the {} models left fit in memory at once; the reference is read again for the others",
                waiting.len()
            ));
        }
        let group: Vec<_> = waiting.drain(..fits).collect();
        let loaded = group.iter().map(load).collect::<Result<Vec<_>>>()?;
        let models: Vec<_> = group
            .iter()
            .zip(&loaded)
            .map(|(c, model)| NamedModel { name: &c.name, model })
            .collect();
        let what = match models[..] {
            [one] => one.name.to_owned(),
            _ => format!("{} models", models.len()),
        };
        let bar = console::bar(total as u64, &format!("{what}, windows"), false);
        let reports = compare(named, &models, &reference.tokens, &options, &mut |p| {
            bar.set_position(p.windows as u64);
        });
        bar.finish_and_clear();
        let mut reports = reports.with_context(|| file.clone())?.into_iter();
        own = own.or(reports.next());
        rows.extend(group.into_iter().zip(reports).map(|(c, report)| row(c, report)));
    }
    let own = own.expect("there was a group");
    let (windows, tokens_scored) = (own.windows, own.tokens_scored);
    let mut first = row(reference, own);
    first.is_reference = true;
    rows.insert(0, first);
    if json {
        return console::json(&json!({
            "reference": rows[0].model,
            "models": rows,
            "tokens_scored": tokens_scored,
            "windows": windows,
            "window": options.window,
            "score_from": options.score_from,
            "cache_type": options.cache_type.name(),
            "text": file,
            "device": backend.name(),
            "activations": device::activations_name(backend.as_ref()),
        }));
    }
    console::print(&table(&rows))?;
    console::note(&format!(
        "{tokens_scored} tokens in {windows} windows of {file} · {}",
        backend.name()
    ));
    Ok(())
}

/// Whether two arguments name the same model.
fn same(a: &str, b: &str) -> bool {
    let path = |name| std::fs::canonicalize(name).ok();
    a == b || path(a).is_some_and(|a| path(b) == Some(a))
}

fn open(
    name: &str,
    text: &str,
    backend: &dyn Backend,
    options: &PerplexityOptions,
) -> Result<Candidate> {
    let checkpoint = locate::open(Some(name))?;
    let tokens = Tokenizer::open(&checkpoint)
        .and_then(|tokenizer| tokenizer.encode(text, Specials::NONE))
        .with_context(|| name.to_owned())?;
    let spec = marlin_models::spec(&checkpoint).with_context(|| name.to_owned())?;
    let storage = inspect::storage(&checkpoint, &spec, backend)?;
    let usage = Use::reading(options.window, options.cache_type, &spec);
    let need = Need::of(&checkpoint, &spec, backend, &usage)?;
    Ok(Candidate { name: name.to_owned(), checkpoint, spec, need, storage, tokens })
}

/// How many of `waiting` may be loaded together in `room` bytes: at least one.
fn fitting(waiting: &VecDeque<Candidate>, room: Option<u64>) -> usize {
    let Some(mut room) = room else { return 1 };
    let fits = waiting.iter().map_while(|c| {
        room = room.checked_sub(c.need.total().saturating_add(c.need.in_place))?;
        Some(())
    });
    fits.count().max(1)
}

fn row(candidate: Candidate, report: PerplexityReport) -> Row {
    Row {
        model: candidate.name,
        is_reference: false,
        storage: candidate.storage,
        perplexity: report.perplexity,
        perplexity_error: report.perplexity_error,
        nll: report.nll,
        kl_divergence: report.kl_divergence,
        kl_median: report.kl_median,
        kl_p99: report.kl_p99,
        top1_agreement: report.top1_agreement,
    }
}

const HEADER: [&str; 11] = [
    "model",
    "format",
    "bits",
    "head",
    "all",
    "bytes",
    "perplexity",
    "KL",
    "median",
    "99 %",
    "top-1",
];

/// Columns of words stand left, of figures right.
const WORDS: usize = 2;

/// The rows with a header, aligned.
fn table(rows: &[Row]) -> String {
    let figure = |value: Option<f64>| match value {
        Some(value) => format!("{value:.5}"),
        None => "-".to_owned(),
    };
    let cells = |row: &Row| -> [String; HEADER.len()] {
        let storage = &row.storage;
        [
            row.model.clone(),
            storage.format.clone(),
            format!("{:.3}", storage.bits_per_weight_linears),
            format!("{:.3}", storage.bits_per_weight_head),
            format!("{:.3}", storage.bits_per_weight),
            storage.file_bytes.to_string(),
            perplexity_text(row.perplexity, row.perplexity_error),
            if row.is_reference { "reference".to_owned() } else { figure(row.kl_divergence) },
            figure(row.kl_median),
            figure(row.kl_p99),
            row.top1_agreement.map_or("-".to_owned(), |share| format!("{:.2} %", share * 100.0)),
        ]
    };
    let mut lines = vec![HEADER.map(str::to_owned)];
    lines.extend(rows.iter().map(cells));
    let widths: Vec<usize> = (0..HEADER.len())
        .map(|column| lines.iter().map(|l| l[column].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for line in &lines {
        let padded = line.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            if column < WORDS { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        text.push_str(padded.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_aligned() {
        let row = |model: &str, format: &str, bits: f64, kl: Option<f64>| Row {
            model: model.to_owned(),
            is_reference: kl.is_none(),
            storage: Storage {
                format: format.to_owned(),
                bits_per_weight_linears: bits,
                bits_per_weight_head: 16.0,
                bits_per_weight: bits,
                file_bytes: (bits * 4.0e6) as u64,
            },
            perplexity: 12.5 + kl.unwrap_or(0.0),
            perplexity_error: kl.map(|_| 0.25),
            nll: 2.5,
            kl_divergence: kl,
            kl_median: kl.map(|kl| kl / 2.0),
            kl_p99: kl.map(|kl| kl * 9.0),
            top1_agreement: kl.map(|_| 0.96875),
        };
        let rows =
            [row("./model-bf16", "bf16", 16.0, None), row("a.gguf", "q4_k+q6_k", 4.85, Some(0.03))];
        insta::assert_snapshot!(table(&rows), @r"
        model         format       bits    head     all     bytes        perplexity         KL   median     99 %    top-1
        ./model-bf16  bf16       16.000  16.000  16.000  64000000           12.5000  reference        -        -        -
        a.gguf        q4_k+q6_k   4.850  16.000   4.850  19400000  12.5300 ± 0.2500    0.03000  0.01500  0.27000  96.88 %
        ");
    }
}
