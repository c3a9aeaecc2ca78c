//! `marlin bench`: prompt and generation speed in the shape of llama-bench.

mod encode;
mod memory;
mod ops;
mod profile;
mod serve;

use crate::args::ActivationsArg;
use crate::args::bench::{Bench, Speed, What};
use crate::{console, loaded, locate};
use anyhow::{Result, ensure};
use marlin_engine::profile::Profiler;
use marlin_models::Model;
use marlin_tensor::{Backend, Batch, Cache, CacheType, Selection};
use serde::Serialize;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

const BLOCK_SIZE: usize = 16;
/// Tokens read at a time before a test.
const CHUNK: usize = 512;

/// One test's result.
#[derive(Debug, Serialize)]
struct Row {
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

/// Runs every test and prints a table.
fn speed(args: &Speed) -> Result<()> {
    let checkpoint = locate::open(args.model.model.as_deref())?;
    let trace = args.profile.as_deref().map(profile::create).transpose()?;
    let mut backend = match trace {
        Some(_) => loaded::cpu_only(&args.device, ActivationsArg::Auto, "--profile")?,
        None => loaded::backend(&args.device, ActivationsArg::Auto)?,
    };
    let profiler = args.profile.as_ref().map(|_| Arc::new(Profiler::new(backend.clone())));
    if let Some(profiler) = &profiler {
        backend = profiler.clone() as Arc<dyn Backend>;
    }
    let model = loaded::load(&checkpoint, backend)?;
    let threads = loaded::threads(&args.device);
    let model_bytes = checkpoint.tensor_bytes();
    let limit = model.spec().max_position_embeddings;
    let tests =
        args.prompt.iter().map(|&n| (true, n)).chain(args.generate.iter().map(|&n| (false, n)));
    let tests: Vec<(bool, usize)> = tests.filter(|&(_, n)| n > 0).collect();
    let mut rows = Vec::new();
    if !args.json {
        console::line(&format!(
            "{:<16} {:>5} {:>14} {:>10} {:>8}",
            "test", "batch", "tokens/s", "± stddev", "GB/s"
        ))?;
    }
    let depths =
        args.depth.iter().flat_map(|depth| args.batch.iter().map(|batch| (*depth, *batch)));
    let cache_type = args.cache_type.into();
    for (depth, batch) in depths {
        ensure!(batch > 0, "--batch must be at least 1");
        for &(prefill, tokens) in &tests {
            let all = tokens.saturating_add(depth);
            ensure!(all <= limit, "{all} tokens do not fit the model's context of {limit}");
            let profiler = profiler.as_deref();
            let bench = Test { model: &model, batch, depth, cache_type, tokens, prefill, profiler };
            let row = bench.measure(usize::from(args.repetitions))?;
            let passes = if prefill { 1.0 } else { tokens as f64 };
            let seconds = (batch * tokens) as f64 / row.0;
            let row = Row {
                test: bench.name(),
                batch,
                depth,
                cache_type: cache_type.name(),
                threads,
                tokens_per_second: row.0,
                stddev: row.1,
                model_bytes,
                gigabytes_per_second: passes * model_bytes as f64 / seconds / 1e9,
                device: model.backend().name(),
                activations: loaded::activations_name(model.backend().as_ref()),
                profile: None,
            };
            if !args.json {
                console::line(&format!(
                    "{:<16} {:>5} {:>14.1} {:>10.1} {:>8.2}",
                    row.test,
                    row.batch,
                    row.tokens_per_second,
                    row.stddev,
                    row.gigabytes_per_second
                ))?;
            }
            rows.push(row);
        }
    }
    if let (Some(path), Some(file), Some(profiler)) = (&args.profile, trace, &profiler) {
        let profile = profiler.take();
        profile::write(&profile, file, path)?;
        for row in &mut rows {
            row.profile = Some(profile::rows(&profile, &pass_name(&row.test, row.batch)));
        }
        if !args.json {
            rows.iter().try_for_each(|row| {
                let rows = row.profile.as_deref().unwrap_or_default();
                profile::print(&pass_name(&row.test, row.batch), rows)
            })?;
        }
    }
    if args.json {
        console::json(&rows)?;
    } else {
        console::note(&format!(
            "{} · {}",
            locate::name(args.model.model.as_deref()),
            model.backend().name()
        ));
    }
    Ok(())
}

/// `tg128`, or `tg128x8` for eight sequences at once.
fn pass_name(test: &str, batch: usize) -> String {
    if batch == 1 { test.to_owned() } else { format!("{test}x{batch}") }
}

struct Test<'a> {
    model: &'a Model,
    batch: usize,
    depth: usize,
    cache_type: CacheType,
    tokens: usize,
    prefill: bool,
    profiler: Option<&'a Profiler>,
}

impl Test<'_> {
    fn name(&self) -> String {
        let name = format!("{}{}", if self.prefill { "pp" } else { "tg" }, self.tokens);
        if self.depth == 0 { name } else { format!("{name} @ d{}", self.depth) }
    }

    /// Median and standard deviation of tokens per second.
    fn measure(&self, repetitions: usize) -> Result<(f64, f64)> {
        let blocks = (self.depth + self.tokens).div_ceil(BLOCK_SIZE);
        let spec = self.model.cache_spec(blocks * self.batch, BLOCK_SIZE, self.cache_type);
        let cache = self.model.backend().create_cache(&spec)?;
        let tables: Vec<Vec<u32>> = (0..self.batch)
            .map(|s| (s * blocks..(s + 1) * blocks).map(|b| b as u32).collect())
            .collect();
        for start in (0..self.depth).step_by(CHUNK) {
            self.step(&cache, &tables, start, CHUNK.min(self.depth - start), true)?;
        }
        self.once(&cache, &tables, None)?;
        let mut speeds = Vec::with_capacity(repetitions);
        for _ in 0..repetitions {
            let start = Instant::now();
            self.once(&cache, &tables, None)?;
            speeds.push((self.batch * self.tokens) as f64 / start.elapsed().as_secs_f64());
        }
        // A run of its own: the speeds above are without the profiler's clock.
        if let Some(profiler) = self.profiler {
            self.once(&cache, &tables, Some(profiler))?;
        }
        speeds.sort_by(f64::total_cmp);
        let middle = speeds.len() / 2;
        let median = if speeds.len() % 2 == 1 {
            speeds[middle]
        } else {
            (speeds[middle - 1] + speeds[middle]) / 2.0
        };
        let mean = speeds.iter().sum::<f64>() / speeds.len() as f64;
        let variance = speeds.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / speeds.len() as f64;
        Ok((median, variance.sqrt()))
    }

    fn once(&self, cache: &Cache, tables: &[Vec<u32>], profiler: Option<&Profiler>) -> Result<()> {
        let name = pass_name(&self.name(), self.batch);
        let step = |start, count| {
            let step = || self.step(cache, tables, self.depth + start, count, self.prefill);
            match profiler {
                Some(profiler) => profiler.pass(&name, step),
                None => step(),
            }
        };
        if self.prefill {
            step(0, self.tokens)
        } else {
            (0..self.tokens).try_for_each(|i| step(i, 1))
        }
    }

    /// Runs `count` tokens of every sequence from position `start` on.
    fn step(
        &self,
        cache: &Cache,
        tables: &[Vec<u32>],
        start: usize,
        count: usize,
        prefill: bool,
    ) -> Result<()> {
        let vocab = self.model.spec().vocab_size as u64;
        let token = |s: usize, i: usize| {
            // Any tokens will do; a fixed sequence makes runs alike.
            ((s as u64 * 7919 + i as u64 * 104_729 + 17) % vocab) as u32
        };
        let max = (self.depth + self.tokens) as u32;
        let mut batch = Batch::new(BLOCK_SIZE);
        for (s, table) in tables.iter().enumerate() {
            let tokens: Vec<u32> = (start..start + count).map(|i| token(s, i)).collect();
            match prefill {
                true => batch.push(&tokens, start, table, max, 1),
                false => batch.push_decode(&tokens, start, table, max, 1),
            }
        }
        let logits = self.model.forward(&batch, cache)?;
        // A device that finds the best token need not copy all logits.
        let wanted = vec![Selection { count: 1, temperature: 1.0 }; logits.rows];
        let backend = self.model.backend();
        if backend.select(&logits, &wanted)?.is_none() {
            backend.download(&logits)?;
        }
        Ok(())
    }
}
