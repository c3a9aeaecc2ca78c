//! Which ids begin and end a text.

use crate::TextError;
use marlin_checkpoint::{Checkpoint, Container};
use serde_json::Value;
use std::path::Path;

/// Ids of the tokens around a text, and whether [`crate::Specials::add`] adds them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct SpecialTokens {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// Ends a text that was begun by `bos` where that is not `eos` (`[SEP]`).
    pub sep: Option<u32>,
    /// Stands for text without a token.
    pub unknown: Option<u32>,
    /// Sorted, without duplicates.
    pub end: Vec<u32>,
    pub add_bos: bool,
    pub add_eos: bool,
}

impl SpecialTokens {
    /// Collects the ids of a Hugging Face directory. A `tokenizer_config.json` with
    /// `add_bos_token` or `add_eos_token` true adds the token where the post-processor of
    /// `tokenizer.json` has not (DeepSeek-V3 ships such a pair).
    pub(crate) fn of_directory(
        checkpoint: &Checkpoint,
        vocab_size: usize,
        token_id: impl Fn(&str) -> Option<u32>,
    ) -> Result<Self, TextError> {
        let path = &checkpoint.path;
        let settings = match checkpoint.sidecar("tokenizer_config.json") {
            Some(bytes) => parse_json(&path.join("tokenizer_config.json"), bytes)?,
            None => Value::Null,
        };
        let named = |key: &str| -> Result<Option<u32>, TextError> {
            let token = match settings.get(key) {
                None | Some(Value::Null) => return Ok(None),
                Some(Value::String(token)) => Some(token.as_str()),
                Some(object) => object.get("content").and_then(Value::as_str),
            };
            let id = token.and_then(&token_id).ok_or_else(|| TextError::Corrupt {
                path: path.join("tokenizer_config.json"),
                field: key.into(),
                reason: format!("{token:?} is not in the vocabulary of tokenizer.json"),
            })?;
            Ok(Some(id))
        };
        let flag = |key: &str| settings.get(key).and_then(Value::as_bool).unwrap_or(false);
        let mut special = Self {
            bos: named("bos_token")?,
            eos: named("eos_token")?,
            add_bos: flag("add_bos_token"),
            add_eos: flag("add_eos_token"),
            ..Self::default()
        };
        let mut end: Vec<u32> = special.eos.into_iter().collect();
        if let Container::HuggingFace { config, generation_config } = &checkpoint.container {
            let ids = |value: Option<&Value>, file: &str, key: &str| {
                ids(value, vocab_size).map_err(|reason| TextError::Corrupt {
                    path: path.join(file),
                    field: key.into(),
                    reason,
                })
            };
            let text_config = config.get("text_config");
            let first_eos = [
                ids(
                    generation_config.as_ref().and_then(|g| g.get("eos_token_id")),
                    "generation_config.json",
                    "eos_token_id",
                )?,
                ids(config.get("eos_token_id"), "config.json", "eos_token_id")?,
                ids(
                    text_config.and_then(|c| c.get("eos_token_id")),
                    "config.json",
                    "text_config.eos_token_id",
                )?,
            ];
            for list in &first_eos {
                end.extend(list);
            }
            special.eos = special.eos.or_else(|| first_eos.iter().flatten().next().copied());
            if special.bos.is_none() && settings.get("bos_token").is_none() {
                let list = ids(config.get("bos_token_id"), "config.json", "bos_token_id")?;
                special.bos = list.first().copied();
            }
        }
        special.set_end(end);
        Ok(special)
    }

    pub(crate) fn set_end(&mut self, mut end: Vec<u32>) {
        end.sort_unstable();
        end.dedup();
        self.end = end;
    }

    /// Adds what is to be added and not there yet.
    pub(crate) fn surround(&self, ids: &mut Vec<u32>) {
        if let Some(bos) = self.bos.filter(|bos| self.add_bos && ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        if let Some(eos) = self.eos.filter(|eos| self.add_eos && ids.last() != Some(eos)) {
            ids.push(eos);
        }
    }
}

/// One id or a list of ids, all below `vocab_size`.
fn ids(value: Option<&Value>, vocab_size: usize) -> Result<Vec<u32>, String> {
    let list = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) => list.as_slice(),
        Some(single) => std::slice::from_ref(single),
    };
    list.iter()
        .map(|id| {
            let id = id.as_u64().ok_or_else(|| format!("{id} is not a token id"))?;
            if id >= vocab_size as u64 {
                return Err(format!("{id} is outside the vocabulary of {vocab_size} tokens"));
            }
            Ok(id as u32)
        })
        .collect()
}

pub(crate) fn parse_json(path: &Path, bytes: &[u8]) -> Result<Value, TextError> {
    serde_json::from_slice(bytes).map_err(|error| TextError::Corrupt {
        path: path.into(),
        field: "(JSON syntax)".into(),
        reason: error.to_string(),
    })
}
