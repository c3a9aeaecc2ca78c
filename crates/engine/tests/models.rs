//! The engine over real forward passes: every tiny checkpoint of the test kit on the CPU backend.

mod common;

use common::{Outcome, answers, drain};
use marlin_checkpoint::{Checkpoint, read_safetensors};
use marlin_cpu::{Activations, CpuBackend, CpuOptions, Level};
use marlin_engine::evaluate::{Choice, ChoiceRow, PerplexityOptions, choices, logits, perplexity};
use marlin_engine::profile::Profiler;
use marlin_engine::{
    Engine, EngineOptions, FinishReason, LanguageModel, Request, SamplingOptions, SamplingParams,
};
use marlin_models::{Model, weight_memory};
use marlin_tensor::CacheType;
use marlin_testkit::{FAMILIES, tiny_model};
use std::sync::Arc;

/// A tiny model and the 64 tokens its reference results are for.
fn load(family: &str) -> (Arc<Model>, Vec<u32>, Vec<f32>) {
    let float = CpuOptions { threads: 1, activations: Activations::Float, ..CpuOptions::default() };
    load_on(family, float)
}

fn load_on(family: &str, options: CpuOptions) -> (Arc<Model>, Vec<u32>, Vec<f32>) {
    let path = tiny_model(family);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let spec = marlin_models::spec(&checkpoint).unwrap();
    let backend = Arc::new(CpuBackend::new(options).unwrap());
    let model = Model::load(&checkpoint, spec, backend, &mut |_| {}).unwrap();
    let reference = read_safetensors(&path.join("ref.safetensors")).unwrap();
    let find = |name: &str| {
        let tensor = reference.tensors.iter().find(|t| t.name == name).unwrap();
        tensor.plain().unwrap()
    };
    let tokens = find("input_ids").to_i64().unwrap().into_iter().map(|t| t as u32).collect();
    (Arc::new(model), tokens, find("logits").to_f32().unwrap())
}

/// What a backend says of each kind of matrix adds up to what loading all of them counts, on every level.
#[test]
fn weights_take_what_was_counted_on() {
    for family in FAMILIES {
        let checkpoint = Checkpoint::open(&tiny_model(family)).unwrap();
        let spec = marlin_models::spec(&checkpoint).unwrap();
        for level in Level::ALL.into_iter().filter(|level| level.is_supported()) {
            let options = CpuOptions { threads: 1, level, ..CpuOptions::default() };
            let counted = Arc::new(Profiler::new(Arc::new(CpuBackend::new(options).unwrap())));
            let need = weight_memory(&checkpoint, &spec, counted.as_ref()).unwrap();
            Model::load(&checkpoint, spec.clone(), counted.clone(), &mut |_| {}).unwrap();
            let planned = need.bytes + need.in_place_bytes;
            assert_eq!(planned, counted.loaded_bytes(), "{family} {level}: {need:?}");
        }
    }
}

fn engine(model: &Arc<Model>, max_batch: usize, num_blocks: usize, chunk: usize) -> Engine {
    let options = EngineOptions {
        block_size: 4,
        max_context: Some(128),
        num_blocks: Some(num_blocks),
        cache_type: CacheType::F32,
        prefill_chunk: chunk,
        mixed_chunk: chunk,
        max_batch,
        ..EngineOptions::default()
    };
    Engine::new(model.clone(), &options).unwrap()
}

/// Greedy and sampled continuations of prefixes of `tokens`.
fn requests(tokens: &[u32]) -> Vec<Request> {
    let sampled = |seed| SamplingOptions { seed, top_p: 0.95, ..SamplingOptions::default() };
    [
        (64, 24, SamplingOptions::greedy()),
        (33, 40, sampled(1)),
        (1, 40, SamplingOptions { repetition_penalty: 1.5, ..SamplingOptions::greedy() }),
        (17, 30, sampled(2)),
    ]
    .into_iter()
    .map(|(prompt, max_tokens, sampling)| {
        let sampling = SamplingParams::new(sampling).unwrap();
        let request = Request::new(tokens[..prompt].to_vec(), sampling, vec![]);
        Request { max_tokens: Some(max_tokens), ..request }
    })
    .collect()
}

#[test]
fn answers_depend_neither_on_chunks_nor_on_company_nor_on_preemption() {
    let best = CpuOptions { threads: 1, ..CpuOptions::default() };
    let (every, some) =
        ([(1, 1), (7, 1), (16, 1), (1, 4), (7, 2), (16, 4), (64, 4)], [(7, 2), (64, 4)]);
    let everywhere = FAMILIES.map(|family| (family, best, &every[..]));
    let levels = Level::ALL.into_iter().filter(|l| l.is_supported());
    let all = levels.flat_map(|l| [(l, Activations::Auto), (l, Activations::Float)]);
    let more = all.flat_map(|(level, activations)| {
        let options = CpuOptions { threads: 1, level, activations };
        ["glm4_moe_lite", "gemma3", "qwen2"].map(|family| (family, options, &some[..]))
    });
    for (family, options, ways) in everywhere.into_iter().chain(more) {
        let (model, tokens, _) = load_on(family, options);
        let requests = requests(&tokens);
        let alone: Vec<_> = requests
            .iter()
            .flat_map(|r| answers(&mut engine(&model, 1, 32, 64), std::slice::from_ref(r)))
            .collect();
        for &(chunk, batch) in ways {
            let mut engine = engine(&model, batch, 32 * batch, chunk);
            let found = answers(&mut engine, &requests);
            assert_eq!(found, alone, "{family}, chunk {chunk}, batch {batch}, {options:?}");
            assert_eq!(engine.free_blocks(), 32 * batch);
        }
        let mut small = engine(&model, 4, 40, 16);
        assert_eq!(answers(&mut small, &requests), alone, "{family}, preempted, {options:?}");
        assert!(small.preemptions() > 0, "the pool was meant to be too small");
        assert_eq!(small.free_blocks(), 40);
        let (model, ..) = load_on(family, CpuOptions { threads: 3, ..options });
        let found = answers(&mut engine(&model, 4, 128, 16), &requests);
        assert_eq!(found, alone, "{family}, three threads, {options:?}");
    }
}

/// Quantized rows are read by blocks, and by tiles where the machine has them.
#[test]
fn answers_depend_on_no_company_over_any_cache() {
    for (family, cache_types) in [
        ("qwen2", &CacheType::ALL[..]),
        ("gemma3", &[CacheType::Q8, CacheType::K8V4]),
        ("glm4_moe_lite", &[CacheType::F16, CacheType::Bf16]),
    ] {
        let (model, tokens, _) = load(family);
        let requests = requests(&tokens);
        for &cache_type in cache_types {
            let engine = |max_batch: usize, chunk: usize| {
                let options = EngineOptions {
                    block_size: 16,
                    max_context: Some(128),
                    num_blocks: Some(8 * max_batch),
                    cache_type,
                    prefill_chunk: chunk,
                    mixed_chunk: chunk,
                    max_batch,
                    ..EngineOptions::default()
                };
                Engine::new(model.clone(), &options).unwrap()
            };
            let alone: Vec<_> = requests
                .iter()
                .flat_map(|r| answers(&mut engine(1, 64), std::slice::from_ref(r)))
                .collect();
            for (chunk, batch) in [(7, 1), (16, 4), (64, 4)] {
                let found = answers(&mut engine(batch, chunk), &requests);
                assert_eq!(found, alone, "{family}, {cache_type}, chunk {chunk}, batch {batch}");
            }
        }
    }
}

#[test]
fn a_cancelled_sequence_leaves_its_company_alone() {
    let (model, tokens, _) = load("glm4_moe_lite");
    let requests = requests(&tokens);
    let alone = answers(&mut engine(&model, 1, 32, 64), &requests[1..2]).remove(0);
    let mut engine = engine(&model, 4, 100, 16);
    let limits = engine.limits();
    let ids: Vec<_> =
        requests.iter().map(|r| engine.submit(limits.validate(r.clone()).unwrap())).collect();
    let mut outcome = Outcome::default();
    for _ in 0..8 {
        outcome.take(engine.step());
    }
    for &id in [&ids[0], &ids[2], &ids[3]] {
        assert!(engine.cancel(id));
    }
    assert_eq!(100 - engine.free_blocks(), (33 + outcome.tokens[&ids[1]].len()).div_ceil(4));
    let rest = drain(&mut engine);
    let mut answer = outcome.tokens[&ids[1]].clone();
    answer.extend(&rest.tokens[&ids[1]]);
    assert_eq!(answer, alone);
    let cancelled = |id| matches!(rest.finished[&id], FinishReason::Cancelled);
    assert!([ids[0], ids[2], ids[3]].into_iter().all(cancelled));
    assert_eq!(engine.free_blocks(), 100);
}

#[test]
fn evaluation_agrees_with_the_reference_logits() {
    for family in FAMILIES {
        let (model, tokens, reference) = load(family);
        let found = logits(model.as_ref(), &tokens).unwrap();
        let error = found.iter().zip(&reference).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(error <= 2e-4, "{family}: {error}");

        let vocab_size = model.vocab_size();
        let score = |position: usize, token: u32| {
            let row = &reference[(position - 1) * vocab_size..][..vocab_size];
            let norm = row.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
            f64::from(row[token as usize]) - norm
        };
        let options = PerplexityOptions {
            window: 64,
            score_from: 5,
            windows: Some(1),
            ..PerplexityOptions::default()
        };
        let reference_model: &dyn LanguageModel = model.as_ref();
        let report =
            perplexity(model.as_ref(), &tokens, &options, Some(reference_model), &mut |_| {})
                .unwrap();
        let expected = -(5..64).map(|p| score(p, tokens[p])).sum::<f64>() / 59.0;
        assert!((report.nll - expected).abs() < 1e-4, "{family}: {} {expected}", report.nll);
        assert_eq!(report.tokens_scored, 59);
        assert_eq!((report.kl_divergence, report.top1_agreement), (Some(0.0), Some(1.0)));

        // The true continuation is chosen exactly when it is likelier than another one. Contexts
        // shorter than 33 would use LongRoPE's short table, unlike the reference's 64 tokens.
        let choice = |tokens: &[u32]| Choice { tokens: tokens.to_vec(), characters: tokens.len() };
        let mut right = 0;
        let rows: Vec<_> = (33..60)
            .map(|at| {
                let other = (tokens[at] + 1) % vocab_size as u32;
                right += usize::from(score(at, tokens[at]) >= score(at, other));
                let choices = vec![choice(&tokens[at..=at]), choice(&[other])];
                ChoiceRow { context: tokens[..at].to_vec(), choices, gold: 0 }
            })
            .collect();
        let report = choices(model.as_ref(), &rows, &mut |_| {}).unwrap();
        assert_eq!(report.accuracy, right as f64 / 27.0, "{family}");
    }
}
