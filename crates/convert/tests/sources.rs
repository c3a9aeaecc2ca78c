//! What jobs start from, and what of the format they are asked for: containers, element types, codebooks, tables.

mod common;

use common::{backend, files, load, options, quantizer};
use half::f16;
use marlin_checkpoint::{Checkpoint, Container, Encoding, StoredTensor};
use marlin_convert::{Exl3Quantizer, JobOptions, Origin, Plan, allocate};
use marlin_cpu::{CpuEncoder, Level};
use marlin_models::Model;
use marlin_quant::exl3::Codebook;
use marlin_quant::exl3::codebook::MCG_MULTIPLIER;
use marlin_tensor::DType;
use marlin_testkit::tiny_model;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

fn real() -> Exl3Quantizer {
    quantizer(Arc::new(CpuEncoder::new(Level::detect(), 1)))
}

fn convert(source: &Checkpoint, quantizer: &Exl3Quantizer, options: &JobOptions) {
    let never = AtomicBool::new(false);
    let backend = backend(options.threads);
    marlin_convert::run(source, backend, quantizer, options, &|_| {}, &never).unwrap();
}

/// KL divergence of what lies in `made` from `source`.
fn divergence(source: &Checkpoint, made: &Path, family: &str) -> f64 {
    let spec = marlin_models::spec(source).unwrap();
    let original = Model::load(source, spec, backend(1), &mut |_| {}).unwrap();
    common::divergence(&original, &load(made), family)
}

/// The tiny model `family` with `change` applied to every tensor, which may become several.
fn changed(family: &str, change: &dyn Fn(&StoredTensor) -> Vec<StoredTensor>) -> Checkpoint {
    let source = Checkpoint::open(&tiny_model(family)).unwrap();
    let Container::HuggingFace { config, .. } = &source.container else { unreachable!() };
    let container = Container::HuggingFace { config: config.clone(), generation_config: None };
    let tensors: Vec<StoredTensor> = source.tensors().flat_map(change).collect();
    Checkpoint::from_parts(source.path.clone(), container, tensors, BTreeMap::new())
}

fn floats(tensor: &StoredTensor) -> Vec<f32> {
    tensor.plain().unwrap().to_f32().unwrap()
}

/// GGUF permutes the rows of q and k of the Llama family: at eight bits a model with rows in a wrong order would be
/// another one.
#[test]
fn gguf_files_with_permuted_rows_make_the_same_model() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/fixtures/gguf");
    for family in ["llama_bias", "mixtral"] {
        let directory = tempfile::tempdir().unwrap();
        let output = directory.path().join("out");
        let source = Checkpoint::open(&fixtures.join(format!("{family}.gguf"))).unwrap();
        convert(&source, &real(), &options(&source, family, &output, 8.0));
        let found = divergence(&source, &output, family);
        assert!(found < 0.01, "{family}: {found}");
    }
}

#[test]
fn f16_sources_stay_f16() {
    let source = changed("llama", &|t| {
        let half = floats(t).into_iter().flat_map(|v| f16::from_f32(v).to_le_bytes());
        let data = half.collect::<Vec<u8>>().into();
        vec![StoredTensor { encoding: Encoding::Plain(DType::F16), data, ..t.clone() }]
    });
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    convert(&source, &real(), &options(&source, "llama", &output, 8.0));
    let found = divergence(&source, &output, "llama");
    assert!(found < 0.01, "{found}");
    let made = Checkpoint::open(&output).unwrap();
    for name in ["model.embed_tokens.weight", "model.norm.weight"] {
        assert_eq!(made.get(name).unwrap().encoding, Encoding::Plain(DType::F16), "{name}");
    }
}

/// The value of an E4M3 byte: a sign, four bits of exponent, three of mantissa; no infinities.
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match exponent {
        0 => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code >> 7 == 0 { magnitude } else { -magnitude }
}

/// The E4M3 byte whose value is nearest.
fn nearest(v: f32) -> u8 {
    let distance = |code: &u8| (e4m3(*code) - v).abs();
    // All ones but the sign is no number.
    let codes = (0..=255u8).filter(|code| code & 0x7f != 0x7f);
    codes.min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap()
}

/// Matrices of blocks in FP8, as DeepSeek publishes them: codes and one scale per 128 × 128.
#[test]
fn fp8_blocks_are_a_source() {
    let family = "llama";
    let source = changed(family, &|t| {
        if !t.name.ends_with("_proj.weight") {
            return vec![t.clone()];
        }
        let values = floats(t);
        let [rows, columns] = [t.shape[0], t.shape[1]];
        let grid = [rows.div_ceil(128), columns.div_ceil(128)];
        let mut most = vec![0f32; grid[0] * grid[1]];
        let block = |i: usize| i / columns / 128 * grid[1] + i % columns / 128;
        for (i, v) in values.iter().enumerate() {
            most[block(i)] = most[block(i)].max(v.abs());
        }
        let scales: Vec<f32> = most.iter().map(|m| m / 448.0).collect();
        let code = |(i, v): (usize, &f32)| nearest(v / scales[block(i)]);
        let codes: Vec<u8> = values.iter().enumerate().map(code).collect();
        let scales: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        let encoding = Encoding::Plain(DType::F8E4M3);
        vec![
            StoredTensor { encoding, data: codes.into(), ..t.clone() },
            StoredTensor {
                name: format!("{}_scale_inv", t.name),
                encoding: Encoding::Plain(DType::F32),
                shape: grid.to_vec(),
                data: scales.into(),
                ..t.clone()
            },
        ]
    });
    let origin = Origin::open(&source).unwrap();
    let plan = Plan::new(&origin.output, origin.mtp);
    assert_eq!(origin.left_out(&plan).unwrap().tensors, [""; 0]);
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    convert(&source, &real(), &options(&source, family, &output, 8.0));
    let found = divergence(&source, &output, family);
    assert!(found < 0.01, "{found}");
    let made = Checkpoint::open(&output).unwrap();
    assert!(!made.tensors().any(|t| t.name.ends_with("_scale_inv")));
}

/// Every codebook through a whole job: its marker is stored and named, and the model is the same one.
#[test]
fn every_codebook_makes_a_model() {
    let mcg = Codebook::Mcg(MCG_MULTIPLIER);
    for (codebook, name, marker) in
        [(mcg, "mcg", Some("mcg")), (Codebook::ThreeInst, "3inst", None)]
    {
        let directory = tempfile::tempdir().unwrap();
        let output = directory.path().join("out");
        let source = Checkpoint::open(&tiny_model("qwen3")).unwrap();
        let origin = Origin::open(&source).unwrap();
        let plan = Plan::new(&origin.output, origin.mtp);
        let mut options = options(&source, "qwen3", &output, 6.0);
        options.bits = allocate::rule(&plan, &allocate::rates(codebook), 6.0, 6.0).unwrap();
        convert(&source, &Exl3Quantizer { codebook, ..real() }, &options);
        let found = divergence(&source, &output, "qwen3");
        assert!(found < 0.05, "{name}: {found}");
        let made = Checkpoint::open(&output).unwrap();
        let key = "model.layers.0.self_attn.q_proj";
        for part in ["mcg", "mul1"] {
            let stored = made.get(&format!("{key}.{part}")).is_some();
            assert_eq!(stored, marker == Some(part), "{name}: {part}");
        }
        let config = std::fs::read(output.join("config.json")).unwrap();
        let config: Value = serde_json::from_slice(&config).unwrap();
        assert_eq!(config["quantization_config"]["codebook"], json!(name));
    }
}

#[test]
fn the_embedding_is_quantized_when_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    let source = Checkpoint::open(&tiny_model("qwen3")).unwrap();
    let mut options = options(&source, "qwen3", &output, 8.0);
    options.embedding_bits = Some(8);
    convert(&source, &real(), &options);
    let made = Checkpoint::open(&output).unwrap();
    assert!(made.get("model.embed_tokens.trellis").is_some());
    assert!(made.get("model.embed_tokens.weight").is_none());
    let found = divergence(&source, &output, "qwen3");
    assert!(found < 0.05, "{found}");
}

/// The encoder that jobs use, with feedback and fits: the same bytes for one thread and for three.
#[test]
fn threads_do_not_change_a_byte_of_the_real_encoder() {
    for family in ["llama", "qwen3_moe"] {
        let made = [1, 3].map(|threads| {
            let directory = tempfile::tempdir().unwrap();
            let output = directory.path().join("out");
            let source = Checkpoint::open(&tiny_model(family)).unwrap();
            let mut options = options(&source, family, &output, 2.5);
            (options.threads, options.jobs) = (threads, threads);
            options.embedding_bits = Some(4);
            convert(&source, &real(), &options);
            files(&output)
        });
        assert!(made[0] == made[1], "{family}");
    }
}
