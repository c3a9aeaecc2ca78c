//! A GGUF vocabulary as the files of a Hugging Face directory.
//!
//! `tokenizer.json` gives `tokenizers`, and what is built on it, the ids that [`Tokenizer`] computes
//! from the GGUF file itself; a vocabulary for which no `tokenizer.json` does is refused. All tokens,
//! holes included, stand in the model's vocabulary under their ids, so that the table is as long as
//! the model's own; those that are looked for in the text are listed as added tokens too.
//!
//! Formats: `tokenizers` 0.23 for `tokenizer.json`, `transformers` 4 and 5 for the others.
//!
//! [`Tokenizer`]: crate::Tokenizer

use crate::TextError;
use crate::ggml::{AddedToken, Exported, Pipeline};
use crate::template;
use marlin_checkpoint::{Checkpoint, Container};
use serde::ser::{SerializeMap, SerializeSeq};
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

/// Files that give a GGUF's vocabulary to programs that read Hugging Face directories:
/// `tokenizer.json`, `tokenizer_config.json`, and `chat_template.jinja` if the file has a template.
/// A file with several templates has them in `tokenizer_config.json`, the only place for names.
///
/// Of the tokens that end a text only one has a place in these files; `generation_config.json` takes
/// the rest ([`Tokenizer::end_ids`](crate::Tokenizer::end_ids)).
///
/// # Errors
/// When `checkpoint` is no GGUF file, its vocabulary is damaged, or no `tokenizer.json` computes the
/// same ids.
pub fn hugging_face_files(checkpoint: &Checkpoint) -> Result<Vec<(String, Vec<u8>)>, TextError> {
    let Container::Gguf { metadata } = &checkpoint.container else {
        return Err(TextError::Unsupported {
            path: checkpoint.path.clone(),
            field: "tokenizer.ggml.model".into(),
            reason: "this is no GGUF file; copy the tokenizer files of the directory".into(),
        });
    };
    let vocabulary = Exported::parse(&checkpoint.path, metadata)?;
    let mut templates = template::gguf_sources(&checkpoint.path, metadata)?;
    let only = if templates.len() == 1 { templates.remove(template::DEFAULT) } else { None };
    let mut config = vocabulary.tokenizer_config();
    if !templates.is_empty() {
        let named = |(name, template)| json!({ "name": name, "template": template });
        config["chat_template"] = templates.into_iter().map(named).collect();
    }
    let files = [
        ("tokenizer.json".to_owned(), serde_json::to_vec(&vocabulary.tokenizer_json())),
        ("tokenizer_config.json".to_owned(), serde_json::to_vec_pretty(&config)),
    ];
    let written = |bytes: serde_json::Result<Vec<u8>>| bytes.expect("strings and numbers are JSON");
    let mut files: Vec<(String, Vec<u8>)> =
        files.into_iter().map(|(name, bytes)| (name, written(bytes))).collect();
    files.extend(only.map(|source| ("chat_template.jinja".to_owned(), source.into_bytes())));
    Ok(files)
}

/// `tokenizer.json`, in the order of the package that defines it.
#[derive(Serialize)]
struct TokenizerJson<'a> {
    version: &'static str,
    truncation: (),
    padding: (),
    added_tokens: Vec<Value>,
    normalizer: &'a Value,
    pre_tokenizer: &'a Value,
    post_processor: Value,
    decoder: &'a Value,
    model: BpeModel<'a>,
}

#[derive(Serialize)]
struct BpeModel<'a> {
    r#type: &'static str,
    dropout: (),
    unk_token: Option<&'a str>,
    continuing_subword_prefix: (),
    end_of_word_suffix: (),
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: Ids<'a>,
    merges: Merges<'a>,
}

/// Text to id, in the order of ids.
struct Ids<'a>(&'a [String]);

impl Serialize for Ids<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (id, text) in self.0.iter().enumerate() {
            map.serialize_entry(text, &id)?;
        }
        map.end()
    }
}

/// Pairs of texts.
struct Merges<'a> {
    tokens: &'a [String],
    pairs: &'a [(u32, u32)],
}

impl Serialize for Merges<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.pairs.len()))?;
        for &(left, right) in self.pairs {
            list.serialize_element(&[&self.tokens[left as usize], &self.tokens[right as usize]])?;
        }
        list.end()
    }
}

impl Exported {
    fn text(&self, id: Option<u32>) -> Option<&str> {
        id.map(|id| self.tokens[id as usize].as_str())
    }

    fn tokenizer_json(&self) -> TokenizerJson<'_> {
        let Pipeline { normalizer, pre_tokenizer, decoder, .. } = &self.pipeline;
        let added = self.added.iter().map(|token| {
            let mut fields = json!({ "id": token.id });
            fields.as_object_mut().expect("made here").extend(self.added_token(token));
            fields
        });
        TokenizerJson {
            version: "1.0",
            truncation: (),
            padding: (),
            added_tokens: added.collect(),
            normalizer,
            pre_tokenizer,
            post_processor: self.post_processor(),
            decoder,
            model: BpeModel {
                r#type: "BPE",
                dropout: (),
                unk_token: self.text(self.pipeline.unknown),
                continuing_subword_prefix: (),
                end_of_word_suffix: (),
                fuse_unk: false,
                byte_fallback: self.pipeline.byte_fallback,
                ignore_merges: self.pipeline.ignore_merges,
                vocab: Ids(&self.tokens),
                merges: Merges { tokens: &self.tokens, pairs: &self.pipeline.merges },
            },
        }
    }

    fn added_token(&self, token: &AddedToken) -> serde_json::Map<String, Value> {
        let fields = json!({
            "content": self.tokens[token.id as usize],
            "single_word": false,
            "lstrip": token.lstrip,
            "rstrip": token.rstrip,
            "normalized": false,
            "special": token.special,
        });
        let Value::Object(fields) = fields else { unreachable!("written as an object") };
        fields
    }

    /// Adds the tokens around a text.
    fn post_processor(&self) -> Value {
        let bos = self.special.bos.filter(|_| self.special.add_bos);
        let eos = self.special.eos.filter(|_| self.special.add_eos);
        if bos.is_none() && eos.is_none() {
            return Value::Null;
        }
        let around = |sequence: &str, segment: u32| {
            let special = |id: Option<u32>| {
                let text = self.text(id)?;
                Some(json!({ "SpecialToken": { "id": text, "type_id": segment } }))
            };
            let text = json!({ "Sequence": { "id": sequence, "type_id": segment } });
            special(bos).into_iter().chain([text]).chain(special(eos)).collect::<Vec<Value>>()
        };
        let mut special_tokens = serde_json::Map::new();
        for id in bos.into_iter().chain(eos) {
            let text = &self.tokens[id as usize];
            special_tokens
                .insert(text.clone(), json!({ "id": text, "ids": [id], "tokens": [text] }));
        }
        let pair = [around("A", 0), around("B", 1)].concat();
        json!({
            "type": "TemplateProcessing",
            "single": around("A", 0),
            "pair": pair,
            "special_tokens": special_tokens,
        })
    }

    fn tokenizer_config(&self) -> Value {
        let special = &self.special;
        let added: serde_json::Map<String, Value> = self
            .added
            .iter()
            .map(|token| (token.id.to_string(), self.added_token(token).into()))
            .collect();
        let mut config = json!({
            "add_bos_token": special.add_bos,
            "add_eos_token": special.add_eos,
            "added_tokens_decoder": added,
            "bos_token": self.text(special.bos),
            "clean_up_tokenization_spaces": false,
            "eos_token": self.text(special.eos),
            "model_input_names": ["input_ids", "attention_mask"],
            "pad_token": self.text(self.padding),
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": self.text(special.unknown),
        });
        if let Some(length) = self.context_length {
            config["model_max_length"] = length.into();
        }
        config
    }
}
