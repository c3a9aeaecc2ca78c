//! Blocks, prefixes, forks and priorities under whatever requests do.

mod common;

use common::user::{NullModel, User, VOCAB};
use common::{HashModel, Outcome, answers, drain, engine, mix, options};
use marlin_engine::{
    Constraint, Engine, EngineOptions, FinishReason, Request, SamplingOptions, SamplingParams,
    SequenceId,
};
use std::sync::Arc;

#[test]
fn a_million_operations_lose_no_block_and_no_request() {
    let small = EngineOptions { num_blocks: Some(40), max_context: Some(64), ..options(8, 24) };
    for (seed, prefix_cache) in [(1, true), (2, true), (3, false)] {
        let options = EngineOptions { prefix_cache, mixed_chunk: 7, ..small.clone() };
        let mut engine = Engine::new(Arc::new(NullModel), &options).unwrap();
        let mut user = User::random(seed);
        for _ in 0..340_000 {
            user.act(&mut engine, VOCAB as u64, 60);
            let stats = engine.stats();
            assert!(stats.free_blocks <= stats.num_blocks);
        }
        let stats = engine.stats();
        assert!(stats.preemptions > 100, "the pool was meant to be too small");
        assert_eq!(stats.cached_tokens > 0, prefix_cache);
        user.finish(&mut engine, 40);
    }
}

/// The same over a model that notices every wrong, stale or shared slot.
#[test]
fn whatever_happens_a_sequence_reads_its_own_tokens() {
    let options = EngineOptions { num_blocks: Some(120), mixed_chunk: 5, ..options(8, 24) };
    let mut engine = Engine::new(Arc::new(HashModel::default()), &options).unwrap();
    let mut user = User::random(7);
    for _ in 0..6_000 {
        user.act(&mut engine, 50, 90);
    }
    assert!(engine.preemptions() > 10 && engine.stats().cached_tokens > 100);
    user.finish(&mut engine, 120);
}

fn request(prompt: Vec<u32>, max_tokens: usize, seed: u64) -> Request {
    let options = SamplingOptions { seed, temperature: 1.3, ..SamplingOptions::default() };
    let sampling = SamplingParams::new(options).unwrap();
    Request { max_tokens: Some(max_tokens), ..Request::new(prompt, sampling, vec![]) }
}

fn prompt(seed: u64, len: usize) -> Vec<u32> {
    (0..len as u64).map(|i| (mix(seed, i) % 50) as u32).collect()
}

#[test]
fn a_prompt_that_begins_alike_is_computed_once() {
    let model = Arc::new(HashModel::default());
    let mut engine = Engine::new(model.clone(), &options(4, 64)).unwrap();
    let first = request(prompt(1, 61), 10, 1);
    let second = Request { prompt: [&first.prompt[..50], &prompt(2, 9)].concat(), ..first.clone() };
    let tenant = Request { cache_name: Some("someone else".into()), ..second.clone() };
    let mut rows = 0;
    for (request, found) in [(&first, 0), (&second, 48), (&second, 56), (&tenant, 0), (&tenant, 56)]
    {
        let expected = answers(
            &mut common::engine(HashModel::default(), options(1, 64)),
            std::slice::from_ref(request),
        );
        let before = engine.stats();
        assert_eq!(answers(&mut engine, std::slice::from_ref(request)), expected);
        let after = engine.stats();
        assert_eq!(after.cached_tokens - before.cached_tokens, found);
        rows += request.prompt.len() as u64 - found;
        assert_eq!(after.prompt_rows, rows);
    }
    // A part of the answer is a beginning, too.
    let answer = answers(&mut engine, std::slice::from_ref(&first)).remove(0);
    let next = request([&first.prompt[..], &answer, &[3, 4]].concat(), 4, 9);
    let before = engine.stats().cached_tokens;
    answers(&mut engine, &[next]);
    assert_eq!(
        engine.stats().cached_tokens - before,
        68,
        "61 + 9 computed tokens fill 17 blocks of 4"
    );
    assert_eq!(engine.free_blocks(), 400);
}

#[test]
fn forks_answer_as_if_alone() {
    for (blocks, chunk) in [(400, 64), (400, 7), (40, 16)] {
        let request = request(prompt(3, 45), 40, 100);
        let alone: Vec<Vec<u32>> = (0..5)
            .map(|i| {
                let one =
                    Request { sampling: request.sampling.with_seed(100 + i), ..request.clone() };
                answers(&mut engine(HashModel::default(), options(1, 64)), &[one]).remove(0)
            })
            .collect();
        let options =
            EngineOptions { num_blocks: Some(blocks), max_context: Some(100), ..options(5, chunk) };
        let mut engine = engine(HashModel::default(), options);
        let ids = engine.submit_many(engine.limits().validate(request).unwrap(), 5);
        let mut outcome = drain(&mut engine);
        let together: Vec<_> = ids.iter().map(|id| outcome.tokens.remove(id).unwrap()).collect();
        assert_eq!(together, alone);
        assert!(blocks > 40 || engine.preemptions() > 0);
        assert_eq!(engine.stats().prompt_tokens, 5 * 45);
        assert_eq!(engine.free_blocks(), blocks);
    }
}

#[test]
fn a_fork_outlives_the_sequence_it_waits_in() {
    let model = HashModel::default();
    let request = request(prompt(3, 60), 12, 100);
    let one = Request { sampling: request.sampling.with_seed(102), ..request.clone() };
    let alone = answers(&mut engine(HashModel::default(), options(1, 64)), &[one]).remove(0);
    let mut engine = engine(model, options(5, 16));
    let ids = engine.submit_many(engine.limits().validate(request).unwrap(), 3);
    let mut outcome = Outcome::default();
    outcome.take(engine.step());
    for id in [ids[0], ids[1]] {
        assert!(engine.cancel(id) && !engine.cancel(id));
    }
    let rest = drain(&mut engine);
    assert_eq!(rest.tokens[&ids[2]], alone);
    assert_eq!(rest.finished.len(), 3);
    assert_eq!(engine.free_blocks(), 500);
}

#[test]
fn urgent_requests_go_first_and_take_the_room_of_others() {
    let options = EngineOptions { num_blocks: Some(100), ..options(2, 64) };
    let mut engine = engine(HashModel::default(), options);
    let submit = |engine: &mut Engine, priority, seed| {
        let request = Request { priority, ..request(prompt(seed, 150), 50, seed) };
        engine.submit(engine.limits().validate(request).unwrap())
    };
    let usual: Vec<_> = (0..3).map(|seed| submit(&mut engine, 0, seed)).collect();
    let mut outcome = Outcome::default();
    for _ in 0..5 {
        outcome.take(engine.step());
    }
    let urgent = submit(&mut engine, -1, 9);
    let late = submit(&mut engine, 1, 10);
    let mut order = Vec::new();
    while !engine.is_idle() {
        outcome.take(engine.step());
        let new = outcome.finished.keys().filter(|id| !order.contains(*id)).copied();
        order.extend(new.collect::<Vec<_>>());
    }
    let place = |id: SequenceId| order.iter().position(|other| *other == id).unwrap();
    assert!(place(urgent) < 2, "{order:?}");
    assert_eq!(place(late), 4, "{order:?}");
    assert!(engine.preemptions() > 0);
    for (seed, id) in (0..3).zip(usual).chain([(9, urgent), (10, late)]) {
        let alone = answers(
            &mut common::engine(HashModel::default(), common::options(1, 64)),
            &[request(prompt(seed, 150), 50, seed)],
        );
        assert_eq!(outcome.tokens[&id], alone[0], "seed {seed}");
    }
}

/// Allows the tokens of a text, one after the other.
#[derive(Debug, Clone)]
struct Exactly(Vec<u32>, usize);

impl Constraint for Exactly {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let allowed = *self.0.get(self.1).ok_or("nothing may follow")?;
        let banned = (0..).zip(logits.iter_mut()).filter(|(token, _)| *token != allowed);
        banned.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        assert_eq!(token, self.0[self.1]);
        self.1 += 1;
        Ok(())
    }

    fn is_complete(&mut self) -> bool {
        self.1 == self.0.len()
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

#[test]
fn a_constraint_is_kept_by_every_fork_and_ends_the_answer() {
    let text = vec![7, 3, 3, 11];
    let beside = request(prompt(2, 9), 30, 1);
    let alone =
        answers(&mut engine(HashModel::default(), options(1, 64)), std::slice::from_ref(&beside));
    // Where the device draws, rows under a constraint are copied and those beside them are not.
    for draws in [false, true] {
        let constraint: Option<Box<dyn Constraint>> = Some(Box::new(Exactly(text.clone(), 0)));
        let request = Request { constraint, ..request(prompt(1, 9), 30, 1) };
        let mut engine = engine(HashModel { draws, ..HashModel::default() }, options(5, 64));
        let limits = engine.limits();
        let first = engine.submit(limits.validate(beside.clone()).unwrap());
        let ids = engine.submit_many(limits.validate(request).unwrap(), 3);
        let last = engine.submit(limits.validate(beside.clone()).unwrap());
        let outcome = drain(&mut engine);
        for id in ids {
            assert_eq!(outcome.tokens[&id], text);
            assert!(matches!(outcome.finished[&id], FinishReason::Complete));
        }
        for id in [first, last] {
            assert_eq!(outcome.tokens[&id], alone[0]);
        }
        let none: Option<Box<dyn Constraint>> = Some(Box::new(Exactly(vec![], 0)));
        let request = Request { constraint: none, ..self::request(prompt(1, 9), 30, 1) };
        let id = engine.submit(limits.validate(request).unwrap());
        let outcome = drain(&mut engine);
        let FinishReason::Error(error) = &outcome.finished[&id] else { panic!("it cannot go on") };
        assert!(error.to_string().contains("nothing may follow"));
        assert_eq!(engine.free_blocks(), 500);
    }
}

/// A prompt of 32 k tokens and a pool that holds little more: the others' first tokens, and the time between their tokens, wait
/// for a chunk of it and not for its room or its end.
#[test]
fn a_long_prompt_in_a_short_pool_holds_nobody_up() {
    const LONG: usize = 32 * 1024;
    let options = EngineOptions {
        block_size: 16,
        max_context: Some(LONG + 64),
        num_blocks: Some((LONG + 64) / 16 + 40),
        mixed_chunk: 256,
        ..options(8, 512)
    };
    // Alone, behind a second one like it, and behind answers that are under way.
    for (longs, early) in [(1, 0), (2, 0), (1, 3)] {
        let model = HashModel { max_context: LONG + 64, ..HashModel::default() };
        let mut engine = engine(model, options.clone());
        let submit = |engine: &mut Engine, request| {
            let request = engine.limits().validate(request).unwrap();
            engine.submit(request)
        };
        let mut outcome = Outcome::default();
        let talking: Vec<_> =
            (0..early).map(|i| submit(&mut engine, request(prompt(50 + i, 40), 200, i))).collect();
        outcome.take(engine.step());
        let long: Vec<_> =
            (0..longs).map(|i| submit(&mut engine, request(prompt(90 + i, LONG), 4, i))).collect();
        outcome.take(engine.step());
        let (mut short, mut waits, mut ended) = (Vec::new(), Vec::new(), None);
        for step in 0.. {
            if step % 4 == 0 && step < 120 {
                let seed = step as u64;
                short.push((step, submit(&mut engine, request(prompt(seed, 30), 6, seed)), None));
            }
            let before = outcome.tokens.clone();
            outcome.take(engine.step());
            for id in talking.iter().filter(|id| !outcome.finished.contains_key(*id)) {
                assert_ne!(
                    before.get(id),
                    outcome.tokens.get(id),
                    "an answer waits at step {step}"
                );
            }
            for (begun, id, first) in &mut short {
                if first.is_none() && outcome.tokens.contains_key(id) {
                    *first = Some(step);
                    waits.push(step - *begun);
                }
            }
            if long.iter().all(|id| outcome.finished.contains_key(id)) {
                ended.get_or_insert(step);
            }
            if engine.is_idle() {
                break;
            }
        }
        assert_eq!(waits.len(), 30);
        let longest = waits.iter().max().unwrap();
        assert!(*longest <= 2, "{longs} long, {early} early: a first token waits {waits:?} steps");
        let steps = ended.unwrap();
        // As many chunks as it has, and not many more for those who passed.
        assert!(steps < longs as usize * (LONG / 256 + 40), "it took {steps} steps");
        assert_eq!(engine.free_blocks(), engine.stats().num_blocks);
    }
}

/// Small ones pass a large one that does not fit, but not for ever.
#[test]
fn those_who_pass_do_not_starve_those_who_wait() {
    for large in [60, 150] {
        let options = EngineOptions {
            num_blocks: Some(50),
            max_context: Some(200),
            prefix_cache: false,
            ..options(8, 64)
        };
        let mut engine = engine(HashModel::default(), options);
        let submit = |engine: &mut Engine, request| {
            let request = engine.limits().validate(request).unwrap();
            engine.submit(request)
        };
        let mut outcome = Outcome::default();
        // Small ones keep coming, so that the pool is never empty.
        for seed in 0..4 {
            submit(&mut engine, request(prompt(seed, 20), 20, seed));
        }
        outcome.take(engine.step());
        let waits = submit(&mut engine, request(prompt(99, large), 8, 99));
        let mut passed = 0;
        while !outcome.finished.contains_key(&waits) {
            passed += 1;
            assert!(passed < 400, "a prompt of {large} starves");
            submit(&mut engine, request(prompt(passed, 20), 20, passed));
            outcome.take(engine.step());
        }
        let alone = [request(prompt(99, large), 8, 99)];
        let alone =
            answers(&mut common::engine(HashModel::default(), common::options(1, 64)), &alone);
        assert_eq!(outcome.tokens[&waits], alone[0]);
        drain(&mut engine);
        assert_eq!(engine.free_blocks(), 50);
    }
}
