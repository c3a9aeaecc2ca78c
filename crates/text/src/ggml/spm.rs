//! SentencePiece byte-pair encoding by scores (`tokenizer.ggml.model = llama`).
//!
//! Spaces become `▁` and the whole text is one word: of all neighbours whose concatenation is a
//! token, the pair with the highest score merges, the leftmost of equals. A character without a
//! token becomes its bytes' `<0x41>` tokens. Nothing is normalized.

use super::metadata::Metadata;
use super::symbols::{Merger, Merges, Symbol};
use super::tokens::Tokens;
use crate::TextError;

#[derive(Debug)]
pub(super) struct Spm {
    scores: Vec<f32>,
    /// Token of each single byte; filled only when all 256 exist.
    bytes: Vec<u32>,
    /// A text begins with a space that is not in it.
    pub add_space_prefix: bool,
}

/// Finite, so the order is total.
#[derive(PartialEq)]
pub(super) struct Score(f32);

impl Eq for Score {}

impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Score {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

struct ByScore<'a> {
    tokens: &'a Tokens,
    scores: &'a [f32],
}

impl Merges for ByScore<'_> {
    type Priority = Score;

    fn merge(&self, _: &Symbol, _: &Symbol, bytes: &[u8]) -> Option<(Score, u32)> {
        let id = self.tokens.id(std::str::from_utf8(bytes).ok()?)?;
        // Adding zero makes the two zeros one.
        Some((Score(self.scores[id as usize] + 0.0), id))
    }
}

impl Spm {
    pub(super) fn read(metadata: &Metadata, tokens: &Tokens) -> Result<Self, TextError> {
        const SCORES: &str = "tokenizer.ggml.scores";
        let scores =
            metadata.numbers(SCORES, tokens.len())?.ok_or_else(|| metadata.missing(SCORES))?;
        let bytes = (0..=255u8)
            .map_while(|byte| {
                // Early vocabularies have the bare character instead.
                let bare = byte.is_ascii().then(|| char::from(byte).to_string());
                tokens
                    .id(&format!("<0x{byte:02X}>"))
                    .or_else(|| bare.and_then(|text| tokens.id(&text)))
            })
            .collect();
        let add_space_prefix = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        Ok(Self { scores, bytes, add_space_prefix })
    }

    /// Appends the tokens of `text`; `begins`: nothing but special tokens stands right before it.
    pub(super) fn encode(
        &self,
        tokens: &Tokens,
        text: &str,
        begins: bool,
        unknown: Option<u32>,
        ids: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        let mut word = String::with_capacity(text.len() + text.len() / 2 + 3);
        if begins && self.add_space_prefix {
            word.push('\u{2581}');
        }
        for character in text.chars() {
            word.push(if character == ' ' { '\u{2581}' } else { character });
        }
        let parts = word.char_indices().map(|(start, character)| {
            let length = character.len_utf8();
            (length, tokens.id(&word[start..start + length]))
        });
        let mut failed = None;
        let merges = ByScore { tokens, scores: &self.scores };
        Merger::new().run(&merges, word.as_bytes(), parts, |symbol| {
            let range = symbol.start as usize..(symbol.start + symbol.length) as usize;
            let bytes = &word.as_bytes()[range];
            if let Some(id) = symbol.id {
                ids.push(id);
            } else if self.bytes.len() == 256 {
                ids.extend(bytes.iter().map(|&byte| self.bytes[byte as usize]));
            } else if let Some(unknown) = unknown {
                ids.push(unknown);
            } else {
                failed.get_or_insert_with(|| String::from_utf8_lossy(bytes).into_owned());
            }
        });
        match failed {
            None => Ok(()),
            Some(piece) => Err(TextError::Encode {
                reason: format!(
                    "{piece:?} has no token, and the vocabulary has neither all 256 byte tokens \
                     nor tokenizer.ggml.unknown_token_id"
                ),
            }),
        }
    }
}
