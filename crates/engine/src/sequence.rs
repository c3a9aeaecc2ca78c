//! One request on its way through the engine.

use crate::{BlockTable, SampleContext, TokenCounts, ValidRequest};
use std::fmt;

/// Names a request; later requests have larger ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub(crate) u64);

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Tokens of one request and how far the cache has come.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// Prompt, then answer.
    pub tokens: Vec<u32>,
    pub request: ValidRequest,
    /// Leading tokens whose keys and values are in the cache.
    pub cached: usize,
    pub table: BlockTable,
    /// Scheduler step that last read a chunk of this prompt.
    pub last_step: u64,
    counts: TokenCounts,
}

impl Sequence {
    pub fn new(request: ValidRequest) -> Self {
        let tokens = request.prompt.clone();
        let counts = TokenCounts::new(&tokens, &request.sampling);
        Self { tokens, request, cached: 0, table: BlockTable::new(), last_step: 0, counts }
    }

    pub fn prompt_len(&self) -> usize {
        self.request.prompt.len()
    }

    /// Tokens generated so far.
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_len()
    }

    /// Tokens still to be run before the next one can be chosen.
    pub fn uncached(&self) -> usize {
        self.tokens.len() - self.cached
    }

    /// Most tokens it can ever hold.
    pub fn max_context(&self) -> usize {
        self.prompt_len() + self.request.max_tokens
    }

    pub fn push(&mut self, token: u32) {
        self.tokens.push(token);
        self.counts.push(token);
    }

    pub fn is_stop(&self, token: u32) -> bool {
        self.request.stop_tokens.binary_search(&token).is_ok()
    }

    /// What the sampler may know.
    pub fn sample_context(&self) -> SampleContext<'_> {
        let early = self.generated() < self.request.min_tokens;
        SampleContext {
            tokens: &self.tokens,
            prompt_len: self.prompt_len(),
            counts: &self.counts,
            banned: if early { &self.request.stop_tokens } else { &[] },
        }
    }
}
