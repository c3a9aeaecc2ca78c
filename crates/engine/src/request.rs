//! A request as the caller writes it, and as the engine trusts it.

use crate::{Constraint, EngineError, SamplingParams};
use std::sync::Arc;

/// What to continue and how.
#[derive(Debug, Clone)]
pub struct Request {
    /// Token ids of the prompt, special tokens included.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Most tokens to generate; `None` goes on until the context is full.
    pub max_tokens: Option<usize>,
    /// Tokens before which no stop token may be chosen.
    pub min_tokens: usize,
    /// The model's end-of-text tokens.
    pub eos_tokens: Vec<u32>,
    /// Further tokens that end the answer.
    pub stop_tokens: Vec<u32>,
    /// Treat end-of-text tokens as any other; `stop_tokens` still stop.
    pub ignore_eos: bool,
    /// What the answer has to look like.
    pub constraint: Option<Box<dyn Constraint>>,
    /// Requests of a lower number go first, and may take the room of others.
    pub priority: i32,
    /// Prompts that begin alike are computed once for all requests of one name.
    pub cache_name: Option<Arc<str>>,
}

impl Request {
    /// Continues `prompt` until one of `eos_tokens` or the end of the context.
    pub fn new(prompt: Vec<u32>, sampling: SamplingParams, eos_tokens: Vec<u32>) -> Self {
        Self {
            prompt,
            sampling,
            max_tokens: None,
            min_tokens: 0,
            eos_tokens,
            stop_tokens: Vec::new(),
            ignore_eos: false,
            constraint: None,
            priority: 0,
            cache_name: None,
        }
    }
}

/// What a request must respect; cheap to copy, so requests are validated off the engine's thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Tokens one sequence may hold, prompt and answer.
    pub max_context: usize,
}

impl Limits {
    /// Checks `request` against the limits. Nothing is ever shortened to fit.
    ///
    /// # Errors
    /// When a token is unknown, the prompt is empty, or prompt and answer do not fit the context.
    pub fn validate(&self, request: Request) -> Result<ValidRequest, EngineError> {
        let Limits { vocab_size, max_context } = *self;
        let prompt_tokens = request.prompt.len();
        if prompt_tokens == 0 {
            return Err(EngineError::EmptyPrompt);
        }
        if prompt_tokens >= max_context {
            let max_tokens = request.max_tokens.unwrap_or(1).max(1);
            return Err(EngineError::PromptTooLong { prompt_tokens, max_tokens, max_context });
        }
        let room = max_context - prompt_tokens;
        let max_tokens = request.max_tokens.unwrap_or(room);
        if max_tokens > room {
            return Err(EngineError::ContextExceeded { prompt_tokens, max_tokens, max_context });
        }
        if max_tokens == 0 {
            return Err(EngineError::Parameter {
                field: "max_tokens",
                expected: "at least 1",
                found: "0".to_owned(),
            });
        }
        if request.min_tokens > max_tokens {
            return Err(EngineError::Parameter {
                field: "min_tokens",
                expected: "at most max_tokens",
                found: format!("{} with max_tokens {max_tokens}", request.min_tokens),
            });
        }
        let sampling = request.sampling.options();
        let biased: Vec<u32> = sampling.logit_bias.iter().map(|&(token, _)| token).collect();
        let breakers = sampling.dry.as_ref().map_or(&[][..], |dry| &dry.sequence_breakers);
        for (field, tokens) in [
            ("prompt", &request.prompt[..]),
            ("eos_token_id", &request.eos_tokens),
            ("stop_token_ids", &request.stop_tokens),
            ("logit_bias", &biased),
            ("dry_sequence_breakers", breakers),
        ] {
            if let Some(&token) = tokens.iter().find(|&&t| t as usize >= vocab_size) {
                return Err(EngineError::UnknownToken { field, token, vocab_size });
            }
        }
        let mut stop_tokens = request.stop_tokens;
        if !request.ignore_eos {
            stop_tokens.extend(request.eos_tokens);
        }
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
        Ok(ValidRequest {
            prompt: request.prompt,
            sampling: request.sampling,
            max_tokens,
            min_tokens: request.min_tokens,
            stop_tokens,
            constraint: request.constraint,
            priority: request.priority,
            cache_name: request.cache_name,
        })
    }
}

/// A request that fits; made by [`Limits::validate`] only.
#[derive(Debug, Clone)]
pub struct ValidRequest {
    pub(crate) constraint: Option<Box<dyn Constraint>>,
    pub(crate) priority: i32,
    pub(crate) cache_name: Option<Arc<str>>,
    pub(crate) prompt: Vec<u32>,
    pub(crate) sampling: SamplingParams,
    pub(crate) max_tokens: usize,
    pub(crate) min_tokens: usize,
    pub(crate) stop_tokens: Vec<u32>,
}

impl ValidRequest {
    /// Token ids of the prompt.
    pub fn prompt(&self) -> &[u32] {
        &self.prompt
    }

    /// Most tokens it may generate.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }
}
