//! One test of `marlin bench`: a prompt read, tokens generated, or both.

use anyhow::Result;
use marlin_engine::profile::Profiler;
use marlin_models::Model;
use marlin_tensor::{Batch, Cache, CacheType, Draw};
use std::time::Instant;

const BLOCK_SIZE: usize = 16;
/// Tokens read at a time before a test.
const CHUNK: usize = 512;

/// Tokens of one sequence in a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tokens {
    /// Read at once.
    pub prompt: usize,
    /// Generated one by one.
    pub generate: usize,
    /// In the cache before.
    pub depth: usize,
}

impl Tokens {
    /// `pp512`, `tg128`, `pp512+tg128`, `tg128 @ d4096`.
    pub fn name(&self) -> String {
        let parts = [("pp", self.prompt), ("tg", self.generate)];
        let parts = parts.iter().filter(|(_, n)| *n > 0).map(|(name, n)| format!("{name}{n}"));
        let name = parts.collect::<Vec<_>>().join("+");
        if self.depth == 0 { name } else { format!("{name} @ d{}", self.depth) }
    }

    /// Tokens that are measured.
    pub fn measured(&self) -> usize {
        self.prompt + self.generate
    }

    /// Room that a sequence takes.
    pub fn all(&self) -> usize {
        [self.prompt, self.generate, self.depth].into_iter().fold(0, usize::saturating_add)
    }

    /// The same in whole blocks.
    pub fn room(&self) -> usize {
        self.all().next_multiple_of(BLOCK_SIZE)
    }

    /// Most of a pass.
    pub fn rows(&self) -> usize {
        self.prompt.max(CHUNK.min(self.depth)).max(1)
    }

    /// Forward passes, each of which reads every weight.
    pub fn passes(&self) -> usize {
        usize::from(self.prompt > 0) + self.generate
    }
}

/// `tg128`, or `tg128x8` for eight sequences at once.
pub fn pass_name(test: &str, batch: usize) -> String {
    if batch == 1 { test.to_owned() } else { format!("{test}x{batch}") }
}

/// What is measured, of what.
pub struct Test<'a> {
    pub model: &'a Model,
    pub batch: usize,
    pub tokens: Tokens,
    pub cache_type: CacheType,
    pub profiler: Option<&'a Profiler>,
}

/// What of a pass the tokens are.
#[derive(Clone, Copy)]
enum Kind {
    Prompt,
    Answer,
}

impl Test<'_> {
    /// Median and standard deviation of tokens per second.
    pub fn measure(&self, repetitions: usize) -> Result<(f64, f64)> {
        let blocks = self.tokens.room() / BLOCK_SIZE;
        let spec = self.model.cache_spec(blocks * self.batch, BLOCK_SIZE, self.cache_type);
        let cache = self.model.backend().create_cache(&spec)?;
        let tables: Vec<Vec<u32>> = (0..self.batch)
            .map(|s| (s * blocks..(s + 1) * blocks).map(|b| b as u32).collect())
            .collect();
        let depth = self.tokens.depth;
        for start in (0..depth).step_by(CHUNK) {
            self.step(&cache, &tables, start, CHUNK.min(depth - start), Kind::Prompt)?;
        }
        self.once(&cache, &tables, None)?;
        let mut speeds = Vec::with_capacity(repetitions);
        for _ in 0..repetitions {
            let start = Instant::now();
            self.once(&cache, &tables, None)?;
            let seconds = start.elapsed().as_secs_f64();
            speeds.push((self.batch * self.tokens.measured()) as f64 / seconds);
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
        let name = pass_name(&self.tokens.name(), self.batch);
        let step = |start, count, kind| {
            let step = || self.step(cache, tables, start, count, kind);
            match profiler {
                Some(profiler) => profiler.pass(&name, step),
                None => step(),
            }
        };
        let Tokens { prompt, generate, depth } = self.tokens;
        if prompt > 0 {
            step(depth, prompt, Kind::Prompt)?;
        }
        (0..generate).try_for_each(|i| step(depth + prompt + i, 1, Kind::Answer))
    }

    /// Runs `count` tokens of every sequence from position `start` on.
    fn step(
        &self,
        cache: &Cache,
        tables: &[Vec<u32>],
        start: usize,
        count: usize,
        kind: Kind,
    ) -> Result<()> {
        let vocab = self.model.spec().vocab_size as u64;
        let token = |s: usize, i: usize| {
            // Any tokens will do; a fixed sequence makes runs alike.
            ((s as u64 * 7919 + i as u64 * 104_729 + 17) % vocab) as u32
        };
        let max = self.tokens.all() as u32;
        let mut batch = Batch::new(BLOCK_SIZE);
        for (s, table) in tables.iter().enumerate() {
            let tokens: Vec<u32> = (start..start + count).map(|i| token(s, i)).collect();
            match kind {
                Kind::Prompt => batch.push(&tokens, start, table, max, 1),
                Kind::Answer => batch.push_decode(&tokens, start, table, max, 1),
            }
        }
        let logits = self.model.forward(&batch, cache)?;
        // A device that draws tokens need not copy all logits.
        let draws: Vec<Draw> = (0..logits.rows).map(Draw::greedy).collect();
        let backend = self.model.backend();
        if backend.draw(&logits, &draws)?.is_none() {
            backend.download(&logits)?;
        }
        Ok(())
    }
}
