//! Logits to a token.
//!
//! The order, which is also the documented order of the parameters:
//!
//! 1. `repetition_penalty` (Keskar et al. 2019, as transformers and vLLM apply it): once for every
//!    distinct token of prompt and answer, `l / p` if `l > 0`, else `l * p`.
//! 2. `frequency_penalty`, `presence_penalty` (OpenAI): `l - n * frequency - presence` for tokens
//!    that occur `n > 0` times in the answer. The prompt does not count, unlike in llama.cpp.
//! 3. DRY, see [`Dry`].
//! 4. `logit_bias`, added; then stop tokens are banned while `min_tokens` are not reached, and what a
//!    [`Constraint`] forbids.
//! 5. `temperature`: 0 takes the largest logit, the lowest id among equals, and ends here;
//!    otherwise `l / t`.
//! 6. `top_k`: the k largest. 7. `top_p`: of those, the fewest whose share reaches p. 8. `min_p`:
//!    of those, the ones with at least p times the probability of the best (6-8 as transformers
//!    and vLLM order them, after the temperature; llama.cpp applies the temperature last).
//! 9. XTC, see [`Xtc`]. 10. One draw from what is left.
//!
//! The draw is a counter-based random number of `(seed, position)`, so a token depends on nothing
//! but its own sequence. Nothing sorts the vocabulary: candidates are selected in linear passes and
//! only what `top_k` keeps, and the tokens at the edge of `top_p`, are put in order. Sums of
//! probabilities are f64.

mod found;
#[cfg(test)]
mod golden;
mod lanes;
mod logprobs;
mod params;
mod penalty;
mod random;
mod select;

pub(crate) use lanes::{argmax, first_not_finite};
pub use logprobs::TokenLogprobs;
pub(crate) use logprobs::log_sum_exp;
pub use params::{Dry, SamplingOptions, SamplingParams, Xtc};
pub use penalty::TokenCounts;

use crate::EngineError;
use select::Candidate;
use std::fmt;

/// What the sampler may know of a sequence.
#[derive(Debug, Clone, Copy)]
pub struct SampleContext<'a> {
    /// Prompt and answer so far.
    pub tokens: &'a [u32],
    /// Leading tokens that are the prompt.
    pub prompt_len: usize,
    /// Occurrences in `tokens`.
    pub counts: &'a TokenCounts,
    /// Tokens that may not be chosen.
    pub banned: &'a [u32],
}

impl SampleContext<'_> {
    fn step(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }
}

/// What an answer has to look like, token by token: a grammar, for one.
pub trait Constraint: Send + Sync + fmt::Debug {
    /// Sets the logits of tokens that may not come next to negative infinity.
    ///
    /// # Errors
    /// When no token may come next, or it takes too long to find out.
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String>;

    /// `token` came next.
    ///
    /// # Errors
    /// When it was not allowed to.
    fn accept(&mut self, token: u32) -> Result<(), String>;

    /// Whether the answer is whole and nothing may follow.
    fn is_complete(&mut self) -> bool;

    /// The same, at the same place, for another answer.
    fn fork(&self) -> Box<dyn Constraint>;
}

impl Clone for Box<dyn Constraint> {
    fn clone(&self) -> Self {
        self.fork()
    }
}

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Present when [`SamplingOptions::logprobs`] asks for it.
    pub logprob: Option<TokenLogprobs>,
}

/// Reusable buffers; keeps no state between calls.
#[derive(Debug, Default)]
pub struct Sampler {
    adjusted: Vec<f32>,
    buffers: Buffers,
}

#[derive(Debug, Default)]
struct Buffers {
    weights: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// Empty buffers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Chooses the token after `context.tokens` from `logits: [vocab_size]`.
    ///
    /// # Errors
    /// When a logit is NaN or infinite, or bans leave nothing.
    pub fn sample(
        &mut self,
        logits: &[f32],
        params: &SamplingParams,
        context: &SampleContext<'_>,
    ) -> Result<Sampled, EngineError> {
        self.sample_within(logits, params, context, None)
    }

    /// [`sample`](Self::sample) of what `constraint` allows; does not tell it what was chosen.
    ///
    /// # Errors
    /// Those of [`sample`](Self::sample), and when the constraint fails.
    pub fn sample_within(
        &mut self,
        logits: &[f32],
        params: &SamplingParams,
        context: &SampleContext<'_>,
        constraint: Option<&mut Box<dyn Constraint>>,
    ) -> Result<Sampled, EngineError> {
        let step = context.step();
        if let Some(token) = first_not_finite(logits) {
            let position = context.tokens.len();
            return Err(EngineError::Logits { step, position, token, value: logits[token] });
        }
        let options = params.options();
        let adjusts = options.adjusts_logits() || !context.banned.is_empty();
        let chosen = if adjusts || constraint.is_some() {
            self.adjusted.clear();
            self.adjusted.extend_from_slice(logits);
            penalty::apply(&mut self.adjusted, options, context);
            if let Some(constraint) = constraint {
                let masked = constraint.mask(&mut self.adjusted);
                masked.map_err(|reason| EngineError::Constraint { step, reason })?;
            }
            self.buffers.choose(&self.adjusted, options, context.tokens.len() as u64)
        } else {
            self.buffers.choose(logits, options, context.tokens.len() as u64)
        };
        let token = chosen.ok_or(EngineError::NothingToSample { step })?;
        let logprob = options.logprobs.map(|top| {
            let candidates = &mut self.buffers.candidates;
            select::largest(logits, top, candidates);
            TokenLogprobs::new(logits, token, candidates)
        });
        Ok(Sampled { token, logprob })
    }
}

impl Buffers {
    /// Steps 5 to 10; `None` when every logit is negative infinity.
    fn choose(&mut self, logits: &[f32], options: &SamplingOptions, position: u64) -> Option<u32> {
        let best = argmax(logits);
        let max = logits[best];
        if max == f32::NEG_INFINITY {
            return None;
        }
        if options.temperature == 0.0 {
            return Some(best as u32);
        }
        let Self { weights, candidates } = self;
        let luck = Luck::new(options, position);
        if !options.truncates() && luck.xtc.is_none() {
            lanes::weigh(logits, max, options.temperature, weights);
            return Some(select::pick_from_all(weights, luck.draw));
        }
        select::truncate(logits, max, options, weights, candidates);
        Some(luck.pick(candidates))
    }
}

/// What chance decides at a position.
struct Luck {
    draw: f64,
    /// The rule, where it is followed.
    xtc: Option<Xtc>,
}

impl Luck {
    fn new(options: &SamplingOptions, position: u64) -> Self {
        let [draw, gate] = random::uniform(options.seed, position);
        Self { draw, xtc: options.xtc.filter(|xtc| gate < f64::from(xtc.probability)) }
    }

    /// Steps 9 and 10, of what truncation has kept.
    fn pick(&self, candidates: &mut Vec<Candidate>) -> u32 {
        if let Some(xtc) = self.xtc {
            select::exclude_top_choices(candidates, xtc.threshold);
        }
        select::pick(candidates, self.draw)
    }
}
