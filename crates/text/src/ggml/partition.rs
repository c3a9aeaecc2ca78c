//! Cutting special tokens out of a text before anything else looks at it.
//!
//! Rule of llama.cpp: tokens claim their occurrences in order of length, longest first, everywhere
//! in the text; shorter ones get what is left. That is not leftmost-longest: in `abcde` the token
//! `bcde` wins over `abc`. All occurrences are found in one pass of an Aho-Corasick automaton
//! (Gemma has 6,400 such tokens) and then claimed in that order.

use super::tokens::Tokens;
use crate::vocabulary::TokenKind;
use aho_corasick::{AhoCorasick, AhoCorasickKind};
use std::collections::BTreeMap;

/// A part of a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part<'t> {
    Text(&'t str),
    Token(u32),
}

/// White space around a special token that belongs to it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Strip {
    pub left: bool,
    pub right: bool,
}

#[derive(Debug)]
struct Entry {
    id: u32,
    length: usize,
    strip: Strip,
    /// Found even where special tokens are to be read as text.
    always: bool,
}

/// Finds the special tokens of a vocabulary.
#[derive(Debug)]
pub(super) struct Partition {
    /// `None` when there is nothing to look for.
    automaton: Option<AhoCorasick>,
    /// Longest first; the automaton's patterns in the same order.
    entries: Vec<Entry>,
}

impl Partition {
    /// # Errors
    /// The reason, when the automaton would be too large.
    pub(super) fn new(tokens: &Tokens, strip: impl Fn(u32) -> Strip) -> Result<Self, String> {
        let mut entries: Vec<Entry> = (0..tokens.len() as u32)
            .filter_map(|id| {
                let always = match tokens.kinds[id as usize] {
                    TokenKind::UserDefined => true,
                    TokenKind::Control | TokenKind::Unknown => false,
                    _ => return None,
                };
                let length = tokens.texts[id as usize].len();
                Some(Entry { id, length, strip: strip(id), always })
            })
            .collect();
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.length));
        let patterns = entries.iter().map(|entry| &tokens.texts[entry.id as usize]);
        let automaton = if entries.is_empty() {
            None
        } else {
            let built = AhoCorasick::builder()
                .kind(Some(AhoCorasickKind::ContiguousNFA))
                .build(patterns)
                .map_err(|error| error.to_string())?;
            Some(built)
        };
        Ok(Self { automaton, entries })
    }

    /// The special tokens and what they take along, longest first.
    pub(super) fn tokens(&self) -> impl Iterator<Item = (u32, Strip)> {
        self.entries.iter().map(|entry| (entry.id, entry.strip))
    }

    /// Cuts `text`; parts in order, text parts never empty.
    pub(super) fn cut<'t>(&self, text: &'t str, parse_special: bool) -> Vec<Part<'t>> {
        let claims = self.claims(text, parse_special);
        let mut parts = Vec::with_capacity(claims.len() * 2 + 1);
        let mut position = 0;
        for (start, (end, id)) in claims {
            if start > position {
                parts.push(Part::Text(&text[position..start]));
            }
            parts.push(Part::Token(id));
            position = end;
        }
        if position < text.len() {
            parts.push(Part::Text(&text[position..]));
        }
        parts
    }

    /// Start to end and id of what was claimed.
    fn claims(&self, text: &str, parse_special: bool) -> BTreeMap<usize, (usize, u32)> {
        let mut claims = BTreeMap::new();
        let Some(automaton) = &self.automaton else { return claims };
        let mut found: Vec<(usize, usize)> = automaton
            .find_overlapping_iter(text)
            .map(|hit| (hit.pattern().as_usize(), hit.start()))
            .filter(|&(entry, _)| parse_special || self.entries[entry].always)
            .collect();
        found.sort_unstable();
        for (index, start) in found {
            let entry = &self.entries[index];
            let end = start + entry.length;
            let before = claims.range(..end).next_back();
            let left = before.map_or(0, |(_, &(end, _)): (&usize, &(usize, u32))| end);
            if left > start {
                continue;
            }
            let right = claims.range(end..).next().map_or(text.len(), |(&start, _)| start);
            let (mut from, mut to) = (start, end);
            // Only the C locale's spaces, as llama.cpp's `isspace`.
            let space = |byte: u8| byte.is_ascii_whitespace() || byte == 0x0b;
            while entry.strip.left && from > left && space(text.as_bytes()[from - 1]) {
                from -= 1;
            }
            while entry.strip.right && to < right && space(text.as_bytes()[to]) {
                to += 1;
            }
            claims.insert(from, (to, entry.id));
        }
        claims
    }
}
