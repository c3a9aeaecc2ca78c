//! Which tokens run next.
//!
//! Every step runs the next token of each sequence that is decoding, oldest first, and up to
//! `prefill_chunk` prompt tokens, given first to the prompts that waited longest: a long prompt
//! delays the others by one chunk, never by its whole length. A sequence is admitted only when its
//! tokens fit the pool with a block to spare for each running one, and owns their blocks from then
//! on, so only decoding can run out. Then the youngest sequence loses its blocks and later
//! recomputes; the oldest always advances, so every request ends.

use crate::sequence::Sequence;
use crate::{BlockManager, BlockTable, SequenceId};
use std::collections::BTreeMap;

/// Consecutive tokens of one sequence to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub id: SequenceId,
    pub tokens: usize,
}

/// One step.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub chunks: Vec<Chunk>,
    /// Block copies to make first.
    pub copies: Vec<(u32, u32)>,
}

/// Owns every unfinished sequence.
#[derive(Debug)]
pub(crate) struct Scheduler {
    waiting: BTreeMap<SequenceId, Sequence>,
    running: BTreeMap<SequenceId, Sequence>,
    prefill_chunk: usize,
    max_batch: usize,
    step: u64,
    preemptions: u64,
}

impl Scheduler {
    pub fn new(prefill_chunk: usize, max_batch: usize) -> Self {
        Self {
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            prefill_chunk,
            max_batch,
            step: 0,
            preemptions: 0,
        }
    }

    pub fn add(&mut self, id: SequenceId, sequence: Sequence) {
        self.waiting.insert(id, sequence);
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    pub fn running(&self, id: SequenceId) -> &Sequence {
        &self.running[&id]
    }

    pub fn running_mut(&mut self, id: SequenceId) -> &mut Sequence {
        self.running.get_mut(&id).expect("planned sequences are running")
    }

    /// Takes a sequence out and frees its blocks.
    pub fn remove(&mut self, id: SequenceId, blocks: &mut BlockManager) -> Option<Sequence> {
        let mut sequence = self.running.remove(&id).or_else(|| self.waiting.remove(&id))?;
        blocks.release(std::mem::take(&mut sequence.table));
        Some(sequence)
    }

    pub fn schedule(&mut self, blocks: &mut BlockManager) -> Plan {
        self.step += 1;
        let mut plan = Plan::default();
        let before = self.preemptions;
        self.plan_decode(blocks, &mut plan);
        if self.preemptions == before {
            self.admit(blocks, &mut plan);
        }
        self.plan_prefill(&mut plan);
        plan
    }

    fn plan_decode(&mut self, blocks: &mut BlockManager, plan: &mut Plan) {
        let decoding: Vec<_> =
            self.running.iter().filter(|(_, s)| s.uncached() == 1).map(|(&id, _)| id).collect();
        for id in decoding {
            // Victims are younger than what is planned already, so a plan is never taken back.
            while let Some(s) = self.running.get_mut(&id) {
                let (written, tokens) = (s.cached, s.tokens.len());
                if blocks.reserve(&mut s.table, written, tokens, &mut plan.copies).is_ok() {
                    plan.chunks.push(Chunk { id, tokens: 1 });
                    break;
                }
                self.preempt_youngest(blocks);
            }
        }
    }

    fn preempt_youngest(&mut self, blocks: &mut BlockManager) {
        let (id, mut sequence) = self.running.pop_last().expect("someone asked for a block");
        blocks.release(std::mem::replace(&mut sequence.table, BlockTable::new()));
        sequence.cached = 0;
        self.waiting.insert(id, sequence);
        self.preemptions += 1;
    }

    fn admit(&mut self, blocks: &mut BlockManager, plan: &mut Plan) {
        while self.running.len() < self.max_batch
            && let Some(entry) = self.waiting.first_entry()
        {
            let tokens = entry.get().tokens.len();
            if blocks.blocks_for(tokens) + self.running.len() > blocks.num_free() {
                break;
            }
            let (id, mut sequence) = entry.remove_entry();
            blocks
                .reserve(&mut sequence.table, 0, tokens, &mut plan.copies)
                .expect("free blocks were counted");
            sequence.last_step = 0;
            self.running.insert(id, sequence);
        }
    }

    fn plan_prefill(&mut self, plan: &mut Plan) {
        let mut budget = self.prefill_chunk;
        let planned: Vec<_> = plan.chunks.iter().map(|c| c.id).collect();
        let mut prefilling: Vec<_> =
            self.running.iter_mut().filter(|(id, _)| planned.binary_search(id).is_err()).collect();
        prefilling.sort_by_key(|(id, s)| (s.last_step, **id));
        for (&id, s) in prefilling {
            let tokens = s.uncached().min(budget);
            if tokens == 0 {
                break;
            }
            budget -= tokens;
            s.last_step = self.step;
            plan.chunks.push(Chunk { id, tokens });
        }
    }
}
