//! Which blocks hold which text, so that a prompt that begins like an earlier one is not computed again.
//!
//! A full block is known by its tokens and by the block before it, down to a root: tokens are compared,
//! not only hashed, so two texts never share by accident. Roots are named, so that those who must not learn from
//! the speed of an answer what others have asked share nothing. A block that nobody owns stays until
//! its room is needed; of these the one that was used longest ago goes first, and a block before those that follow it last.

use crate::CacheEvent;
use crate::cache_events::Record;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// What comes before a block.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Before {
    /// Nothing; texts of different roots share nothing.
    Root(Option<Arc<str>>),
    /// The block that was given this number, never to be given again; and what [`CacheEvent`]s call it, if they are recorded.
    Block { number: u64, hash: u64 },
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    before: Before,
    tokens: Box<[u32]>,
}

#[derive(Debug)]
struct Known {
    key: Key,
    number: u64,
    hash: u64,
    /// When it lost its last owner; none while it has one.
    idle_since: Option<u64>,
}

/// Full blocks by their text.
#[derive(Debug)]
pub(crate) struct PrefixCache {
    blocks: HashMap<Key, u32>,
    known: Vec<Option<Known>>,
    idle: BTreeMap<u64, u32>,
    numbers: u64,
    clock: u64,
    /// What changes, for whoever wants to be told.
    record: Option<Record>,
}

impl PrefixCache {
    pub fn new(num_blocks: usize) -> Self {
        let known = (0..num_blocks).map(|_| None).collect();
        let (blocks, idle) = Default::default();
        Self { blocks, known, idle, numbers: 0, clock: 0, record: None }
    }

    /// Records what changes from now on, of a model of this name.
    pub fn record(&mut self, model: &str) {
        self.record = Some(Record::new(model));
    }

    /// What has changed since the last call.
    pub fn take_events(&mut self) -> Vec<CacheEvent> {
        self.record.as_mut().map(Record::take).unwrap_or_default()
    }

    /// Known blocks that nobody owns.
    pub fn num_idle(&self) -> usize {
        self.idle.len()
    }

    /// The block that holds `tokens` behind `before`, and what a block behind it is known by.
    pub fn find(&self, before: &Before, tokens: &[u32]) -> Option<(u32, Before)> {
        let key = Key { before: before.clone(), tokens: tokens.into() };
        let block = *self.blocks.get(&key)?;
        let known = self.known[block as usize].as_ref()?;
        Some((block, Before::Block { number: known.number, hash: known.hash }))
    }

    /// Notes that `block` holds `tokens` behind `before`; returns what a block behind it is known by. Where
    /// another block holds the same, that one stays the known one.
    pub fn insert(&mut self, block: u32, before: Before, tokens: &[u32]) -> Before {
        if let Some((_, next)) = self.find(&before, tokens) {
            return next;
        }
        let number = self.numbers;
        self.numbers += 1;
        let mut hash = 0;
        if let Some(record) = &mut self.record {
            let (parent, root) = match &before {
                Before::Root(name) => (None, name.as_ref()),
                Before::Block { hash, .. } => (Some(*hash), None),
            };
            let behind = parent.unwrap_or_else(|| record.root(root.map(|name| &**name)));
            hash = Record::hash(behind, tokens);
            record.stored(hash, parent, tokens, root);
        }
        let key = Key { before, tokens: tokens.into() };
        self.blocks.insert(key.clone(), block);
        self.known[block as usize] = Some(Known { key, number, hash, idle_since: None });
        Before::Block { number, hash }
    }

    /// `block` has an owner again.
    pub fn wake(&mut self, block: u32) {
        if let Some(since) = self.known[block as usize].as_mut().and_then(|k| k.idle_since.take()) {
            self.idle.remove(&since);
        }
    }

    /// `block` has lost its last owner. False when nothing is known of it.
    pub fn rest(&mut self, block: u32) -> bool {
        let Some(known) = &mut self.known[block as usize] else { return false };
        self.clock += 1;
        known.idle_since = Some(self.clock);
        self.idle.insert(self.clock, block);
        true
    }

    /// Forgets the idle block that was used longest ago.
    pub fn evict(&mut self) -> Option<u32> {
        let (_, block) = self.idle.pop_first()?;
        if let Some(known) = self.known[block as usize].take() {
            self.blocks.remove(&known.key);
            if let Some(record) = &mut self.record {
                record.removed(known.hash);
            }
        }
        Some(block)
    }
}
