//! `marlin bench memory`: what a model takes, by part.

use crate::args::ActivationsArg;
use crate::args::bench::Memory;
use crate::{console, exit, loaded, locate};
use anyhow::Result;
use marlin_engine::profile::Profiler;
use marlin_tensor::{Backend, Batch};
use serde::Serialize;
use std::sync::Arc;

const BLOCK_SIZE: usize = 16;
/// Context lengths told, up to the model's own, which is told too.
const CONTEXTS: [usize; 4] = [512, 2048, 8192, 32768];
/// Columns of the names.
const WIDTH: usize = 32;

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    device: String,
    activations: &'static str,
    /// Tensors in the files.
    model_bytes: u64,
    /// Weights on the device, repacked copies included.
    weight_bytes: u64,
    cache_type: String,
    cache_bytes_per_token: u64,
    cache: Vec<CacheRow>,
    scratch: Scratch,
    /// Resident before the model was loaded, where the system says; so are the ones below.
    start_bytes: Option<u64>,
    loaded_bytes: Option<u64>,
    /// The most that was ever resident, files that are read in place included.
    peak_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct CacheRow {
    context: usize,
    bytes: u64,
}

/// Growth of the process's own memory by a first pass, without the cache it wrote.
#[derive(Debug, Serialize)]
struct Scratch {
    prompt_tokens: usize,
    prompt_bytes: Option<u64>,
    decode_bytes: Option<u64>,
}

/// Loads the model, reads a prompt, decodes a token, and says what each took.
pub fn run(args: &Memory) -> Result<()> {
    let start_bytes = resident("VmRSS:");
    let checkpoint = locate::open(args.model.model.as_deref())?;
    let inner = loaded::backend(&args.device, ActivationsArg::Auto)?;
    let counted = Arc::new(Profiler::new(inner));
    let model = loaded::load(&checkpoint, counted.clone() as Arc<dyn Backend>)?;
    let loaded_bytes = resident("VmRSS:");
    let cache_type = marlin_tensor::CacheType::from(args.cache_type);
    let limit = model.spec().max_position_embeddings;
    let tokens = args.prompt as usize;
    if tokens >= limit {
        return Err(exit::usage(format!("{tokens} tokens do not fit the context of {limit}")));
    }

    let blocks = (tokens + 1).div_ceil(BLOCK_SIZE);
    let spec = model.cache_spec(blocks, BLOCK_SIZE, cache_type);
    let per_token = spec.bytes_per_token() as u64;
    let cache = model.backend().create_cache(&spec)?;
    let table: Vec<u32> = (0..blocks as u32).collect();
    // A cache takes its memory when it is written, so decoding comes first, into a block by itself.
    let step = |start: usize, count: usize| -> Result<Option<u64>> {
        let before = resident("RssAnon:");
        let mut batch = Batch::new(BLOCK_SIZE);
        match count {
            1 => batch.push_decode(&[0], start, &table, limit as u32, 1),
            _ => batch.push(&vec![0; count], start, &table, limit as u32, 1),
        }
        let logits = model.forward(&batch, &cache)?;
        model.backend().download(&logits)?;
        let grown = resident("RssAnon:").zip(before).map(|(now, then)| now.saturating_sub(then));
        Ok(grown.map(|bytes| bytes.saturating_sub(per_token * count as u64)))
    };
    let decode_bytes = step(0, 1)?;
    let prompt_bytes = step(0, tokens)?.zip(decode_bytes).map(|(prompt, decode)| prompt + decode);

    let mut contexts: Vec<usize> = CONTEXTS.into_iter().filter(|&n| n < limit).collect();
    contexts.push(limit);
    let row = |context: usize| {
        let padded = context.next_multiple_of(BLOCK_SIZE) as u64;
        CacheRow { context, bytes: padded * per_token }
    };
    let report = Report {
        model: locate::name(args.model.model.as_deref()).to_owned(),
        device: model.backend().name(),
        activations: loaded::activations_name(model.backend().as_ref()),
        model_bytes: checkpoint.tensor_bytes(),
        weight_bytes: counted.loaded_bytes(),
        cache_type: cache_type.to_string(),
        cache_bytes_per_token: per_token,
        cache: contexts.into_iter().map(row).collect(),
        scratch: Scratch { prompt_tokens: tokens, prompt_bytes, decode_bytes },
        start_bytes,
        loaded_bytes,
        peak_bytes: resident("VmHWM:"),
    };
    if args.json { console::json(&report) } else { print(&report) }
}

fn print(report: &Report) -> Result<()> {
    let line = |name: &str, bytes: Option<u64>| {
        let bytes = bytes.map_or_else(|| "unknown".to_owned(), console::bytes);
        console::line(&format!("{name:<WIDTH$} {bytes:>10}"))
    };
    line("tensors in files", Some(report.model_bytes))?;
    line("weights on the device", Some(report.weight_bytes))?;
    line(&format!("cache per token, {}", report.cache_type), Some(report.cache_bytes_per_token))?;
    for row in &report.cache {
        line(&format!("cache of {} tokens", row.context), Some(row.bytes))?;
    }
    line("scratch, decoding", report.scratch.decode_bytes)?;
    let prompt = format!("scratch, prompt of {}", report.scratch.prompt_tokens);
    line(&prompt, report.scratch.prompt_bytes)?;
    line("resident at start", report.start_bytes)?;
    line("resident, model loaded", report.loaded_bytes)?;
    line("resident at most", report.peak_bytes)?;
    console::note(&format!("{} · {}", report.model, report.device));
    Ok(())
}

/// A field of what the system says of this process.
fn resident(field: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with(field))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
