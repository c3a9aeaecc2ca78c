//! The merge loop that byte-pair encoding and SentencePiece share.
//!
//! A text starts as a chain of small symbols; the best mergeable pair of neighbours becomes one
//! symbol until no pair can merge. A heap holds the candidate pairs, and a pair that a later merge
//! has overtaken is recognized by its length, so a word of `n` bytes costs `O(n log n)` whatever it
//! is made of.

use std::collections::BinaryHeap;

const NONE: u32 = u32::MAX;

/// A run of bytes of the word.
#[derive(Debug, Clone, Copy)]
pub(super) struct Symbol {
    pub start: u32,
    /// 0 once it was merged into its left neighbour.
    pub length: u32,
    /// Token of these bytes, or `None`.
    pub id: Option<u32>,
    previous: u32,
    next: u32,
}

/// A pair of neighbours that may merge; the greatest is merged first.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate<P> {
    priority: P,
    /// Of equal priorities the leftmost wins.
    left: std::cmp::Reverse<u32>,
    right: u32,
    length: u32,
    merged: u32,
}

/// Which neighbours merge.
pub(super) trait Merges {
    /// Larger merges earlier.
    type Priority: Ord;

    /// Priority and token of the merged pair, or `None`. `bytes` are those of both.
    fn merge(&self, left: &Symbol, right: &Symbol, bytes: &[u8]) -> Option<(Self::Priority, u32)>;
}

/// Buffers of the merge loop, kept from word to word.
pub(super) struct Merger<P> {
    symbols: Vec<Symbol>,
    heap: BinaryHeap<Candidate<P>>,
}

impl<P: Ord> Merger<P> {
    pub(super) fn new() -> Self {
        Self { symbols: Vec::new(), heap: BinaryHeap::new() }
    }

    /// Merges `word`, cut into `parts` of (length in bytes, token), and hands each symbol that
    /// remains to `emit`. Words are shorter than 4 GiB.
    pub(super) fn run<M: Merges<Priority = P>>(
        &mut self,
        merges: &M,
        word: &[u8],
        parts: impl Iterator<Item = (usize, Option<u32>)>,
        mut emit: impl FnMut(&Symbol),
    ) {
        self.symbols.clear();
        self.heap.clear();
        let mut start = 0;
        for (length, id) in parts {
            let index = self.symbols.len() as u32;
            let previous = index.checked_sub(1).unwrap_or(NONE);
            self.symbols.push(Symbol {
                start,
                length: length as u32,
                id,
                previous,
                next: index + 1,
            });
            start += length as u32;
        }
        let Some(last) = self.symbols.last_mut() else { return };
        last.next = NONE;
        for left in 0..self.symbols.len() as u32 - 1 {
            self.consider(merges, word, left, left + 1);
        }
        while let Some(best) = self.heap.pop() {
            let (left, right) = (best.left.0 as usize, best.right as usize);
            let (a, b) = (self.symbols[left], self.symbols[right]);
            if a.length == 0 || b.length == 0 || a.length + b.length != best.length {
                continue;
            }
            self.symbols[right].length = 0;
            self.symbols[left].length = best.length;
            self.symbols[left].id = Some(best.merged);
            self.symbols[left].next = b.next;
            if b.next != NONE {
                self.symbols[b.next as usize].previous = best.left.0;
                self.consider(merges, word, best.left.0, b.next);
            }
            if a.previous != NONE {
                self.consider(merges, word, a.previous, best.left.0);
            }
        }
        self.symbols.iter().filter(|symbol| symbol.length > 0).for_each(&mut emit);
    }

    fn consider<M: Merges<Priority = P>>(
        &mut self,
        merges: &M,
        word: &[u8],
        left: u32,
        right: u32,
    ) {
        let (a, b) = (&self.symbols[left as usize], &self.symbols[right as usize]);
        let length = a.length + b.length;
        let bytes = &word[a.start as usize..(a.start + length) as usize];
        if let Some((priority, merged)) = merges.merge(a, b, bytes) {
            let left = std::cmp::Reverse(left);
            self.heap.push(Candidate { priority, left, right, length, merged });
        }
    }
}
