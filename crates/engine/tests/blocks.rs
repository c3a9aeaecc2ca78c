//! Random operations on the block manager, with a model of what the blocks must contain.

use marlin_engine::{BlockManager, BlockTable};
use proptest::prelude::*;
use std::collections::HashMap;

const BLOCK_SIZE: usize = 3;
const NUM_BLOCKS: usize = 12;

#[derive(Debug, Clone)]
enum Operation {
    Open,
    /// Appends tokens to the table of this index (modulo those open).
    Append(usize, usize),
    /// Shares the first tokens of a table.
    Fork(usize, usize),
    Close(usize),
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        1 => Just(Operation::Open),
        4 => (any::<usize>(), 1usize..8).prop_map(|(t, n)| Operation::Append(t, n)),
        2 => (any::<usize>(), 0usize..12).prop_map(|(t, n)| Operation::Fork(t, n)),
        2 => any::<usize>().prop_map(Operation::Close),
    ]
}

/// A table and the tokens that were written through it.
struct Open {
    table: BlockTable,
    tokens: Vec<u64>,
}

struct World {
    manager: BlockManager,
    slots: Vec<u64>,
    open: Vec<Open>,
    next_token: u64,
}

impl World {
    fn apply(&mut self, operation: &Operation) {
        let count = self.open.len();
        match *operation {
            Operation::Open => self.open.push(Open { table: BlockTable::new(), tokens: vec![] }),
            Operation::Append(table, tokens) if count > 0 => self.append(table % count, tokens),
            Operation::Fork(table, tokens) if count > 0 => {
                let source = &self.open[table % count];
                let tokens = tokens.min(source.tokens.len());
                let table = self.manager.share(&source.table, tokens);
                let tokens = source.tokens[..tokens].to_vec();
                self.open.push(Open { table, tokens });
            }
            Operation::Close(table) if count > 0 => {
                let open = self.open.swap_remove(table % count);
                self.manager.release(open.table);
            }
            _ => {}
        }
    }

    fn append(&mut self, index: usize, tokens: usize) {
        let open = &mut self.open[index];
        let (written, total) = (open.tokens.len(), open.tokens.len() + tokens);
        let (before, free) = (open.table.blocks().to_vec(), self.manager.num_free());
        let mut copies = Vec::new();
        if let Err(short) = self.manager.reserve(&mut open.table, written, total, &mut copies) {
            assert!(short.needed > short.free && short.free == free);
            assert_eq!((open.table.blocks(), self.manager.num_free()), (&before[..], free));
            assert!(copies.is_empty());
            return;
        }
        for (from, to) in copies {
            let from = from as usize * BLOCK_SIZE;
            self.slots.copy_within(from..from + BLOCK_SIZE, to as usize * BLOCK_SIZE);
        }
        for position in written..total {
            let block = open.table.blocks()[position / BLOCK_SIZE];
            assert_eq!(self.manager.references(block), 1, "a writer owns its block alone");
            self.next_token += 1;
            self.slots[block as usize * BLOCK_SIZE + position % BLOCK_SIZE] = self.next_token;
            open.tokens.push(self.next_token);
        }
    }

    fn check(&self) {
        let mut owners: HashMap<u32, u32> = HashMap::new();
        for open in &self.open {
            assert!(open.table.blocks().len() >= self.manager.blocks_for(open.tokens.len()));
            for (position, &token) in open.tokens.iter().enumerate() {
                let block = open.table.blocks()[position / BLOCK_SIZE] as usize;
                assert_eq!(self.slots[block * BLOCK_SIZE + position % BLOCK_SIZE], token);
            }
            for &block in open.table.blocks() {
                *owners.entry(block).or_default() += 1;
            }
        }
        for block in 0..NUM_BLOCKS as u32 {
            let expected = owners.get(&block).copied().unwrap_or(0);
            assert_eq!(self.manager.references(block), expected);
        }
        assert_eq!(self.manager.num_free(), NUM_BLOCKS - owners.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn no_leak_no_double_free_no_overwrite(
        operations in prop::collection::vec(operation(), 1..250),
    ) {
        let mut world = World {
            manager: BlockManager::new(NUM_BLOCKS, BLOCK_SIZE),
            slots: vec![0; NUM_BLOCKS * BLOCK_SIZE],
            open: Vec::new(),
            next_token: 0,
        };
        for operation in &operations {
            world.apply(operation);
            world.check();
        }
        for open in std::mem::take(&mut world.open) {
            world.manager.release(open.table);
        }
        prop_assert_eq!(world.manager.num_free(), NUM_BLOCKS);
    }
}
