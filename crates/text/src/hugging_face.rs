//! `tokenizer.json`: encoding by the `tokenizers` crate, decoding by a table of our own.
//!
//! The file's `decoder` is a pipeline over whole token lists. Everything that language models use of
//! it acts on one token at a time, except that the first token of a text may lose a space, so it is
//! compiled into bytes for each token here ([`Rules`]). Streaming and decoding at once are then the
//! same thing, which the pipeline does not promise.
//!
//! The file is checked before the crate sees it (its deserializer may panic on malformed decoders,
//! silently renumbers added tokens and takes the last of duplicate keys), and truncation and padding stored in it are switched off:
//! they belong to the training run that saved the file.

use crate::TextError;
use crate::byte_level;
use crate::tokenizer::Specials;
use crate::vocabulary::{TokenKind, Vocabulary};
use marlin_checkpoint::{CheckpointError, check_json};
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;
use std::sync::OnceLock;

/// Most values one file may hold: twice those of the largest known vocabulary, 262 thousand tokens
/// and 515 thousand merges of three values each.
const MAX_VALUES: usize = 4 << 20;
const MAX_TOKENS: usize = 1 << 20;

/// The parts of the file that are read here; the others are only checked for syntax.
#[derive(Deserialize)]
struct Header {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    decoder: Option<Value>,
    #[serde(default)]
    normalizer: Option<Value>,
    #[serde(default)]
    model: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

/// An opened `tokenizer.json`.
#[derive(Debug)]
pub(crate) struct HuggingFace {
    tokenizer: tokenizers::Tokenizer,
    /// The same, but reading special tokens in the input as plain text; made when first needed.
    literal: OnceLock<tokenizers::Tokenizer>,
}

impl HuggingFace {
    /// Parses `bytes`, the contents of `path`.
    pub(crate) fn parse(path: &Path, bytes: &[u8]) -> Result<(Self, Vocabulary), TextError> {
        check_json(path, bytes, MAX_VALUES, MAX_TOKENS).map_err(|error| checked(path, error))?;
        let header: Header =
            serde_json::from_slice(bytes).map_err(|error| syntax_error(path, bytes, &error))?;
        if header.model.is_none() {
            return Err(corrupt(path, "model", "missing"));
        }
        if let Some(normalizer) = &header.normalizer {
            check_charsmaps(path, normalizer)?;
        }
        let rules = Rules::compile(path, header.decoder.as_ref())?;
        // The crate's panics on odd but well-formed files are turned into the error they should be.
        let parsed = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(bytes))
            .map_err(|_| corrupt(path, "model", "the tokenizer library cannot build this model"))?;
        let mut tokenizer =
            parsed.map_err(|error| library_error(path, bytes, &error.to_string()))?;
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|error| corrupt(path, "truncation", &error.to_string()))?;
        let vocabulary = table(path, &tokenizer, &header.added_tokens, &rules)?;
        // What it puts around every text is written in the file beside the vocabulary.
        let around = encode(&tokenizer, "", true);
        let around = around.map_err(|reason| corrupt(path, "post_processor", &reason))?;
        if let Some(id) = around.iter().find(|id| **id as usize >= vocabulary.len()) {
            let reason = format!("it adds token {id}, but there are {} tokens", vocabulary.len());
            return Err(corrupt(path, "post_processor", &reason));
        }
        Ok((Self { tokenizer, literal: OnceLock::new() }, vocabulary))
    }

    pub(crate) fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>, TextError> {
        let tokenizer = if specials.parse {
            &self.tokenizer
        } else {
            self.literal.get_or_init(|| {
                let mut literal = self.tokenizer.clone();
                literal.set_encode_special_tokens(true);
                literal
            })
        };
        encode(tokenizer, text, specials.add).map_err(|reason| TextError::Encode { reason })
    }

    pub(crate) fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }
}

/// Ids of a text. Some files that the crate opens make it panic at a text.
fn encode(tokenizer: &tokenizers::Tokenizer, text: &str, add: bool) -> Result<Vec<u32>, String> {
    let encode = std::panic::AssertUnwindSafe(|| tokenizer.encode_fast(text, add));
    match std::panic::catch_unwind(encode) {
        Ok(Ok(encoding)) => Ok(encoding.get_ids().to_vec()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the tokenizer library fails on this text".to_owned()),
    }
}

/// Refuses maps of characters that say they are longer than they are: the crate makes room for what they say.
fn check_charsmaps(path: &Path, normalizer: &Value) -> Result<(), TextError> {
    match normalizer {
        Value::Array(list) => list.iter().try_for_each(|part| check_charsmaps(path, part)),
        Value::Object(fields) => fields.iter().try_for_each(|(key, value)| match value {
            Value::String(map) if key == "precompiled_charsmap" => {
                // What is not even as long as its size is an error of the crate's.
                let says = first_u32(map).unwrap_or(0) as usize;
                match says <= map.len() / 4 * 3 {
                    true => Ok(()),
                    false => Err(corrupt(path, key, "the trie is longer than the map")),
                }
            }
            value => check_charsmaps(path, value),
        }),
        _ => Ok(()),
    }
}

/// The first four bytes of a text in base 64, as a number, the lowest first.
fn first_u32(text: &str) -> Option<u32> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digit = |byte: &u8| Some(DIGITS.iter().position(|digit| digit == byte)? as u64);
    let digits: Option<Vec<u64>> = text.as_bytes().get(..6)?.iter().map(digit).collect();
    let bits = digits?.iter().fold(0, |bits, digit| bits << 6 | digit);
    Some(((bits >> 4) as u32).swap_bytes())
}

/// Lays the tokens out by id.
fn table(
    path: &Path,
    tokenizer: &tokenizers::Tokenizer,
    added: &[AddedToken],
    rules: &Rules,
) -> Result<Vocabulary, TextError> {
    let by_text: HashMap<String, u32> = tokenizer.get_vocab(true);
    let Some((last, &highest)) = by_text.iter().max_by_key(|(_, id)| **id) else {
        return Err(corrupt(path, "model.vocab", "there are no tokens"));
    };
    // Real vocabularies have few holes; a wild id would make the table as large as the id says.
    if highest as usize > by_text.len() * 4 + 65_536 {
        let reason =
            format!("token {last:?} has id {highest}, but there are {} tokens", by_text.len());
        return Err(corrupt(path, "model.vocab", &reason));
    }
    let mut tokens: Vec<(&str, TokenKind)> = vec![("", TokenKind::Unused); highest as usize + 1];
    for (text, &id) in &by_text {
        tokens[id as usize] = (text, TokenKind::Normal);
    }
    for (index, token) in added.iter().enumerate() {
        if token.content.is_empty() {
            continue;
        }
        let found = tokenizer.token_to_id(&token.content);
        if found != Some(token.id) {
            let reason = format!(
                "{:?} is declared with id {} but the vocabulary gives it {found:?}",
                token.content, token.id
            );
            return Err(corrupt(path, &format!("added_tokens[{index}].id"), &reason));
        }
        let kind = if token.special { TokenKind::Control } else { TokenKind::UserDefined };
        tokens[token.id as usize] = (&token.content, kind);
    }
    let mut vocabulary = Vocabulary::with_capacity(tokens.len(), rules.strip_first_space);
    for (text, kind) in tokens {
        vocabulary.push(&rules.bytes(text, kind), kind);
    }
    Ok(vocabulary)
}

/// What one token contributes to text.
#[derive(Debug, Default)]
struct Rules {
    byte_level: bool,
    byte_fallback: bool,
    replace: Vec<(String, String)>,
    strip_first_space: bool,
    /// WordPiece: prefix of tokens that continue a word, and whether to tidy punctuation.
    words: Option<(String, bool)>,
}

impl Rules {
    fn compile(path: &Path, decoder: Option<&Value>) -> Result<Self, TextError> {
        let mut rules = Self::default();
        match decoder {
            // Without a decoder tokens are joined by spaces.
            None | Some(Value::Null) => {
                rules.words = Some((String::new(), false));
                rules.strip_first_space = true;
            }
            Some(decoder) => rules.add(path, "decoder", decoder)?,
        }
        Ok(rules)
    }

    fn add(&mut self, path: &Path, field: &str, decoder: &Value) -> Result<(), TextError> {
        let kind = decoder.get("type").and_then(Value::as_str).unwrap_or_default();
        let text = |key: &str| {
            decoder
                .get(key)
                .and_then(Value::as_str)
                .ok_or_else(|| corrupt(path, &format!("{field}.{key}"), "expected a string"))
        };
        match kind {
            "Sequence" => {
                let key = format!("{field}.decoders");
                let parts = decoder.get("decoders").and_then(Value::as_array);
                let parts = parts.ok_or_else(|| corrupt(path, &key, "expected a list"))?;
                for (index, part) in parts.iter().enumerate() {
                    if part.get("type").and_then(Value::as_str) == Some("Sequence") {
                        return Err(unsupported(path, &key, "a sequence inside a sequence"));
                    }
                    self.add(path, &format!("{key}[{index}]"), part)?;
                }
            }
            "ByteLevel" => self.byte_level = true,
            "ByteFallback" => self.byte_fallback = true,
            "Fuse" => {}
            "Replace" => {
                let pattern = decoder.pointer("/pattern/String").and_then(Value::as_str);
                let pattern = pattern.filter(|p| !p.is_empty()).ok_or_else(|| {
                    unsupported(path, &format!("{field}.pattern"), "only a plain string is read")
                })?;
                self.replace.push((pattern.to_owned(), text("content")?.to_owned()));
            }
            "Strip" => {
                let number = |key: &str| decoder.get(key).and_then(Value::as_u64);
                if text("content")? != " " || number("stop") != Some(0) {
                    return Err(unsupported(path, field, "only one leading space is stripped"));
                }
                match number("start") {
                    Some(0) => {}
                    Some(1) => self.strip_first_space = true,
                    _ => {
                        return Err(unsupported(path, field, "only one leading space is stripped"));
                    }
                }
            }
            "Metaspace" => {
                self.replace.push((text("replacement")?.to_owned(), " ".to_owned()));
                let scheme = decoder.get("prepend_scheme").and_then(Value::as_str);
                let prefix = decoder.get("add_prefix_space").and_then(Value::as_bool);
                self.strip_first_space = scheme != Some("never") && prefix != Some(false);
            }
            "WordPiece" => {
                let cleanup = decoder.get("cleanup").and_then(Value::as_bool).unwrap_or(true);
                self.words = Some((text("prefix")?.to_owned(), cleanup));
                self.strip_first_space = true;
            }
            other => {
                let reason = format!(
                    "{other:?} is not supported (ByteLevel, ByteFallback, Fuse, Replace, Strip, \
                     Metaspace, WordPiece and Sequence are)"
                );
                return Err(unsupported(path, &format!("{field}.type"), &reason));
            }
        }
        Ok(())
    }

    fn bytes(&self, text: &str, kind: TokenKind) -> Vec<u8> {
        if self.byte_level {
            // Added tokens are matched in the text as they stand, before the byte-level alphabet.
            return match kind {
                TokenKind::Normal => byte_level::decode(text),
                _ => None,
            }
            .unwrap_or_else(|| text.as_bytes().to_vec());
        }
        if self.byte_fallback
            && let Some(byte) = fallback_byte(text)
        {
            return vec![byte];
        }
        let mut text = text.to_owned();
        for (from, to) in &self.replace {
            text = text.replace(from, to);
        }
        if let Some((prefix, cleanup)) = &self.words {
            text = match text.strip_prefix(prefix.as_str()).filter(|_| !prefix.is_empty()) {
                Some(rest) => rest.to_owned(),
                None => format!(" {text}"),
            };
            if *cleanup {
                text = tidy(text);
            }
        }
        text.into_bytes()
    }
}

/// The byte that a token called `<0x41>` stands for.
pub(crate) fn fallback_byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let hexadecimal = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    hexadecimal.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// English punctuation as the WordPiece decoder's `cleanup` leaves it, one token at a time.
fn tidy(text: String) -> String {
    const ATTACHED: [&str; 9] = [" .", " ?", " !", " ,", " n't", " 'm", " 's", " 've", " 're"];
    if ATTACHED.iter().any(|start| text.starts_with(start)) {
        return text[1..].to_owned();
    }
    text
}

fn syntax_error(path: &Path, bytes: &[u8], error: &serde_json::Error) -> TextError {
    let field = match serde_json::from_slice::<Value>(bytes) {
        // The syntax is right, so a field that `Header` reads has the wrong type.
        Ok(file) if !file.is_object() => "(top level)",
        Ok(file) if !file.get("added_tokens").is_none_or(Value::is_array) => "added_tokens",
        Ok(_) => "added_tokens[].{id, content, special}",
        Err(_) => "(JSON syntax)",
    };
    corrupt(path, field, &error.to_string())
}

/// The crate reports positions, not fields; the field is looked up by parsing the parts alone.
fn library_error(path: &Path, bytes: &[u8], message: &str) -> TextError {
    let Ok(Value::Object(file)) = serde_json::from_slice::<Value>(bytes) else {
        return corrupt(path, "(JSON syntax)", message);
    };
    let part = |name: &str| file.get(name).cloned().unwrap_or(Value::Null);
    // It may panic on a part alone, too, as it may on the whole.
    fn ok<T: serde::de::DeserializeOwned>(value: Value) -> bool {
        value.is_null()
            || std::panic::catch_unwind(|| serde_json::from_value::<T>(value).is_ok())
                .unwrap_or(false)
    }
    let field = if !ok::<String>(part("version")) || part("version") != "1.0" {
        "version"
    } else if !ok::<tokenizers::NormalizerWrapper>(part("normalizer")) {
        "normalizer"
    } else if !ok::<tokenizers::PreTokenizerWrapper>(part("pre_tokenizer")) {
        "pre_tokenizer"
    } else if !ok::<tokenizers::PostProcessorWrapper>(part("post_processor")) {
        "post_processor"
    } else if !ok::<tokenizers::DecoderWrapper>(part("decoder")) {
        "decoder"
    } else if !ok::<tokenizers::ModelWrapper>(part("model")) {
        "model"
    } else {
        "added_tokens"
    };
    corrupt(path, field, message)
}

fn checked(path: &Path, error: CheckpointError) -> TextError {
    match error {
        CheckpointError::Corrupt { field, reason, .. } => corrupt(path, &field, &reason),
        other => corrupt(path, "(JSON syntax)", &other.to_string()),
    }
}

fn corrupt(path: &Path, field: &str, reason: &str) -> TextError {
    TextError::Corrupt { path: path.into(), field: field.into(), reason: reason.into() }
}

fn unsupported(path: &Path, field: &str, reason: &str) -> TextError {
    TextError::Unsupported { path: path.into(), field: field.into(), reason: reason.into() }
}
