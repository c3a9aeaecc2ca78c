//! Measuring a model: perplexity and KL divergence, raw logits, multiple choice; and vectors of texts.
//!
//! None of it goes through the scheduler or the sampler: the tokens are known, so they run in
//! large chunks through a cache of their own (f32, so that the cache is not what is measured), and
//! logits are pulled a few rows at a time, so memory does not grow with the text.

mod choices;
mod embed;
mod logits;
mod perplexity;
mod pooling;

pub use choices::{Choice, ChoiceRow, ChoicesReport, choices};
pub use embed::{Pooling, embed};
pub use logits::{for_each_logits, for_each_logprob, logits};
pub use perplexity::{
    NamedModel, PerplexityOptions, PerplexityProgress, PerplexityReport, compare, perplexity,
};
pub use pooling::DeclaredPooling;

use crate::{BlockManager, BlockTable, EngineError, LanguageModel};
use marlin_tensor::{Batch, Cache, CacheType};

/// Most bytes of logits per forward pass, where one row is not larger.
const LOGIT_BYTES: usize = 64 << 20;

/// Rows per forward pass that need no logits.
const CHUNK: usize = 512;
const BLOCK_SIZE: usize = 16;

/// Runs sequences of known tokens, one after the other, over a cache of its own.
struct Reader<'a> {
    model: &'a dyn LanguageModel,
    cache: Cache,
    table: BlockTable,
    capacity: usize,
}

impl<'a> Reader<'a> {
    /// For sequences of up to `capacity` tokens.
    fn new(model: &'a dyn LanguageModel, capacity: usize) -> Result<Self, EngineError> {
        Self::with_cache(model, capacity, CacheType::F32)
    }

    fn with_cache(
        model: &'a dyn LanguageModel,
        capacity: usize,
        cache_type: CacheType,
    ) -> Result<Self, EngineError> {
        let capacity = capacity.max(1);
        check_context(capacity, model)?;
        let num_blocks = capacity.div_ceil(BLOCK_SIZE);
        let cache = model.create_cache(num_blocks, BLOCK_SIZE, cache_type)?;
        let mut table = BlockTable::new();
        BlockManager::new(num_blocks, BLOCK_SIZE)
            .reserve(&mut table, 0, capacity, &mut Vec::new())
            .expect("the pool is as large as the table");
        Ok(Self { model, cache, table, capacity })
    }

    /// Reads `tokens` from an empty cache. Logits are wanted after each position from
    /// `first_output` on.
    fn stream<'r>(&'r self, tokens: &'r [u32], first_output: usize) -> LogitStream<'r> {
        LogitStream { reader: self, tokens, position: 0, first_output, go_on: &|| true }
    }
}

/// Logits of one sequence, pulled a few rows at a time.
struct LogitStream<'r> {
    reader: &'r Reader<'r>,
    tokens: &'r [u32],
    position: usize,
    first_output: usize,
    go_on: GoOn<'r>,
}

impl LogitStream<'_> {
    /// The next rows `[n, vocab_size]` and the position of the first of them; `None` at the end.
    fn next(&mut self) -> Result<Option<(usize, Vec<f32>)>, EngineError> {
        let Reader { model, cache, table, capacity } = self.reader;
        while self.position < self.tokens.len() {
            check_wanted(self.go_on)?;
            let start = self.position;
            let silent = self.first_output.saturating_sub(start);
            let (most, outputs) = rows_per_pass(model.vocab_size());
            let size = if silent > 0 { silent.min(most) } else { outputs };
            let end = (start + size).min(self.tokens.len());
            let outputs = if silent > 0 { 0 } else { end - start };
            let mut batch = Batch::new(BLOCK_SIZE);
            let chunk = &self.tokens[start..end];
            batch.push(chunk, start, table.blocks(), *capacity as u32, outputs);
            let logits = model.forward(&batch, cache)?;
            self.position = end;
            if outputs > 0 {
                return Ok(Some((start, model.download(&logits)?)));
            }
        }
        Ok(None)
    }
}

/// Most rows of a forward pass, and most of which logits are asked: as many as fit `LOGIT_BYTES`, 64 MiB.
pub fn rows_per_pass(vocab_size: usize) -> (usize, usize) {
    (CHUNK, (LOGIT_BYTES / (4 * vocab_size.max(1))).clamp(1, CHUNK))
}

/// Asked before each forward pass: false ends the work with [`EngineError::Stopped`].
pub type GoOn<'a> = &'a dyn Fn() -> bool;

fn check_wanted(go_on: GoOn) -> Result<(), EngineError> {
    if go_on() { Ok(()) } else { Err(EngineError::Stopped) }
}

/// Checks that a sequence of `tokens` fits the model's context.
fn check_context(tokens: usize, model: &dyn LanguageModel) -> Result<(), EngineError> {
    let max_context = model.max_context();
    if tokens > max_context {
        return Err(EngineError::TextTooLong { tokens, max_context });
    }
    Ok(())
}

/// Checks that `tokens` are in the model's vocabulary.
fn check_tokens(
    field: &'static str,
    tokens: &[u32],
    model: &dyn LanguageModel,
) -> Result<(), EngineError> {
    let vocab_size = model.vocab_size();
    match tokens.iter().find(|&&t| t as usize >= vocab_size) {
        Some(&token) => Err(EngineError::UnknownToken { field, token, vocab_size }),
        None => Ok(()),
    }
}

/// Fails when a row of logits is not finite; such a row would otherwise average into a plausible figure.
fn check_row(row: &[f32], position: usize) -> Result<(), EngineError> {
    match crate::sampler::first_not_finite(row) {
        Some(token) => {
            Err(EngineError::Logits { step: position, position, token, value: row[token] })
        }
        None => Ok(()),
    }
}
