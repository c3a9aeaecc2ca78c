//! The loop: plan, run, sample, report.

use crate::scheduler::{Plan, Scheduler};
use crate::sequence::Sequence;
use crate::{
    BlockManager, EngineError, LanguageModel, Limits, Sampled, Sampler, SequenceId, TokenLogprobs,
    ValidRequest,
};
use marlin_tensor::{Batch, Cache, DType};
use std::sync::Arc;

/// Sizes of an [`Engine`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineOptions {
    /// Tokens per cache block.
    pub block_size: usize,
    /// Most tokens of one sequence; `None` takes the model's.
    pub max_context: Option<usize>,
    /// Blocks in the pool; `None` takes what one sequence of `max_context` tokens needs.
    pub num_blocks: Option<usize>,
    /// Element type of the cache.
    pub cache_dtype: DType,
    /// Most prompt tokens read per step.
    pub prefill_chunk: usize,
    /// Most sequences running at once.
    pub max_batch: usize,
}

impl Default for EngineOptions {
    /// One sequence of the model's full context, f16 cache.
    fn default() -> Self {
        Self {
            block_size: 16,
            max_context: None,
            num_blocks: None,
            cache_dtype: DType::F16,
            prefill_chunk: 512,
            max_batch: 1,
        }
    }
}

/// Something that happened to a sequence.
#[derive(Debug, Clone)]
pub enum Event {
    /// A token of the answer. Stop tokens are not reported here.
    Token {
        /// Whose.
        id: SequenceId,
        /// The token.
        token: u32,
        /// Present when the request asked for it.
        logprob: Option<TokenLogprobs>,
    },
    /// The last event of a sequence.
    Finished {
        /// Whose.
        id: SequenceId,
        /// Why.
        reason: FinishReason,
        /// Tokens it took.
        usage: Usage,
    },
}

/// Why a sequence ended.
#[derive(Debug, Clone)]
pub enum FinishReason {
    /// The model chose this stop token.
    Stop(u32),
    /// `max_tokens` were generated, or the context is full.
    Length,
    /// [`Engine::cancel`] was called.
    Cancelled,
    /// Its forward pass or its logits failed.
    Error(Arc<EngineError>),
}

/// Tokens a sequence took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens chosen, a final stop token included.
    pub completion_tokens: usize,
}

/// Runs any number of sequences over one model and one paged cache. Synchronous: one thread owns
/// it, and nothing happens between calls of [`step`](Self::step).
pub struct Engine {
    model: Arc<dyn LanguageModel>,
    cache: Cache,
    blocks: BlockManager,
    scheduler: Scheduler,
    sampler: Sampler,
    limits: Limits,
    next_id: u64,
    cancelled: Vec<Event>,
}

impl Engine {
    /// Allocates the cache.
    ///
    /// # Errors
    /// When a size is zero, the context is longer than the model's, the pool cannot hold one
    /// sequence of the context, or the device has no room.
    pub fn new(
        model: Arc<dyn LanguageModel>,
        options: &EngineOptions,
    ) -> Result<Self, EngineError> {
        for (field, value) in [
            ("block_size", options.block_size),
            ("prefill_chunk", options.prefill_chunk),
            ("max_batch", options.max_batch),
        ] {
            crate::error::check(field, value, value > 0, "at least 1")?;
        }
        let max_context = options.max_context.unwrap_or(model.max_context());
        if max_context < 2 || max_context > model.max_context() {
            return Err(EngineError::Parameter {
                field: "max_context",
                expected: "2 to the model's context",
                found: format!("{max_context} with a model of {}", model.max_context()),
            });
        }
        let one_sequence = max_context.div_ceil(options.block_size);
        let num_blocks = options.num_blocks.unwrap_or(one_sequence);
        if num_blocks < one_sequence || num_blocks > u32::MAX as usize / options.block_size {
            return Err(EngineError::Parameter {
                field: "num_blocks",
                expected: "room for one sequence of max_context tokens, and slots that fit 32 bits",
                found: format!("{num_blocks} where one sequence takes {one_sequence}"),
            });
        }
        let cache = model.create_cache(num_blocks, options.block_size, options.cache_dtype)?;
        Ok(Self {
            cache,
            blocks: BlockManager::new(num_blocks, options.block_size),
            scheduler: Scheduler::new(options.prefill_chunk, options.max_batch),
            sampler: Sampler::new(),
            limits: Limits { vocab_size: model.vocab_size(), max_context },
            next_id: 0,
            cancelled: Vec::new(),
            model,
        })
    }

    /// What requests must respect.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The paged cache, for its shape and bytes.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Blocks of the pool that no sequence owns.
    pub fn free_blocks(&self) -> usize {
        self.blocks.num_free()
    }

    /// Times a sequence lost its blocks to an older one and had to be computed again.
    pub fn preemptions(&self) -> u64 {
        self.scheduler.preemptions()
    }

    /// Whether [`step`](Self::step) has nothing to do.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_empty() && self.cancelled.is_empty()
    }

    /// Queues a request made with [`limits`](Self::limits).
    pub fn submit(&mut self, request: ValidRequest) -> SequenceId {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.scheduler.add(id, Sequence::new(request));
        id
    }

    /// Frees a sequence's blocks at once; the next step reports it. False when it has ended before.
    pub fn cancel(&mut self, id: SequenceId) -> bool {
        let event = self.finish(id, FinishReason::Cancelled);
        let found = event.is_some();
        self.cancelled.extend(event);
        found
    }

    /// Runs one forward pass and reports what came of it. A failure ends the sequences it
    /// concerns, never the engine.
    pub fn step(&mut self) -> Vec<Event> {
        let mut events = std::mem::take(&mut self.cancelled);
        let plan = self.scheduler.schedule(&mut self.blocks);
        if plan.chunks.is_empty() {
            return events;
        }
        match self.forward(&plan) {
            Ok(logits) => self.advance(&plan, &logits, &mut events),
            Err(error) => {
                let error = Arc::new(error);
                for chunk in &plan.chunks {
                    events.extend(self.finish(chunk.id, FinishReason::Error(error.clone())));
                }
            }
        }
        events
    }

    /// Logits of the sequences in `plan` whose last token is in it, in order.
    fn forward(&self, plan: &Plan) -> Result<Vec<f32>, EngineError> {
        let mut batch = Batch::new(self.blocks.block_size());
        for chunk in &plan.chunks {
            let s = self.scheduler.running(chunk.id);
            let tokens = &s.tokens[s.cached..s.cached + chunk.tokens];
            let outputs = usize::from(chunk.tokens == s.uncached());
            batch.push(tokens, s.cached, s.table.blocks(), s.max_context() as u32, outputs);
        }
        if !plan.copies.is_empty() {
            self.model.copy_blocks(&self.cache, &plan.copies)?;
        }
        let logits = self.model.forward(&batch, &self.cache)?;
        if batch.output_rows.is_empty() {
            return Ok(Vec::new());
        }
        self.model.download(&logits)
    }

    fn advance(&mut self, plan: &Plan, logits: &[f32], events: &mut Vec<Event>) {
        let mut rows = logits.chunks_exact(self.limits.vocab_size);
        for chunk in &plan.chunks {
            let s = self.scheduler.running_mut(chunk.id);
            s.cached += chunk.tokens;
            if s.uncached() > 0 {
                continue;
            }
            let row = rows.next().expect("forward gives a row per output");
            let id = chunk.id;
            match self.sampler.sample(row, &s.request.sampling, &s.sample_context()) {
                Err(error) => events.extend(self.finish(id, FinishReason::Error(error.into()))),
                Ok(sampled) => {
                    s.push(sampled.token);
                    if s.is_stop(sampled.token) {
                        events.extend(self.finish(id, FinishReason::Stop(sampled.token)));
                        continue;
                    }
                    let full = s.tokens.len() == s.max_context();
                    let Sampled { token, logprob } = sampled;
                    events.push(Event::Token { id, token, logprob });
                    if full {
                        events.extend(self.finish(id, FinishReason::Length));
                    }
                }
            }
        }
    }

    fn finish(&mut self, id: SequenceId, reason: FinishReason) -> Option<Event> {
        let sequence = self.scheduler.remove(id, &mut self.blocks)?;
        let usage =
            Usage { prompt_tokens: sequence.prompt_len(), completion_tokens: sequence.generated() };
        Some(Event::Finished { id, reason, usage })
    }
}
