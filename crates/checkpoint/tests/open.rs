//! Opening directories, files and embedded models.

use marlin_checkpoint::{Checkpoint, Container};
use marlin_testkit::tiny_model;

#[test]
fn single_file() {
    let checkpoint = Checkpoint::open(&tiny_model("llama")).unwrap();
    let Container::HuggingFace { config, .. } = &checkpoint.container else { panic!() };
    assert_eq!(config["model_type"], "llama");
    let embedding = checkpoint.get("model.embed_tokens.weight").unwrap();
    assert_eq!(Some(embedding.shape[1] as u64), config["hidden_size"].as_u64());
    // `ref.safetensors` lies beside it and is none of the model.
    assert!(checkpoint.tensors().all(|t| t.file.ends_with("model.safetensors")));
    checkpoint.prefetch();
}

#[test]
fn shards() {
    let whole = Checkpoint::open(&tiny_model("llama_sharded")).unwrap();
    let files: std::collections::BTreeSet<_> = whole.tensors().map(|t| t.file.clone()).collect();
    assert_eq!(files.len(), 2);
    let names: Vec<_> = whole.tensors().map(|t| &t.name).collect();
    assert!(names.is_sorted());
    let bytes: u64 = whole.tensors().map(|t| t.data.len() as u64).sum();
    assert_eq!(bytes, whole.tensor_bytes());
}
