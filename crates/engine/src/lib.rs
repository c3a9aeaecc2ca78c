//! Sequences in, tokens out.
//!
//! ```text
//! Request ── Limits::validate ──► ValidRequest ── Engine::submit ──► waiting
//!                                                                      │ Scheduler: blocks, token budget
//! Event ◄── Sampler ◄── logits ◄── LanguageModel::forward ◄── Batch ◄──┘
//! ```
//!
//! * [`Engine`]: one thread owns it and calls [`Engine::step`]; every step is one forward pass over
//!   the next token of all decoding sequences and a chunk of the prompts still being read.
//! * [`BlockManager`], [`BlockTable`]: who owns which block of the paged cache.
//! * [`Sampler`], [`SamplingParams`]: logits to a token, a pure function of the logits, the
//!   parameters, the sequence's own tokens, the seed and the position. What else is in the batch,
//!   how a prompt was chunked, or whether a sequence was preempted cannot change its tokens.
//! * [`GenerationConfig`]: defaults from `generation_config.json`.
//! * [`evaluate`]: perplexity, KL divergence, raw logits, multiple choice.
//! * [`profile`]: the time of every operator, as a table and as a trace.
//!
//! Everything goes through [`LanguageModel`], so the tests here need no weights. No text, no
//! threads, no clock but the profiler's: stop strings, streams and deadlines belong to the layers above.

mod block_manager;
mod cache_events;
mod engine;
mod error;
pub mod evaluate;
mod generation_config;
mod model;
mod prefix_cache;
pub mod profile;
mod request;
mod sampler;
mod scheduler;
mod sequence;

pub use block_manager::{BlockManager, BlockTable, OutOfBlocks};
pub use cache_events::CacheEvent;
pub use engine::{Engine, EngineOptions, Event, FinishReason, Stats, Usage};
pub use error::EngineError;
pub use generation_config::GenerationConfig;
pub use model::LanguageModel;
pub use request::{Limits, Request, ValidRequest};
pub use sampler::{
    Constraint, Dry, SampleContext, Sampled, Sampler, SamplingOptions, SamplingParams, TokenCounts,
    TokenLogprobs, Xtc,
};
pub use sequence::SequenceId;
