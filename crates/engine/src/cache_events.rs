//! What the prefix cache learns and forgets, told to those who choose between several engines by what each has
//! computed already.
//!
//! A block goes by a hash of its text down to the beginning, which is the same in every process that serves the same
//! model: a router that hears of the same hash from two of them hears of the same text. Inside, texts are
//! still compared by their tokens; a collision can mislead a router, never an answer.

use std::collections::HashMap;
use std::sync::Arc;

/// A change of what prompts are found in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheEvent {
    /// Blocks that follow each other are found from now on.
    Stored {
        /// The blocks, in order; none of them is 0.
        hashes: Vec<u64>,
        /// The block before the first; none where a text begins.
        parent: Option<u64>,
        /// Their tokens, as many in each.
        tokens: Vec<u32>,
        /// Where a text begins: the [`cache_name`](crate::Request::cache_name) that requests find it by.
        cache_name: Option<Arc<str>>,
    },
    /// Blocks are not found any more.
    Removed {
        /// The blocks.
        hashes: Vec<u64>,
    },
}

/// Between the parts of what a hash is of; no byte and no token.
const SEPARATOR: u64 = 1 << 40;

/// Events since they were last taken.
#[derive(Debug)]
pub(crate) struct Record {
    /// Hash of the name of the model.
    name: u64,
    /// Known blocks by hash. Two can hold one text, when that before it was given up and computed again.
    held: HashMap<u64, u32>,
    events: Vec<CacheEvent>,
}

impl Record {
    /// Nothing yet of the model `name`.
    pub fn new(name: &str) -> Self {
        Self { name: bytes(0, name), held: HashMap::new(), events: Vec::new() }
    }

    /// What texts of a root begin with.
    pub fn root(&self, cache_name: Option<&str>) -> u64 {
        match cache_name {
            None => self.name,
            Some(cache_name) => bytes(absorb(self.name, SEPARATOR), cache_name),
        }
    }

    /// Hash of the block that holds `tokens` behind `before`. Never 0, which readers take for no block.
    pub fn hash(before: u64, tokens: &[u32]) -> u64 {
        let start = absorb(before, SEPARATOR);
        tokens.iter().fold(start, |hash, &token| absorb(hash, u64::from(token))).max(1)
    }

    /// A block is known from now on.
    pub fn stored(
        &mut self,
        hash: u64,
        before: Option<u64>,
        text: &[u32],
        root: Option<&Arc<str>>,
    ) {
        let held = self.held.entry(hash).or_default();
        *held += 1;
        if *held > 1 {
            return;
        }
        if let Some(CacheEvent::Stored { hashes, tokens, .. }) = self.events.last_mut()
            && before.is_some()
            && hashes.last().copied() == before
        {
            hashes.push(hash);
            tokens.extend_from_slice(text);
            return;
        }
        self.events.push(CacheEvent::Stored {
            hashes: vec![hash],
            parent: before,
            tokens: text.to_vec(),
            cache_name: root.cloned(),
        });
    }

    /// A block that was known is no more.
    pub fn removed(&mut self, hash: u64) {
        let Some(held) = self.held.get_mut(&hash) else { return };
        *held -= 1;
        if *held > 0 {
            return;
        }
        self.held.remove(&hash);
        match self.events.last_mut() {
            Some(CacheEvent::Removed { hashes }) => hashes.push(hash),
            _ => self.events.push(CacheEvent::Removed { hashes: vec![hash] }),
        }
    }

    /// The events since the last call.
    pub fn take(&mut self) -> Vec<CacheEvent> {
        std::mem::take(&mut self.events)
    }
}

fn bytes(hash: u64, text: &str) -> u64 {
    text.bytes().fold(hash, |hash, byte| absorb(hash, u64::from(byte)))
}

/// The finalizer of splitmix64 over state and value: every bit of both reaches every bit of the result.
fn absorb(hash: u64, value: u64) -> u64 {
    let mut x = hash.rotate_left(23) ^ value.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Routers keep these from one version of the program to the next, and compare those of several machines.
    #[test]
    fn hashes_stay_what_they_are() {
        let record = Record::new("model");
        let other = Record::new("other");
        let root = record.root(None);
        let first = Record::hash(root, &[1, 2, 3, 4]);
        let second = Record::hash(first, &[5, 6, 7, 8]);
        // As a few lines of Python compute them.
        assert_eq!((first, second), (6_254_792_391_477_299_987, 11_368_751_995_967_220_414));
        let hashes = [
            first,
            second,
            Record::hash(root, &[5, 6, 7, 8]),
            Record::hash(root, &[1, 2, 3, 4, 5, 6, 7, 8]),
            Record::hash(root, &[4, 3, 2, 1]),
            Record::hash(record.root(Some("tenant")), &[1, 2, 3, 4]),
            Record::hash(record.root(Some("")), &[1, 2, 3, 4]),
            Record::hash(other.root(None), &[1, 2, 3, 4]),
        ];
        let different: std::collections::HashSet<u64> = hashes.into();
        assert_eq!(different.len(), hashes.len());
    }

    /// A text in two blocks is there until both are gone.
    #[test]
    fn events_are_of_texts_not_of_blocks() {
        let mut record = Record::new("model");
        let first = Record::hash(record.root(None), &[1]);
        let second = Record::hash(first, &[2]);
        record.stored(first, None, &[1], None);
        record.stored(second, Some(first), &[2], None);
        record.stored(second, Some(first), &[2], None);
        record.removed(second);
        let stored = CacheEvent::Stored {
            hashes: vec![first, second],
            parent: None,
            tokens: vec![1, 2],
            cache_name: None,
        };
        assert_eq!(record.take(), [stored]);
        record.removed(second);
        record.removed(first);
        record.removed(first);
        assert_eq!(record.take(), [CacheEvent::Removed { hashes: vec![second, first] }]);
        assert!(record.held.is_empty());
    }
}
