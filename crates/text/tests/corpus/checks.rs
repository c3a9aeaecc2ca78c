//! What must hold for any bytes at all: a vocabulary or a template, or an error that names the
//! file. Used by the fuzz targets and by the test that replays what they found.

use bytes::Bytes;
use marlin_checkpoint::{Checkpoint, Container};
use marlin_text::{ChatTemplate, Specials, TemplateInputs, TextError, Tokenizer};
use serde_json::json;
use std::collections::BTreeMap;

/// Whatever a vocabulary says, it gives ids of its own for these, or an error.
const LINES: [&str; 4] = ["", "Hello, w\u{f6}rld", "ab \u{1f42d} 12\t3\n", "\u{ff21}\u{fb01}\0<s>"];

fn encode(opened: Result<Tokenizer, TextError>) {
    match opened {
        Ok(tokenizer) => {
            for line in LINES {
                for specials in [Specials::NONE, Specials::PROMPT] {
                    let Ok(ids) = tokenizer.encode(line, specials) else { continue };
                    assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
                    let _ = tokenizer.decode(&ids);
                }
            }
        }
        Err(error) => assert!(error.to_string().starts_with("fuzz"), "{error}"),
    }
}

/// `data` as `tokenizer.json`.
pub fn tokenizer(data: &[u8]) {
    let sidecars = BTreeMap::from([("tokenizer.json".into(), Bytes::copy_from_slice(data))]);
    let container = Container::HuggingFace { config: json!({}), generation_config: None };
    encode(Tokenizer::open(&Checkpoint::from_parts("fuzz".into(), container, [], sidecars)));
}

/// `data` as a GGUF file whose vocabulary is read.
pub fn vocabulary(data: &[u8]) {
    let files = [("model.gguf", Bytes::copy_from_slice(data))];
    if let Ok(checkpoint) = Checkpoint::from_memory("fuzz", &files) {
        encode(Tokenizer::open(&checkpoint));
    }
}

/// `data` as a chat template.
pub fn template(data: &[u8]) {
    let Ok(source) = std::str::from_utf8(data) else { return };
    let sources = BTreeMap::from([("default".to_owned(), source.to_owned())]);
    match ChatTemplate::new("fuzz", sources, Some("<s>".into()), None) {
        Ok(template) => {
            let messages = [json!({"role": "user", "content": "Hi"})];
            let _ = template.render(&TemplateInputs::new(&messages));
        }
        Err(error) => assert!(error.to_string().starts_with("fuzz"), "{error}"),
    }
}
