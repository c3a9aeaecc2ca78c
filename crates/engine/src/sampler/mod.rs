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
//! 9. XTC, see [`Xtc`]. 10. One draw from what is left, whose probabilities are walked by token.
//!
//! The draw is a counter-based random number of `(seed, position)`, so a token depends on nothing
//! but its own sequence. All that decides a token is written down as a [`Draw`], which a device that has the logits carries out itself; this
//! sampler does it where the host has them, and where a [`Constraint`] has its say. Nothing sorts the vocabulary: candidates are selected in linear passes and
//! only what `top_k` keeps, and the tokens at the edge of `top_p`, are put in order. Sums of
//! probabilities are f64.

#[cfg(test)]
mod device;
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
use marlin_tensor::{Draw, Drawn};
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
    /// Tokens of the answer so far.
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

impl From<Drawn> for Sampled {
    fn from(drawn: Drawn) -> Self {
        let logprob = drawn.logits.as_ref().map(TokenLogprobs::of_drawn);
        Self { token: drawn.token, logprob }
    }
}

impl SamplingParams {
    /// How the token after `context.tokens` is chosen from row `row` of logits.
    pub(crate) fn draw(&self, row: usize, context: &SampleContext<'_>) -> Draw {
        let options = self.options();
        let [uniform, gate] = random::uniform(options.seed, context.tokens.len() as u64);
        let xtc = options.xtc.filter(|xtc| gate < f64::from(xtc.probability));
        Draw {
            row,
            adjustments: penalty::adjustments(options, context),
            temperature: options.temperature,
            top_k: options.top_k,
            top_p: options.top_p,
            min_p: options.min_p,
            exclude: xtc.map(|xtc| xtc.threshold),
            uniform,
            logprobs: options.logprobs,
        }
    }
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
        self.sample_within(logits, &params.draw(0, context), context, None)
    }

    /// Carries out `draw` of what `constraint` allows; does not tell it what was chosen.
    ///
    /// # Errors
    /// Those of [`sample`](Self::sample), and when the constraint fails.
    pub(crate) fn sample_within(
        &mut self,
        logits: &[f32],
        draw: &Draw,
        context: &SampleContext<'_>,
        constraint: Option<&mut Box<dyn Constraint>>,
    ) -> Result<Sampled, EngineError> {
        let step = context.step();
        if let Some(token) = first_not_finite(logits) {
            let position = context.tokens.len();
            return Err(EngineError::Logits { step, position, token, value: logits[token] });
        }
        let chosen = if draw.adjustments.is_empty() && constraint.is_none() {
            self.buffers.choose(logits, draw)
        } else {
            self.adjusted.clear();
            self.adjusted.extend_from_slice(logits);
            penalty::apply(&mut self.adjusted, &draw.adjustments);
            if let Some(constraint) = constraint {
                let masked = constraint.mask(&mut self.adjusted);
                masked.map_err(|reason| EngineError::Constraint { step, reason })?;
            }
            self.buffers.choose(&self.adjusted, draw)
        };
        let token = chosen.ok_or(EngineError::NothingToSample { step })?;
        let logprob = draw.logprobs.map(|top| {
            let candidates = &mut self.buffers.candidates;
            select::largest(logits, top, candidates);
            TokenLogprobs::new(logits, token, candidates)
        });
        Ok(Sampled { token, logprob })
    }
}

impl Buffers {
    /// Steps 5 to 10; `None` when every logit is negative infinity.
    fn choose(&mut self, logits: &[f32], draw: &Draw) -> Option<u32> {
        let best = argmax(logits);
        let max = logits[best];
        if max == f32::NEG_INFINITY {
            return None;
        }
        if draw.temperature == 0.0 {
            return Some(best as u32);
        }
        let Self { weights, candidates } = self;
        if !select::truncates(draw) && draw.exclude.is_none() {
            lanes::weigh(logits, max, draw.temperature, weights);
            return Some(select::pick_from_all(weights, draw.uniform));
        }
        select::truncate(logits, max, draw, weights, candidates);
        if let Some(threshold) = draw.exclude {
            select::exclude_top_choices(candidates, threshold);
        }
        Some(select::pick(candidates, draw.uniform))
    }
}
