//! Unigram language model (`tokenizer.ggml.model = t5`).
//!
//! The text is normalized by the file's character map, spaces become `▁`, and of all ways to cover
//! it with tokens the one with the highest sum of scores is taken (Viterbi). A character without a
//! token costs ten more than the worst token and becomes the unknown token; unknown characters in
//! a row are one token. User-defined tokens cost nothing and are not normalized.

use super::metadata::Metadata;
use super::tokens::Tokens;
use crate::TextError;
use crate::vocabulary::TokenKind;

#[derive(Debug)]
pub(super) struct Unigram {
    /// Tokens that text may match, sorted by their bytes.
    matchable: Vec<Piece>,
    /// User-defined tokens, sorted by their bytes.
    user_defined: Vec<Piece>,
    unknown_score: f64,
    charsmap: Option<CharacterMap>,
    pub add_space_prefix: bool,
    remove_extra_spaces: bool,
}

#[derive(Debug)]
struct Piece {
    text: Box<[u8]>,
    id: u32,
    score: f64,
}

/// What an unknown character costs beyond the worst token.
const UNKNOWN_PENALTY: f32 = 10.0;

impl Unigram {
    pub(super) fn read(metadata: &Metadata, tokens: &Tokens) -> Result<Self, TextError> {
        const SCORES: &str = "tokenizer.ggml.scores";
        let scores =
            metadata.numbers(SCORES, tokens.len())?.ok_or_else(|| metadata.missing(SCORES))?;
        let (mut matchable, mut user_defined) = (Vec::new(), Vec::new());
        let mut worst = f32::MAX;
        for (id, text) in (0u32..).zip(&tokens.texts) {
            let (kind, score) = (tokens.kinds[id as usize], scores[id as usize]);
            let piece = |score: f64| Piece { text: text.as_bytes().into(), id, score };
            match kind {
                TokenKind::Normal => {
                    worst = worst.min(score);
                    matchable.push(piece(score.into()));
                }
                TokenKind::Unused => matchable.push(piece(score.into())),
                TokenKind::UserDefined => {
                    matchable.push(piece(0.0));
                    user_defined.push(piece(0.0));
                }
                TokenKind::Control | TokenKind::Unknown | TokenKind::Byte => {}
            }
        }
        matchable.sort_unstable_by(|a, b| a.text.cmp(&b.text));
        user_defined.sort_unstable_by(|a, b| a.text.cmp(&b.text));
        Ok(Self {
            matchable,
            user_defined,
            unknown_score: f64::from(worst - UNKNOWN_PENALTY),
            charsmap: CharacterMap::read(metadata)?,
            add_space_prefix: metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(false),
            remove_extra_spaces: metadata
                .flag("tokenizer.ggml.remove_extra_whitespaces")?
                .unwrap_or(false),
        })
    }

    /// Appends the tokens of `text`.
    pub(super) fn encode(
        &self,
        text: &str,
        unknown: Option<u32>,
        ids: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        let text = self.normalize(text)?;
        /// Best way to cover the text up to some byte.
        #[derive(Clone, Copy)]
        struct Best {
            token: Option<u32>,
            start: usize,
            score: f64,
        }
        let nowhere = Best { token: None, start: 0, score: f64::MIN };
        let mut best = vec![nowhere; text.len() + 1];
        best[0].score = 0.0;
        for (start, character) in text.char_indices() {
            let single = start + character.len_utf8();
            let mut single_found = false;
            let here = best[start].score;
            let mut reach = |end: usize, token: Option<u32>, score: f64| {
                if here + score > best[end].score {
                    best[end] = Best { token, start, score: here + score };
                }
            };
            let mut range = &self.matchable[..];
            for (length, &byte) in text.as_bytes()[start..].iter().enumerate() {
                range = narrow(range, length, byte);
                let Some(first) = range.first() else { break };
                if first.text.len() == length + 1 {
                    let end = start + length + 1;
                    single_found |= end == single;
                    reach(end, Some(first.id), first.score);
                }
            }
            if !single_found {
                reach(single, None, self.unknown_score);
            }
        }
        let first = ids.len();
        let mut end = text.len();
        let mut unknown_before = false;
        while end > 0 {
            let Best { token, start, .. } = best[end];
            let is_unknown = token.is_none() || token == unknown;
            if !(is_unknown && unknown_before) {
                ids.push(token.or(unknown).ok_or_else(|| TextError::Encode {
                    reason: format!(
                        "{:?} has no token, and there is no tokenizer.ggml.unknown_token_id",
                        &text[start..end]
                    ),
                })?);
            }
            unknown_before = is_unknown;
            end = start;
        }
        ids[first..].reverse();
        Ok(())
    }

    fn normalize(&self, text: &str) -> Result<String, TextError> {
        let mut normalized = String::with_capacity(text.len() * 3);
        let mut in_word = false;
        let mut prefixed = false;
        let mut rest = text;
        while !rest.is_empty() {
            let (part, used) = self.normalize_start(rest)?;
            for character in part.chars() {
                if character == ' ' {
                    in_word = false;
                    if !self.remove_extra_spaces {
                        normalized.push('\u{2581}');
                    }
                    continue;
                }
                if !in_word {
                    in_word = true;
                    if (self.add_space_prefix && !prefixed) || self.remove_extra_spaces {
                        normalized.push('\u{2581}');
                        prefixed = true;
                    }
                }
                normalized.push(character);
            }
            rest = &rest[used..];
        }
        Ok(normalized)
    }

    /// What the beginning of `rest` becomes, and how many bytes of it that took.
    fn normalize_start<'t>(&'t self, rest: &'t str) -> Result<(&'t str, usize), TextError> {
        let mut range = &self.user_defined[..];
        let mut length = 0;
        for &byte in rest.as_bytes() {
            range = narrow(range, length, byte);
            if range.is_empty() {
                break;
            }
            length += 1;
        }
        while !rest.is_char_boundary(length) {
            length -= 1;
        }
        if length > 0 {
            return Ok((&rest[..length], length));
        }
        if let Some(charsmap) = &self.charsmap
            && let Some((replacement, used)) = charsmap.longest(rest)?
        {
            return Ok((replacement, used));
        }
        let used = rest.chars().next().map_or(0, char::len_utf8);
        Ok((&rest[..used], used))
    }
}

/// The pieces of `range`, which agree in their first `position` bytes, whose next byte is `byte`.
/// One that ends there comes first.
fn narrow(range: &[Piece], position: usize, byte: u8) -> &[Piece] {
    let next = |piece: &Piece| piece.text.get(position).copied();
    let from = range.partition_point(|piece| next(piece) < Some(byte));
    let to = from + range[from..].partition_point(|piece| next(piece) == Some(byte));
    &range[from..to]
}

/// SentencePiece's `precompiled_charsmap`: a double-array trie over UTF-8 bytes whose leaves point
/// at replacement strings.
///
/// Layout: bytes of the trie as `u32`, the trie as `u32` units, the replacements, each ended by a
/// zero byte. In a unit, bits 10 to 30 are the offset to its children (shifted left by 8 when bit 9
/// is set), bit 8 says that a value hangs below it, bits 0 to 7 and 31 are its label.
#[derive(Debug)]
struct CharacterMap {
    units: Vec<u32>,
    replacements: Vec<u8>,
}

const CHARSMAP: &str = "tokenizer.ggml.precompiled_charsmap";

impl CharacterMap {
    fn read(metadata: &Metadata) -> Result<Option<Self>, TextError> {
        let Some(list) = metadata.list(CHARSMAP)?.filter(|list| !list.is_empty()) else {
            return Ok(None);
        };
        // The bytes are stored as signed or unsigned numbers.
        let bytes: Option<Vec<u8>> = list
            .iter()
            .map(|value| value.as_i64().filter(|v| (-128..256).contains(v)).map(|v| v as u8))
            .collect();
        let bytes = bytes.ok_or_else(|| metadata.corrupt(CHARSMAP, "expected bytes"))?;
        let (size, rest) = bytes
            .split_first_chunk::<4>()
            .map(|(size, rest)| (u32::from_le_bytes(*size) as usize, rest))
            .filter(|(size, rest)| *size < rest.len() && *size >= 4)
            .ok_or_else(|| metadata.corrupt(CHARSMAP, "the trie is longer than the map"))?;
        let (trie, replacements) = rest.split_at(size);
        let units = trie.as_chunks::<4>().0.iter().map(|&unit| u32::from_le_bytes(unit)).collect();
        if std::str::from_utf8(replacements).is_err() || replacements.last() != Some(&0) {
            let reason = "the replacements are not UTF-8 strings ended by zero bytes";
            return Err(metadata.corrupt(CHARSMAP, reason));
        }
        Ok(Some(Self { units, replacements: replacements.to_vec() }))
    }

    /// Replacement of the longest beginning of `text` that has one, and that beginning's length.
    fn longest(&self, text: &str) -> Result<Option<(&str, usize)>, TextError> {
        let damaged = || TextError::Encode {
            reason: format!("{CHARSMAP} is damaged; fetch the model again"),
        };
        let unit = |index: usize| self.units.get(index).copied().ok_or_else(damaged);
        let children = |unit: u32| ((unit >> 10) << ((unit & (1 << 9)) >> 6)) as usize;
        let mut found = None;
        let mut node = children(unit(0)?);
        for (position, &byte) in text.as_bytes().iter().enumerate() {
            if byte == 0 {
                break;
            }
            node ^= usize::from(byte);
            let current = unit(node)?;
            if current & (1 << 31 | 0xff) != u32::from(byte) {
                break;
            }
            node ^= children(current);
            if current & (1 << 8) != 0 {
                found = Some((unit(node)? & !(1 << 31), position + 1));
            }
        }
        let Some((at, length)) = found else { return Ok(None) };
        let tail = self.replacements.get(at as usize..).ok_or_else(damaged)?;
        let end = tail.iter().position(|&byte| byte == 0).ok_or_else(damaged)?;
        let replacement = std::str::from_utf8(&tail[..end]).map_err(|_| damaged())?;
        if !text.is_char_boundary(length) {
            return Err(damaged());
        }
        Ok(Some((replacement, length)))
    }
}
