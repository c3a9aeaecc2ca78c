//! Sequences in, tokens out.
//!
//! ```text
//! Request ── Limits::validate ──► ValidRequest ── Engine::submit ──► waiting
//!                                                                      │ Scheduler: blocks, token budget
//! Event ◄── Sampler ◄── logits ◄── LanguageModel::forward ◄── Batch ◄──┘
//! ```
//! * [`Sampler`], [`SamplingParams`]: logits to a token, a pure function of the logits, the
//!   parameters, the sequence's own tokens, the seed and the position. What else is in the batch,
//!   how a prompt was chunked, or whether a sequence was preempted cannot change its tokens.
//! * [`GenerationConfig`]: defaults from `generation_config.json`.

mod error;
mod generation_config;
mod sampler;

pub use error::EngineError;
pub use generation_config::GenerationConfig;
pub use sampler::{
    Dry, SampleContext, Sampled, Sampler, SamplingOptions, SamplingParams, TokenCounts,
    TokenLogprobs, Xtc,
};
