//! Byte-pair encoding from a list of merges (`tokenizer.ggml.model = gpt2`).
//!
//! Words come from the [pre-tokenizer](super::pre_tokenizer) and are merged apart. Byte-level
//! vocabularies start from single bytes; the token texts are translated to bytes once, here, so
//! that nothing is translated while encoding. Raw vocabularies (Gemma 4) start from characters and
//! fall back to `<0x41>` tokens.
//!
//! A byte that has no token is left out, as llama.cpp and the `tokenizers` crate do: SmolLM2 has
//! none for six control characters.

use super::metadata::Metadata;
use super::pipeline::{Pipeline, marked_decoder, replace, sequence};
use super::pre_tokenizer::PreTokenizer;
use super::symbols::{Merger, Merges, Symbol};
use super::tokens::Tokens;
use crate::TextError;
use crate::byte_level;
use serde_json::{Value, json};
use std::cmp::Reverse;
use std::collections::HashMap;

/// Rank and token of a mergeable pair of tokens.
type Ranks = HashMap<(u32, u32), (u32, u32)>;

#[derive(Debug)]
pub(super) struct Bpe {
    pre_tokenizer: PreTokenizer,
    /// Token of each single byte: the byte itself, or `<0x41>` in a raw vocabulary.
    bytes: [Option<u32>; 256],
    ranks: Ranks,
    /// Whole words, where they win over merges, and characters of raw vocabularies.
    words: HashMap<Vec<u8>, u32>,
}

impl Merges for Ranks {
    type Priority = Reverse<u32>;

    fn merge(&self, left: &Symbol, right: &Symbol, _: &[u8]) -> Option<(Reverse<u32>, u32)> {
        let &(rank, merged) = self.get(&(left.id?, right.id?))?;
        Some((Reverse(rank), merged))
    }
}

impl Bpe {
    pub(super) fn read(
        metadata: &Metadata,
        tokens: &Tokens,
        pre_tokenizer: PreTokenizer,
    ) -> Result<Self, TextError> {
        const MERGES: &str = "tokenizer.ggml.merges";
        let merges = metadata.texts(MERGES)?.ok_or_else(|| metadata.missing(MERGES))?;
        let mut ranks = HashMap::with_capacity(merges.len());
        for (rank, merge) in merges.into_iter().enumerate() {
            let wrong = |reason: String| metadata.corrupt(&format!("{MERGES}[{rank}]"), reason);
            // The first character belongs to the left piece even when it is a space.
            let space =
                merge.char_indices().skip(1).find(|&(_, character)| character == ' ').ok_or_else(
                    || wrong(format!("{merge:?} is not two pieces with a space between")),
                )?;
            let (left, right) = (&merge[..space.0], &merge[space.0 + 1..]);
            let id = |piece: &str| {
                tokens.id(piece).ok_or_else(|| wrong(format!("there is no token {piece:?}")))
            };
            let pair = (id(left)?, id(right)?);
            let merged = id(&[left, right].concat())?;
            ranks.entry(pair).or_insert((rank as u32, merged));
        }
        let raw = pre_tokenizer.raw;
        let mut bytes = [None; 256];
        let mut words = HashMap::new();
        for (id, text) in (0u32..).zip(&tokens.texts) {
            if raw {
                if let Some(byte) = crate::hugging_face::fallback_byte(text) {
                    bytes[byte as usize] = Some(id);
                }
                words.insert(text.as_bytes().to_vec(), id);
            } else if let Some(word) = byte_level::decode(text) {
                if let [byte] = word[..] {
                    bytes[byte as usize] = Some(id);
                }
                if pre_tokenizer.whole_words {
                    words.insert(word, id);
                }
            }
        }
        Ok(Self { pre_tokenizer, bytes, ranks, words })
    }

    /// How `tokenizer.json` says this.
    ///
    /// `tokenizers` joins what stands around a byte without a token, which may then merge, so such
    /// bytes are cut out as words of their own.
    pub(super) fn pipeline(&self, metadata: &Metadata) -> Result<Pipeline, TextError> {
        let PreTokenizer { whole_words, whole_lines, raw, escape_spaces, .. } = self.pre_tokenizer;
        let cut = |pattern: &str, behavior: &str| {
            let pattern = json!({ "Regex": pattern });
            json!({ "type": "Split", "pattern": pattern, "behavior": behavior, "invert": false })
        };
        let splits = self.pre_tokenizer.splits();
        let mut stages: Vec<Value> =
            splits.iter().map(|split| cut(&split.pattern, split.behavior)).collect();
        let absent: Vec<u8> =
            (0..=255).filter(|&byte| self.bytes[byte as usize].is_none()).collect();
        let decoder = if raw {
            if let Some(byte) = absent.first() {
                let reason = format!(
                    "there is no token <0x{byte:02X}>, and tokenizer.json needs all 256; put the \
                     original model's tokenizer.json into the directory instead"
                );
                return Err(metadata.unsupported("tokenizer.ggml.tokens", reason));
            }
            marked_decoder(false)
        } else {
            stages.push(json!({
                "type": "ByteLevel",
                "add_prefix_space": false,
                "trim_offsets": true,
                "use_regex": false,
            }));
            if !absent.is_empty() {
                let characters: String = absent
                    .iter()
                    .map(|&byte| format!(r"\x{{{:X}}}", u32::from(byte_level::character(byte))))
                    .collect();
                stages.push(cut(&format!("[{characters}]"), "Isolated"));
            }
            json!({
                "type": "ByteLevel",
                "add_prefix_space": true,
                "trim_offsets": true,
                "use_regex": true,
            })
        };
        if whole_lines && !whole_words {
            self.check_lines(metadata)?;
        }
        let mut merges: Vec<(u32, (u32, u32))> =
            self.ranks.iter().map(|(&pair, &(rank, _))| (rank, pair)).collect();
        merges.sort_unstable();
        Ok(Pipeline {
            normalizer: if escape_spaces { replace(" ", "\u{2581}") } else { Value::Null },
            pre_tokenizer: sequence("pretokenizers", stages),
            decoder,
            merges: merges.into_iter().map(|(_, pair)| pair).collect(),
            unknown: None,
            byte_fallback: raw,
            ignore_merges: whole_words,
        })
    }

    /// `tokenizer.json` cannot say that words of line breaks alone are never merged from parts, so
    /// merging has to reach the same tokens.
    fn check_lines(&self, metadata: &Metadata) -> Result<(), TextError> {
        for (word, &id) in &self.words {
            if word.iter().any(|&byte| byte != b'\n') {
                continue;
            }
            let mut merged = Vec::new();
            let parts = word.iter().map(|byte| (1, self.words.get(&[*byte][..]).copied()));
            Merger::new().run(&self.ranks, word, parts, |symbol| merged.push(symbol.id));
            if merged != [Some(id)] {
                let reason = format!(
                    "no merges lead to token {id} of {} line breaks, and tokenizer.json cannot do \
                     without; put the original model's tokenizer.json into the directory instead",
                    word.len()
                );
                return Err(metadata.unsupported("tokenizer.ggml.merges", reason));
            }
        }
        Ok(())
    }

    /// Appends the tokens of `text`.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        let mut merger = Merger::new();
        let escaped;
        let text = if self.pre_tokenizer.escape_spaces {
            escaped = text.replace(' ', "\u{2581}");
            &escaped
        } else {
            text
        };
        for word in self.pre_tokenizer.split(text) {
            let bytes = word.as_bytes();
            let whole = self.pre_tokenizer.whole_words
                || self.pre_tokenizer.whole_lines && bytes.iter().all(|&byte| byte == b'\n');
            if whole && let Some(&id) = self.words.get(bytes) {
                ids.push(id);
                continue;
            }
            let emit = |symbol: &Symbol| match symbol.id {
                Some(id) => ids.push(id),
                None => {
                    let range = symbol.start as usize..(symbol.start + symbol.length) as usize;
                    ids.extend(bytes[range].iter().filter_map(|&byte| self.bytes[byte as usize]));
                }
            };
            if self.pre_tokenizer.raw {
                let parts = word.char_indices().map(|(start, character)| {
                    let length = character.len_utf8();
                    (length, self.words.get(&bytes[start..start + length]).copied())
                });
                merger.run(&self.ranks, bytes, parts, emit);
            } else {
                let parts = bytes.iter().map(|&byte| (1, self.bytes[byte as usize]));
                merger.run(&self.ranks, bytes, parts, emit);
            }
        }
    }
}
