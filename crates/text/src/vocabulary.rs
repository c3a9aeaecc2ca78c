//! What every kind of tokenizer shares once it is open: the bytes each token contributes to text.
//!
//! All bytes lie in one arena, because a vocabulary has up to 262,144 tokens and one allocation
//! each would cost more than reading the file.

use crate::TextError;

/// What a token is for. The kinds are those of `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenKind {
    /// Ordinary text.
    Normal,
    /// Stands for what cannot be encoded.
    Unknown,
    /// Steers the model and is not text: `<|im_start|>`.
    Control,
    /// Text that is never split: `<tool_call>`.
    UserDefined,
    /// A hole in the vocabulary.
    Unused,
    /// One byte of a character that has no token of its own.
    Byte,
}

/// Bytes and kind of every token.
#[derive(Debug)]
pub(crate) struct Vocabulary {
    arena: Vec<u8>,
    /// End of token `i` in the arena; it starts where token `i - 1` ends.
    ends: Vec<u32>,
    kinds: Vec<TokenKind>,
    /// Word starts carry a space that the first word of a text does not show (SentencePiece).
    strip_first_space: bool,
}

impl Vocabulary {
    pub(crate) fn with_capacity(tokens: usize, strip_first_space: bool) -> Self {
        Self {
            arena: Vec::with_capacity(tokens * 8),
            ends: Vec::with_capacity(tokens),
            kinds: Vec::with_capacity(tokens),
            strip_first_space,
        }
    }

    /// Appends the next token. Sources are far below the 4 GiB that the offsets can hold, because
    /// they come from sidecar files; [`Vocabulary::fits`] is asked first where that is not given.
    pub(crate) fn push(&mut self, bytes: &[u8], kind: TokenKind) {
        self.arena.extend_from_slice(bytes);
        self.ends.push(self.arena.len() as u32);
        self.kinds.push(kind);
    }

    /// Whether `more` bytes can still be appended.
    pub(crate) fn fits(&self, more: usize) -> bool {
        self.arena.len().saturating_add(more) <= u32::MAX as usize
    }

    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(crate) fn strips_first_space(&self) -> bool {
        self.strip_first_space
    }

    pub(crate) fn bytes(&self, id: u32) -> Result<&[u8], TextError> {
        let index = id as usize;
        let end = *self.ends.get(index).ok_or_else(|| self.out_of_range(id))? as usize;
        let start = if index == 0 { 0 } else { self.ends[index - 1] as usize };
        Ok(&self.arena[start..end])
    }

    pub(crate) fn kind(&self, id: u32) -> Result<TokenKind, TextError> {
        self.kinds.get(id as usize).copied().ok_or_else(|| self.out_of_range(id))
    }

    /// Control and unknown tokens: not part of the text that a reader sees.
    pub(crate) fn is_special(&self, id: u32) -> Result<bool, TextError> {
        Ok(matches!(self.kind(id)?, TokenKind::Control | TokenKind::Unknown))
    }

    fn out_of_range(&self, id: u32) -> TextError {
        TextError::TokenId { id, vocab_size: self.len() }
    }
}
