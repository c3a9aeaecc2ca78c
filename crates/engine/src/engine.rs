//! The loop: plan, run, sample, report.

use crate::scheduler::{Budget, Plan, Scheduler};
use crate::sequence::Sequence;
use crate::{
    BlockManager, CacheEvent, EngineError, LanguageModel, Limits, Sampled, Sampler, SequenceId,
    TokenLogprobs, ValidRequest,
};
use marlin_tensor::{Batch, Cache, CacheType, Draw, Drawn, Tensor};
use std::borrow::Cow;
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
    pub cache_type: CacheType,
    /// Most prompt tokens read per step.
    pub prefill_chunk: usize,
    /// Most prompt tokens read per step while answers are under way: what they wait for between tokens.
    pub mixed_chunk: usize,
    /// Most answers under way at once.
    pub max_batch: usize,
    /// Keep what was computed for prompts that begin alike.
    pub prefix_cache: bool,
    /// Name of the model, if [`Engine::take_cache_events`] is to tell of its prefix cache.
    pub cache_events: Option<Arc<str>>,
}

impl Default for EngineOptions {
    /// One sequence of the model's full context, f16 cache.
    fn default() -> Self {
        Self {
            block_size: 16,
            max_context: None,
            num_blocks: None,
            cache_type: CacheType::F16,
            prefill_chunk: 512,
            mixed_chunk: 512,
            max_batch: 1,
            prefix_cache: true,
            cache_events: None,
        }
    }
}

impl EngineOptions {
    /// Most tokens of a sequence, and blocks of the pool, with a model whose context is `most` tokens.
    ///
    /// # Errors
    /// When a size is zero, the context is longer than the model's, or the pool cannot hold one sequence of it.
    pub fn sizes(&self, most: usize) -> Result<(usize, usize), EngineError> {
        for (field, value) in [
            ("block_size", self.block_size),
            ("prefill_chunk", self.prefill_chunk),
            ("mixed_chunk", self.mixed_chunk),
            ("max_batch", self.max_batch),
        ] {
            crate::error::check(field, value, value > 0, "at least 1")?;
        }
        let max_context = self.max_context.unwrap_or(most);
        if max_context < 2 || max_context > most {
            return Err(EngineError::Parameter {
                field: "max_context",
                expected: "2 to the model's context",
                found: format!("{max_context} with a model of {most}"),
            });
        }
        let one_sequence = max_context.div_ceil(self.block_size);
        let num_blocks = self.num_blocks.unwrap_or(one_sequence);
        if num_blocks < one_sequence || num_blocks > u32::MAX as usize / self.block_size {
            return Err(EngineError::Parameter {
                field: "num_blocks",
                expected: "room for one sequence of max_context tokens, and slots that fit 32 bits",
                found: format!("{num_blocks} where one sequence takes {one_sequence}"),
            });
        }
        Ok((max_context, num_blocks))
    }
}

/// Logits of a step, and what is chosen from them.
struct Logits {
    tensor: Tensor,
    /// How every token is chosen, in order, and which one the device has drawn.
    choices: std::vec::IntoIter<(Draw, Option<Drawn>)>,
    /// Rows that were copied, and their values.
    copied: Vec<u32>,
    values: Vec<f32>,
}

impl Logits {
    fn row(&mut self, model: &dyn LanguageModel, row: usize) -> Result<&[f32], EngineError> {
        let known = self.copied.iter().position(|&r| r as usize == row);
        let at = known.unwrap_or(self.copied.len());
        if known.is_none() {
            self.values.extend(model.download_rows(&self.tensor, &[row as u32])?);
            self.copied.push(row as u32);
        }
        let vocab = model.vocab_size();
        Ok(&self.values[at * vocab..(at + 1) * vocab])
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
    /// The answer is all that its constraint allows.
    Complete,
    /// `max_tokens` were generated, or the context is full.
    Length,
    /// [`Engine::cancel`] was called.
    Cancelled,
    /// Its forward pass or its logits failed.
    Error(Arc<EngineError>),
}

/// Tokens a sequence took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens chosen, a final stop token included.
    pub completion_tokens: usize,
    /// Tokens of the prompt that had been computed for an earlier one.
    pub cached_tokens: usize,
}

/// What an [`Engine`] is doing and has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences that own blocks.
    pub running: usize,
    /// Sequences that own none yet, or no longer.
    pub waiting: usize,
    /// Blocks of the pool.
    pub num_blocks: usize,
    /// Blocks that no sequence owns.
    pub free_blocks: usize,
    /// Times a sequence lost its blocks to another one and had to be computed again.
    pub preemptions: u64,
    /// Forward passes.
    pub steps: u64,
    /// Rows of forward passes that were tokens of prompts.
    pub prompt_rows: u64,
    /// Rows of forward passes that were tokens of answers.
    pub decode_rows: u64,
    /// Tokens of prompts that ended.
    pub prompt_tokens: u64,
    /// Those of them that had been computed for an earlier prompt.
    pub cached_tokens: u64,
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
    /// Sequences of whose prompts the last step read a part.
    reading: Vec<SequenceId>,
    /// Its counters; the rest is asked for when it is wanted.
    stats: Stats,
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
        let (max_context, num_blocks) = options.sizes(model.max_context())?;
        let cache = model.create_cache(num_blocks, options.block_size, options.cache_type)?;
        let blocks = BlockManager::new(num_blocks, options.block_size);
        let blocks = if options.prefix_cache { blocks } else { blocks.without_reuse() };
        let blocks = match &options.cache_events {
            Some(name) => blocks.recording(name),
            None => blocks,
        };
        let budget = Budget { alone: options.prefill_chunk, beside_answers: options.mixed_chunk };
        Ok(Self {
            cache,
            blocks,
            scheduler: Scheduler::new(budget, options.max_batch),
            sampler: Sampler::new(),
            limits: Limits { vocab_size: model.vocab_size(), max_context },
            next_id: 0,
            cancelled: Vec::new(),
            reading: Vec::new(),
            stats: Stats::default(),
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

    /// Times a sequence lost its blocks to another one and had to be computed again.
    pub fn preemptions(&self) -> u64 {
        self.scheduler.preemptions
    }

    /// What it is doing and has done.
    pub fn stats(&self) -> Stats {
        Stats {
            running: self.scheduler.num_running(),
            waiting: self.scheduler.num_waiting(),
            num_blocks: self.blocks.num_blocks(),
            free_blocks: self.blocks.num_free(),
            preemptions: self.scheduler.preemptions,
            ..self.stats
        }
    }

    /// Sequences of whose prompts the last step read a part: how long they waited is for those to say who have a clock.
    pub fn reading(&self) -> &[SequenceId] {
        &self.reading
    }

    /// What the prefix cache has learnt and forgotten since the last call. Whoever sets
    /// [`EngineOptions::cache_events`] asks after each step, or they pile up.
    pub fn take_cache_events(&mut self) -> Vec<CacheEvent> {
        self.blocks.take_events()
    }

    /// The model it runs.
    pub fn model(&self) -> &Arc<dyn LanguageModel> {
        &self.model
    }

    /// Whether [`step`](Self::step) has nothing to do.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_empty() && self.cancelled.is_empty()
    }

    /// Queues a request made with [`limits`](Self::limits).
    pub fn submit(&mut self, request: ValidRequest) -> SequenceId {
        self.submit_many(request, 1)[0]
    }

    /// Queues `n` answers to one prompt, which is computed once. Answer `i` is seeded with the request's
    /// seed plus `i`.
    ///
    /// # Panics
    /// When `n` is zero: a bug of the caller.
    pub fn submit_many(&mut self, request: ValidRequest, n: usize) -> Vec<SequenceId> {
        let ids: Vec<_> = (self.next_id..).take(n).map(SequenceId).collect();
        self.next_id += n as u64;
        let sampling = request.sampling.clone();
        let seed = sampling.options().seed;
        let mut sequence = Sequence::new(request);
        let forks = (1..).zip(&ids[1..]);
        sequence.forks =
            forks.map(|(i, id)| (*id, sampling.with_seed(seed.wrapping_add(i)))).collect();
        self.scheduler.add(ids[0], sequence);
        ids
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
        self.reading.clear();
        self.reading.extend(plan.chunks.iter().filter(|c| !c.decode).map(|c| c.id));
        if plan.chunks.is_empty() {
            return events;
        }
        match self.forward(&plan) {
            Ok(mut logits) => self.advance(&plan, &mut logits, &mut events),
            Err(error) => {
                let error = Arc::new(error);
                for chunk in &plan.chunks {
                    for id in self.scheduler.split(chunk.id, &mut self.blocks) {
                        events.extend(self.finish(id, FinishReason::Error(error.clone())));
                    }
                    events.extend(self.finish(chunk.id, FinishReason::Error(error.clone())));
                }
            }
        }
        events
    }

    /// Logits of the sequences in `plan` whose last token is in it, in order.
    fn forward(&mut self, plan: &Plan) -> Result<Logits, EngineError> {
        let mut batch = Batch::new(self.blocks.block_size());
        let mut draws = Vec::new();
        // Rows that a constraint has to see.
        let mut masked = Vec::new();
        for chunk in &plan.chunks {
            let s = self.scheduler.running_mut(chunk.id);
            let outputs = usize::from(chunk.tokens == s.uncached());
            if outputs > 0 {
                let row = batch.output_rows.len();
                draws.extend(s.draws(row));
                if s.request.constraint.is_some() {
                    masked.push(row as u32);
                }
            }
            let tokens = &s.tokens[s.cached..s.cached + chunk.tokens];
            let (table, limit) = (s.table.blocks(), s.max_context() as u32);
            match chunk.decode {
                true => batch.push_decode(tokens, s.cached, table, limit, outputs),
                false => batch.push(tokens, s.cached, table, limit, outputs),
            }
        }
        self.stats.steps += 1;
        let decode_rows = batch.decode_rows();
        self.stats.decode_rows += decode_rows as u64;
        self.stats.prompt_rows += (batch.rows() - decode_rows) as u64;
        if !plan.copies.is_empty() {
            self.model.copy_blocks(&self.cache, &plan.copies)?;
        }
        let logits = self.model.forward(&batch, &self.cache)?;
        self.choices(logits, draws, masked)
    }

    /// What the device draws, and the rows that it does not draw from.
    fn choices(
        &self,
        tensor: Tensor,
        draws: Vec<Draw>,
        masked: Vec<u32>,
    ) -> Result<Logits, EngineError> {
        let is_free = |draw: &&Draw| !masked.contains(&(draw.row as u32));
        let free: Cow<'_, [Draw]> = match masked.is_empty() {
            true => (&draws).into(),
            false => draws.iter().filter(is_free).cloned().collect(),
        };
        let drawn = match free.is_empty() {
            true => None,
            false => self.model.draw(&tensor, &free)?,
        };
        let (copied, values) = match (&drawn, tensor.rows) {
            (_, 0) => (Vec::new(), Vec::new()),
            (None, rows) => ((0..rows as u32).collect(), self.model.download(&tensor)?),
            (Some(_), _) if masked.is_empty() => (Vec::new(), Vec::new()),
            (Some(_), _) => (masked.clone(), self.model.download_rows(&tensor, &masked)?),
        };
        let mut drawn = drawn.unwrap_or_default().into_iter();
        let with = |draw: Draw| {
            let found = if is_free(&&draw) { drawn.next().flatten() } else { None };
            (draw, found)
        };
        let choices: Vec<_> = draws.into_iter().map(with).collect();
        Ok(Logits { tensor, choices: choices.into_iter(), copied, values })
    }

    fn advance(&mut self, plan: &Plan, logits: &mut Logits, events: &mut Vec<Event>) {
        for chunk in &plan.chunks {
            let s = self.scheduler.running_mut(chunk.id);
            s.cached += chunk.tokens;
            self.blocks.note(&mut s.table, &s.tokens[..s.cached]);
            if s.uncached() > 0 {
                continue;
            }
            let forks = self.scheduler.split(chunk.id, &mut self.blocks);
            for id in std::iter::once(chunk.id).chain(forks) {
                self.choose(id, logits, events);
            }
        }
    }

    /// The next token of `id`, of which everything else has been computed.
    fn choose(&mut self, id: SequenceId, logits: &mut Logits, events: &mut Vec<Event>) {
        let s = self.scheduler.running_mut(id);
        let sampled = match logits.choices.next() {
            Some((_, Some(drawn))) => Ok(Sampled::from(drawn)),
            Some((draw, None)) => logits.row(&*self.model, draw.row).and_then(|logits| {
                let mut constraint = s.request.constraint.take();
                let context = s.context();
                let sampled =
                    self.sampler.sample_within(logits, &draw, &context, constraint.as_mut());
                s.request.constraint = constraint;
                sampled
            }),
            None => unreachable!("a draw for every token that is chosen"),
        };
        let Sampled { token, logprob } = match sampled {
            Ok(sampled) => sampled,
            Err(error) => {
                return events.extend(self.finish(id, FinishReason::Error(error.into())));
            }
        };
        s.push(token);
        if s.is_stop(token) {
            return events.extend(self.finish(id, FinishReason::Stop(token)));
        }
        let full = s.tokens.len() == s.max_context();
        let step = s.generated() - 1;
        let accepted =
            s.request.constraint.as_mut().map(|c| c.accept(token).map(|()| c.is_complete()));
        events.push(Event::Token { id, token, logprob });
        let end = match accepted {
            Some(Err(reason)) => {
                Some(FinishReason::Error(EngineError::Constraint { step, reason }.into()))
            }
            Some(Ok(true)) => Some(FinishReason::Complete),
            _ if full => Some(FinishReason::Length),
            _ => None,
        };
        events.extend(end.and_then(|reason| self.finish(id, reason)));
    }

    fn finish(&mut self, id: SequenceId, reason: FinishReason) -> Option<Event> {
        let usage = self.scheduler.remove(id, &mut self.blocks)?;
        self.stats.prompt_tokens += usage.prompt_tokens as u64;
        self.stats.cached_tokens += usage.cached_tokens as u64;
        Some(Event::Finished { id, reason, usage })
    }
}
