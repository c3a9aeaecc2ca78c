//! WordPiece (`tokenizer.ggml.model = bert`).
//!
//! The text is cleaned (controls dropped, optionally accents and case), cut at white space,
//! punctuation and ideographs, and each word is covered from the left by the longest tokens; a
//! word that cannot be covered is the unknown token. GGUF writes the start of a word as `▁`
//! instead of writing its continuation as `##`.
//!
//! As in llama.cpp, stripping accents keeps the first character of the canonical decomposition
//! and drops all marks.

use super::metadata::Metadata;
use super::tokens::Tokens;
use crate::TextError;
use unicode_general_category::{GeneralCategory as Category, get_general_category};
use unicode_normalization::char::decompose_canonical;

#[derive(Debug)]
pub(super) struct WordPiece {
    lowercase: bool,
    strip_accents: bool,
    longest_token: usize,
}

impl WordPiece {
    pub(super) fn read(metadata: &Metadata, tokens: &Tokens) -> Result<Self, TextError> {
        let lowercase = metadata.flag("tokenizer.ggml.normalizer.lowercase")?.unwrap_or(true);
        let strip_accents =
            metadata.flag("tokenizer.ggml.normalizer.strip_accents")?.unwrap_or(lowercase);
        let longest_token = tokens.texts.iter().map(String::len).max().unwrap_or(0);
        Ok(Self { lowercase, strip_accents, longest_token })
    }

    /// Appends the tokens of `text`.
    pub(super) fn encode(
        &self,
        tokens: &Tokens,
        text: &str,
        unknown: Option<u32>,
        ids: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        for word in self.words(text) {
            let before = ids.len();
            if self.cover(tokens, &format!("\u{2581}{word}"), ids).is_none() {
                ids.truncate(before);
                ids.push(unknown.ok_or_else(|| TextError::Encode {
                    reason: format!(
                        "{word:?} has no tokens, and there is no tokenizer.ggml.unknown_token_id"
                    ),
                })?);
            }
        }
        Ok(())
    }

    /// Longest tokens from the left; `None` when they do not cover the word.
    fn cover(&self, tokens: &Tokens, word: &str, ids: &mut Vec<u32>) -> Option<()> {
        let mut start = 0;
        while start < word.len() {
            let mut end = word.len().min(start + self.longest_token);
            while !word.is_char_boundary(end) {
                end -= 1;
            }
            let (id, length) = word[start..end].char_indices().rev().find_map(|(at, last)| {
                let length = at + last.len_utf8();
                Some((tokens.id(&word[start..start + length])?, length))
            })?;
            ids.push(id);
            start += length;
        }
        Some(())
    }

    fn words(&self, text: &str) -> Vec<String> {
        let mut words = Vec::new();
        let mut word = String::new();
        for character in text.chars() {
            let character = if self.strip_accents { base(character) } else { character };
            if character.is_whitespace() {
                words.extend(take(&mut word));
                continue;
            }
            let class = class(character);
            if character == '\0' || character == '\u{fffd}' || class == Class::Control {
                continue;
            }
            if self.strip_accents && class == Class::Mark {
                continue;
            }
            let lower = if self.lowercase { lowercase(character) } else { character };
            let alone = match class {
                Class::Punctuation => true,
                Class::Symbol => character < '\u{7f}',
                _ => is_ideograph(character),
            };
            if alone {
                words.extend(take(&mut word));
                words.push(lower.to_string());
            } else {
                word.push(lower);
            }
        }
        words.extend(take(&mut word));
        words
    }
}

fn take(word: &mut String) -> Option<String> {
    (!word.is_empty()).then(|| std::mem::take(word))
}

/// First character of the canonical decomposition.
fn base(character: char) -> char {
    let mut first = None;
    decompose_canonical(character, |part| {
        first.get_or_insert(part);
    });
    first.unwrap_or(character)
}

/// The lower-case character where it is a single one.
fn lowercase(character: char) -> char {
    let mut lower = character.to_lowercase();
    match (lower.next(), lower.next()) {
        (Some(single), None) => single,
        _ => character,
    }
}

#[derive(PartialEq, Eq)]
enum Class {
    Punctuation,
    Symbol,
    Mark,
    Control,
    Other,
}

fn class(character: char) -> Class {
    match get_general_category(character) {
        Category::ConnectorPunctuation
        | Category::DashPunctuation
        | Category::OpenPunctuation
        | Category::ClosePunctuation
        | Category::InitialPunctuation
        | Category::FinalPunctuation
        | Category::OtherPunctuation => Class::Punctuation,
        Category::MathSymbol
        | Category::CurrencySymbol
        | Category::ModifierSymbol
        | Category::OtherSymbol => Class::Symbol,
        Category::NonspacingMark | Category::SpacingMark | Category::EnclosingMark => Class::Mark,
        Category::Control | Category::Format | Category::PrivateUse | Category::Surrogate => {
            Class::Control
        }
        _ => Class::Other,
    }
}

/// Ideographs stand alone. The block bounds are those of the `tokenizers` crate, which begins
/// extension E at U+2B920.
fn is_ideograph(character: char) -> bool {
    matches!(character,
        '\u{4e00}'..='\u{9fff}'
        | '\u{3400}'..='\u{4dbf}'
        | '\u{20000}'..='\u{2a6df}'
        | '\u{2a700}'..='\u{2b81f}'
        | '\u{2b920}'..='\u{2ceaf}'
        | '\u{f900}'..='\u{faff}'
        | '\u{2f800}'..='\u{2fa1f}')
}
