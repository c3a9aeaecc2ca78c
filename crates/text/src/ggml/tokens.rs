//! The token list of a GGUF vocabulary: texts, kinds, and the index from text to id.

use super::metadata::Metadata;
use crate::TextError;
use crate::vocabulary::TokenKind;
use std::collections::HashMap;

/// Tokens as the file lists them.
#[derive(Debug)]
pub(super) struct Tokens {
    pub texts: Vec<String>,
    pub kinds: Vec<TokenKind>,
    pub ids: HashMap<String, u32>,
}

impl Tokens {
    pub(super) fn read(metadata: &Metadata) -> Result<Self, TextError> {
        const TOKENS: &str = "tokenizer.ggml.tokens";
        const KINDS: &str = "tokenizer.ggml.token_type";
        let list = metadata.texts(TOKENS)?.ok_or_else(|| metadata.missing(TOKENS))?;
        if list.is_empty() {
            return Err(metadata.corrupt(TOKENS, "there are no tokens"));
        }
        if list.len() > u32::MAX as usize {
            return Err(metadata.corrupt(TOKENS, "more tokens than ids"));
        }
        let mut texts = Vec::with_capacity(list.len());
        let mut ids = HashMap::with_capacity(list.len());
        for (id, text) in list.into_iter().enumerate() {
            // Converters fill holes with the empty string; each hole gets a name of its own.
            let text = if text.is_empty() { format!("[EMPTY_{id}]") } else { text.to_owned() };
            if let Some(first) = ids.insert(text.clone(), id as u32) {
                let reason = format!("{text:?} is already token {first}");
                return Err(metadata.corrupt(&format!("{TOKENS}[{id}]"), reason));
            }
            texts.push(text);
        }
        let mut kinds = vec![TokenKind::Normal; texts.len()];
        if let Some(list) = metadata.list(KINDS)? {
            if list.len() != texts.len() {
                let reason = format!("{} values for {} tokens", list.len(), texts.len());
                return Err(metadata.corrupt(KINDS, reason));
            }
            for (id, value) in list.iter().enumerate() {
                kinds[id] = match value.as_i64() {
                    Some(1) => TokenKind::Normal,
                    Some(2) => TokenKind::Unknown,
                    Some(3) => TokenKind::Control,
                    Some(4) => TokenKind::UserDefined,
                    Some(0 | 5) => TokenKind::Unused,
                    Some(6) => TokenKind::Byte,
                    _ => {
                        let reason = format!("{value} is not a token type (0 to 6)");
                        return Err(metadata.corrupt(&format!("{KINDS}[{id}]"), reason));
                    }
                };
            }
        }
        Ok(Self { texts, kinds, ids })
    }

    pub(super) fn len(&self) -> usize {
        self.texts.len()
    }

    pub(super) fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }
}
