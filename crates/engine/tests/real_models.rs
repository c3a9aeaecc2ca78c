//! Real GGUF files against two other programs. `fixtures/greedy_*.json` (written by
//! `make_greedy_fixtures.py` there) hold continuations by llama.cpp and by transformers in f32 from
//! the dequantized weights; `docs/measurements/perplexity_reference.json` holds perplexities by
//! transformers. Run with
//!
//! ```text
//! MARLIN_TEST_MODELS=DIR MARLIN_TEST_TEXT=wiki.test.raw \
//!     cargo test --release -p marlin-engine --test real_models -- --nocapture --test-threads 1
//! ```
//!
//! Without the variables, or without a model's file, the rows are skipped.

mod common;

use common::answers;
use marlin_checkpoint::Checkpoint;
use marlin_cpu::{Activations, CpuBackend, CpuOptions};
use marlin_engine::evaluate::{PerplexityOptions, logits, perplexity};
use marlin_engine::{
    Engine, EngineOptions, LanguageModel, Request, SamplingOptions, SamplingParams,
};
use marlin_models::Model;
use marlin_tensor::CacheType;
use marlin_text::{Specials, Tokenizer};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MODELS: [&str; 3] = ["smollm2-135m-q4_1", "qwen2.5-coder-0.5b-q4_k_m", "gemma3-270m-q4_k_m"];

/// Of the rows on which llama.cpp and transformers agree, the share that must be equal here too.
const EQUAL: f64 = 0.9;
/// Largest difference of a first-token logit from transformers' f32: only the order of sums.
const LOGIT_TOLERANCE: f32 = 1e-3;
/// Relative difference of perplexity.
const PERPLEXITY_TOLERANCE: f64 = 0.005;

fn json(path: &Path) -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

/// The model's file, or why there is none.
fn model_file(name: &str) -> Option<PathBuf> {
    let Some(folder) = std::env::var_os("MARLIN_TEST_MODELS") else {
        println!("skipped {name}: MARLIN_TEST_MODELS does not name a folder of models");
        return None;
    };
    let path = Path::new(&folder).join(format!("{name}.gguf"));
    if !path.exists() {
        println!("skipped {name}: {} does not exist", path.display());
        return None;
    }
    Some(path)
}

fn load(path: &Path) -> (Checkpoint, Arc<Model>) {
    let checkpoint = Checkpoint::open(path).unwrap();
    let spec = marlin_models::spec(&checkpoint).unwrap();
    let options = CpuOptions { activations: Activations::Float, ..CpuOptions::default() };
    let backend = Arc::new(CpuBackend::new(options).unwrap());
    let model = Model::load(&checkpoint, spec, backend, &mut |_| {}).unwrap();
    (checkpoint, Arc::new(model))
}

fn ids(row: &Value, field: &str) -> Vec<u32> {
    let list = row[field].as_array().unwrap_or_else(|| panic!("{field} is missing"));
    list.iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

/// Largest difference of the stored logits, `[[id, logit], ...]`, from `found`.
fn largest_difference(row: &Value, field: &str, found: &[f32]) -> f32 {
    let stored = row[field].as_array().unwrap();
    let difference = |pair: &Value| {
        let expected = pair[1].as_f64().unwrap() as f32;
        (found[pair[0].as_u64().unwrap() as usize] - expected).abs()
    };
    stored.iter().map(difference).fold(0.0, f32::max)
}

#[test]
fn greedy_continuations_equal_the_references() {
    for name in MODELS {
        let Some(path) = model_file(name) else { continue };
        let (_, model) = load(&path);
        let fixture = json(Path::new(&format!("fixtures/greedy_{name}.json")));
        let rows = fixture["prompts"].as_array().unwrap();
        let options = EngineOptions {
            max_context: Some(512),
            num_blocks: Some(rows.len() * 32),
            cache_type: CacheType::F32,
            max_batch: rows.len(),
            ..EngineOptions::default()
        };
        let mut engine = Engine::new(model.clone(), &options).unwrap();
        let sampling = SamplingParams::new(SamplingOptions::greedy()).unwrap();
        let request = |row: &Value| {
            let request = Request::new(ids(row, "prompt_ids"), sampling.clone(), vec![]);
            Request { max_tokens: Some(64), ..request }
        };
        let requests: Vec<_> = rows.iter().map(request).collect();
        let found = answers(&mut engine, &requests);

        let (mut agreed, mut equal, mut as_float, mut as_llama) = (0, 0, 0, 0);
        let (mut from_float, mut from_llama) = (0f32, 0f32);
        for (row, found) in rows.iter().zip(&found) {
            let (llama, float) = (ids(row, "ids"), ids(row, "float_ids"));
            let (is_llama, is_float) = (found.starts_with(&llama), found.starts_with(&float));
            as_llama += usize::from(is_llama);
            as_float += usize::from(is_float);
            agreed += usize::from(llama == float);
            equal += usize::from(llama == float && is_float);
            if !is_float {
                let at = float.iter().zip(found).take_while(|(a, b)| a == b).count();
                let gap = &row["float_gaps"][at];
                println!("{name}: {} parts at token {at}, where the gap is {gap}", row["prompt"]);
            }
            let prompt = ids(row, "prompt_ids");
            let all = logits(model.as_ref(), &prompt).unwrap();
            let last = &all[all.len() - model.vocab_size()..];
            from_float = from_float.max(largest_difference(row, "float_first_logits", last));
            from_llama = from_llama.max(largest_difference(row, "first_logits", last));
        }
        println!(
            "{name}: {equal} of {agreed} prompts on which both references agree; of all {}: \
             {as_float} as transformers, {as_llama} as llama.cpp; first logits within {from_float} \
             of transformers, {from_llama} of llama.cpp",
            rows.len()
        );
        assert!(agreed > 0 && equal as f64 >= EQUAL * f64::from(agreed as u32), "{name}");
        assert!(from_float <= LOGIT_TOLERANCE, "{name}: first logits differ by {from_float}");
    }
}

#[test]
fn perplexity_equals_the_float_reference() {
    let Some(text) = std::env::var_os("MARLIN_TEST_TEXT") else {
        println!("skipped: MARLIN_TEST_TEXT does not name wiki.test.raw");
        return;
    };
    let text = std::fs::read_to_string(text).unwrap();
    let reference = json(Path::new("../../docs/measurements/perplexity_reference.json"));
    let results = reference["results"].as_array().unwrap();
    for name in MODELS {
        let Some(path) = model_file(name) else { continue };
        let file = format!("{name}.gguf");
        let expected = results.iter().find(|r| r["model"] == file.as_str()).unwrap();
        let (checkpoint, model) = load(&path);
        let tokenizer = Tokenizer::open(&checkpoint).unwrap();
        let tokens = tokenizer.encode(&text, Specials::NONE).unwrap();
        assert_eq!(tokens.len() as u64, expected["tokens_in_file"].as_u64().unwrap(), "{name}");
        let first = ids(expected, "first_ids");
        assert_eq!(tokens[..first.len()], first, "{name}");
        let size = |field: &str| expected[field].as_u64().unwrap() as usize;
        let options = PerplexityOptions {
            window: size("window"),
            score_from: size("score_from"),
            windows: Some(size("windows")),
            ..PerplexityOptions::default()
        };
        let report = perplexity(model.as_ref(), &tokens, &options, None, &mut |_| {}).unwrap();
        let expected = expected["perplexity"].as_f64().unwrap();
        let relative = report.perplexity / expected - 1.0;
        println!(
            "{name}: perplexity {}, transformers {expected}: {relative:+.2e}",
            report.perplexity
        );
        assert!(relative.abs() <= PERPLEXITY_TOLERANCE, "{name}: {relative}");
    }
}
