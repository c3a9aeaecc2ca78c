//! One request on its way through the engine.

use crate::{BlockManager, BlockTable, SampleContext, SamplingParams, TokenCounts, ValidRequest};
use marlin_tensor::Draw;
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
    /// How often others were admitted before it while it waited, or steps that it has waited for blocks since.
    pub passed: usize,
    /// Further answers to the same prompt, which begin where it ends: who, and how tokens are chosen.
    pub forks: Vec<(SequenceId, SamplingParams)>,
    /// Tokens of the prompt that were found in the cache when it was read first.
    pub found: Option<usize>,
    counts: TokenCounts,
}

impl Sequence {
    pub fn new(request: ValidRequest) -> Self {
        let tokens = request.prompt.clone();
        let counts = TokenCounts::new(&tokens, &request.sampling);
        Self {
            tokens,
            request,
            cached: 0,
            table: BlockTable::new(),
            last_step: 0,
            passed: 0,
            forks: Vec::new(),
            found: None,
            counts,
        }
    }

    /// A second answer to the prompt, of which nothing has been chosen yet, with a table of its own.
    pub fn fork(&self, sampling: SamplingParams, table: BlockTable) -> Self {
        let request = ValidRequest { sampling, ..self.request.clone() };
        let Self { cached, last_step, found, .. } = *self;
        Self { cached, last_step, found, table, ..Self::new(request) }
    }

    /// Answers it is or will become.
    pub fn answers(&self) -> usize {
        1 + self.forks.len()
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

    /// Whether the next token to run belongs to the answer. Prompt and answer are computed in ways of
    /// their own, also when the cache was lost, so that losing it changes nothing.
    pub fn past_prompt(&self) -> bool {
        self.cached >= self.prompt_len()
    }

    /// Whether one more token of the answer is all there is to run.
    pub fn is_decoding(&self) -> bool {
        self.past_prompt() && self.uncached() == 1
    }

    /// Whether it gets its blocks part by part, and has not got all.
    pub fn is_partial(&self, blocks: &BlockManager) -> bool {
        !self.is_decoding() && self.table.blocks().len() < blocks.blocks_for(self.tokens.len())
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

    /// How the next token is chosen from row `row` of logits, first of this answer, then of those that begin here.
    pub fn draws(&self, row: usize) -> impl Iterator<Item = Draw> {
        let forks = self.forks.iter().map(|(_, sampling)| sampling);
        let all = std::iter::once(&self.request.sampling).chain(forks);
        all.map(move |sampling| sampling.draw(row, &self.context()))
    }

    /// What the sampler may know.
    pub fn context(&self) -> SampleContext<'_> {
        let early = self.generated() < self.request.min_tokens;
        SampleContext {
            tokens: &self.tokens,
            prompt_len: self.prompt_len(),
            counts: &self.counts,
            banned: if early { &self.request.stop_tokens } else { &[] },
        }
    }
}
