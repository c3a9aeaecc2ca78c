//! Answers that must follow a grammar: which tokens may come next.
//!
//! [`GrammarFactory`] is made once for a model, [`GrammarFactory::compile`] turns a [`Grammar`] of a
//! request into a [`GrammarMatcher`], and the matcher gives a [`TokenMask`] before each token is chosen
//! and hears which one it was. The work is done by llguidance: an Earley parser over lexemes that are
//! matched by derivatives of regular expressions, walked down a trie of the vocabulary.
//!
//! **Limits.** Grammars come from clients, so all of them are bounded before anything is built
//! ([`limits`]) and by fuel while it is: a grammar that is too large for it is an error. Compiling has a
//! thread of its own and is given up after two seconds ([`compiling`]); a mask that would take too many steps
//! ends the answer with an error.
//!
//! **JSON.** White space between the parts of JSON is a space, or one line break and up to [`MAX_SPACES`] spaces, because models
//! are known to fall into endless line breaks where any amount is allowed. Reasoning is no part of a
//! grammar: the caller starts the matcher when the content begins.

mod calls;
mod compiling;
mod gbnf;
mod limits;

pub use compiling::{Compiling, GrammarLimits};

use crate::TextError;
use crate::output::CallFormat;
use crate::tokenizer::Tokenizer;
use crate::tools::Tool;
use crate::vocabulary::{TokenKind, Vocabulary};
use compiling::Unfinished;
use llguidance::api::{GrammarInit, ParserLimits, StopReason, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{
    InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv,
};
use llguidance::{JsonCompileOptions, Logger, Matcher, ParserFactory};
use serde_json::{Value, json};
use std::fmt;
use std::sync::{Arc, OnceLock};

/// Most spaces before a part of JSON that begins a line.
pub const MAX_SPACES: usize = 20;

/// What an answer must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that is valid under a schema.
    JsonSchema {
        /// The schema.
        schema: Value,
        /// `oneOf` whose choices may overlap is an error; otherwise it is read as `anyOf`. A keyword that
        /// cannot be enforced is an error always.
        strict: bool,
    },
    /// A regular expression in the syntax of the `regex` crate, for the whole answer.
    Regex(String),
    /// A grammar in llguidance's dialect of Lark.
    Lark(String),
    /// A grammar in llama.cpp's notation.
    Gbnf(String),
    /// Calls of functions, written as the model writes them: [`Grammar::tool_calls`].
    ToolCalls(ToolCalls),
}

/// Parts of [`Grammar::ToolCalls`].
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCalls {
    format: CallFormat,
    /// Not empty.
    tools: Vec<Tool>,
    parallel: bool,
    /// An answer may be text, and text may come first.
    optional: bool,
}

/// Which functions an answer has to call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolChoice<'a> {
    /// Any of them, or none: text, calls, or text and then calls.
    Auto,
    /// Any of them.
    Required,
    /// This one.
    Named(&'a str),
}

impl Grammar {
    /// An answer that is a call of one of the `tools` and nothing else, or several calls where
    /// `parallel` allows them, with arguments that are valid under the tools' schemas. With [`ToolChoice::Auto`] it may be
    /// text as well, in which nothing can look like the beginning of a call and be none.
    ///
    /// # Errors
    /// When there is no tool, or none of that name.
    pub fn tool_calls(
        format: CallFormat,
        tools: &[Tool],
        which: ToolChoice,
        parallel: bool,
    ) -> Result<Self, TextError> {
        let chosen = |tool: &&Tool| match which {
            ToolChoice::Auto | ToolChoice::Required => true,
            ToolChoice::Named(name) => tool.name == name,
        };
        let tools: Vec<Tool> = tools.iter().filter(chosen).cloned().collect();
        if tools.is_empty() {
            let reason = match which {
                ToolChoice::Auto | ToolChoice::Required => "there are no tools to call".to_owned(),
                ToolChoice::Named(name) => format!("there is no tool called {name:?}"),
            };
            return Err(TextError::Grammar { kind: "tool_choice", reason });
        }
        let optional = which == ToolChoice::Auto;
        Ok(Self::ToolCalls(ToolCalls { format, tools, parallel, optional }))
    }

    /// What errors call it.
    fn kind(&self) -> &'static str {
        match self {
            Self::JsonObject => "json_object",
            Self::JsonSchema { .. } => "json_schema",
            Self::Regex(_) => "regex",
            Self::Lark(_) => "lark",
            Self::Gbnf(_) => "gbnf",
            Self::ToolCalls(_) => "tools",
        }
    }
}

fn json_options(strict: bool) -> JsonCompileOptions {
    JsonCompileOptions {
        whitespace_pattern: Some(format!(r"(\x0A[\x20]{{0,{MAX_SPACES}}}|[\x20])")),
        coerce_one_of: !strict,
        lenient: false,
        ..JsonCompileOptions::default()
    }
}

/// `schema` with our options written into it, which replace any that the client wrote.
fn with_options(schema: &Value, strict: bool) -> Value {
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        other => other.clone(),
    };
    if schema.is_object() {
        json_options(strict).apply_to(&mut schema);
    }
    schema
}

/// Compiles grammars for one vocabulary.
#[derive(Clone)]
pub struct GrammarFactory {
    shared: Arc<Shared>,
}

struct Shared {
    vocabulary: Arc<Vocabulary>,
    end_ids: Vec<u32>,
    parsers: OnceLock<Result<ParserFactory, String>>,
    limits: GrammarLimits,
}

impl fmt::Debug for GrammarFactory {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("GrammarFactory").field("vocab_size", &self.shared.vocabulary.len()).finish()
    }
}

impl GrammarFactory {
    /// A factory for the vocabulary of `tokenizer`, with the usual limits.
    ///
    /// # Errors
    /// As [`GrammarFactory::within`].
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, TextError> {
        Self::within(tokenizer, GrammarLimits::default())
    }

    /// A factory for the vocabulary of `tokenizer`.
    ///
    /// This is free. The first [`GrammarFactory::compile`] builds the tries of the vocabulary, which
    /// takes a fraction of a second for 150 thousand tokens; [`GrammarFactory::prepare`] does it ahead
    /// of the first request.
    ///
    /// # Errors
    /// When the vocabulary has no token that ends a text, so that no answer could ever be complete.
    pub fn within(tokenizer: &Tokenizer, limits: GrammarLimits) -> Result<Self, TextError> {
        let end_ids = tokenizer.end_ids().to_vec();
        if end_ids.is_empty() {
            let reason = "the model has no end-of-text token, which a grammar needs".into();
            return Err(TextError::Grammar { kind: "tokenizer", reason });
        }
        let vocabulary = tokenizer.vocabulary().clone();
        Ok(Self {
            shared: Arc::new(Shared { vocabulary, end_ids, parsers: OnceLock::new(), limits }),
        })
    }

    /// Builds what all grammars share, if that has not been done yet.
    ///
    /// # Errors
    /// When the vocabulary cannot be used.
    pub fn prepare(&self) -> Result<(), TextError> {
        self.shared.parsers().map(|_| ())
    }

    /// A matcher at the beginning of an answer under `grammar`. Takes milliseconds for usual grammars
    /// and at most [`GrammarLimits::compile_time`] for any.
    ///
    /// # Errors
    /// [`TextError::Grammar`] when the grammar is malformed, cannot be satisfied, asks for what cannot
    /// be enforced, or is too large.
    pub fn compile(&self, grammar: &Grammar) -> Result<GrammarMatcher, TextError> {
        let limits = &self.shared.limits;
        limits::check(grammar, limits)?;
        let kind = grammar.kind();
        let top = self.shared.top_level(grammar)?;
        self.prepare()?;
        let failed = |reason: String| TextError::Grammar { kind, reason };
        let shared = self.shared.clone();
        let compiled = limits.run(move || shared.parsers().map(|parsers| matcher(parsers, top)));
        let matcher = compiled.map_err(|unfinished| match unfinished {
            Unfinished::Full => TextError::TooManyGrammars,
            Unfinished::NoThread(error) => failed(format!("no thread to compile on: {error}")),
            Unfinished::GivenUp => failed(format!(
                "not compiled within {:?}; make the grammar smaller",
                limits.compile_time
            )),
        })??;
        if let Some(error) = matcher.get_error() {
            return Err(failed(tidy(&error)));
        }
        Ok(GrammarMatcher {
            matcher,
            kind,
            shared: self.shared.clone(),
            mask: TokenMask::new(self.shared.vocabulary.len()),
            mask_is_current: false,
            done: false,
        })
    }
}

fn matcher(parsers: &ParserFactory, top: TopLevelGrammar) -> Matcher {
    Matcher::new(parsers.create_parser_from_init_ext(
        GrammarInit::Serialized(top),
        Logger::new(0, 0),
        InferenceCapabilities::default(),
        parsers.limits().clone(),
    ))
}

/// An error of the library without what shows its insides.
fn tidy(error: &str) -> String {
    if error.starts_with("panic") {
        return "the compiler of grammars fails on this one".into();
    }
    let end = ["\n<state>", "\n<non-verbose", "\n<backtrace>"]
        .iter()
        .filter_map(|mark| error.find(mark))
        .min();
    error[..end.unwrap_or(error.len())].trim_end().to_owned()
}

impl Shared {
    fn parsers(&self) -> Result<&ParserFactory, TextError> {
        let parsers = self.parsers.get_or_init(|| self.build());
        parsers
            .as_ref()
            .map_err(|reason| TextError::Grammar { kind: "tokenizer", reason: reason.clone() })
    }

    fn build(&self) -> Result<ParserFactory, String> {
        let vocabulary = &self.vocabulary;
        let words: Result<Vec<Vec<u8>>, TextError> = (0..vocabulary.len() as u32)
            .map(|id| {
                let bytes = vocabulary.bytes(id)?;
                Ok(match vocabulary.kind(id)? {
                    TokenKind::Control | TokenKind::Unknown if !bytes.is_empty() => {
                        [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
                    }
                    // The marker is no byte of any text.
                    _ if bytes.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) => Vec::new(),
                    _ => bytes.to_vec(),
                })
            })
            .collect();
        let words = words.map_err(|error| error.to_string())?;
        let info = TokRxInfo::new(words.len() as u32, self.end_ids[0]);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(&self.end_ids);
        let environment: TokEnv = Arc::new(Environment { trie });
        let slices = SlicedBiasComputer::general_slices();
        let mut parsers =
            ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
                .map_err(|error| error.to_string())?;
        parsers.quiet();
        *parsers.limits_mut() = ParserLimits { verbose_errors: false, ..ParserLimits::default() };
        Ok(parsers)
    }

    fn top_level(&self, grammar: &Grammar) -> Result<TopLevelGrammar, TextError> {
        Ok(match grammar {
            Grammar::JsonObject => {
                TopLevelGrammar::from_json_schema(with_options(&json!({"type": "object"}), true))
            }
            Grammar::JsonSchema { schema, strict } => {
                TopLevelGrammar::from_json_schema(with_options(schema, *strict))
            }
            Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Grammar::Lark(source) => TopLevelGrammar::from_lark(source.clone()),
            Grammar::Gbnf(source) => TopLevelGrammar::from_lark(gbnf::to_lark(source)?),
            Grammar::ToolCalls(calls) => {
                TopLevelGrammar::from_lark(calls::to_lark(calls, |text| self.special_id(text)))
            }
        })
    }

    /// Id of the control token that shows as `text`.
    fn special_id(&self, text: &str) -> Option<u32> {
        (0..self.vocabulary.len() as u32).find(|&id| {
            self.vocabulary.is_special(id).unwrap_or(false)
                && self.vocabulary.bytes(id).is_ok_and(|bytes| bytes == text.as_bytes())
        })
    }
}

/// The vocabulary as llguidance wants it. Tokens are never forced, only masked, so its own choice of
/// tokens for a text does not matter.
struct Environment {
    trie: TokTrie,
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.greedy_tokenize(bytes)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

/// The tokens that may come next.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenMask {
    /// The lowest bit of a word is its first token.
    words: Vec<u32>,
    vocab_size: usize,
}

impl fmt::Debug for TokenMask {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "TokenMask({} of {})", self.count(), self.vocab_size)
    }
}

impl TokenMask {
    fn new(vocab_size: usize) -> Self {
        Self { words: vec![0; vocab_size.div_ceil(32)], vocab_size }
    }

    /// Takes the bits over, without those behind the vocabulary, which may have any value.
    fn set(&mut self, bits: &SimpleVob) {
        self.words.fill(0);
        for (word, from) in self.words.iter_mut().zip(bits.as_slice()) {
            *word = *from;
        }
        let rest = self.vocab_size % 32;
        if let Some(last) = self.words.last_mut().filter(|_| rest > 0) {
            *last &= (1 << rest) - 1;
        }
    }

    /// Whether token `id` may come next.
    pub fn allows(&self, id: u32) -> bool {
        self.words.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
    }

    /// Number of tokens that may come next.
    pub fn count(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The tokens that may come next, ascending.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        self.words.iter().zip(0u32..).flat_map(|(&word, index)| {
            (0..32).filter(move |bit| word >> bit & 1 == 1).map(move |bit| index * 32 + bit)
        })
    }

    /// One bit for each token, the lowest of a word first; bits behind the vocabulary are zero.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Sets the logits of tokens that may not come next to minus infinity, those behind the
    /// vocabulary included.
    pub fn apply(&self, logits: &mut [f32]) {
        for (word, logits) in self.words.iter().zip(logits.chunks_mut(32)) {
            if *word == u32::MAX {
                continue;
            }
            for (bit, logit) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        if let Some(rest) = logits.get_mut(self.words.len() * 32..) {
            rest.fill(f32::NEG_INFINITY);
        }
    }
}

/// Follows one answer. A clone follows an answer of its own from here on.
#[derive(Clone)]
pub struct GrammarMatcher {
    matcher: Matcher,
    kind: &'static str,
    shared: Arc<Shared>,
    mask: TokenMask,
    mask_is_current: bool,
    done: bool,
}

impl fmt::Debug for GrammarMatcher {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("GrammarMatcher").field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl GrammarMatcher {
    /// The tokens that may come next: only those that end the text once the grammar is at its end.
    ///
    /// # Errors
    /// [`TextError::Grammar`] when the grammar takes more steps than are allowed, or no token fits.
    pub fn mask(&mut self) -> Result<&TokenMask, TextError> {
        if !self.mask_is_current {
            let bits = self.matcher.compute_mask_or_eos().map_err(|e| self.failed(&e))?;
            self.mask.set(&bits);
            self.mask_is_current = true;
        }
        Ok(&self.mask)
    }

    /// Goes on to after `token`.
    ///
    /// # Errors
    /// [`TextError::Grammar`] when the token may not come next; the matcher is as it was. Also when
    /// the grammar takes more steps than are allowed.
    pub fn accept(&mut self, token: u32) -> Result<(), TextError> {
        if self.done {
            return Err(self.wrong("the answer is at its end already"));
        }
        let allowed = match self.mask_is_current {
            true => self.mask.allows(token),
            false if self.matcher.is_stopped() => self.mask()?.allows(token),
            false => true,
        };
        if !allowed {
            return Err(self.wrong(&format!("token {token} does not fit here")));
        }
        if self.shared.end_ids.contains(&token) {
            if !self.may_stop()? {
                return Err(self.wrong(&format!("token {token} ends the answer too early")));
            }
            self.done = true;
        } else {
            let taken = self.matcher.try_consume_tokens(&[token]).map_err(|e| self.failed(&e))?;
            if taken == 0 {
                return Err(self.wrong(&format!("token {token} does not fit here")));
            }
        }
        self.mask_is_current = false;
        Ok(())
    }

    /// Whether the answer may end here: a token that ends the text is allowed.
    ///
    /// # Errors
    /// As [`GrammarMatcher::mask`].
    pub fn may_stop(&mut self) -> Result<bool, TextError> {
        if self.done || self.is_done() {
            return Ok(true);
        }
        self.matcher.is_accepting().map_err(|e| self.failed(&e))
    }

    /// Whether nothing but the end can follow, so that generation may stop without waiting for the
    /// token that says so.
    pub fn is_done(&self) -> bool {
        self.done || self.matcher.is_stopped() && self.matcher.stop_reason().is_ok()
    }

    fn failed(&self, error: &impl fmt::Display) -> TextError {
        let error = error.to_string();
        let told = |part: &str| error.contains(part);
        let too_complex = [StopReason::LexerTooComplex, StopReason::ParserTooComplex]
            .contains(&self.matcher.stop_reason());
        let reason = if told("NoExtensionBias") {
            "nothing can satisfy the grammar from here on".to_owned()
        } else if too_complex || told("too many expressions") || told("Current row has") {
            "the grammar takes too many steps here; make it less ambiguous".to_owned()
        } else {
            tidy(&error)
        };
        TextError::Grammar { kind: self.kind, reason }
    }

    fn wrong(&self, reason: &str) -> TextError {
        TextError::Grammar { kind: self.kind, reason: reason.into() }
    }
}
