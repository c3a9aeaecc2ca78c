//! The memory of a whole job, of a model that is several times larger. One test in a process of its own, since
//! memory is counted per process.
#![cfg(target_os = "linux")]

mod common;

use common::{Greedy, convert_with, options};
use marlin_checkpoint::{Checkpoint, write_safetensors};
use marlin_convert::Calibration;
use marlin_tensor::{DType, HostTensor};
use marlin_testkit::Noise;
use serde_json::json;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const HIDDEN: usize = 256;
const WIDE: usize = 768;
const LAYERS: usize = 96;
const VOCAB: usize = 16_384;
const LIMIT: u64 = 84 << 20;

/// A model of the Llama family with noise for weights, f32.
fn write_model(directory: &Path) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": WIDE, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": VOCAB, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
        "hidden_act": "silu", "dtype": "float32",
    });
    std::fs::write(directory.join("config.json"), config.to_string()).unwrap();
    // One stretch of noise serves all: what is in the weights does not matter here.
    let mut noise = Noise(3);
    let values: Vec<u8> =
        (0..VOCAB * HIDDEN).flat_map(|_| (noise.uniform() * 0.05).to_le_bytes()).collect();
    let values = bytes::Bytes::from(values);
    let matrix = |rows: usize, columns: usize| {
        let bytes = values.slice(..rows * columns * 4);
        HostTensor::new(DType::F32, vec![rows, columns], bytes).unwrap()
    };
    let norm = || HostTensor::from_f32(vec![HIDDEN], &[1.0; HIDDEN]);
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), matrix(VOCAB, HIDDEN)),
        ("lm_head.weight".to_owned(), matrix(VOCAB, HIDDEN)),
        ("model.norm.weight".to_owned(), norm()),
    ];
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        for part in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            tensors.push((name(&format!("self_attn.{part}")), matrix(HIDDEN, HIDDEN)));
        }
        tensors.push((name("mlp.gate_proj"), matrix(WIDE, HIDDEN)));
        tensors.push((name("mlp.up_proj"), matrix(WIDE, HIDDEN)));
        tensors.push((name("mlp.down_proj"), matrix(HIDDEN, WIDE)));
        tensors.push((name("input_layernorm"), norm()));
        tensors.push((name("post_attention_layernorm"), norm()));
    }
    let tensors = tensors.iter().map(|(name, t)| (name.as_str(), t));
    write_safetensors(&directory.join("model.safetensors"), tensors, &[]).unwrap();
}

/// Bytes of this process that are not the pages of a file.
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn a_model_four_times_larger_than_the_limit_is_made_within_it() {
    let directory = tempfile::tempdir().unwrap();
    // Written by a process of its own: what it takes is not the job's.
    if let Some(to) = std::env::var_os("MARLIN_TEST_WRITE_MODEL") {
        return write_model(Path::new(&to));
    }
    let written = std::process::Command::new(std::env::current_exe().unwrap())
        .env("MARLIN_TEST_WRITE_MODEL", directory.path())
        .status();
    assert!(written.unwrap().success());
    let source = Checkpoint::open(directory.path()).unwrap();
    assert!(source.tensor_bytes() > 4 * LIMIT, "{}", source.tensor_bytes());
    let output = directory.path().join("out");
    let mut noise = Noise(5);
    let mut options = options(&source, "llama", &output, 1.0);
    // Fewest candidates for the encoder: memory does not depend on it.
    options.bits.fill(1.0);
    let mut row = || (0..64).map(|_| (noise.bits() % VOCAB as u64) as u32).collect();
    options.calibration = Calibration { rows: (0..2).map(|_| row()).collect() };
    options.max_memory = Some(LIMIT);
    (options.threads, options.jobs) = (2, 2);

    let (most, done) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                most.fetch_max(memory(), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let made =
            convert_with(Arc::new(Greedy), &source, &options, &|_| {}, &AtomicBool::new(false));
        done.store(true, Ordering::Relaxed);
        made.unwrap();
    });
    let most = most.into_inner();
    eprintln!("{most} bytes at most, {LIMIT} allowed");
    assert!(most < LIMIT, "{most} bytes, {LIMIT} allowed");
    // Half of it is refused before anything is done.
    let tight = directory.path().join("tight");
    options.output.clone_from(&tight);
    options.max_memory = Some(LIMIT / 2);
    let made = convert_with(Arc::new(Greedy), &source, &options, &|_| {}, &AtomicBool::new(false));
    let message = made.unwrap_err().to_string();
    assert!(message.contains("--max-memory allows"), "{message}");
}
