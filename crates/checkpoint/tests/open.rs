//! Opening directories, files and embedded models: which files belong to a model.

use marlin_checkpoint::{
    Checkpoint, CheckpointError, Container, GgufTensor, GgufValue, write_gguf, write_safetensors,
};
use marlin_tensor::HostTensor;
use marlin_testkit::tiny_model;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// A model directory written for one test: `(file name, tensor names)` and `(file name, text)`.
fn directory(weights: &[(&str, &[&str])], texts: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let tensor = HostTensor::from_f32(vec![2], &[1.0, 2.0]);
    for (file, names) in weights {
        let tensors = names.iter().map(|name| (*name, &tensor));
        write_safetensors(&directory.path().join(file), tensors, &[]).unwrap();
    }
    for (file, text) in texts {
        fs::write(directory.path().join(file), text).unwrap();
    }
    directory
}

fn names(checkpoint: &Checkpoint) -> Vec<&str> {
    checkpoint.tensors().map(|t| t.name.as_str()).collect()
}

fn config(checkpoint: &Checkpoint) -> &serde_json::Value {
    let Container::HuggingFace { config, .. } = &checkpoint.container else { panic!("not gguf") };
    config
}

#[test]
fn single_file() {
    let checkpoint = Checkpoint::open(&tiny_model("llama")).unwrap();
    assert_eq!(config(&checkpoint)["model_type"], "llama");
    let embedding = checkpoint.get("model.embed_tokens.weight").unwrap();
    assert_eq!(Some(embedding.shape[1] as u64), config(&checkpoint)["hidden_size"].as_u64());
    // `ref.safetensors` lies beside it and is none of the model.
    assert!(checkpoint.tensors().all(|t| t.file.ends_with("model.safetensors")));
    checkpoint.prefetch();
}

#[test]
fn shards() {
    let whole = Checkpoint::open(&tiny_model("llama_sharded")).unwrap();
    let files: BTreeSet<_> = whole.tensors().map(|t| t.file.clone()).collect();
    assert_eq!(files.len(), 2);
    assert!(names(&whole).is_sorted());
    let bytes: u64 = whole.tensors().map(|t| t.data.len() as u64).sum();
    assert_eq!(bytes, whole.tensor_bytes());
}

const TWO: [(&str, &[&str]); 2] = [
    ("model-00001-of-00002.safetensors", &["a", "b"]),
    ("model-00002-of-00002.safetensors", &["c"]),
];
const CONFIG: (&str, &str) = ("config.json", "{}");
const EXL3: (&str, &str) = ("config.json", r#"{"quantization_config": {"quant_method": "exl3"}}"#);

#[test]
fn files_of_a_directory() {
    let index = |text| ("model.safetensors.index.json", text);
    let first = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors"}}"#;
    let rows: [(&str, tempfile::TempDir, &[&str]); 6] = [
        ("no index", directory(&TWO, &[CONFIG]), &["a", "b", "c"]),
        ("the index decides", directory(&TWO, &[CONFIG, index(first)]), &["a", "b"]),
        ("exl3 has no use for it", directory(&TWO, &[EXL3, index(first)]), &["a", "b", "c"]),
        ("nor for its syntax", directory(&TWO, &[EXL3, index("{")]), &["a", "b", "c"]),
        ("any names", directory(&[("x.safetensors", &["x"])], &[CONFIG]), &["x"]),
        ("no weights", directory(&[], &[CONFIG]), &[]),
    ];
    for (what, directory, expected) in rows {
        assert_eq!(names(&Checkpoint::open(directory.path()).unwrap()), expected, "{what}");
    }
}

#[test]
fn directories_that_contradict_themselves() {
    let index = |text| ("model.safetensors.index.json", text);
    let wrong = r#"{"weight_map": {"c": "model-00001-of-00002.safetensors",
                                   "a": "model-00002-of-00002.safetensors"}}"#;
    let unknown = r#"{"weight_map": {"z": "model-00001-of-00002.safetensors"}}"#;
    let absent = r#"{"weight_map": {"a": "model-00003-of-00003.safetensors"}}"#;
    let outside = r#"{"weight_map": {"a": "../model.safetensors"}}"#;
    let twice: [(&str, &[&str]); 2] = [("x.safetensors", &["x"]), ("y.safetensors", &["x"])];
    let rows = [
        ("weight_map, c: listed in model-00001", directory(&TWO, &[CONFIG, index(wrong)])),
        ("weight_map, z: listed in model-00001", directory(&TWO, &[CONFIG, index(unknown)])),
        ("model-00003-of-00003.safetensors: file", directory(&TWO, &[CONFIG, index(absent)])),
        ("weight_map, a: file name", directory(&TWO, &[CONFIG, index(outside)])),
        ("1 of the 2 files like model-00001", directory(&TWO[..1], &[CONFIG])),
        ("1 of the 2 files like model-00002", directory(&TWO[1..], &[EXL3])),
        ("tensor x: also stored in", directory(&twice, &[CONFIG])),
        ("config.json (or a .gguf file) not found", directory(&TWO, &[])),
        ("config.json: top level: expected", directory(&TWO, &[("config.json", "[]")])),
        ("generation_config.json: eos: ", {
            directory(&[], &[CONFIG, ("generation_config.json", r#"{"eos": tru}"#)])
        }),
    ];
    for (part, directory) in rows {
        let error = Checkpoint::open(directory.path()).expect_err(part).to_string();
        assert!(error.contains(part), "expected {part}, found {error}");
    }
    for (part, path) in [
        ("model file or directory not found", "/no/such/place"),
        ("file: neither a GGUF file", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")),
        #[cfg(unix)]
        ("file: not a regular file", "/dev/null"),
    ] {
        let error = Checkpoint::open(Path::new(path)).expect_err(part).to_string();
        assert!(error.contains(path) && error.contains(part), "expected {part}, found {error}");
    }
    let weights = tiny_model("llama").join("model.safetensors");
    let error = Checkpoint::open(&weights).unwrap_err();
    assert!(matches!(error, CheckpointError::Unsupported { .. }), "{error}");
}

#[test]
fn a_configuration_alone() {
    let checkpoint = Checkpoint::open(&tiny_model("llama").join("config_legacy.json")).unwrap();
    assert_eq!(config(&checkpoint)["model_type"], "llama");
    assert_eq!(checkpoint.tensor_bytes(), 0);
}

#[test]
fn sidecars_are_kept_as_they_are() {
    let template = "{{ messages }}";
    let directory = directory(
        &TWO,
        &[
            CONFIG,
            ("chat_template.jinja", template),
            ("tokenizer.json", "not parsed here"),
            ("generation_config.json", r#"{"temperature": 0.5}"#),
            ("README.md", "no sidecar"),
        ],
    );
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    assert_eq!(checkpoint.sidecar("chat_template.jinja").unwrap(), template);
    assert_eq!(checkpoint.sidecar("tokenizer.json").unwrap(), "not parsed here");
    assert!(checkpoint.sidecar("README.md").is_none());
    let Container::HuggingFace { generation_config, .. } = &checkpoint.container else { panic!() };
    assert_eq!(generation_config.as_ref().unwrap()["temperature"], 0.5);
}

#[test]
fn embedded() {
    let weights: &'static [u8] =
        fs::read(tiny_model("llama").join("model.safetensors")).unwrap().leak();
    let text = br#"{"model_type": "llama"}"#;
    let files =
        [("config.json", &text[..]), ("model.safetensors", weights), ("tokenizer.json", b"{}")];
    let checkpoint = Checkpoint::from_embedded("tiny", &files).unwrap();
    let on_disk = Checkpoint::open(&tiny_model("llama")).unwrap();
    assert_eq!(names(&checkpoint), names(&on_disk));
    assert!(checkpoint.tensors().zip(on_disk.tensors()).all(|(a, b)| a.data == b.data));
    assert_eq!(checkpoint.sidecar("tokenizer.json").unwrap(), "{}");
    assert_eq!(config(&checkpoint)["model_type"], "llama");

    let cut = &weights[..weights.len() - 1];
    let files = [("config.json", &text[..]), ("model.safetensors", cut)];
    let error = Checkpoint::from_embedded("tiny", &files).unwrap_err().to_string();
    assert!(error.contains("tiny/model.safetensors: tensor "), "{error}");

    let gguf: &'static [u8] =
        include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/tiny.gguf"));
    let checkpoint = Checkpoint::from_embedded("tiny", &[("m.gguf", gguf)]).unwrap();
    assert!(matches!(checkpoint.container, Container::Gguf { .. }));
}

/// Writes part `no` (from 0) of `count` to `path`, with one tensor `t{no}`.
fn part(path: &Path, no: u16, count: u16, total: i32) {
    let metadata = [
        ("general.name", GgufValue::String(format!("part {no}"))),
        ("split.no", GgufValue::U16(no)),
        ("split.count", GgufValue::U16(count)),
        ("split.tensors.count", GgufValue::I32(total)),
    ];
    let name = format!("t{no}");
    let encoding = marlin_checkpoint::Encoding::Plain(marlin_tensor::DType::F32);
    let tensor = GgufTensor { name: &name, encoding, shape: &[1], data: &[no as u8; 4] };
    write_gguf(path, &metadata, &[tensor]).unwrap();
}

#[test]
fn split_gguf() {
    let directory = tempfile::tempdir().unwrap();
    let path = |no: u16| directory.path().join(format!("m-{:05}-of-00003.gguf", no + 1));
    let fresh = || (0..3).for_each(|no| part(&path(no), no, 3, 3));
    fresh();
    let any = [path(0), path(1), path(2), directory.path().to_path_buf()];
    for opened in &any {
        let checkpoint = Checkpoint::open(opened).unwrap();
        assert_eq!(names(&checkpoint), ["t0", "t1", "t2"]);
        let Container::Gguf { metadata } = &checkpoint.container else { panic!() };
        assert_eq!(metadata["general.name"], "part 0");
    }

    type Damage<'d> = Box<dyn Fn() + 'd>;
    let rows: [(&str, Damage); 6] = [
        ("00002-of-00003.gguf: file not found", Box::new(|| fs::remove_file(path(1)).unwrap())),
        ("split.no: 0, but the file is named as part 2", Box::new(|| part(&path(1), 0, 3, 3))),
        ("split.no: expected a number below 3", Box::new(|| part(&path(1), 3, 3, 3))),
        ("split.count: differs from the 3", Box::new(|| part(&path(1), 1, 4, 3))),
        ("split.tensors.count: 4, but", Box::new(|| part(&path(0), 0, 3, 4))),
        (
            "t0: also stored in",
            Box::new(|| {
                let mut bytes = fs::read(path(1)).unwrap();
                let at = bytes.windows(2).rposition(|w| w == b"t1").unwrap();
                bytes[at + 1] = b'0';
                fs::write(path(1), bytes).unwrap();
            }),
        ),
    ];
    for (part, damage) in rows {
        fresh();
        damage();
        let error = Checkpoint::open(&path(0)).expect_err(part).to_string();
        assert!(error.contains(part), "expected {part}, found {error}");
    }

    fresh();
    let renamed = directory.path().join("renamed.gguf");
    fs::rename(path(2), &renamed).unwrap();
    let error = Checkpoint::open(&renamed).unwrap_err().to_string();
    assert!(error.contains("must be named `NAME-00003-of-00003.gguf`"), "{error}");
    let error = Checkpoint::open(directory.path()).unwrap_err().to_string();
    assert!(error.contains("m-00001-of-00003.gguf, renamed.gguf; give the path"), "{error}");
}
