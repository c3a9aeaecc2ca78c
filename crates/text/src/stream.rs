//! Tokens to text, one token at a time.
//!
//! A token is a run of bytes that may end inside a character, and a stop string may be spread over
//! several tokens, so text is held back until it can no longer change:
//!
//! * bytes that could still become a character wait; bytes that cannot (a wrong continuation, the
//!   end of the stream) become U+FFFD, one for each maximal ill-formed part, which is what
//!   [`String::from_utf8_lossy`] does to the whole;
//! * text that could be the beginning of a stop string waits; once a stop string is complete the
//!   text before it is given out and nothing after it ever is. Of several stop strings the one that
//!   is complete first wins, and the longest of those complete at the same character, so the
//!   result does not depend on how the text was cut into tokens.

use crate::TextError;
use crate::vocabulary::Vocabulary;
use std::sync::Arc;

/// How [`StreamDecoder`] turns tokens into text.
#[derive(Debug, Clone, Default)]
pub struct StreamOptions {
    /// Text of control tokens such as `<|im_end|>` is given out too.
    pub show_special: bool,
    /// Control tokens whose text is given out all the same: the markers of calls and reasoning,
    /// [`crate::OutputFormat::markers`]. Texts that are no token are ignored, since no token can
    /// hide them.
    pub show: Vec<String>,
    /// The tokens continue a text instead of starting one, so a space at their very beginning is
    /// part of it. Matters to SentencePiece vocabularies only, whose first word carries a space
    /// that is not in the text.
    pub continues_text: bool,
    /// The text ends before the first of these. Empty strings are ignored.
    pub stop: Vec<String>,
}

/// What one step of a [`StreamDecoder`] gave out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Emitted {
    /// New text, often empty.
    pub text: String,
    /// Index in [`StreamOptions::stop`] of the stop string that ended the text.
    pub stopped_by: Option<usize>,
}

/// Incremental detokenizer; made by [`crate::Tokenizer::stream`].
#[derive(Debug, Clone)]
pub struct StreamDecoder {
    vocabulary: Arc<Vocabulary>,
    stop: Vec<String>,
    show_special: bool,
    /// Ids of [`StreamOptions::show`].
    shown: Vec<u32>,
    at_start: bool,
    /// Beginning of a character.
    bytes: Vec<u8>,
    /// Text that may be the beginning of a stop string.
    held: String,
    stopped_by: Option<usize>,
}

impl StreamDecoder {
    /// `token_id`: the id of the token written so.
    pub(crate) fn new(
        vocabulary: Arc<Vocabulary>,
        options: StreamOptions,
        token_id: impl Fn(&str) -> Option<u32>,
    ) -> Self {
        let at_start = vocabulary.strips_first_space() && !options.continues_text;
        Self {
            vocabulary,
            stop: options.stop,
            show_special: options.show_special,
            shown: options.show.iter().filter_map(|text| token_id(text)).collect(),
            at_start,
            bytes: Vec::new(),
            held: String::new(),
            stopped_by: None,
        }
    }

    /// Appends one token and gives out the text that is now certain. After a stop string every
    /// call gives out nothing.
    ///
    /// # Errors
    /// [`TextError::TokenId`] when the id is outside the vocabulary; the stream is unchanged.
    pub fn push(&mut self, id: u32) -> Result<Emitted, TextError> {
        let mut piece = self.vocabulary.bytes(id)?;
        if self.stopped_by.is_some() {
            return Ok(self.emit(String::new()));
        }
        if !self.show_special && self.vocabulary.is_special(id)? && !self.shown.contains(&id) {
            piece = &[];
        }
        if self.at_start && !piece.is_empty() {
            self.at_start = false;
            piece = piece.strip_prefix(b" ").unwrap_or(piece);
        }
        self.bytes.extend_from_slice(piece);
        let from = self.held.len();
        let used = decode_certain(&self.bytes, &mut self.held);
        self.bytes.drain(..used);
        Ok(self.release(from))
    }

    /// Ends the text: what was held back is given out, an unfinished character as U+FFFD.
    pub fn finish(&mut self) -> Emitted {
        if self.stopped_by.is_some() {
            return self.emit(String::new());
        }
        let from = self.held.len();
        if !self.bytes.is_empty() {
            self.bytes.clear();
            self.held.push(char::REPLACEMENT_CHARACTER);
        }
        let mut emitted = self.release(from);
        if emitted.stopped_by.is_none() {
            emitted.text.push_str(&std::mem::take(&mut self.held));
        }
        emitted
    }

    /// Gives out the held text that no stop string can claim. `from`: where new text starts.
    fn release(&mut self, from: usize) -> Emitted {
        if let Some((start, index)) = self.complete_stop(from) {
            self.stopped_by = Some(index);
            self.bytes.clear();
            let mut text = std::mem::take(&mut self.held);
            text.truncate(start);
            return self.emit(text);
        }
        let keep = self.stop.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let tail = self.held.split_off(self.held.len() - keep);
        let text = std::mem::replace(&mut self.held, tail);
        self.emit(text)
    }

    /// Start and index of the stop string that is complete first; earlier text was searched before.
    fn complete_stop(&self, from: usize) -> Option<(usize, usize)> {
        let mut best: Option<(usize, usize, usize)> = None;
        for (index, stop) in self.stop.iter().enumerate().filter(|(_, stop)| !stop.is_empty()) {
            let mut begin = from.saturating_sub(stop.len());
            while !self.held.is_char_boundary(begin) {
                begin -= 1;
            }
            if let Some(start) = self.held[begin..].find(stop.as_str()).map(|at| at + begin) {
                let found = (start + stop.len(), start, index);
                best = Some(best.map_or(found, |b| b.min(found)));
            }
        }
        best.map(|(_, start, index)| (start, index))
    }

    fn emit(&self, text: String) -> Emitted {
        Emitted { text, stopped_by: self.stopped_by }
    }
}

/// Appends to `text` what `bytes` certainly mean and returns how many bytes that took; the rest is
/// the beginning of a character.
fn decode_certain(bytes: &[u8], text: &mut String) -> usize {
    let mut used = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        used += chunk.valid().len();
        let invalid = chunk.invalid();
        if invalid.is_empty() {
            continue;
        }
        let at_end = used + invalid.len() == bytes.len();
        let unfinished =
            at_end && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if unfinished {
            break;
        }
        text.push(char::REPLACEMENT_CHARACTER);
        used += invalid.len();
    }
    used
}

/// Length of the longest end of `text` that is a beginning, but not the whole, of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    (1..=longest)
        .rev()
        .find(|&n| text.as_bytes()[text.len() - n..] == stop.as_bytes()[..n])
        .unwrap_or(0)
}
