//! Development only: tiny seeded checkpoints with reference logits, and damaged files.

pub mod mutate;

use std::path::{Path, PathBuf};

/// Directory of the tiny language model `family`: `config.json`, `config_legacy.json`,
/// safetensors, and `ref.safetensors` with reference results.
pub fn tiny_model(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llm").join(family)
}
