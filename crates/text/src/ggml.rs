//! The vocabulary in a GGUF file's metadata, and nothing else.
//!
//! `tokenizer.ggml.model` names the algorithm: `gpt2` and `gemma4` ([`bpe`]), `llama` ([`spm`]),
//! `t5` ([`unigram`]), `bert` ([`wordpiece`]). Ids are those of llama.cpp, whose conversion scripts
//! define these keys.

mod bpe;
mod metadata;
mod partition;
mod pipeline;
mod pre_tokenizer;
mod spm;
mod symbols;
mod tokens;
mod unigram;
mod wordpiece;

use crate::TextError;
use crate::byte_level;
use crate::hugging_face::fallback_byte;
use crate::special::SpecialTokens;
use crate::tokenizer::Specials;
use crate::vocabulary::{TokenKind, Vocabulary};
use metadata::Metadata;
use partition::{Part, Partition, Strip};
pub(crate) use pipeline::{AddedToken, Exported, Pipeline};
use pre_tokenizer::PreTokenizer;
use serde_json::{Map, Value};
use std::path::Path;
use tokens::Tokens;

#[derive(Debug)]
enum Algorithm {
    Bpe(Box<bpe::Bpe>),
    Spm(spm::Spm),
    Unigram(Box<unigram::Unigram>),
    WordPiece(wordpiece::WordPiece),
}

/// An opened GGUF vocabulary.
#[derive(Debug)]
pub(crate) struct Ggml {
    tokens: Tokens,
    partition: Partition,
    algorithm: Algorithm,
}

/// How the texts of normal tokens are written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Alphabet {
    ByteLevel,
    /// `▁` is a space.
    Marked,
}

/// What the algorithm says about special tokens before the file's own keys are read.
#[derive(Default)]
struct Defaults {
    bos: Option<u32>,
    eos: Option<u32>,
    sep: Option<u32>,
    unknown: Option<u32>,
    add_bos: bool,
    add_eos: bool,
    force_bos: bool,
}

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";

impl Ggml {
    /// Reads the `tokenizer.*` keys of `map`, the metadata of `path`.
    pub(crate) fn parse(
        path: &Path,
        map: &Map<String, Value>,
    ) -> Result<(Self, Vocabulary, SpecialTokens), TextError> {
        let metadata = Metadata { path, map };
        let model = metadata.text(MODEL)?.ok_or_else(|| metadata.missing(MODEL))?;
        if !matches!(model, "gpt2" | "gemma4" | "llama" | "t5" | "bert") {
            let reason = format!("{model:?} is not supported (gpt2, gemma4, llama, t5, bert are)");
            return Err(metadata.unsupported(MODEL, reason));
        }
        let mut tokens = Tokens::read(&metadata)?;
        let (algorithm, alphabet, defaults) = algorithm(&metadata, model, &tokens)?;
        let strip_first_space = match &algorithm {
            Algorithm::Spm(spm) => spm.add_space_prefix,
            Algorithm::Unigram(unigram) => unigram.add_space_prefix,
            Algorithm::WordPiece(_) => true,
            Algorithm::Bpe(_) => false,
        };
        let special = special_tokens(&metadata, &mut tokens, defaults)?;
        let strips = strips(&metadata, &tokens)?;
        let partition = Partition::new(&tokens, strips).map_err(|reason| {
            metadata.corrupt("tokenizer.ggml.token_type", format!("special tokens: {reason}"))
        })?;
        let mut vocabulary = Vocabulary::with_capacity(tokens.len(), strip_first_space);
        for (text, &kind) in tokens.texts.iter().zip(&tokens.kinds) {
            let bytes = token_bytes(text, kind, alphabet);
            if !vocabulary.fits(bytes.len()) {
                return Err(metadata.corrupt("tokenizer.ggml.tokens", "more than 4 GiB of text"));
            }
            vocabulary.push(&bytes, kind);
        }
        Ok((Self { tokens, partition, algorithm }, vocabulary, special))
    }

    pub(crate) fn token_id(&self, token: &str) -> Option<u32> {
        self.tokens.id(token)
    }

    pub(crate) fn encode(
        &self,
        text: &str,
        specials: Specials,
        special: &SpecialTokens,
    ) -> Result<Vec<u32>, TextError> {
        if text.len() >= u32::MAX as usize / 4 {
            return Err(TextError::Encode { reason: "the text is longer than 1 GiB".into() });
        }
        let mut ids = Vec::new();
        if specials.add && special.add_bos {
            ids.extend(special.bos);
        }
        let mut begins = true;
        for part in self.partition.cut(text, specials.parse) {
            match part {
                Part::Token(id) => ids.push(id),
                Part::Text(text) => match &self.algorithm {
                    Algorithm::Bpe(bpe) => bpe.encode(text, &mut ids),
                    Algorithm::Spm(spm) => {
                        spm.encode(&self.tokens, text, begins, special.unknown, &mut ids)?;
                    }
                    Algorithm::Unigram(unigram) => {
                        unigram.encode(text, special.unknown, &mut ids)?;
                    }
                    Algorithm::WordPiece(wordpiece) => {
                        wordpiece.encode(&self.tokens, text, special.unknown, &mut ids)?;
                    }
                },
            }
            begins = matches!(part, Part::Token(_));
        }
        if specials.add && special.add_eos {
            ids.extend(special.sep.or(special.eos));
        }
        Ok(ids)
    }
}

fn algorithm(
    metadata: &Metadata,
    model: &str,
    tokens: &Tokens,
) -> Result<(Algorithm, Alphabet, Defaults), TextError> {
    Ok(match model {
        "llama" => {
            let spm = Algorithm::Spm(spm::Spm::read(metadata, tokens)?);
            let (bos, eos, unknown) = (Some(1), Some(2), Some(0));
            let defaults = Defaults { bos, eos, unknown, add_bos: true, ..Defaults::default() };
            (spm, Alphabet::Marked, defaults)
        }
        "t5" => {
            let unigram = Algorithm::Unigram(Box::new(unigram::Unigram::read(metadata, tokens)?));
            let (eos, unknown) = (Some(1), Some(2));
            let defaults = Defaults { eos, unknown, add_eos: true, ..Defaults::default() };
            (unigram, Alphabet::Marked, defaults)
        }
        "bert" => {
            let wordpiece = wordpiece::WordPiece::read(metadata, tokens)?;
            let defaults = Defaults {
                bos: Some(101),
                sep: Some(102),
                unknown: Some(100),
                add_bos: true,
                add_eos: true,
                ..Defaults::default()
            };
            (Algorithm::WordPiece(wordpiece), Alphabet::Marked, defaults)
        }
        _ => {
            let name = match model {
                "gemma4" => "gemma4",
                _ => metadata.text(PRE)?.ok_or_else(|| metadata.missing(PRE))?,
            };
            let pre_tokenizer = PreTokenizer::named(name).ok_or_else(|| {
                let reason = format!("{name:?} is not a pre-tokenizer this program knows");
                metadata.unsupported(PRE, reason)
            })?;
            let raw = pre_tokenizer.raw;
            let defaults = Defaults {
                add_bos: pre_tokenizer.add_bos,
                force_bos: pre_tokenizer.force_bos,
                ..Defaults::default()
            };
            let bpe = bpe::Bpe::read(metadata, tokens, pre_tokenizer)?;
            let alphabet = if raw { Alphabet::Marked } else { Alphabet::ByteLevel };
            (Algorithm::Bpe(Box::new(bpe)), alphabet, defaults)
        }
    })
}

/// Tokens that end a turn, by the names converters recognize where a file has no
/// `eot_token_id`/`eom_token_id` key; files typed some of them as ordinary text.
const ENDS: [&str; 23] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "[e~[",
    "<|fim_pad|>",
];

fn special_tokens(
    metadata: &Metadata,
    tokens: &mut Tokens,
    defaults: Defaults,
) -> Result<SpecialTokens, TextError> {
    let size = tokens.len();
    let id = |key: &str, default: Option<u32>| -> Result<Option<u32>, TextError> {
        let id = metadata.id(&format!("tokenizer.ggml.{key}_token_id"), size)?;
        Ok(id.or(default.filter(|&id| (id as usize) < size)))
    };
    let mut special = SpecialTokens {
        bos: id("bos", defaults.bos)?,
        eos: id("eos", defaults.eos)?,
        // The key is misspelt in every file, and the correct spelling is accepted.
        sep: id("seperator", None)?.or(id("separator", defaults.sep)?),
        unknown: id("unknown", defaults.unknown)?,
        ..SpecialTokens::default()
    };
    if defaults.sep.is_none() {
        special.sep = None;
    }
    let mut end: Vec<u32> = Vec::new();
    for name in ENDS {
        if let Some(id) = tokens.id(name) {
            end.push(id);
            tokens.kinds[id as usize] = TokenKind::Control;
        }
    }
    ordinary_ends(tokens, &mut end);
    end.extend(special.eos);
    end.extend(id("eot", None)?);
    end.extend(id("eom", None)?);
    special.set_end(end);

    let flag = |key: &str| metadata.flag(&format!("tokenizer.ggml.{key}"));
    if defaults.sep.is_some() {
        (special.add_bos, special.add_eos) = (true, true);
    } else {
        let add_bos = flag("add_bos_token")?.unwrap_or(defaults.add_bos);
        special.add_bos = add_bos || defaults.force_bos;
        special.add_eos = flag("add_eos_token")?.unwrap_or(defaults.add_eos);
    }
    let needed = [
        (special.add_bos && special.bos.is_none(), "tokenizer.ggml.bos_token_id"),
        (special.add_eos && special.sep.or(special.eos).is_none(), "tokenizer.ggml.eos_token_id"),
    ];
    for (absent, key) in needed {
        if absent {
            return Err(metadata.missing(key));
        }
    }
    Ok(special)
}

/// Names that end a turn elsewhere and are ordinary in the formats that have the other tokens too:
/// `<|end|>` between the channels of Harmony and Solar, `</s>` as a tag in Gemma 4.
fn ordinary_ends(tokens: &mut Tokens, end: &mut Vec<u32>) {
    for name in ["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"] {
        if let Some(id) = tokens.id(name) {
            tokens.kinds[id as usize] = TokenKind::UserDefined;
        }
    }
    let has = |name: &str| tokens.id(name).is_some();
    let calls = has("<|call|>") || has("<|calls|>");
    let harmony = calls && (has("<|return|>") || has("<|flush|>"));
    let tag = has("<|tool_response>");
    let ordinary = [(harmony, "<|end|>", TokenKind::UserDefined), (tag, "</s>", TokenKind::Normal)];
    for (applies, name, kind) in ordinary {
        if let Some(id) = tokens.id(name).filter(|_| applies) {
            end.retain(|&other| other != id);
            tokens.kinds[id as usize] = kind;
        }
    }
}

/// White space that special tokens take along. GGUF has no key for it, so converters and readers
/// agree by the names of pre-tokenizer, architecture and model.
fn strips(metadata: &Metadata, tokens: &Tokens) -> Result<impl Fn(u32) -> Strip, TextError> {
    let pre = metadata.text(PRE)?.unwrap_or_default();
    let architecture = metadata.text("general.architecture")?.unwrap_or_default();
    let name = metadata.text("general.name")?.unwrap_or_default().to_lowercase();
    let any = |text: &str, parts: &[&str]| parts.iter().any(|part| text.contains(part));
    let masked = any(pre, &["jina-v2-de", "jina-v2-es", "jina-v2-code"])
        || any(architecture, &["nomic-bert-moe", "jina-bert-v3"]);
    let mut left = None;
    let mut right = false;
    if masked {
        left = tokens.id("<mask>");
    } else if any(&name, &["phi-3", "phi3"]) {
        right = true;
    } else if name.contains("modern-bert") {
        left = tokens.id("[MASK]");
    }
    let keep: Vec<u32> =
        ["<unk>", "<s>", "<|endoftext|>"].iter().filter_map(|text| tokens.id(text)).collect();
    Ok(move |id: u32| Strip { left: left == Some(id), right: right && !keep.contains(&id) })
}

fn token_bytes(text: &str, kind: TokenKind, alphabet: Alphabet) -> Vec<u8> {
    match (kind, alphabet) {
        (TokenKind::Unused, _) => Vec::new(),
        (TokenKind::Byte, _) => fallback_byte(text).into_iter().collect(),
        (TokenKind::Normal, Alphabet::ByteLevel) => {
            byte_level::decode(text).unwrap_or_else(|| text.as_bytes().to_vec())
        }
        (TokenKind::Normal, Alphabet::Marked) => text.replace('\u{2581}', " ").into_bytes(),
        (TokenKind::Control | TokenKind::Unknown | TokenKind::UserDefined, _) => {
            text.as_bytes().to_vec()
        }
    }
}
