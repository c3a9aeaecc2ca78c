//! Shards, the index, what is copied and what is replaced.

mod common;

use common::{convert, divergence, load, options};
use marlin_checkpoint::{Checkpoint, Container, Encoding, StoredTensor};
use marlin_convert::options::KEPT;
use marlin_convert::origin::{LeftOut, half};
use marlin_convert::output::{
    Module, clear, copy_sidecars, read_tensors, tensor_storage, write_tensors,
};
use marlin_convert::{Event, Origin, Plan, Role};
use marlin_tensor::{DType, HostTensor};
use marlin_testkit::{FAMILIES, tiny_model};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

fn module(key: &str, bytes: usize) -> Module {
    let tensor = HostTensor::new(DType::F16, vec![bytes / 2], vec![1; bytes].into()).unwrap();
    (key.to_owned(), vec![(format!("{key}.weight"), tensor)])
}

#[test]
fn shards_are_cut_between_modules_and_indexed() {
    let directory = tempfile::tempdir().unwrap();
    let modules = [module("a", 600), module("b", 600), module("c", 300), module("d", 5000)];
    write_tensors(directory.path(), &modules, 1000).unwrap();
    let index = fs::read(directory.path().join("model.safetensors.index.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    assert_eq!(index["metadata"]["total_size"], 6500);
    let file =
        |key: &str| index["weight_map"][format!("{key}.weight")].as_str().unwrap().to_owned();
    assert_eq!(file("a"), "model-00001-of-00003.safetensors");
    assert_eq!((file("b"), file("d")), (file("c"), "model-00003-of-00003.safetensors".to_owned()));

    let read = read_tensors(directory.path()).unwrap();
    let names: Vec<&str> = read.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["a.weight", "b.weight", "c.weight", "d.weight"]);
    fs::remove_file(directory.path().join("model-00002-of-00003.safetensors")).unwrap();
    assert!(read_tensors(directory.path()).is_err());

    fs::write(directory.path().join("config.json"), "{}").unwrap();
    fs::write(directory.path().join("tokenizer.json"), "{}").unwrap();
    clear(directory.path()).unwrap();
    let left: Vec<_> =
        fs::read_dir(directory.path()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(left, ["tokenizer.json"]);
}

#[test]
fn only_what_is_not_weights_is_copied() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for name in [
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        ".hidden",
        "merges.txt",
        "x.jinja",
    ] {
        fs::write(from.path().join(name), name).unwrap();
    }
    fs::create_dir(from.path().join("folder")).unwrap();
    copy_sidecars(from.path(), to.path()).unwrap();
    let mut names: Vec<_> =
        fs::read_dir(to.path()).unwrap().flatten().map(|e| e.file_name()).collect();
    names.sort();
    assert_eq!(names, ["merges.txt", "x.jinja"]);
}

/// The fields that other programs read, as exllamav3 1.6.5 writes them.
#[test]
fn configurations_say_what_other_readers_expect() {
    let directory = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&tiny_model("qwen2")).unwrap();
    let output = directory.path().join("out");
    let options = options(&source, "qwen2", &output, 2.5);
    convert(&source, &options, &|_| {}, &AtomicBool::new(false)).unwrap();
    let read = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(output.join(name)).unwrap()).unwrap()
    };
    let (config, table) = (read("config.json"), read("quantization_config.json"));
    assert_eq!(config["tie_word_embeddings"], false);
    let quantization = &config["quantization_config"];
    assert_eq!(quantization["quant_method"], "exl3");
    assert_eq!(quantization["head_bits"], 6);
    assert_eq!(quantization["codebook"], "mul1");
    let module = &table["tensor_storage"]["model.layers.0.self_attn.k_proj"];
    assert_eq!(module["quant_format"], "exl3");
    assert_eq!(module["mul1_multiplier"], 0x83dc_d12du32);
    let trellis = &module["stored_tensors"]["model.layers.0.self_attn.k_proj.trellis"];
    assert_eq!(trellis["dtype"], "torch.int16");
    assert!(module["stored_tensors"].get("model.layers.0.self_attn.k_proj.bias").is_some());
    let marker = &module["stored_tensors"]["model.layers.0.self_attn.k_proj.mul1"];
    assert_eq!(marker, &json!({"shape": [], "n_bytes": 4, "dtype": "torch.int32"}));
    load(&output);

    let plain = tensor_storage(&json!({}), &[module_of_one("model.norm")]);
    assert!(plain["tensor_storage"]["model.norm"].get("quant_format").is_none());
}

fn module_of_one(key: &str) -> Module {
    module(key, 8)
}

/// The configuration was written before the weights were read back: killed in between, a job left a directory
/// that looked finished and was not verified.
#[test]
fn a_directory_has_no_configuration_until_it_is_verified() {
    let directory = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&tiny_model("llama")).unwrap();
    let output = directory.path().join("out");
    let options = options(&source, "llama", &output, 2.5);
    let never = AtomicBool::new(false);
    let weights = output.join("model.safetensors");
    let damage = |event: Event| {
        if matches!(event, Event::Verifying) {
            assert!(!output.join("config.json").exists());
            // Another file of the same size: the last byte of the last tensor is another one.
            let mut bytes = fs::read(&weights).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::remove_file(&weights).unwrap();
            fs::write(&weights, bytes).unwrap();
        }
    };
    let error = convert(&source, &options, &damage, &never).unwrap_err().to_string();
    assert!(error.contains("differs after writing"), "{error}");
    assert!(!output.join("config.json").exists() && !weights.exists());

    // Nothing was lost: the next run only writes.
    let seen = Mutex::new(Vec::new());
    let note = |event: Event| seen.lock().unwrap().push(event);
    convert(&source, &options, &note, &never).unwrap();
    let seen = seen.into_inner().unwrap();
    assert!(!seen.iter().any(|e| matches!(e, Event::Matrix(_))), "{seen:?}");
    assert!(output.join("config.json").exists() && !output.join(".quantize").exists());
}

/// `--head-bits 16` was refused. exllamav3 leaves the output projection in fp16 then, on its own also where the source ties it.
#[test]
fn a_head_of_sixteen_bits_stays_as_it_is() {
    for family in ["qwen2", "glm4_moe_lite"] {
        let directory = tempfile::tempdir().unwrap();
        let source = Checkpoint::open(&tiny_model(family)).unwrap();
        let output = directory.path().join("out");
        let mut options = options(&source, family, &output, 8.0);
        let origin = Origin::open(&source).unwrap();
        let plan = Plan::new(&origin.output, origin.mtp);
        let head = plan.groups.iter().position(|g| g.role == Role::Head).unwrap();
        options.bits[head] = KEPT;
        let report = convert(&source, &options, &|_| {}, &AtomicBool::new(false)).unwrap();
        assert_eq!(report.head_stored_bits, 16.0, "{family}");
        assert!(report.tensors.iter().any(|t| t.key == "lm_head" && t.bits == 16.0), "{family}");

        let made = Checkpoint::open(&output).unwrap();
        let of_head: Vec<_> = made.tensors().filter(|t| t.name.starts_with("lm_head")).collect();
        assert_eq!(of_head.len(), 1, "{family}");
        let stored = of_head[0];
        assert_eq!(
            (stored.name.as_str(), stored.encoding),
            ("lm_head.weight", Encoding::Plain(DType::F16))
        );
        let spec = &origin.output.head.linear;
        assert_eq!(stored.shape, [spec.out_features, spec.in_features], "{family}: no padding");
        let own = half(stored.shape.clone(), &origin.matrix(spec).unwrap().data);
        assert!(stored.data == *own.bytes(), "{family}");

        let read = |name: &str| -> Value {
            serde_json::from_slice(&fs::read(output.join(name)).unwrap()).unwrap()
        };
        let (config, table) = (read("config.json"), read("quantization_config.json"));
        assert_eq!(config["quantization_config"]["head_bits"], 16);
        assert_eq!(config["tie_word_embeddings"], false);
        let size = 2 * spec.out_features * spec.in_features;
        let weight = json!({"shape": stored.shape, "n_bytes": size, "dtype": "torch.float16"});
        let module = json!({"stored_tensors": {"lm_head.weight": weight}});
        assert_eq!(table["tensor_storage"]["lm_head"], module, "{family}");
        let divergence = divergence(&load(&tiny_model(family)), &load(&output), family);
        // What the quick encoder of the tests reaches.
        assert!(divergence < 0.5, "{family}: {divergence}");

        options.tied = true;
        options.output = directory.path().join("tied");
        let refused = convert(&source, &options, &|_| {}, &AtomicBool::new(false));
        assert!(refused.unwrap_err().to_string().starts_with("--tied"), "{family}");
    }
}

/// As exllamav3 1.6.5 writes them for GLM-4.7-Flash's kind: the bits of the prediction layer, and the correction
/// bias among what the router's module stores.
#[test]
fn routers_and_prediction_layers_are_described_as_exllamav3_does() {
    let directory = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&tiny_model("glm4_moe_lite")).unwrap();
    let output = directory.path().join("out");
    let mut options = options(&source, "glm4_moe_lite", &output, 2.0);
    let origin = Origin::open(&source).unwrap();
    let plan = Plan::new(&origin.output, origin.mtp);
    for (group, bits) in plan.groups.iter().zip(&mut options.bits) {
        if group.role == Role::Prediction {
            *bits = 4.0;
        }
    }
    convert(&source, &options, &|_| {}, &AtomicBool::new(false)).unwrap();
    let read = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(output.join(name)).unwrap()).unwrap()
    };
    let (config, table) = (read("config.json"), read("quantization_config.json"));
    assert_eq!(config["quantization_config"]["mtp_bits"], 4);
    assert_eq!(table["mtp_bits"], 4);
    let storage = table["tensor_storage"].as_object().unwrap();
    let gates: Vec<_> = storage.iter().filter(|(key, _)| key.ends_with(".mlp.gate")).collect();
    assert!(!gates.is_empty());
    for (key, module) in gates {
        let stored = &module["stored_tensors"];
        let bias = &stored[format!("{key}.e_score_correction_bias")];
        let experts = bias["shape"][0].as_u64().unwrap();
        let about = json!({"shape": [experts], "n_bytes": 4 * experts, "dtype": "torch.float32"});
        assert_eq!(*bias, about, "{key}");
        assert_eq!(stored[format!("{key}.weight")]["dtype"], "torch.float16", "{key}");
    }
    assert!(!storage.keys().any(|key| key.ends_with("e_score_correction_bias")));
}

/// Tensors without a place in the output were dropped without a word.
#[test]
fn what_has_no_place_in_the_output_is_told() {
    let dropped = |source: &Checkpoint| {
        let origin = Origin::open(source).unwrap();
        origin.left_out(&Plan::new(&origin.output, origin.mtp)).unwrap()
    };
    let gguf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/fixtures/gguf");
    let gguf = ["llama_bias", "mixtral", "qwen3moe", "deepseek2_v3", "deepseek2_glm"]
        .map(|name| gguf.join(format!("{name}.gguf")));
    for path in FAMILIES.map(tiny_model).into_iter().chain(gguf) {
        let source = Checkpoint::open(&path).unwrap();
        let mut dropped = dropped(&source).tensors;
        // Copies of the trunk's tables in the prediction layer, which shares them in what is made.
        let copies = [".embed_tokens.weight", ".shared_head.head.weight"];
        dropped.retain(|name| !copies.iter().any(|copy| name.ends_with(copy)));
        assert_eq!(dropped, [""; 0], "{}", path.display());
    }
    let source = Checkpoint::open(&tiny_model("llama")).unwrap();
    let Container::HuggingFace { config, .. } = &source.container else { unreachable!() };
    let with = |names: &[&str], config: &Value| {
        let mut tensors: Vec<StoredTensor> = source.tensors().cloned().collect();
        for name in names {
            tensors.push(StoredTensor { name: (*name).to_owned(), ..tensors[0].clone() });
        }
        let container = Container::HuggingFace { config: config.clone(), generation_config: None };
        Checkpoint::from_parts(source.path.clone(), container, tensors, BTreeMap::new())
    };
    // The last two are of a part that the configuration does not have: nothing was said of them.
    let names = [
        "model.layers.0.self_attn.sinks",
        "model.layers.7.mlp.up_proj.weight",
        "multi_modal_projector.linear.weight",
        "vision_tower.layers.0.mlp.fc1.weight",
    ];
    let bytes = 4 * source.tensors().next().unwrap().data.len() as u64;
    let tensors = names.map(str::to_owned).to_vec();
    assert_eq!(dropped(&with(&names, config)), LeftOut { tensors, bytes });

    let mut seeing = config.clone();
    seeing["vision_config"] = json!({"hidden_size": 8});
    let source = with(&[], &seeing);
    let refused = Origin::open(&source).err().unwrap().to_string();
    assert!(refused.contains("vision_config") && refused.contains("text-only"), "{refused}");
}
