//! Ownership of the paged cache's blocks.
//!
//! A block holds the keys and values of `block_size` consecutive tokens in every layer. Blocks are
//! counted, not copied: tables that share a prefix share its blocks, and a shared block is copied
//! only when someone is about to write into it. Full blocks whose text is known stay behind when they lose
//! their last owner, for a prompt that begins alike. A [`BlockTable`] is the ownership of its blocks:
//! it cannot be cloned, only shared through the manager, and giving it back consumes it, so a
//! double free does not compile.

use crate::CacheEvent;
use crate::prefix_cache::{Before, PrefixCache};
use std::fmt;
use std::sync::Arc;

/// The pool has fewer free blocks than a reservation needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutOfBlocks {
    /// Blocks needed.
    pub needed: usize,
    /// Blocks free.
    pub free: usize,
}

impl fmt::Display for OutOfBlocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cache blocks needed, {} free", self.needed, self.free)
    }
}

impl std::error::Error for OutOfBlocks {}

/// Blocks of one sequence, in token order.
#[derive(Debug, Default)]
#[must_use = "dropping a table leaks its blocks; give it back with BlockManager::release"]
pub struct BlockTable {
    blocks: Vec<u32>,
    /// Leading blocks whose text is known.
    known: usize,
    /// What the next one will be known by; none where nobody is to find it.
    before: Option<Before>,
}

impl BlockTable {
    /// A table that owns nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Block ids, as a [`Batch`](marlin_tensor::Batch) wants them.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }
}

/// A fixed pool of reference-counted blocks.
#[derive(Debug)]
pub struct BlockManager {
    block_size: usize,
    /// Last in, first out: a block just freed is the likeliest to be in the processor's caches.
    free: Vec<u32>,
    references: Vec<u32>,
    prefixes: PrefixCache,
    reuses: bool,
}

impl BlockManager {
    /// `num_blocks` free blocks of `block_size` tokens.
    ///
    /// # Panics
    /// When `block_size` is zero or block ids would not fit `u32`.
    pub fn new(num_blocks: usize, block_size: usize) -> Self {
        assert!(block_size > 0, "a block holds at least one token");
        let blocks = u32::try_from(num_blocks).expect("block ids fit u32");
        Self {
            block_size,
            free: (0..blocks).rev().collect(),
            references: vec![0; num_blocks],
            prefixes: PrefixCache::new(num_blocks),
            reuses: true,
        }
    }

    /// The same, whose [`prefix`](Self::prefix) finds nothing.
    pub fn without_reuse(self) -> Self {
        Self { reuses: false, ..self }
    }

    /// The same, which records what [`prefix`](Self::prefix) finds and no longer finds, for a model of this name.
    pub fn recording(mut self, model: &str) -> Self {
        self.prefixes.record(model);
        self
    }

    /// What has changed since the last call; nothing unless it records.
    pub fn take_events(&mut self) -> Vec<CacheEvent> {
        self.prefixes.take_events()
    }

    /// Tokens per block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks in the pool.
    pub fn num_blocks(&self) -> usize {
        self.references.len()
    }

    /// Blocks nobody owns, those included that are kept for a prompt that begins alike.
    pub fn num_free(&self) -> usize {
        self.free.len() + self.prefixes.num_idle()
    }

    /// Blocks that `tokens` tokens take.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size)
    }

    /// Tables that own `block`.
    pub fn references(&self, block: u32) -> u32 {
        self.references[block as usize]
    }

    /// Makes positions `written .. tokens` of `table` present and its own, where the first
    /// `written` positions hold data already. Appends the block copies `(from, to)` that must be
    /// made before writing to `copies`.
    ///
    /// # Errors
    /// When the pool is too small; then nothing has changed.
    pub fn reserve(
        &mut self,
        table: &mut BlockTable,
        written: usize,
        tokens: usize,
        copies: &mut Vec<(u32, u32)>,
    ) -> Result<(), OutOfBlocks> {
        let total = self.blocks_for(tokens).max(table.blocks.len());
        let first = (written / self.block_size).min(table.blocks.len());
        let last = self.blocks_for(tokens).min(table.blocks.len()).max(first);
        let shared = |b: &&u32| self.references[**b as usize] > 1;
        let to_copy = table.blocks[first..last].iter().filter(shared).count();
        let needed = total - table.blocks.len() + to_copy;
        if needed > self.num_free() {
            return Err(OutOfBlocks { needed, free: self.num_free() });
        }
        for (index, block) in table.blocks.iter_mut().enumerate().take(last).skip(first) {
            let old = *block;
            if self.references[old as usize] > 1 {
                *block = self.take();
                self.references[old as usize] -= 1;
                if index * self.block_size < written {
                    copies.push((old, *block));
                }
            }
        }
        for _ in table.blocks.len()..total {
            let block = self.take();
            table.blocks.push(block);
        }
        Ok(())
    }

    /// A second owner of the blocks that hold the first `tokens` positions of `table`.
    pub fn share(&mut self, table: &BlockTable, tokens: usize) -> BlockTable {
        let count = self.blocks_for(tokens).min(table.blocks.len());
        let blocks = table.blocks[..count].to_vec();
        for &block in &blocks {
            self.references[block as usize] += 1;
        }
        // Known again only where nothing is cut off.
        let before = table.before.clone().filter(|_| table.known <= tokens / self.block_size);
        BlockTable { blocks, known: table.known, before }
    }

    /// A table of the known blocks that `tokens` begins with, all but the last token at most: that one has to be
    /// computed. `root` is who shares with whom.
    pub fn prefix(&mut self, root: Option<&Arc<str>>, tokens: &[u32]) -> BlockTable {
        let mut table = BlockTable::new();
        if !self.reuses {
            return table;
        }
        let mut before = Before::Root(root.cloned());
        let blocks = tokens.len().saturating_sub(1) / self.block_size;
        for tokens in tokens.chunks(self.block_size).take(blocks) {
            let Some((block, next)) = self.prefixes.find(&before, tokens) else { break };
            self.prefixes.wake(block);
            self.references[block as usize] += 1;
            table.blocks.push(block);
            before = next;
        }
        table.known = table.blocks.len();
        table.before = Some(before);
        table
    }

    /// Notes the text of the blocks of `table` that `tokens`, all of them written, fill.
    pub fn note(&mut self, table: &mut BlockTable, tokens: &[u32]) {
        let Some(mut before) = table.before.take() else { return };
        let full = (tokens.len() / self.block_size).min(table.blocks.len());
        for index in table.known..full {
            let tokens = &tokens[index * self.block_size..(index + 1) * self.block_size];
            before = self.prefixes.insert(table.blocks[index], before, tokens);
            table.known += 1;
        }
        table.before = Some(before);
    }

    /// Gives a table back; blocks without another owner become free.
    pub fn release(&mut self, table: BlockTable) {
        // Reversed, so that the next table gets the first block first.
        for &block in table.blocks.iter().rev() {
            let references = &mut self.references[block as usize];
            assert!(*references > 0, "block {block} is released twice");
            *references -= 1;
            if *references == 0 && !self.prefixes.rest(block) {
                self.free.push(block);
            }
        }
    }

    fn take(&mut self) -> u32 {
        let block = self.free.pop().or_else(|| self.prefixes.evict());
        let block = block.expect("free blocks were counted");
        self.references[block as usize] = 1;
        block
    }
}
