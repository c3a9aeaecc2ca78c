//! A GGUF vocabulary as the stages of a `tokenizer.json`.
//!
//! Each algorithm says in its own module how those stages reach the ids that it computes itself
//! ([`Bpe::pipeline`](super::bpe::Bpe::pipeline), [`Spm::pipeline`](super::spm::Spm::pipeline)).
//!
//! One rule has no counterpart there: special tokens claim text longest first here and leftmost
//! first in `tokenizers`, so texts in which two different ones overlap are cut differently.

use super::metadata::Metadata;
use super::{Algorithm, Ggml, MODEL};
use crate::TextError;
use crate::special::SpecialTokens;
use crate::vocabulary::TokenKind;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Stages of a `tokenizer.json` whose model is BPE. A stage that is null does nothing.
#[derive(Debug)]
pub(crate) struct Pipeline {
    pub normalizer: Value,
    pub pre_tokenizer: Value,
    pub decoder: Value,
    /// Pairs of tokens, the first merge first.
    pub merges: Vec<(u32, u32)>,
    /// Stands for a character without a token; without it the character is left out.
    pub unknown: Option<u32>,
    /// A character without a token becomes its bytes' `<0x41>` tokens.
    pub byte_fallback: bool,
    /// A word that is a token is never merged from parts.
    pub ignore_merges: bool,
}

/// A token that is looked for in the text before anything else happens to it.
#[derive(Debug)]
pub(crate) struct AddedToken {
    pub id: u32,
    pub special: bool,
    pub lstrip: bool,
    pub rstrip: bool,
}

/// What a Hugging Face directory says about a vocabulary.
#[derive(Debug)]
pub(crate) struct Exported {
    /// Texts by id.
    pub tokens: Vec<String>,
    /// Ascending.
    pub added: Vec<AddedToken>,
    pub pipeline: Pipeline,
    pub special: SpecialTokens,
    pub padding: Option<u32>,
    /// Tokens the model was trained to read.
    pub context_length: Option<u64>,
}

impl Exported {
    /// Reads `map`, the metadata of `path`.
    ///
    /// # Errors
    /// When the vocabulary is damaged, or no `tokenizer.json` reaches the same ids.
    pub(crate) fn parse(path: &Path, map: &Map<String, Value>) -> Result<Self, TextError> {
        let metadata = Metadata { path, map };
        let (ggml, _, special) = Ggml::parse(path, map)?;
        let pipeline = match &ggml.algorithm {
            Algorithm::Bpe(bpe) => bpe.pipeline(&metadata)?,
            Algorithm::Spm(spm) => spm.pipeline(&metadata, &ggml.tokens, special.unknown)?,
            Algorithm::Unigram(_) | Algorithm::WordPiece(_) => {
                let reason = "only gpt2, gemma4 and llama vocabularies can be written as \
                              tokenizer.json; put the original model's tokenizer.json into the \
                              directory instead";
                return Err(metadata.unsupported(MODEL, reason));
            }
        };
        let mut added: Vec<AddedToken> = ggml
            .partition
            .tokens()
            .map(|(id, strip)| AddedToken {
                id,
                special: ggml.tokens.kinds[id as usize] != TokenKind::UserDefined,
                lstrip: strip.left,
                rstrip: strip.right,
            })
            .collect();
        added.sort_unstable_by_key(|token| token.id);
        let padding = metadata.id("tokenizer.ggml.padding_token_id", ggml.tokens.len())?;
        let architecture = metadata.text("general.architecture")?.unwrap_or_default();
        let context_length =
            map.get(&format!("{architecture}.context_length")).and_then(Value::as_u64);
        let tokens = ggml.tokens.texts;
        Ok(Self { tokens, added, pipeline, special, padding, context_length })
    }
}

/// The stage that replaces `from` by `to`, in a text or in a token.
pub(super) fn replace(from: &str, to: &str) -> Value {
    json!({ "type": "Replace", "pattern": { "String": from }, "content": to })
}

/// `stages` one after the other, as the field `field` of a sequence, or the only one alone.
pub(super) fn sequence(field: &str, mut stages: Vec<Value>) -> Value {
    match stages.len() {
        0 => Value::Null,
        1 => stages.remove(0),
        _ => json!({ "type": "Sequence", field: stages }),
    }
}

/// The decoder of vocabularies that write spaces as `▁` and bytes as `<0x41>`.
pub(super) fn marked_decoder(strip_first_space: bool) -> Value {
    let mut stages = vec![
        replace("\u{2581}", " "),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if strip_first_space {
        stages.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    sequence("decoders", stages)
}
