//! A router that only hears what the prefix cache tells knows what a prompt will find there.

mod common;

use common::{HashModel, drain, engine, options};
use marlin_engine::{
    BlockManager, BlockTable, CacheEvent, Engine, EngineOptions, Event, Request, SamplingOptions,
    SamplingParams,
};
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;

/// What comes before a block: another one, or a text begins, for those of a name.
type Before = Result<u64, Option<Arc<str>>>;

/// Blocks by what they hold, as told.
#[derive(Default)]
struct Router {
    blocks: HashMap<(Before, Vec<u32>), u64>,
    keys: HashMap<u64, (Before, Vec<u32>)>,
}

impl Router {
    fn hear(&mut self, events: Vec<CacheEvent>) {
        for event in events {
            match event {
                CacheEvent::Stored { hashes, parent, tokens, cache_name } => {
                    assert!(parent.is_none() || cache_name.is_none(), "only where a text begins");
                    let mut before = parent.ok_or(cache_name);
                    let size = tokens.len() / hashes.len();
                    assert_eq!(tokens.len(), size * hashes.len());
                    for (hash, tokens) in hashes.into_iter().zip(tokens.chunks(size)) {
                        let key = (before, tokens.to_vec());
                        assert!(hash != 0 && self.keys.insert(hash, key.clone()).is_none());
                        assert!(self.blocks.insert(key, hash).is_none(), "told twice");
                        before = Ok(hash);
                    }
                }
                CacheEvent::Removed { hashes } => {
                    for hash in hashes {
                        let key = self.keys.remove(&hash).expect("told before");
                        self.blocks.remove(&key);
                    }
                }
            }
        }
    }

    /// Blocks that a prompt will find.
    fn expects(&self, name: Option<&Arc<str>>, tokens: &[u32], block_size: usize) -> usize {
        let mut before: Before = Err(name.cloned());
        let most = (tokens.len() - 1) / block_size;
        let mut found = 0;
        for tokens in tokens.chunks(block_size).take(most) {
            let Some(&hash) = self.blocks.get(&(before, tokens.to_vec())) else { break };
            before = Ok(hash);
            found += 1;
        }
        found
    }
}

const BLOCK_SIZE: usize = 3;
const NUM_BLOCKS: usize = 12;

#[derive(Debug, Clone)]
enum Operation {
    /// A text is computed, for those of one of three names.
    Open(Vec<u32>, usize),
    Close(usize),
}

fn operation() -> impl Strategy<Value = Operation> {
    let text = prop::collection::vec(0u32..2, 1..20);
    prop_oneof![
        3 => (text, 0usize..3).prop_map(|(text, name)| Operation::Open(text, name)),
        2 => any::<usize>().prop_map(Operation::Close),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Nothing that is found was not told, nothing that is gone stays told for ever; whatever the order in which texts that
    /// begin alike come and go, side by side too.
    #[test]
    fn events_cover_what_is_found(operations in prop::collection::vec(operation(), 1..60)) {
        let names = [None, Some(Arc::from("")), Some(Arc::from("tenant"))];
        let mut manager = BlockManager::new(NUM_BLOCKS, BLOCK_SIZE).recording("model");
        let mut router = Router::default();
        let mut open: Vec<BlockTable> = Vec::new();
        for operation in operations {
            match operation {
                Operation::Open(text, name) => {
                    let name = names[name].as_ref();
                    let mut table = manager.prefix(name, &text);
                    let found = table.blocks().len();
                    prop_assert!(found <= router.expects(name, &text, BLOCK_SIZE));
                    match manager.reserve(&mut table, found * BLOCK_SIZE, text.len(), &mut Vec::new()) {
                        Ok(()) => {
                            manager.note(&mut table, &text[..text.len() / 2]);
                            manager.note(&mut table, &text);
                            open.push(table);
                        }
                        Err(_) => manager.release(table),
                    }
                }
                Operation::Close(table) if !open.is_empty() => {
                    let table = open.swap_remove(table % open.len());
                    manager.release(table);
                }
                Operation::Close(_) => {}
            }
            router.hear(manager.take_events());
            prop_assert!(router.keys.len() <= NUM_BLOCKS);
        }
        for table in open {
            manager.release(table);
        }
        let mut all = BlockTable::new();
        manager.reserve(&mut all, 0, NUM_BLOCKS * BLOCK_SIZE, &mut Vec::new()).unwrap();
        router.hear(manager.take_events());
        prop_assert!(router.keys.is_empty(), "everything was given up: {:?}", router.keys);
        manager.release(all);
    }
}

fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Request {
    let sampling = SamplingParams::new(SamplingOptions::greedy()).unwrap();
    Request { max_tokens: Some(max_tokens), ..Request::new(prompt, sampling, Vec::new()) }
}

fn cached_tokens(engine: &mut Engine, request: Request) -> usize {
    engine.submit(engine.limits().validate(request).unwrap());
    let mut cached = None;
    while !engine.is_idle() {
        for event in engine.step() {
            if let Event::Finished { usage, .. } = event {
                cached = Some(usage.cached_tokens);
            }
        }
    }
    cached.expect("it ends")
}

/// One request after the other: exactly what was told is found, while blocks are given up all the time.
#[test]
fn a_router_knows_what_a_prompt_will_find() {
    let options = EngineOptions { num_blocks: Some(40), max_context: Some(96), ..options(1, 16) };
    let options = EngineOptions { cache_events: Some("model".into()), ..options };
    let mut engine = engine(HashModel::default(), options);
    let mut router = Router::default();
    let mut draws = 0;
    let mut random = |below: u64| {
        draws += 1;
        common::mix(1, draws) % below
    };
    let mut hits = 0;
    for _ in 0..400 {
        // One of a few beginnings, and something of its own.
        let (beginning, own) = (random(5) as u32, random(3) as u32);
        let length = 4 + random(70) as u32;
        let prompt: Vec<u32> = (0..length)
            .map(|i| (beginning * 7 + i / 9 + if i > 30 { own } else { 0 }) % 50)
            .collect();
        let mut request = greedy(prompt.clone(), 1 + random(12) as usize);
        request.cache_name = (random(4) == 0).then(|| Arc::from("tenant"));
        let expected = router.expects(request.cache_name.as_ref(), &prompt, 4);
        let cached = cached_tokens(&mut engine, request);
        assert_eq!(cached, expected * 4);
        hits += usize::from(cached > 0);
        router.hear(engine.take_cache_events());
    }
    assert!((50..390).contains(&hits), "{hits}: some prompts find something and some do not");
}

/// Nobody asked: nothing is told, nothing piles up.
#[test]
fn nothing_is_recorded_unasked() {
    let mut engine = engine(HashModel::default(), options(1, 16));
    engine.submit(engine.limits().validate(greedy((1..40).collect(), 9)).unwrap());
    drain(&mut engine);
    assert!(engine.take_cache_events().is_empty());
}
