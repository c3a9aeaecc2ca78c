//! The tokenizer of a checkpoint, whichever file it came from.

use crate::TextError;
use crate::ggml::Ggml;
use crate::hugging_face::HuggingFace;
use crate::special::SpecialTokens;
use crate::stream::{StreamDecoder, StreamOptions};
use crate::vocabulary::Vocabulary;
use marlin_checkpoint::{Checkpoint, Container};
use std::sync::Arc;

/// What [`Tokenizer::encode`] does about special tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Specials {
    /// Adds what the model expects around a text (BOS, sometimes EOS).
    pub add: bool,
    /// Reads `<|im_end|>` in the text as the token instead of as ten characters.
    pub parse: bool,
}

impl Specials {
    /// Plain text: nothing added, nothing parsed. What a user typed, and perplexity.
    pub const NONE: Self = Self { add: false, parse: false };
    /// A rendered chat template: it brings its own special tokens.
    pub const TEMPLATE: Self = Self { add: false, parse: true };
    /// A raw prompt, as completion endpoints take it.
    pub const PROMPT: Self = Self { add: true, parse: true };
}

#[derive(Debug)]
enum Model {
    HuggingFace(Box<HuggingFace>),
    Ggml(Box<Ggml>),
}

/// Text to token ids and back.
#[derive(Debug)]
pub struct Tokenizer {
    model: Model,
    vocabulary: Arc<Vocabulary>,
    special: SpecialTokens,
}

impl Tokenizer {
    /// Opens the tokenizer of `checkpoint`: the sidecar `tokenizer.json`, or the vocabulary in a
    /// GGUF file's metadata.
    ///
    /// # Errors
    /// When there is none, or it is damaged or of a kind that is not supported.
    pub fn open(checkpoint: &Checkpoint) -> Result<Self, TextError> {
        let path = &checkpoint.path;
        if let Some(bytes) = checkpoint.sidecar("tokenizer.json") {
            let file = path.join("tokenizer.json");
            let (model, vocabulary) = HuggingFace::parse(&file, bytes)?;
            let special =
                SpecialTokens::of_directory(checkpoint, vocabulary.len(), |t| model.token_id(t))?;
            let model = Model::HuggingFace(Box::new(model));
            return Ok(Self { model, vocabulary: Arc::new(vocabulary), special });
        }
        match &checkpoint.container {
            Container::Gguf { metadata } => {
                let (model, vocabulary, special) = Ggml::parse(path, metadata)?;
                let model = Model::Ggml(Box::new(model));
                Ok(Self { model, vocabulary: Arc::new(vocabulary), special })
            }
            Container::HuggingFace { .. } => Err(TextError::Missing {
                path: path.clone(),
                field: "tokenizer.json".into(),
                hint: "fetch it into the model's directory".into(),
            }),
        }
    }

    /// Token ids of `text`. A text that says its first token itself, as rendered chat templates do,
    /// does not get it twice.
    ///
    /// # Errors
    /// When a part of the text has no token and the vocabulary no unknown token.
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>, TextError> {
        let mut ids = match &self.model {
            Model::HuggingFace(model) => {
                let mut ids = model.encode(text, specials)?;
                if specials.add {
                    self.special.surround(&mut ids);
                }
                ids
            }
            Model::Ggml(model) => model.encode(text, specials, &self.special)?,
        };
        if specials.add
            && specials.parse
            && let Some(bos) = self.special.bos
            && ids.starts_with(&[bos, bos])
            && text.as_bytes().starts_with(self.vocabulary.bytes(bos)?)
        {
            ids.remove(0);
        }
        Ok(ids)
    }

    /// The text of `ids` from its beginning, without special tokens.
    ///
    /// # Errors
    /// [`TextError::TokenId`] when an id is outside the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TextError> {
        self.decode_with(ids, StreamOptions::default())
    }

    /// The text of `ids` under `options`: what a stream would give out in all.
    ///
    /// # Errors
    /// [`TextError::TokenId`] when an id is outside the vocabulary.
    pub fn decode_with(&self, ids: &[u32], options: StreamOptions) -> Result<String, TextError> {
        let mut stream = self.stream(options);
        let mut text = String::new();
        for &id in ids {
            text.push_str(&stream.push(id)?.text);
        }
        text.push_str(&stream.finish().text);
        Ok(text)
    }

    /// An incremental decoder, independent of the lifetime of this value.
    pub fn stream(&self, options: StreamOptions) -> StreamDecoder {
        StreamDecoder::new(self.vocabulary.clone(), options, |text| self.token_id(text))
    }

    /// The bytes that token `id` contributes to text: byte-level and byte-fallback tokens resolved,
    /// word-start marks as spaces. Not necessarily whole characters.
    ///
    /// # Errors
    /// [`TextError::TokenId`] when the id is outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Result<&[u8], TextError> {
        self.vocabulary.bytes(id)
    }

    /// Whether token `id` steers the model and is no part of the text.
    ///
    /// # Errors
    /// [`TextError::TokenId`] when the id is outside the vocabulary.
    pub fn is_special(&self, id: u32) -> Result<bool, TextError> {
        self.vocabulary.is_special(id)
    }

    pub(crate) fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }

    /// The id of the token written exactly `token` in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        match &self.model {
            Model::HuggingFace(model) => model.token_id(token),
            Model::Ggml(model) => model.token_id(token),
        }
    }

    /// Number of ids, holes included. The model's own vocabulary may be padded beyond it.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.len()
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.special.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.special.eos
    }

    /// Every token that ends generation, ascending: all EOS ids of `generation_config.json`,
    /// `config.json` and `tokenizer_config.json`, or the EOS, EOT and EOM ids of a GGUF file.
    pub fn end_ids(&self) -> &[u32] {
        &self.special.end
    }
}
