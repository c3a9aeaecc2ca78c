//! SentencePiece byte-pair encoding by scores (`tokenizer.ggml.model = llama`).
//!
//! Spaces become `▁` and the whole text is one word: of all neighbours whose concatenation is a
//! token, the pair with the highest score merges, the leftmost of equals. A character without a
//! token becomes its bytes' `<0x41>` tokens. Nothing is normalized.

use super::metadata::Metadata;
use super::pipeline::{Pipeline, marked_decoder, replace, sequence};
use super::symbols::{Merger, Merges, Symbol};
use super::tokens::Tokens;
use crate::TextError;
use crate::vocabulary::TokenKind;
use serde_json::{Value, json};

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

    /// How `tokenizer.json` says this.
    ///
    /// Every way to cut a token into two tokens is a merge, and merges are ranked by the token's
    /// score. Two rules of the merge by scores have no counterpart, and vocabularies that need
    /// them are refused: of different tokens with the same score the leftmost is first, and a
    /// character that is no token may merge all the same. Cuts of the same token differ in rank too
    /// where only their place should count; 140,000 random strings show no difference for Gemma 3.
    pub(super) fn pipeline(
        &self,
        metadata: &Metadata,
        tokens: &Tokens,
        unknown: Option<u32>,
    ) -> Result<Pipeline, TextError> {
        let prefix = json!({ "type": "Prepend", "prepend": "\u{2581}" });
        let mut normalizers: Vec<Value> =
            self.add_space_prefix.then_some(prefix).into_iter().collect();
        normalizers.push(replace(" ", "\u{2581}"));
        Ok(Pipeline {
            normalizer: sequence("normalizers", normalizers),
            pre_tokenizer: Value::Null,
            decoder: marked_decoder(self.add_space_prefix),
            merges: self.merges(metadata, tokens)?,
            unknown,
            byte_fallback: self.bytes.len() == 256,
            ignore_merges: false,
        })
    }

    fn merges(&self, metadata: &Metadata, tokens: &Tokens) -> Result<Vec<(u32, u32)>, TextError> {
        const INSTEAD: &str = "which tokenizer.json has no means for; put the original model's \
                               tokenizer.json into the directory instead";
        let mut merged: Vec<(u32, Vec<(u32, u32)>)> = Vec::new();
        for (id, text) in (0u32..).zip(&tokens.texts) {
            let mut cuts = Vec::new();
            // Longest left part first: in a run of equal characters the rest stands on the right.
            for (at, _) in text.char_indices().skip(1).collect::<Vec<_>>().into_iter().rev() {
                let (left, right) = text.split_at(at);
                let mergeable =
                    |part: &str| tokens.id(part).is_some() || part.chars().nth(1).is_none();
                match (tokens.id(left), tokens.id(right)) {
                    (Some(left), Some(right)) => cuts.push((left, right)),
                    _ if tokens.kinds[id as usize] == TokenKind::Normal
                        && mergeable(left)
                        && mergeable(right) =>
                    {
                        let reason =
                            format!("{text:?} merges from a character that is no token, {INSTEAD}");
                        return Err(
                            metadata.unsupported(&format!("tokenizer.ggml.tokens[{id}]"), reason)
                        );
                    }
                    _ => {}
                }
            }
            if !cuts.is_empty() {
                merged.push((id, cuts));
            }
        }
        let score = |id: u32| Score(self.scores[id as usize] + 0.0);
        merged.sort_by_key(|(id, _)| std::cmp::Reverse(score(*id)));
        for pair in merged.windows(2) {
            let (a, b) = (pair[0].0, pair[1].0);
            // Other kinds of tokens are cut out of the text before it comes here.
            let normal = |id: u32| tokens.kinds[id as usize] == TokenKind::Normal;
            if score(a) == score(b) && normal(a) && normal(b) {
                let reason = format!(
                    "tokens {a} and {b} have the same score, so the leftmost of them merges first, \
                     {INSTEAD}"
                );
                return Err(metadata.unsupported("tokenizer.ggml.scores", reason));
            }
        }
        Ok(merged.into_iter().flat_map(|(_, cuts)| cuts).collect())
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
