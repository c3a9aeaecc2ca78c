//! The profiler: what it records nests and adds up, and it changes no result.

use marlin_checkpoint::Checkpoint;
use marlin_cpu::{CpuBackend, CpuOptions};
use marlin_engine::EngineError;
use marlin_engine::profile::{Profiler, Shape};
use marlin_models::Model;
use marlin_tensor::{Backend, Batch, CacheType};
use marlin_testkit::tiny_model;
use serde_json::Value;
use std::sync::Arc;

const BLOCK_SIZE: usize = 4;
const PROMPT: usize = 12;

fn load(family: &str, backend: Arc<dyn Backend>) -> Model {
    let checkpoint = Checkpoint::open(&tiny_model(family)).unwrap();
    let spec = marlin_models::spec(&checkpoint).unwrap();
    Model::load(&checkpoint, spec, backend, &mut |_| {}).unwrap()
}

/// Runs a pass under a name.
type Pass<'a> = &'a dyn Fn(&str, &dyn Fn() -> Vec<f32>) -> Vec<f32>;

/// Logits of a prompt and of one more token, each step inside `pass`.
fn answer(model: &Model, pass: Pass) -> Vec<f32> {
    let cache = model.cache_spec(PROMPT, BLOCK_SIZE, CacheType::F32);
    let cache = model.backend().create_cache(&cache).unwrap();
    let table: Vec<u32> = (0..PROMPT as u32).collect();
    let step = |start: usize, count: usize| {
        let mut batch = Batch::new(BLOCK_SIZE);
        let tokens: Vec<u32> = (start..start + count).map(|i| i as u32 % 50).collect();
        batch.push(&tokens, start, &table, 4 * PROMPT as u32, 1);
        let logits = model.forward(&batch, &cache).unwrap();
        model.backend().download(&logits).unwrap()
    };
    let mut logits = pass("prompt", &|| step(0, PROMPT));
    logits.extend(pass("token", &|| step(PROMPT, 1)));
    logits
}

#[test]
fn calls_nest_in_passes_and_their_times_add_up() {
    for family in ["llama", "qwen3_moe", "glm4_moe_lite"] {
        let plain = Arc::new(CpuBackend::new(CpuOptions::default()).unwrap());
        let profiler = Arc::new(Profiler::new(plain.clone()));
        let expected = answer(&load(family, plain), &|_, step| step());
        let model = load(family, profiler.clone());
        assert!(profiler.loaded_bytes() > 1000, "{family}");
        // Nothing is recorded outside passes.
        assert_eq!(answer(&model, &|_, step| step()), expected, "{family}");
        assert!(profiler.take().rows().is_empty(), "{family}");

        let pass = |name: &str, step: &dyn Fn() -> Vec<f32>| {
            profiler.pass(name, || Ok::<_, EngineError>(step())).unwrap()
        };
        assert_eq!(answer(&model, &pass), expected, "{family}");
        let failed: Result<(), &str> = profiler.pass("failed", || Err("no"));
        assert_eq!(failed, Err("no"));
        let profile = profiler.take();
        assert!(profiler.take().rows().is_empty(), "{family}: taken once");

        let rows = profile.rows();
        for name in ["prompt", "token"] {
            let own: Vec<_> = rows.iter().filter(|row| row.pass == name).collect();
            let share: f64 = own.iter().map(|row| row.share).sum();
            assert!((share - 1.0).abs() < 1e-6, "{family} {name}: {share}");
            for operator in ["embed", "linear_many", "linear", "attention", "rms_norm", "download"]
            {
                let found = own.iter().any(|row| row.operator == operator);
                assert!(
                    found || (operator == "linear_many" && family != "llama"),
                    "{family} {operator}"
                );
            }
            let linear = own.iter().find(|row| row.operator == "linear").unwrap();
            assert!(linear.kernel.is_some() && linear.gigabytes_per_second > Some(0.0));
            let attention = own.iter().find(|row| row.operator == "attention").unwrap();
            let expected = if name == "prompt" { PROMPT } else { 1 };
            assert!(
                matches!(attention.shape, Some(Shape::Attention { rows, .. }) if rows == expected),
                "{family} {name}: {attention:?}"
            );
        }
        assert!(rows.iter().all(|row| row.pass != "failed"));
        check_trace(family, &profile, rows.iter().map(|row| row.seconds).sum());
    }
}

/// Every operator lies inside a pass and after the one before it.
fn check_trace(family: &str, profile: &marlin_engine::profile::Profile, seconds: f64) {
    let mut text = Vec::new();
    profile.write_trace(&mut text).unwrap();
    let trace: Value = serde_json::from_slice(&text).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let number = |event: &Value, field: &str| event[field].as_f64().unwrap();
    // Microseconds, printed exactly to the nanosecond but summed in floating point.
    let slack = 1e-2;
    let mut open: Option<(f64, f64)> = None;
    let (mut wall, mut last, mut passes, mut inside) = (0.0, 0.0, 0, 0.0);
    for event in events.iter().filter(|event| event["ph"] == "X") {
        assert_eq!((&event["pid"], &event["tid"]), (&1.into(), &1.into()));
        let (start, length) = (number(event, "ts"), number(event, "dur"));
        assert!(start + slack >= last, "{family}: {event} starts before {last}");
        match event["cat"].as_str().unwrap() {
            "pass" => {
                open = Some((start, start + length));
                (wall, last, passes) = (wall + length, start, passes + 1);
            }
            "operator" => {
                let (begin, end) = open.expect("a pass comes first");
                assert!(
                    start + slack >= begin && start + length <= end + slack,
                    "{family}: {event}"
                );
                assert!(event["args"]["shape"].is_string(), "{event}");
                (last, inside) = (start + length, inside + length);
            }
            other => panic!("{other}"),
        }
    }
    assert_eq!(passes, 2);
    assert!(inside <= wall && (wall / 1e6 - seconds).abs() < 1e-6, "{inside} {wall} {seconds}");
}
