//! GGUF files of every supported architecture against transformers: `fixtures/gguf`, written by
//! `make_gguf_fixtures.py` beside it, which also shows that llama.cpp reads the same files to the
//! same logits. What is in the table of architectures and not here is tested on real files by
//! `crates/engine/tests/real_models.rs`.

use marlin_checkpoint::{Checkpoint, Container};
use marlin_cpu::{Activations, CpuBackend, CpuOptions, Level};
use marlin_models::{MixerSpec, Model, spec};
use marlin_tensor::{Batch, CacheType};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Largest difference of any logit, f32 throughout.
const TOLERANCE: f32 = 2e-4;
const BLOCK_SIZE: usize = 16;

const FILES: [&str; 12] = [
    "deepseek2_glm",
    "deepseek2_v2",
    "deepseek2_v2_rank",
    "deepseek2_v3",
    "deepseek2_v3_whole",
    "llama3",
    "llama_bias",
    "mixtral",
    "phi3_long",
    "phi3_short",
    "qwen3",
    "qwen3moe",
];

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/gguf").join(name)
}

fn logits(checkpoint: &Checkpoint, ids: &[u32]) -> Vec<f32> {
    let options = CpuOptions { threads: 1, level: Level::Scalar, activations: Activations::Float };
    let backend = Arc::new(CpuBackend::new(options).unwrap());
    let model =
        Model::load(checkpoint, spec(checkpoint).unwrap(), backend.clone(), &mut |_| {}).unwrap();
    assert!(model.unused_tensors().is_empty(), "{:?}", model.unused_tensors());
    assert!(model.spec().unread.is_empty(), "{:?}", model.spec().unread);
    let blocks = ids.len().div_ceil(BLOCK_SIZE);
    let cache = model.cache_spec(blocks, BLOCK_SIZE, CacheType::F32);
    let cache = model.backend().create_cache(&cache).unwrap();
    let table: Vec<u32> = (0..blocks as u32).collect();
    let mut batch = Batch::new(BLOCK_SIZE);
    batch.push(ids, 0, &table, ids.len() as u32, ids.len());
    model.backend().download(&model.forward(&batch, &cache).unwrap()).unwrap()
}

#[test]
fn logits_equal_transformers() {
    for name in FILES {
        let bytes = std::fs::read(path(&format!("{name}.ref.safetensors"))).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let data = |tensor: &str| file.tensor(tensor).unwrap().data().to_vec();
        let ids: Vec<u32> = data("input_ids")
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32)
            .collect();
        let expected: Vec<f32> = data("logits")
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        let checkpoint = Checkpoint::open(&path(&format!("{name}.gguf"))).unwrap();
        let found = logits(&checkpoint, &ids);
        assert_eq!(found.len(), expected.len(), "{name}");
        let worst = found
            .iter()
            .zip(&expected)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, |w: f32, d| if d.is_nan() { d } else { w.max(d) });
        println!("{name}: largest difference {worst:e}");
        assert!(worst <= TOLERANCE, "{name}: largest difference {worst:e}");
    }
}

/// The error for `file` with a metadata field set, or removed where `value` is null.
fn refusal(file: &str, field: &str, value: Value) -> String {
    let mut checkpoint = Checkpoint::open(&path(&format!("{file}.gguf"))).unwrap();
    let Container::Gguf { metadata } = &mut checkpoint.container else { panic!("not a gguf") };
    match value {
        Value::Null => metadata.remove(field),
        value => metadata.insert(field.to_owned(), value),
    };
    spec(&checkpoint).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn what_was_not_verified_is_refused() {
    for (file, field, value) in [
        ("qwen3", "general.architecture", json!("mamba")),
        ("qwen3", "qwen3.rope.scaling.type", json!("dynamic")),
        ("qwen3", "qwen3.rope.scaling.type", json!("longrope")),
        ("qwen3", "qwen3.rope.scaling.attn_factor", json!(1.2)),
        ("deepseek2_v2", "deepseek2.expert_group_count", json!(3)),
        ("deepseek2_v2", "deepseek2.expert_weights_norm", json!(true)),
        ("deepseek2_v2", "deepseek2.expert_gating_func", json!(3)),
        ("deepseek2_v3", "deepseek2.expert_group_count", Value::Null),
        ("deepseek2_v3", "deepseek2.rope.scaling.yarn_log_multiplier", Value::Null),
    ] {
        let error = refusal(file, field, value.clone());
        assert!(error.contains(field), "{file} with {field} {value}: {error}");
    }
}

#[test]
fn prediction_layers_are_not_blocks() {
    let mut checkpoint = Checkpoint::open(&path("deepseek2_glm.gguf")).unwrap();
    let Container::Gguf { metadata } = &mut checkpoint.container else { panic!("not a gguf") };
    metadata.insert("deepseek2.block_count".into(), json!(3));
    metadata.insert("deepseek2.nextn_predict_layers".into(), json!(1));
    assert_eq!(spec(&checkpoint).unwrap().blocks.len(), 2);
}

#[test]
fn gemma3_27b_divides_by_the_hidden_size_per_head() {
    for (blocks, expected) in [(62, 168f32), (34, 128.0)] {
        let mut checkpoint = Checkpoint::open(&path("qwen3.gguf")).unwrap();
        let Container::Gguf { metadata } = &mut checkpoint.container else { panic!("not a gguf") };
        *metadata = serde_json::from_value(json!({
            "general.architecture": "gemma3",
            "gemma3.vocab_size": 97,
            "gemma3.block_count": blocks,
            "gemma3.embedding_length": 5376,
            "gemma3.feed_forward_length": 21_504,
            "gemma3.attention.head_count": 32,
            "gemma3.attention.head_count_kv": 16,
            "gemma3.attention.key_length": 128,
            "gemma3.attention.sliding_window": 1024,
        }))
        .unwrap();
        let spec = spec(&checkpoint).unwrap();
        let MixerSpec::Gqa(attention) = &spec.blocks[0].mixer else { panic!("not gqa") };
        assert_eq!(attention.params.scale, expected.powf(-0.5), "{blocks} layers");
    }
}
