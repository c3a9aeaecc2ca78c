//! What must hold whatever is asked of an engine. Used by the fuzz target and by the test that replays what it found.

#[path = "../common/mod.rs"]
mod common;

use common::user::{NullModel, User, VOCAB};
use marlin_engine::{Engine, EngineOptions};
use std::sync::Arc;

/// Turns of one input.
const TURNS: usize = 2_000;

/// `data` as sizes of an engine and what its users do: no block is lost, every request ends once.
pub fn scheduler(data: &[u8]) {
    let mut bytes = data.iter();
    let mut next = || bytes.next().copied();
    let sizes: [usize; 5] = std::array::from_fn(|_| usize::from(next().unwrap_or(0)));
    let [blocks, chunk, mixed, batch, reuse] = sizes;
    // At least what one request may take.
    let num_blocks = 16 + blocks % 64;
    let options = EngineOptions {
        num_blocks: Some(num_blocks),
        max_context: Some(64),
        prefix_cache: reuse % 2 == 0,
        prefill_chunk: 1 + chunk % 40,
        mixed_chunk: 1 + mixed % 20,
        ..common::options(1 + batch % 12, 1)
    };
    let mut engine = Engine::new(Arc::new(NullModel), &options).expect("sizes within range");
    let more = std::cell::Cell::new(true);
    let mut user = User::new(|| {
        // Two bytes a choice; zeros when there are none left.
        let low = next().unwrap_or_else(|| {
            more.set(false);
            0
        });
        u64::from(low) | u64::from(next().unwrap_or(0)) << 8
    });
    for _ in 0..TURNS {
        if !more.get() {
            break;
        }
        user.act(&mut engine, VOCAB as u64, 60);
        let stats = engine.stats();
        assert!(stats.free_blocks <= stats.num_blocks);
    }
    user.finish(&mut engine, num_blocks);
}
