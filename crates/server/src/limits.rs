//! What requests may ask for, and what a model does for them at most.

use crate::runtime::QueueLimits;
use marlin_text::{GrammarLimits, RenderLimits};
use std::time::Duration;

/// How much of something one request may hold; more is refused with 400, by the field's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestLimits {
    /// Answers to one prompt, `n`.
    pub answers: usize,
    /// Prompts of a completion.
    pub prompts: usize,
    /// Stop strings, and bytes of one.
    pub stops: usize,
    /// See there.
    pub stop_bytes: usize,
    /// Entries of `logit_bias`.
    pub biases: usize,
    /// Likeliest tokens beside each one.
    pub top_logprobs: usize,
    /// Messages, or items of `/v1/responses`.
    pub messages: usize,
    /// Tools.
    pub tools: usize,
    /// Inputs of `/v1/embeddings`.
    pub inputs: usize,
    /// Depth of a schema, or of a tool.
    pub schema_depth: usize,
    /// Values in one.
    pub schema_values: usize,
}

impl Default for RequestLimits {
    fn default() -> Self {
        let GrammarLimits { max_depth, max_nodes, .. } = GrammarLimits::default();
        Self {
            answers: 16,
            prompts: 64,
            stops: 4,
            stop_bytes: 256,
            biases: 1024,
            top_logprobs: 20,
            messages: 4096,
            tools: 128,
            inputs: 2048,
            schema_depth: max_depth,
            schema_values: max_nodes,
        }
    }
}

/// What every model of a server does at most.
#[derive(Debug, Clone)]
pub struct ModelLimits {
    /// How much may wait.
    pub queue: QueueLimits,
    /// For the compilers of grammars, which all models share.
    pub grammars: GrammarLimits,
    /// Time for a template.
    pub template_time: Duration,
}

impl Default for ModelLimits {
    fn default() -> Self {
        Self {
            queue: QueueLimits::default(),
            grammars: GrammarLimits::default(),
            template_time: RenderLimits::default().max_time,
        }
    }
}
