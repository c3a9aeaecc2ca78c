//! `marlin bench memory`: what a model takes, by part.

use crate::args::ActivationsArg;
use crate::args::bench::Memory;
use crate::fit::{Need, Use};
use crate::{console, device, exit, loaded, locate};
use anyhow::Result;
use marlin_cpu::system::{self, Resident};
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
    /// What was known before it was loaded, which decides whether it is.
    need: Planned,
    /// Whose memory the ones below are: `device`, as its allocator counts it, or `process`, as the system says.
    memory: &'static str,
    /// Before the model was loaded.
    start_bytes: Option<u64>,
    loaded_bytes: Option<u64>,
    /// The most that was ever taken; of a process, files that are read in place included.
    peak_bytes: Option<u64>,
    /// The most that was ever resident of a process whose model lies on a device.
    #[serde(skip_serializing_if = "Option::is_none")]
    host_peak_bytes: Option<u64>,
}

/// What a context of the prompt and one token needs.
#[derive(Debug, Serialize)]
struct Planned {
    weight_bytes: u64,
    /// Weights that are read in place, from the model's file.
    in_place_bytes: u64,
    cache_bytes: u64,
    /// At most.
    scratch_bytes: u64,
}

#[derive(Debug, Serialize)]
struct CacheRow {
    context: usize,
    bytes: u64,
}

/// What a first pass takes beside the cache: growth of the process's own memory, or of what a device's allocator holds, which
/// it takes in pages and keeps.
#[derive(Debug, Serialize)]
struct Scratch {
    prompt_tokens: usize,
    prompt_bytes: Option<u64>,
    decode_bytes: Option<u64>,
}

/// Where a model's memory is counted.
#[derive(Clone, Copy)]
struct Meter<'a> {
    backend: &'a dyn Backend,
}

impl Meter<'_> {
    /// The device's memory, or the process's where the backend has no other.
    fn read(self) -> Option<Resident> {
        match self.backend.memory() {
            Some(memory) => Some(Resident {
                bytes: memory.used_bytes,
                most_bytes: memory.reserved_bytes,
                own_bytes: memory.reserved_bytes,
            }),
            None => system::resident(),
        }
    }

    fn is_device(self) -> bool {
        self.backend.memory().is_some()
    }
}

/// Loads the model, reads a prompt, decodes a token, and says what each took.
pub fn run(args: &Memory) -> Result<()> {
    let checkpoint = locate::open(args.model.model.as_deref())?;
    let model_spec = marlin_models::spec(&checkpoint)?;
    let limit = model_spec.max_position_embeddings;
    let tokens = args.prompt as usize;
    if tokens >= limit {
        return Err(exit::usage(format!("{tokens} tokens do not fit the context of {limit}")));
    }
    let inner = device::backend(&args.device, ActivationsArg::Auto)?;
    let meter = Meter { backend: inner.as_ref() };
    let start = meter.read();
    let counted = Arc::new(Profiler::new(inner.clone()));
    let cache_type = marlin_tensor::CacheType::from(args.cache_type);
    let blocks = (tokens + 1).div_ceil(BLOCK_SIZE);
    let usage = Use { tokens: blocks * BLOCK_SIZE, cache_type, rows: tokens.max(1), outputs: 1 };
    let need = Need::of(&checkpoint, &model_spec, inner.as_ref(), &usage)?;
    let backend = counted.clone() as Arc<dyn Backend>;
    let model = loaded::load(&checkpoint, model_spec, backend, &need)?;
    let loaded = meter.read();
    let spec = model.cache_spec(blocks, BLOCK_SIZE, cache_type);
    let per_token = spec.bytes_per_token() as u64;
    let cache = model.backend().create_cache(&spec)?;
    let table: Vec<u32> = (0..blocks as u32).collect();
    // A process's cache takes its memory when it is written, so decoding comes first, into a block by itself.
    let lazy = if meter.is_device() { 0 } else { per_token };
    let step = |start: usize, count: usize| -> Result<Option<u64>> {
        let before = meter.read();
        let mut batch = Batch::new(BLOCK_SIZE);
        match count {
            1 => batch.push_decode(&[0], start, &table, limit as u32, 1),
            _ => batch.push(&vec![0; count], start, &table, limit as u32, 1),
        }
        let logits = model.forward(&batch, &cache)?;
        model.backend().download(&logits)?;
        let grown = meter.read().zip(before);
        let grown = grown.map(|(now, then)| now.own_bytes.saturating_sub(then.own_bytes));
        Ok(grown.map(|bytes| bytes.saturating_sub(lazy * count as u64)))
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
        activations: device::activations_name(model.backend().as_ref()),
        model_bytes: checkpoint.tensor_bytes(),
        weight_bytes: counted.loaded_bytes(),
        cache_type: cache_type.to_string(),
        cache_bytes_per_token: per_token,
        cache: contexts.into_iter().map(row).collect(),
        scratch: Scratch { prompt_tokens: tokens, prompt_bytes, decode_bytes },
        need: Planned {
            weight_bytes: need.weights,
            in_place_bytes: need.in_place,
            cache_bytes: need.cache,
            scratch_bytes: need.scratch,
        },
        memory: if meter.is_device() { "device" } else { "process" },
        start_bytes: start.map(|memory| memory.bytes),
        loaded_bytes: loaded.map(|memory| memory.bytes),
        peak_bytes: meter.read().map(|memory| memory.most_bytes),
        host_peak_bytes: system::resident().map(|r| r.most_bytes).filter(|_| meter.is_device()),
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
    line("scratch counted on before", Some(report.need.scratch_bytes))?;
    let whose = if report.memory == "device" { "on the device" } else { "resident" };
    line(&format!("{whose} at start"), report.start_bytes)?;
    line(&format!("{whose}, model loaded"), report.loaded_bytes)?;
    line(&format!("{whose} at most"), report.peak_bytes)?;
    if report.memory == "device" {
        line("resident on the host at most", report.host_peak_bytes)?;
    }
    console::note(&format!("{} · {}", report.model, report.device));
    Ok(())
}
