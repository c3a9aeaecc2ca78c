//! The engine over a model that notices every misplaced token.

mod common;

use common::{HashModel, Outcome, answers, drain, engine, options};
use marlin_engine::{
    Dry, Engine, EngineError, EngineOptions, Event, FinishReason, LanguageModel, Request,
    SampleContext, Sampler, SamplingOptions, SamplingParams, TokenCounts, Usage, Xtc,
};
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::Ordering;

fn params(options: SamplingOptions) -> SamplingParams {
    SamplingParams::new(options).unwrap()
}

fn prompt(seed: u64, len: usize) -> Vec<u32> {
    (0..len as u64).map(|i| (common::mix(seed, i) % 50) as u32).collect()
}

fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Request {
    let sampling = params(SamplingOptions::greedy());
    Request { max_tokens: Some(max_tokens), ..Request::new(prompt, sampling, vec![]) }
}

fn sampled(prompt: Vec<u32>, max_tokens: usize, seed: u64) -> Request {
    let sampling = SamplingOptions {
        seed,
        temperature: 1.5,
        top_p: 0.95,
        repetition_penalty: 1.3,
        frequency_penalty: 0.2,
        ..SamplingOptions::default()
    };
    Request { sampling: params(sampling), ..greedy(prompt, max_tokens) }
}

/// The answer by definition: all tokens through the model each time, no cache, no batch.
fn expected(model: &HashModel, request: &Request) -> Vec<u32> {
    let mut tokens = request.prompt.clone();
    let prompt_len = tokens.len();
    let mut counts = TokenCounts::new(&tokens, &request.sampling);
    let mut sampler = Sampler::new();
    let stops = |t: u32| {
        request.stop_tokens.contains(&t) || !request.ignore_eos && request.eos_tokens.contains(&t)
    };
    let banned: Vec<u32> = (0..50).filter(|&t| stops(t)).collect();
    while tokens.len() < prompt_len + request.max_tokens.unwrap() {
        let early = tokens.len() - prompt_len < request.min_tokens;
        let context = SampleContext {
            tokens: &tokens,
            prompt_len,
            counts: &counts,
            banned: if early { &banned } else { &[] },
        };
        let logits = model.logits(&tokens);
        let token = sampler.sample(&logits, &request.sampling, &context).unwrap().token;
        if stops(token) {
            break;
        }
        counts.push(token);
        tokens.push(token);
    }
    tokens.split_off(prompt_len)
}

#[test]
fn a_device_that_draws_changes_no_answer() {
    let plain = SamplingOptions { seed: 5, ..SamplingOptions::default() };
    let few = SamplingOptions { top_k: Some(8), temperature: 0.7, ..plain.clone() };
    let nucleus = SamplingOptions { top_p: 0.6, ..plain.clone() };
    let penalised = SamplingOptions {
        repetition_penalty: 1.2,
        frequency_penalty: 0.4,
        logit_bias: vec![(7, 3.0)],
        dry: Some(Dry::default()),
        xtc: Some(Xtc { probability: 0.5, threshold: 0.05 }),
        ..plain.clone()
    };
    let with =
        |o: &SamplingOptions| Request { sampling: params(o.clone()), ..greedy(prompt(9, 20), 30) };
    let requests = [
        greedy(prompt(3, 7), 30),
        with(&few),
        with(&nucleus),
        with(&plain),
        with(&penalised),
        Request { min_tokens: 25, eos_tokens: (0..20).collect(), ..with(&plain) },
    ];
    let [host, device] = [false, true].map(|draws| {
        let model = Arc::new(HashModel { draws, ..HashModel::default() });
        let mut engine = Engine::new(model.clone(), &options(6, 16)).unwrap();
        let answers = answers(&mut engine, &requests);
        assert_eq!(model.downloads.load(Ordering::Relaxed) > 0, !draws);
        // Answers to one prompt begin with draws from one row.
        let request = engine.limits().validate(with(&penalised)).unwrap();
        let ids = engine.submit_many(request, 4);
        let outcome = drain(&mut engine);
        let forks: Vec<_> = ids.iter().map(|id| outcome.tokens[id].clone()).collect();
        assert!(forks.windows(2).any(|w| w[0] != w[1]), "seeds of their own");
        (answers, forks)
    });
    assert_eq!(host, device);
    // A NaN is found by who reads the whole row.
    let model = HashModel { draws: true, nan_at: Some(9), ..HashModel::default() };
    let mut engine = engine(model, options(1, 16));
    engine.submit(engine.limits().validate(greedy(prompt(3, 7), 30)).unwrap());
    let ends: Vec<_> = drain(&mut engine).finished.into_values().collect();
    assert!(
        matches!(&ends[..], [FinishReason::Error(e)] if matches!(**e, EngineError::Logits { .. })),
        "{ends:?}"
    );
}

#[test]
fn chunks_and_batches_do_not_change_answers() {
    let requests: Vec<Request> = [1, 5, 64, 3, 130]
        .into_iter()
        .enumerate()
        .flat_map(|(i, len)| {
            let p = prompt(i as u64, len);
            [greedy(p.clone(), 20 + i), sampled(p, 33, i as u64)]
        })
        .collect();
    let expected: Vec<_> = requests.iter().map(|r| expected(&HashModel::default(), r)).collect();
    for chunk in [1, 7, 16, 64] {
        for batch in [1, 2, 10] {
            let mut engine = engine(HashModel::default(), options(batch, chunk));
            assert_eq!(answers(&mut engine, &requests), expected, "chunk {chunk}, batch {batch}");
            assert_eq!(engine.free_blocks(), 100 * batch);
        }
    }
}

#[test]
fn a_sequence_preempted_and_resumed_answers_the_same() {
    let requests: Vec<_> = (0..6).map(|i| sampled(prompt(i, 30), 90, i)).collect();
    let expected: Vec<_> = requests.iter().map(|r| expected(&HashModel::default(), r)).collect();
    let small = EngineOptions { num_blocks: Some(45), max_context: Some(160), ..options(6, 16) };
    let mut engine = engine(HashModel::default(), small);
    assert_eq!(answers(&mut engine, &requests), expected);
    assert!(engine.preemptions() > 0, "the pool was meant to be too small");
    assert_eq!(engine.free_blocks(), 45);
}

#[test]
fn cancelling_frees_blocks_at_once_wherever_the_sequence_is() {
    let mut engine = engine(HashModel::default(), options(2, 8));
    let limits = engine.limits();
    let mut submit = |len| engine.submit(limits.validate(greedy(prompt(1, len), 50)).unwrap());
    let (decoding, prefilling, waiting) = (submit(3), submit(100), submit(3));
    let mut outcome = Outcome::default();
    for _ in 0..3 {
        outcome.take(engine.step());
    }
    assert!(outcome.tokens.contains_key(&decoding) && !outcome.tokens.contains_key(&prefilling));
    for id in [waiting, prefilling, decoding] {
        assert!(engine.cancel(id));
        assert!(!engine.cancel(id), "it has ended");
    }
    assert_eq!(engine.free_blocks(), 200);
    assert!(!engine.is_idle(), "the ends are yet to be reported");
    outcome.take(engine.step());
    assert!(engine.is_idle());
    assert_eq!(outcome.finished.len(), 3);
    assert!(outcome.finished.values().all(|r| matches!(r, FinishReason::Cancelled)));
}

#[test]
fn a_long_prompt_delays_others_by_one_chunk() {
    let mut engine = engine(HashModel::default(), options(3, 10));
    let limits = engine.limits();
    let submit = |engine: &mut Engine, len| {
        engine.submit(limits.validate(greedy(prompt(1, len), 60)).unwrap())
    };
    let talking = submit(&mut engine, 2);
    engine.step();
    submit(&mut engine, 300);
    engine.step();
    let short = submit(&mut engine, 4);
    for step in 0..20 {
        let events = engine.step();
        let got =
            |wanted| events.iter().any(|e| matches!(e, Event::Token { id, .. } if *id == wanted));
        assert!(got(talking), "step {step}: decoding waits for nobody");
        assert!(got(short), "step {step}: a short prompt is read with the next chunk");
    }
}

#[test]
fn no_step_reads_more_than_its_budget() {
    let model = std::sync::Arc::new(HashModel::default());
    let mut engine = Engine::new(model.clone(), &options(4, 16)).unwrap();
    let requests: Vec<_> = (0..8).map(|i| greedy(prompt(i, 50), 10)).collect();
    answers(&mut engine, &requests);
    let widest = model.widest.load(std::sync::atomic::Ordering::Relaxed);
    assert!((16..=16 + 3).contains(&widest), "{widest} rows");
}

/// The greedy answer to `prompt(9, 5)`.
fn plain() -> Vec<u32> {
    expected(&HashModel::default(), &greedy(prompt(9, 5), 40))
}

#[test]
fn endings() {
    let plain = plain();
    let stop = plain[6];
    let first = plain.iter().position(|&t| t == stop).unwrap();
    let base = || greedy(prompt(9, 5), 40);
    let check = |request: Request, reason: FinishReason, completion_tokens: usize| {
        let mut engine = engine(HashModel::default(), options(1, 16));
        let request = engine.limits().validate(request).unwrap();
        let id = engine.submit(request);
        let mut tokens = Vec::new();
        loop {
            for event in engine.step() {
                match event {
                    Event::Token { token, .. } => tokens.push(token),
                    Event::Finished { id: ended, reason: found, usage } => {
                        assert_eq!(ended, id);
                        assert_eq!(format!("{found:?}"), format!("{reason:?}"));
                        assert_eq!(
                            usage,
                            Usage { prompt_tokens: 5, completion_tokens, cached_tokens: 0 }
                        );
                        return tokens;
                    }
                }
            }
        }
    };
    let length = || FinishReason::Length;
    let stopped = || FinishReason::Stop(stop);
    assert_eq!(check(base(), length(), 40), plain);
    assert_eq!(check(Request { max_tokens: Some(1), ..base() }, length(), 1), plain[..1]);
    let open = Request { max_tokens: None, ..base() };
    assert_eq!(check(open, length(), 395).len(), 395, "until the context is full");
    let eos = || Request { eos_tokens: vec![49, stop], ..base() };
    let before = &plain[..first];
    assert_eq!(check(Request { eos_tokens: vec![stop], ..base() }, stopped(), first + 1), before);
    assert_eq!(check(Request { stop_tokens: vec![stop], ..base() }, stopped(), first + 1), before);
    let ignored = Request { eos_tokens: vec![stop], ignore_eos: true, ..base() };
    assert_eq!(check(ignored, length(), 40), plain);
    let both = Request { stop_tokens: vec![stop], ignore_eos: true, ..eos() };
    assert_eq!(check(both, stopped(), first + 1), before);

    let late = Request { min_tokens: 20, ..eos() };
    let mut engine = engine(HashModel::default(), options(1, 16));
    let answer = answers(&mut engine, std::slice::from_ref(&late));
    assert!(answer[0].len() >= 20 && !answer[0].contains(&stop));
    assert_eq!(answer[0], expected(&HashModel::default(), &late));
}

#[test]
fn requests_that_do_not_fit_are_refused_with_the_numbers() {
    let engine = engine(HashModel::default(), options(1, 16));
    let limits = engine.limits();
    let bias = SamplingOptions { logit_bias: vec![(50, 1.0)], ..SamplingOptions::greedy() };
    for (request, words) in [
        (greedy(vec![], 1), &["no tokens"][..]),
        (greedy(prompt(0, 400), 1), &["prompt has 400", "have 1;", "holds 400"]),
        (greedy(prompt(0, 1000), 1), &["prompt has 1000", "have 1;", "holds 400"]),
        (greedy(prompt(0, 300), 101), &["prompt has 300", "have 101;", "holds 400"]),
        (greedy(prompt(0, 300), 0), &["max_tokens", "at least 1"]),
        (Request { min_tokens: 3, ..greedy(prompt(0, 3), 2) }, &["min_tokens", "3", "2"]),
        (greedy(vec![1, 50], 1), &["prompt", "token 50", "50 tokens"]),
        (Request { eos_tokens: vec![77], ..greedy(vec![1], 1) }, &["eos_token_id", "77"]),
        (Request { stop_tokens: vec![78], ..greedy(vec![1], 1) }, &["stop_token_ids", "78"]),
        (Request { sampling: params(bias), ..greedy(vec![1], 1) }, &["logit_bias", "50"]),
    ] {
        let message = limits.validate(request).unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "{message:?} should contain {word:?}");
        }
    }
    assert!(limits.validate(greedy(prompt(0, 300), 100)).is_ok());
}

#[test]
fn options_that_cannot_work_are_refused() {
    let good = || EngineOptions { num_blocks: None, ..options(1, 16) };
    for (options, field) in [
        (EngineOptions { block_size: 0, ..good() }, "block_size"),
        (EngineOptions { prefill_chunk: 0, ..good() }, "prefill_chunk"),
        (EngineOptions { max_batch: 0, ..good() }, "max_batch"),
        (EngineOptions { max_context: Some(401), ..good() }, "max_context"),
        (EngineOptions { max_context: Some(1), ..good() }, "max_context"),
        (EngineOptions { num_blocks: Some(99), ..good() }, "num_blocks"),
        (EngineOptions { num_blocks: Some(usize::MAX), ..good() }, "num_blocks"),
    ] {
        match Engine::new(std::sync::Arc::new(HashModel::default()), &options).err() {
            Some(EngineError::Parameter { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{options:?}: {other:?}"),
        }
    }
    let engine = engine(HashModel::default(), good());
    assert_eq!(engine.free_blocks(), 100, "one sequence of the whole context");
}

#[test]
fn bad_logits_end_their_sequence_and_no_other() {
    let model = HashModel { nan_at: Some(30), ..HashModel::default() };
    let mut engine = engine(model, options(2, 16));
    let limits = engine.limits();
    let bad = engine.submit(limits.validate(greedy(prompt(1, 25), 20)).unwrap());
    let good = engine.submit(limits.validate(greedy(prompt(2, 3), 20)).unwrap());
    let outcome = drain(&mut engine);
    assert_eq!((outcome.tokens[&bad].len(), outcome.tokens[&good].len()), (6, 20));
    let FinishReason::Error(error) = &outcome.finished[&bad] else { panic!("no error") };
    let message = error.to_string();
    assert!(message.contains("step 6") && message.contains("NaN at position 31"), "{message}");
    assert_eq!(engine.free_blocks(), 200);
}

#[test]
fn a_failed_pass_ends_its_sequences_and_the_engine_goes_on() {
    let model = HashModel { fail_at: Some(4), ..HashModel::default() };
    let mut engine = engine(model, options(2, 16));
    let requests: Vec<_> = (0..3).map(|i| greedy(prompt(i, 5), 10)).collect();
    let limits = engine.limits();
    let ids: Vec<_> =
        requests.iter().map(|r| engine.submit(limits.validate(r.clone()).unwrap())).collect();
    let outcome = drain(&mut engine);
    for id in &ids[..2] {
        let FinishReason::Error(error) = &outcome.finished[id] else { panic!("no error") };
        assert!(error.to_string().contains("on fire"));
    }
    assert_eq!(outcome.tokens[&ids[2]], expected(&HashModel::default(), &requests[2]));
    assert_eq!(engine.free_blocks(), 200);
}

#[test]
fn logprobs_are_those_of_the_model() {
    let sampling = SamplingOptions {
        logprobs: Some(3),
        temperature: 0.5,
        logit_bias: vec![(7, 50.0)],
        ..SamplingOptions::default()
    };
    let mut engine = engine(HashModel::default(), options(1, 16));
    let request = Request { sampling: params(sampling), ..greedy(vec![1, 2], 1) };
    let request = engine.limits().validate(request).unwrap();
    engine.submit(request);
    let Some(Event::Token { token: 7, logprob: Some(found), .. }) = engine.step().first().cloned()
    else {
        panic!("the bias decides");
    };
    let logits = HashModel::default().logits(&[1, 2]);
    let norm = logits.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
    let mut sorted: Vec<_> = (0..)
        .zip(&logits)
        .map(|(i, &l)| (i, (f64::from(l) - norm) as f32))
        .collect::<Vec<(u32, f32)>>();
    assert!((found.logprob - sorted[7].1).abs() < 1e-6);
    sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
    for (found, expected) in found.top.iter().zip(&sorted[..3]) {
        assert!(found.0 == expected.0 && (found.1 - expected.1).abs() < 1e-6);
    }
    assert_eq!(found.top.len(), 3);
}

#[derive(Debug, Clone)]
struct Job {
    prompt: usize,
    max_tokens: usize,
    eos: bool,
    /// Steps before it is submitted, and from then until it is cancelled.
    submit_after: usize,
    cancel_after: Option<usize>,
}

fn job() -> impl Strategy<Value = Job> {
    (1usize..40, 1usize..40, any::<bool>(), 0usize..30, prop::option::weighted(0.3, 0usize..40))
        .prop_map(|(prompt, max_tokens, eos, submit_after, cancel_after)| Job {
            prompt,
            max_tokens,
            eos,
            submit_after,
            cancel_after,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Whatever is submitted and cancelled when, in whatever pool: every request ends once, with
    /// the answer it would have had alone, and every block comes back.
    #[test]
    fn every_request_ends_with_its_own_answer(
        jobs in prop::collection::vec(job(), 1..14),
        num_blocks in 20usize..60,
        max_batch in 1usize..6,
        chunk in 1usize..40,
    ) {
        let model = HashModel { max_context: 80, ..HashModel::default() };
        let reference = HashModel { max_context: 80, ..HashModel::default() };
        let options =
            EngineOptions { num_blocks: Some(num_blocks), ..options(max_batch, chunk) };
        let mut engine = engine(model, options);
        let limits = engine.limits();
        let mut outcome = Outcome::default();
        let mut ids = vec![None; jobs.len()];
        let mut step = 0;
        while !engine.is_idle() || ids.iter().any(Option::is_none) {
            for (i, job) in jobs.iter().enumerate() {
                if job.submit_after == step {
                    let mut request = sampled(prompt(i as u64, job.prompt), job.max_tokens, i as u64);
                    request.eos_tokens = if job.eos { (0..5).collect() } else { vec![] };
                    ids[i] = Some((engine.submit(limits.validate(request.clone()).unwrap()), request));
                }
                if let (Some(after), Some((id, _))) = (job.cancel_after, &ids[i])
                    && job.submit_after + after == step
                {
                    engine.cancel(*id);
                }
            }
            outcome.take(engine.step());
            step += 1;
            prop_assert!(step < 10_000, "a request never ends");
        }
        for (id, request) in ids.into_iter().flatten() {
            let expected = expected(&reference, &request);
            let found = outcome.tokens.remove(&id).unwrap_or_default();
            match &outcome.finished[&id] {
                FinishReason::Cancelled => prop_assert!(expected.starts_with(&found)),
                FinishReason::Error(error) => panic!("{error}"),
                _ => prop_assert_eq!(found, expected),
            }
        }
        prop_assert_eq!(engine.free_blocks(), num_blocks);
    }
}

#[test]
fn the_cache_has_the_shape_that_was_asked_for() {
    let engine = engine(HashModel::default(), options(2, 16));
    assert_eq!((engine.cache().spec.num_blocks, engine.cache().spec.block_size), (200, 4));
    assert_eq!(engine.limits().max_context, HashModel::default().max_context());
}
