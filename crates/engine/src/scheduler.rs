//! Which tokens run next.
//!
//! Every step runs the next token of each sequence that is decoding, first come first, and up to a budget of
//! prompt tokens, given first to the prompts that waited longest: a long prompt delays the others by one
//! chunk, never by its whole length. The budget is smaller while answers are under way, which
//! bounds the time between their tokens; while there are none, a step ends with the first prompt that does.
//!
//! A sequence is admitted when its tokens fit the pool with a block to spare for each running one, and owns their blocks from
//! then on. One that is large for the pool gets its blocks with the parts in which it is read, and one such at a time: it neither
//! waits for the whole of its room nor keeps room from others before it needs it. When it has waited for blocks for
//! some steps, nobody else is admitted until it has them. Another one that does not fit lets those behind it, of the same
//! priority, pass so many times and no more. Decoding can run out of blocks: then the last one in rank loses its own and
//! later recomputes; the first always advances, so every request ends. Rank is priority, then age.

use crate::sequence::Sequence;
use crate::{BlockManager, BlockTable, SequenceId, Usage};
use std::collections::{BTreeMap, HashMap};
use std::ops::Bound::{Excluded, Unbounded};

/// Tokens of prompts that are worth a step: few cost almost as much as these, since every weight is read.
const ENOUGH: usize = 128;

/// Steps that a prompt waits for blocks, and admissions that it lets pass, before nobody else is admitted.
const PATIENCE: usize = 16;
/// A sequence of more than this part of the pool is large.
const LARGE: usize = 8;
/// Those that do not fit before the search for one that does ends: each costs a look at the prefix cache.
const CANDIDATES: usize = 8;

/// Consecutive tokens of one sequence to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub id: SequenceId,
    pub tokens: usize,
    /// Tokens of the answer, not of the prompt.
    pub decode: bool,
}

/// One step.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Those of answers first.
    pub chunks: Vec<Chunk>,
    /// Block copies to make first.
    pub copies: Vec<(u32, u32)>,
}

/// Priority, then age.
type Rank = (i32, SequenceId);

/// Most tokens of prompts in a step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    /// While nothing else runs.
    pub alone: usize,
    /// While answers are under way.
    pub beside_answers: usize,
}

/// Owns every unfinished sequence.
#[derive(Debug)]
pub(crate) struct Scheduler {
    waiting: BTreeMap<Rank, Sequence>,
    running: BTreeMap<Rank, Sequence>,
    /// Of every sequence, and of the forks that wait in one for the end of its prompt.
    ranks: HashMap<SequenceId, Rank>,
    budget: Budget,
    max_batch: usize,
    step: u64,
    pub preemptions: u64,
}

impl Scheduler {
    pub fn new(budget: Budget, max_batch: usize) -> Self {
        let (waiting, running, ranks) = Default::default();
        Self { waiting, running, ranks, budget, max_batch, step: 0, preemptions: 0 }
    }

    pub fn add(&mut self, id: SequenceId, sequence: Sequence) {
        let rank = (sequence.request.priority, id);
        self.ranks.insert(id, rank);
        self.ranks.extend(sequence.forks.iter().map(|(fork, _)| (*fork, rank)));
        self.waiting.insert(rank, sequence);
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    pub fn running_mut(&mut self, id: SequenceId) -> &mut Sequence {
        self.running.get_mut(&self.ranks[&id]).expect("planned sequences are running")
    }

    /// Takes a sequence out and frees its blocks.
    pub fn remove(&mut self, id: SequenceId, blocks: &mut BlockManager) -> Option<Usage> {
        let rank = self.ranks.remove(&id)?;
        if rank.1 != id {
            // It has not come out of another one yet.
            let host = self.running.get_mut(&rank).or_else(|| self.waiting.get_mut(&rank))?;
            host.forks.retain(|(fork, _)| *fork != id);
            return Some(Usage { prompt_tokens: host.prompt_len(), ..Usage::default() });
        }
        let is_running = self.running.contains_key(&rank);
        let from = if is_running { &mut self.running } else { &mut self.waiting };
        let mut sequence = from.remove(&rank)?;
        let usage = Usage {
            prompt_tokens: sequence.prompt_len(),
            completion_tokens: sequence.generated(),
            cached_tokens: sequence.found.unwrap_or(0),
        };
        if sequence.forks.is_empty() {
            blocks.release(std::mem::take(&mut sequence.table));
            return Some(usage);
        }
        // The others still want their answers: the first of them goes on in its place.
        let (heir, sampling) = sequence.forks.remove(0);
        let table = std::mem::take(&mut sequence.table);
        let mut next = sequence.fork(sampling, table);
        next.forks = std::mem::take(&mut sequence.forks);
        let rank = (rank.0, heir);
        self.ranks.insert(heir, rank);
        self.ranks.extend(next.forks.iter().map(|(fork, _)| (*fork, rank)));
        from.insert(rank, next);
        Some(usage)
    }

    /// Lets the forks of `id`, whose prompt is in the cache, run by themselves.
    pub fn split(&mut self, id: SequenceId, blocks: &mut BlockManager) -> Vec<SequenceId> {
        let host = self.running_mut(id);
        let forks = std::mem::take(&mut host.forks);
        let ids = forks.iter().map(|(fork, _)| *fork).collect();
        for (fork, sampling) in forks {
            let host = self.running_mut(id);
            let table = blocks.share(&host.table, host.cached);
            let sequence = host.fork(sampling, table);
            let rank = (sequence.request.priority, fork);
            self.ranks.insert(fork, rank);
            self.running.insert(rank, sequence);
        }
        ids
    }

    pub fn schedule(&mut self, blocks: &mut BlockManager) -> Plan {
        self.step += 1;
        let mut plan = Plan::default();
        self.make_room(blocks);
        let before = self.preemptions;
        self.plan_decode(blocks, &mut plan);
        if self.preemptions == before {
            self.admit(blocks, &mut plan);
        }
        self.plan_prefill(blocks, &mut plan);
        plan.chunks.sort_by_key(|chunk| !chunk.decode);
        plan
    }

    fn plan_decode(&mut self, blocks: &mut BlockManager, plan: &mut Plan) {
        let decoding = self.running.iter().filter(|(_, s)| s.is_decoding());
        for rank in decoding.map(|(rank, _)| *rank).collect::<Vec<_>>() {
            // Victims rank behind what is planned already, so a plan is never taken back.
            while let Some(s) = self.running.get_mut(&rank) {
                let (written, tokens) = (s.cached, s.tokens.len());
                if blocks.reserve(&mut s.table, written, tokens, &mut plan.copies).is_ok() {
                    plan.chunks.push(Chunk { id: rank.1, tokens: 1, decode: true });
                    break;
                }
                self.preempt_last(blocks);
            }
        }
    }

    fn preempt_last(&mut self, blocks: &mut BlockManager) {
        let (rank, mut sequence) = self.running.pop_last().expect("someone asked for a block");
        blocks.release(std::mem::replace(&mut sequence.table, BlockTable::new()));
        sequence.cached = 0;
        self.waiting.insert(rank, sequence);
        self.preemptions += 1;
    }

    /// Lets those of a later priority wait for those of an earlier one.
    fn make_room(&mut self, blocks: &mut BlockManager) {
        while let Some((rank, sequence)) = self.waiting.first_key_value()
            && let Some((last, _)) = self.running.last_key_value()
            && last.0 > rank.0
        {
            let needed = blocks.blocks_for(sequence.tokens.len()) + self.running.len();
            if needed <= blocks.num_free() && self.answers() + sequence.answers() <= self.max_batch
            {
                break;
            }
            self.preempt_last(blocks);
        }
    }

    /// Answers under way.
    fn answers(&self) -> usize {
        self.running.values().map(Sequence::answers).sum()
    }

    fn admit(&mut self, blocks: &mut BlockManager, plan: &mut Plan) {
        if self.running.values().any(|s| s.passed >= PATIENCE) {
            return;
        }
        let mut blocked: Vec<Rank> = Vec::new();
        while blocked.len() < CANDIDATES
            && (self.running.is_empty() || self.answers() < self.max_batch)
            && let Some((&rank, sequence)) = self.after(blocked.last())
            && blocked.first().is_none_or(|first| first.0 == rank.0)
        {
            let is_alone = self.running.is_empty();
            let passed = sequence.passed;
            let fits = is_alone || self.answers() + sequence.answers() <= self.max_batch;
            if !(fits && self.start(rank, blocks, plan)) {
                blocked.push(rank);
                if passed >= PATIENCE {
                    return;
                }
            } else if !self.reads_in_parts(blocks) {
                // While another one is read in parts, it is not those behind them that they wait for.
                for rank in &blocked {
                    self.waiting.get_mut(rank).expect("it waits").passed += 1;
                }
                if blocked.iter().any(|rank| self.waiting[rank].passed >= PATIENCE) {
                    return;
                }
            }
        }
    }

    /// Whether a prompt is being read that has not got all its blocks.
    fn reads_in_parts(&self, blocks: &BlockManager) -> bool {
        self.running.values().any(|s| s.is_partial(blocks))
    }

    /// Lets the sequence at `rank` run if there is room for it, or for its first part if it is large and no other one is read so.
    fn start(&mut self, rank: Rank, blocks: &mut BlockManager, plan: &mut Plan) -> bool {
        let mut sequence = self.waiting.remove(&rank).expect("it waits");
        let mut table = blocks.prefix(sequence.request.cache_name.as_ref(), &sequence.tokens);
        let found = table.blocks().len() * blocks.block_size();
        let room = blocks.num_free() + table.blocks().len();
        let fits = |tokens| blocks.blocks_for(tokens) + self.running.len() <= room;
        let first_part = found + self.budget.alone;
        let is_large = |tokens| LARGE * blocks.blocks_for(tokens) > blocks.num_blocks();
        let tokens = match sequence.tokens.len() {
            all if all <= first_part || !is_large(all) => Some(all),
            _ if self.reads_in_parts(blocks) => None,
            _ => Some(first_part),
        };
        let tokens = match tokens {
            Some(tokens) if fits(tokens) => tokens,
            _ => {
                blocks.release(table);
                self.waiting.insert(rank, sequence);
                return false;
            }
        };
        let reserved = blocks.reserve(&mut table, found, tokens, &mut plan.copies);
        reserved.expect("free blocks were counted");
        sequence.table = table;
        sequence.cached = found;
        sequence.found.get_or_insert(found);
        sequence.last_step = 0;
        sequence.passed = 0;
        self.running.insert(rank, sequence);
        true
    }

    /// The first of those that wait, or the next one behind `last`.
    fn after(&self, last: Option<&Rank>) -> Option<(&Rank, &Sequence)> {
        match last {
            None => self.waiting.first_key_value(),
            Some(last) => self.waiting.range((Excluded(*last), Unbounded)).next(),
        }
    }

    fn plan_prefill(&mut self, blocks: &mut BlockManager, plan: &mut Plan) {
        let Budget { alone, beside_answers } = self.budget;
        let is_alone = plan.chunks.is_empty();
        let mut budget = if is_alone { alone } else { beside_answers };
        let others = self.running.len().saturating_sub(1);
        let mut reading: Vec<_> =
            self.running.iter_mut().filter(|(_, s)| !s.is_decoding()).collect();
        reading.sort_by_key(|(rank, s)| (s.last_step, **rank));
        for (rank, s) in reading {
            let decode = s.past_prompt();
            let left = if decode { s.uncached() } else { s.prompt_len() - s.cached };
            let tokens = left.min(budget);
            if tokens == 0 {
                break;
            }
            let (read, end) = (s.cached, s.cached + tokens);
            let missing = blocks.blocks_for(end).saturating_sub(s.table.blocks().len());
            if missing > 0 {
                if missing + others > blocks.num_free()
                    || blocks.reserve(&mut s.table, read, end, &mut plan.copies).is_err()
                {
                    s.passed += 1;
                    continue;
                }
                s.passed = 0;
            }
            budget -= tokens;
            s.last_step = self.step;
            plan.chunks.push(Chunk { id: rank.1, tokens, decode });
            // When many prompts come at once, the first have their answers begun without waiting for the last.
            if is_alone && tokens == left && alone - budget >= ENOUGH {
                break;
            }
        }
    }
}
