//! Ownership of the paged cache's blocks.
//!
//! A block holds the keys and values of `block_size` consecutive tokens in every layer. Blocks are
//! counted, not copied: tables that share a prefix share its blocks, and a shared block is copied
//! only when someone is about to write into it. A [`BlockTable`] is the ownership of its blocks:
//! it cannot be cloned, only shared through the manager, and giving it back consumes it, so a
//! double free does not compile.

use std::fmt;

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
}

impl BlockManager {
    /// `num_blocks` free blocks of `block_size` tokens.
    ///
    /// # Panics
    /// When `block_size` is zero or block ids would not fit `u32`.
    pub fn new(num_blocks: usize, block_size: usize) -> Self {
        assert!(block_size > 0, "a block holds at least one token");
        let blocks = u32::try_from(num_blocks).expect("block ids fit u32");
        Self { block_size, free: (0..blocks).rev().collect(), references: vec![0; num_blocks] }
    }

    /// Tokens per block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks in the pool.
    pub fn num_blocks(&self) -> usize {
        self.references.len()
    }

    /// Blocks nobody owns.
    pub fn num_free(&self) -> usize {
        self.free.len()
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
        if needed > self.free.len() {
            return Err(OutOfBlocks { needed, free: self.free.len() });
        }
        for (index, block) in table.blocks.iter_mut().enumerate().take(last).skip(first) {
            let old = *block;
            if self.references[old as usize] > 1 {
                *block = Self::take(&mut self.free, &mut self.references);
                self.references[old as usize] -= 1;
                if index * self.block_size < written {
                    copies.push((old, *block));
                }
            }
        }
        for _ in table.blocks.len()..total {
            table.blocks.push(Self::take(&mut self.free, &mut self.references));
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
        BlockTable { blocks }
    }

    /// Gives a table back; blocks without another owner become free.
    pub fn release(&mut self, table: BlockTable) {
        // Reversed, so that the next table gets the first block first.
        for &block in table.blocks.iter().rev() {
            let references = &mut self.references[block as usize];
            assert!(*references > 0, "block {block} is released twice");
            *references -= 1;
            if *references == 0 {
                self.free.push(block);
            }
        }
    }

    fn take(free: &mut Vec<u32>, references: &mut [u32]) -> u32 {
        let block = free.pop().expect("free blocks were counted");
        references[block as usize] = 1;
        block
    }
}
