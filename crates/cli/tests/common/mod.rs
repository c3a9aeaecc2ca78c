//! What the tests of the command line share.
#![allow(dead_code, reason = "each test program uses a part")]

pub mod quantize;

use marlin_testkit::tiny_model;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

/// A tokenizer of single characters: the 97 ids of the tiny models.
pub fn tokenizer() -> Value {
    let mut vocab = serde_json::Map::new();
    for (id, c) in (' '..='~').chain(['\n', '\u{FFFD}']).enumerate() {
        vocab.insert(c.to_string(), json!(id));
    }
    json!({
        "version": "1.0",
        "added_tokens": [],
        "model": { "type": "BPE", "unk_token": "\u{FFFD}", "vocab": vocab, "merges": [] },
    })
}

/// A text of `lines` lines that it reads.
pub fn text(path: &Path, lines: usize) {
    let line = "A small mouse was not afraid of the big cat, and the cat was surprised.\n";
    fs::write(path, line.repeat(lines)).unwrap();
}

/// The tiny model with that tokenizer, and a text.
pub fn source(directory: &Path) -> (PathBuf, PathBuf) {
    source_of("llama", directory)
}

/// The tiny model `family` with that tokenizer, and a text.
pub fn source_of(family: &str, directory: &Path) -> (PathBuf, PathBuf) {
    let model = directory.join("model");
    fs::create_dir(&model).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(tiny_model(family).join(name), model.join(name)).unwrap();
    }
    fs::write(model.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    fs::write(model.join("notes.txt"), "kept").unwrap();
    let path = directory.join("text.txt");
    text(&path, 20);
    (model, path)
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
