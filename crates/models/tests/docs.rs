//! The page of models says what the code does.

use marlin_models::{ARCHITECTURES, Architecture, GGUF_ARCHITECTURES};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// `model_type` of every tiny checkpoint, with the name of its folder.
fn families() -> Vec<(String, String)> {
    let folders = fs::read_dir(repository().join("crates/testkit/fixtures/llm")).unwrap();
    let mut found = Vec::new();
    for folder in folders.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
        let config = fs::read(folder.join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        found.push((config["model_type"].as_str().unwrap().to_owned(), name));
    }
    found.sort();
    found
}

fn list<'t>(names: impl Iterator<Item = &'t str>) -> String {
    let quoted: Vec<String> = names.map(|name| format!("`{name}`")).collect();
    if quoted.is_empty() { "–".to_owned() } else { quoted.join(", ") }
}

/// Tiny checkpoints of `architecture`.
fn compared<'t>(
    architecture: &'t Architecture,
    families: &'t [(String, String)],
) -> impl Iterator<Item = &'t str> {
    let mine = |model_type: &str| architecture.model_types.contains(&model_type);
    families.iter().filter(move |(t, _)| mine(t)).map(|(_, name)| name.as_str())
}

fn page() -> String {
    let mut page = String::from(
        "# Models\n\n\
         Written by `crates/models/tests/docs.rs`; do not edit.\n\n\
         A model is described by its `config.json`, or by the metadata of a GGUF file, and by nothing\n\
         else. A field that is absent takes the model class's documented default, which `marlin inspect`\n\
         prints; a value that is not supported is an error that names it.\n\n\
         \"Compared\" lists the tiny seeded checkpoints in `crates/testkit/fixtures/llm` whose logits of 64\n\
         tokens, at every position, and chosen experts must equal transformers' in f32\n\
         (`crates/models/tests/parity.rs`).\n\n\
         The model inside the binary: [glm-stories.md](glm-stories.md).\n\n\
         | models | `model_type` | GGUF architecture | compared |\n\
         | --- | --- | --- | --- |\n",
    );
    let families = families();
    for architecture in &ARCHITECTURES {
        let gguf = GGUF_ARCHITECTURES.iter().filter(|g| architecture.model_types.contains(&g.1));
        let types = list(architecture.model_types.iter().copied());
        let gguf = list(gguf.map(|g| g.0));
        let compared = list(compared(architecture, &families));
        writeln!(page, "| {} | {types} | {gguf} | {compared} |", architecture.name).unwrap();
    }
    page.push_str(
        "\nA GGUF file of architecture `llama` that has experts is Mixtral. The other rows without a GGUF\n\
         architecture are read from safetensors only.\n",
    );
    page
}

#[test]
fn the_page_of_models_is_current() {
    let committed = repository().join("docs/models/README.md");
    let fresh = page();
    if fs::read_to_string(&committed).unwrap_or_default() != fresh {
        let written = Path::new(env!("CARGO_TARGET_TMPDIR")).join("models.md");
        fs::write(&written, fresh).unwrap();
        panic!("out of date: cp {} {}", written.display(), committed.display());
    }
}

#[test]
fn every_architecture_is_compared_with_transformers() {
    let families = families();
    for architecture in &ARCHITECTURES {
        for model_type in architecture.model_types {
            // `gemma3` is the configuration around `gemma3_text`.
            let known = families.iter().any(|(t, _)| t == model_type) || *model_type == "gemma3";
            assert!(known, "{model_type} has no tiny checkpoint");
        }
    }
}
