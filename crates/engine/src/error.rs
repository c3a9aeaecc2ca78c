//! Everything that can go wrong between a request and its tokens.

use marlin_tensor::BackendError;
use std::error::Error;

/// Why a request, a step or an evaluation failed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A number is outside its range, or not a number.
    #[error("{field}: expected {expected}, found {found}")]
    Parameter {
        /// Field as the user writes it.
        field: &'static str,
        /// The accepted range.
        expected: &'static str,
        /// What was given.
        found: String,
    },
    /// A field of `generation_config.json` has the wrong type.
    #[error("generation_config.json: {field}: expected {expected}, found {found}")]
    GenerationConfig {
        /// Key in the file.
        field: String,
        /// Accepted types.
        expected: &'static str,
        /// The value there.
        found: String,
    },
    /// Nothing to continue.
    #[error("the prompt has no tokens; give at least one (usually the beginning-of-text token)")]
    EmptyPrompt,
    /// The prompt alone fills the context.
    #[error(
        "the context holds {max_context} tokens, the prompt has {prompt_tokens} and the answer is to have {max_tokens}; shorten the prompt or raise the context"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens asked for; one where nothing was said, which an answer has at least.
        max_tokens: usize,
        /// Tokens a sequence may hold.
        max_context: usize,
    },
    /// Prompt and answer together do not fit.
    #[error(
        "the context holds {max_context} tokens, the prompt has {prompt_tokens} and the answer is to have {max_tokens}; ask for a shorter answer, shorten the prompt or raise the context"
    )]
    ContextExceeded {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens asked for.
        max_tokens: usize,
        /// Tokens a sequence may hold.
        max_context: usize,
    },
    /// A text to evaluate does not fit.
    #[error("the text has {tokens} tokens, the model's context holds {max_context}; shorten it")]
    TextTooLong {
        /// Tokens of the text.
        tokens: usize,
        /// Tokens a sequence may hold.
        max_context: usize,
    },
    /// A token id the model does not have.
    #[error("{field}: token {token} is not in the vocabulary of {vocab_size} tokens")]
    UnknownToken {
        /// Field that names the token.
        field: &'static str,
        /// The id.
        token: u32,
        /// Ids are below this.
        vocab_size: usize,
    },
    /// The model produced NaN or infinity.
    #[error(
        "step {step}: the logit of token {token} is {value} at position {position}; the weights or a kernel are broken, try --device cpu and compare"
    )]
    Logits {
        /// Index of the answer's token that was being chosen, from 0.
        step: usize,
        /// Position in the sequence of the token that was being chosen.
        position: usize,
        /// First token with a bad logit.
        token: usize,
        /// The logit.
        value: f32,
    },
    /// Bans and penalties leave nothing to choose.
    #[error("step {step}: every token is banned; loosen logit_bias, min_tokens or the penalties")]
    NothingToSample {
        /// Index of the answer's token that was being chosen, from 0.
        step: usize,
    },
    /// What the answer has to look like leaves nothing to choose, or takes too long.
    #[error("step {step}: {reason}")]
    Constraint {
        /// Index of the answer's token that was being chosen, from 0.
        step: usize,
        /// Reason.
        reason: String,
    },
    /// The text is too short for what was asked of it.
    #[error("{what}: needs {needed} tokens, found {found}")]
    TooFewTokens {
        /// What was being evaluated.
        what: &'static str,
        /// Tokens needed.
        needed: usize,
        /// Tokens there.
        found: usize,
    },
    /// Two models cannot be compared.
    #[error(
        "the reference has a vocabulary of {reference} tokens, the model {model}; compare models with the same tokenizer"
    )]
    VocabularyMismatch {
        /// Vocabulary of the reference.
        reference: usize,
        /// Vocabulary of the model.
        model: usize,
    },
    /// Vectors of this model would mean nothing.
    #[error("pooling: {reason}")]
    Pooling {
        /// Why.
        reason: String,
    },
    /// The states of a text have no direction.
    #[error("the states of the text have length {length}; the weights or a kernel are broken")]
    Embedding {
        /// Length of their sum.
        length: f64,
    },
    /// One of several models that are compared is at fault.
    #[error("{name}: {error}")]
    InModel {
        /// As the user knows it.
        name: String,
        /// What is wrong with it.
        error: Box<EngineError>,
    },
    /// Whoever wanted it has left.
    #[error("stopped: nobody waits for it any more")]
    Stopped,
    /// The forward pass failed.
    #[error("forward pass: {0}")]
    Forward(#[source] Box<dyn Error + Send + Sync>),
    /// The cache could not be made or copied, or logits not read back.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// Checks a number against its range; NaN is in none.
pub(crate) fn check<T: PartialOrd + std::fmt::Display>(
    field: &'static str,
    value: T,
    ok: bool,
    expected: &'static str,
) -> Result<(), EngineError> {
    if ok {
        Ok(())
    } else {
        Err(EngineError::Parameter { field, expected, found: value.to_string() })
    }
}
