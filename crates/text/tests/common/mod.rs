//! Tokenizers for tests.

use marlin_checkpoint::{Checkpoint, Container};
use marlin_text::Tokenizer;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// A vocabulary of bytes, in order, then `words`, then `<s>`, `</s>`, `<unk>` and `controls`, which are control tokens.
/// `<|end|>` among them ends answers, too.
pub fn bytes_tokenizer(words: &[&str], controls: &[&str]) -> Tokenizer {
    let mut tokens: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    tokens.extend(words.iter().map(|word| (*word).to_owned()));
    let first = tokens.len();
    tokens.extend(["<s>", "</s>", "<unk>"].iter().chain(controls).map(|c| (*c).to_owned()));
    let kind = |id: usize| match id {
        ..256 => 6,
        _ if id < first => 1,
        _ => 3,
    };
    let Value::Object(mut metadata) = json!({
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.token_type": (0..tokens.len()).map(kind).collect::<Vec<_>>(),
        "tokenizer.ggml.scores": vec![0; tokens.len()],
        "tokenizer.ggml.bos_token_id": first,
        "tokenizer.ggml.eos_token_id": first + 1,
        "tokenizer.ggml.unknown_token_id": first + 2,
    }) else {
        unreachable!()
    };
    if let Some(end) = tokens.iter().position(|token| token == "<|end|>") {
        metadata.insert("tokenizer.ggml.eot_token_id".into(), end.into());
    }
    metadata.insert("tokenizer.ggml.tokens".into(), tokens.into());
    let container = Container::Gguf { metadata };
    let checkpoint = Checkpoint::from_parts("fuzz".into(), container, [], BTreeMap::new());
    Tokenizer::open(&checkpoint).expect("a vocabulary of our own")
}
