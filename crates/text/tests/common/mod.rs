//! Tokenizers for tests.

use marlin_checkpoint::{Checkpoint, Container};
use marlin_text::Tokenizer;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// A vocabulary of `count` tokens as trained ones have them: bytes, words and parts of words in several scripts, with and without
/// a space before them, numbers, and what code and JSON are made of. The same in every run.
#[allow(dead_code)]
pub fn large_vocabulary(count: usize) -> Tokenizer {
    const SYLLABLES: [&str; 40] = [
        "a", "an", "ar", "be", "ca", "co", "de", "di", "e", "en", "er", "es", "for", "ge", "he",
        "i", "in", "ing", "ion", "is", "ka", "la", "le", "li", "ma", "men", "mo", "na", "o", "on",
        "pre", "ra", "re", "s", "st", "ta", "te", "ti", "un", "y",
    ];
    const MARKS: [&str; 24] = [
        "\"", "'", "{", "}", "[", "]", "(", ")", ":", ",", ".", ";", "=", "\\", "/", "_", "-", "<",
        ">", "\n", "\u{2581}", "0", "true", "null",
    ];
    let mut state = 1u64;
    let mut below = |end: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % end
    };
    let mut words = BTreeSet::new();
    while words.len() < count - 256 - 4 {
        let mut word = if below(2) == 0 { "\u{2581}".to_owned() } else { String::new() };
        match below(20) {
            // Mostly letters, as everywhere.
            0..13 => {
                let syllables: String = (0..1 + below(4)).map(|_| SYLLABLES[below(40)]).collect();
                match below(5) {
                    0 => word.push_str(&syllables.to_uppercase()),
                    1 => {
                        word.push(char::from(b'A' + below(26) as u8));
                        word.push_str(&syllables);
                    }
                    _ => word.push_str(&syllables),
                }
            }
            13..15 => (0..1 + below(4)).for_each(|_| word.push_str(MARKS[below(24)])),
            15 => (0..1 + below(3)).for_each(|_| word.push(char::from(b'0' + below(10) as u8))),
            script => {
                let (first, letters) =
                    [(0x4E00, 6_000), (0x430, 32), (0x620, 40), (0xAC00, 4_000)][script - 16];
                for _ in 0..1 + below(3) {
                    word.extend(char::from_u32(first + below(letters) as u32));
                }
            }
        }
        words.insert(word);
    }
    let words: Vec<&str> =
        words.iter().map(String::as_str).filter(|word| !word.is_empty()).collect();
    bytes_tokenizer(&words, &["<|end|>"])
}

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
