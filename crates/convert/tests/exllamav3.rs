//! What is made has the tensors, names, types and descriptions that exllamav3 writes and loads.
//!
//! The lists are those of glm-stories as exllamav3 1.6.5 made it (`python -m exllamav3.conversion.convert_model
//! -b 3.0 -hb 6`): a model with latent attention, a dense block, routed and shared experts, and a prediction layer.
//! Numbers of blocks and experts are written `N`.

mod common;

use common::{convert, options};
use marlin_checkpoint::{Checkpoint, Encoding};
use marlin_convert::exl3::PADDING;
use marlin_convert::{Origin, Plan, Role};
use marlin_quant::exl3::codebook::MUL1_MULTIPLIER;
use marlin_tensor::DType;
use marlin_testkit::{FAMILIES, tiny_model};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// Of each: `.trellis` I16 of three dimensions, `.suh` and `.svh` F16 of one, `.mul1` I32 of none.
const LINEARS: [&str; 15] = [
    "lm_head",
    "model.layers.N.eh_proj",
    "model.layers.N.mlp.down_proj",
    "model.layers.N.mlp.experts.N.down_proj",
    "model.layers.N.mlp.experts.N.gate_proj",
    "model.layers.N.mlp.experts.N.up_proj",
    "model.layers.N.mlp.gate_proj",
    "model.layers.N.mlp.shared_experts.down_proj",
    "model.layers.N.mlp.shared_experts.gate_proj",
    "model.layers.N.mlp.shared_experts.up_proj",
    "model.layers.N.mlp.up_proj",
    "model.layers.N.self_attn.kv_a_proj_with_mqa",
    "model.layers.N.self_attn.o_proj",
    "model.layers.N.self_attn.q_a_proj",
    "model.layers.N.self_attn.q_b_proj",
];

/// The rest. Types are those of a bf16 source.
const PLAIN: [(&str, &str, usize); 12] = [
    ("model.embed_tokens.weight", "bfloat16", 2),
    ("model.layers.N.enorm.weight", "bfloat16", 1),
    ("model.layers.N.hnorm.weight", "bfloat16", 1),
    ("model.layers.N.input_layernorm.weight", "bfloat16", 1),
    ("model.layers.N.mlp.gate.e_score_correction_bias", "float32", 1),
    ("model.layers.N.mlp.gate.weight", "float16", 2),
    ("model.layers.N.post_attention_layernorm.weight", "bfloat16", 1),
    ("model.layers.N.self_attn.kv_a_layernorm.weight", "bfloat16", 1),
    ("model.layers.N.self_attn.kv_b_proj.weight", "float16", 2),
    ("model.layers.N.self_attn.q_a_layernorm.weight", "bfloat16", 1),
    ("model.layers.N.shared_head.norm.weight", "bfloat16", 1),
    ("model.norm.weight", "bfloat16", 1),
];

/// Fields of `quantization_config`.
const FIELDS: [&str; 8] = [
    "quant_method",
    "version",
    "bits",
    "head_bits",
    "calibration",
    "out_scales",
    "codebook",
    "mtp_bits",
];

fn fields(config: &Value) -> BTreeSet<&str> {
    config["quantization_config"].as_object().unwrap().keys().map(String::as_str).collect()
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The type of a stored tensor in torch's words.
fn torch(encoding: Encoding) -> &'static str {
    match encoding {
        Encoding::Plain(DType::I16) => "int16",
        Encoding::Plain(DType::I32) => "int32",
        Encoding::Plain(DType::F16) => "float16",
        Encoding::Plain(DType::BF16) => "bfloat16",
        Encoding::Plain(DType::F32) => "float32",
        other => panic!("{other:?} is no type of exllamav3's"),
    }
}

fn pattern(name: &str) -> String {
    let part = |part: &str| match part.parse::<usize>() {
        Ok(_) => "N".to_owned(),
        Err(_) => part.to_owned(),
    };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

#[test]
fn the_tensors_are_those_that_exllamav3_makes_of_the_same_kind_of_model() {
    let directory = tempfile::tempdir().unwrap();
    let family = "glm4_moe_lite";
    let source = Checkpoint::open(&tiny_model(family)).unwrap();
    let output = directory.path().join("out");
    convert(&source, &options(&source, family, &output, 3.0), &|_| {}, &AtomicBool::new(false))
        .unwrap();
    let made = Checkpoint::open(&output).unwrap();
    let found: BTreeSet<(String, &str, usize)> =
        made.tensors().map(|t| (pattern(&t.name), torch(t.encoding), t.shape.len())).collect();
    let of_linear = |key: &&str| {
        [
            ("trellis", "int16", 3),
            ("suh", "float16", 1),
            ("svh", "float16", 1),
            ("mul1", "int32", 0),
        ]
        .map(|(part, dtype, rank)| (format!("{key}.{part}"), dtype, rank))
    };
    let plain = PLAIN.iter().map(|&(name, dtype, rank)| (name.to_owned(), dtype, rank));
    let expected: BTreeSet<_> = LINEARS.iter().flat_map(of_linear).chain(plain).collect();
    let differ: Vec<_> = found.symmetric_difference(&expected).collect();
    assert!(differ.is_empty(), "{differ:?}");
    let config = read(&output.join("config.json"));
    assert_eq!(fields(&config), BTreeSet::from(FIELDS));
}

#[test]
fn every_architecture_is_stored_and_described_as_exllamav3_reads_it() {
    for family in FAMILIES {
        let directory = tempfile::tempdir().unwrap();
        let source = Checkpoint::open(&tiny_model(family)).unwrap();
        let output = directory.path().join("out");
        let options = options(&source, family, &output, 2.3);
        convert(&source, &options, &|_| {}, &AtomicBool::new(false)).unwrap();
        let made = Checkpoint::open(&output).unwrap();

        // The table names every stored tensor, and no other.
        let table = read(&output.join("quantization_config.json"));
        let modules = table["tensor_storage"].as_object().unwrap();
        let mut stored = BTreeMap::new();
        for (key, module) in modules {
            for (name, about) in module["stored_tensors"].as_object().unwrap() {
                assert!(name.starts_with(&format!("{key}.")), "{family}: {name} in {key}");
                stored.insert(name.clone(), about.clone());
            }
        }
        let found: BTreeMap<String, Value> = made
            .tensors()
            .map(|t| {
                let about =
                    json!({"shape": t.shape, "n_bytes": t.data.len(), "dtype": format!("torch.{}", torch(t.encoding))});
                (t.name.clone(), about)
            })
            .collect();
        assert_eq!(stored, found, "{family}");

        // The matrices: padded, in tiles, one rate a group, marked.
        let origin = Origin::open(&source).unwrap();
        let plan = Plan::new(&origin.output, origin.mtp);
        for target in &plan.targets {
            let key = origin.output_key(&target.spec);
            let (k, n) = (target.spec.in_features, target.spec.out_features);
            let (k, n) = (k.next_multiple_of(PADDING), n.next_multiple_of(PADDING));
            let bits = options.bits[target.group];
            let tensor = |part: &str| made.get(&format!("{key}.{part}"));
            let shape = |part: &str| tensor(part).map(|t| (torch(t.encoding), t.shape.clone()));
            let words = (16.0 * bits) as usize;
            let trellis = vec![k / 16, n / 16, words];
            assert_eq!(shape("trellis"), Some(("int16", trellis)), "{family}: {key}");
            assert_eq!(shape("suh"), Some(("float16", vec![k])), "{family}: {key}");
            assert_eq!(shape("svh"), Some(("float16", vec![n])), "{family}: {key}");
            assert_eq!(shape("mul1"), Some(("int32", vec![])), "{family}: {key}");
            assert_eq!(tensor("mul1").unwrap().data[..], MUL1_MULTIPLIER.to_le_bytes());
            assert_eq!(tensor("bias").is_some(), target.spec.bias, "{family}: {key}");
            if target.spec.bias {
                assert_eq!(shape("bias"), Some(("float16", vec![n])), "{family}: {key}");
            }
            assert!(tensor("weight").is_none(), "{family}: {key}");
            let about = &modules[&key];
            let whole = bits.fract() == 0.0;
            let told = if whole { json!(bits as u64) } else { json!(bits) };
            assert_eq!(about["bits_per_weight"], told, "{family}: {key}");
            assert_eq!(about["quant_format"], "exl3", "{family}: {key}");
            assert_eq!(about["mul1_multiplier"], MUL1_MULTIPLIER, "{family}: {key}");
        }
        let others = modules.iter().filter(|(_, m)| m.get("quant_format").is_some()).count();
        assert_eq!(others, plan.targets.len(), "{family}: nothing else says it is EXL3");

        // What libraries select the reader by.
        let config = read(&output.join("config.json"));
        assert_eq!(config["tie_word_embeddings"], false, "{family}");
        let quantization = &config["quantization_config"];
        let mut same = table.clone();
        same.as_object_mut().unwrap().remove("tensor_storage");
        assert_eq!(*quantization, same, "{family}");
        let ahead = plan.groups.iter().any(|g| g.role == Role::Prediction);
        let expected = FIELDS.into_iter().filter(|f| ahead || *f != "mtp_bits");
        assert_eq!(fields(&config), expected.collect(), "{family}");
        assert_eq!(quantization["quant_method"], "exl3", "{family}");
        assert!(quantization["bits"].is_f64() && quantization["head_bits"].is_u64(), "{family}");
        let calibration = &options.calibration;
        let rows = json!({"rows": calibration.rows.len(), "cols": calibration.columns()});
        assert_eq!(quantization["calibration"], rows, "{family}");
        assert_eq!(quantization["out_scales"], "always", "{family}");
    }
}
