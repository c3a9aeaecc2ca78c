//! Shards, the index, what is copied and what is replaced.

mod common;

use common::{convert, load, options};
use marlin_checkpoint::Checkpoint;
use marlin_convert::Event;
use marlin_convert::output::{
    Module, clear, copy_sidecars, read_tensors, tensor_storage, write_tensors,
};
use marlin_tensor::{DType, HostTensor};
use marlin_testkit::tiny_model;
use serde_json::{Value, json};
use std::fs;
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
