//! Text to token ids and back.
//!
//! * [`Tokenizer`]: `tokenizer.json`, or the vocabulary inside a GGUF file and nothing else.
//! * [`StreamDecoder`]: tokens to text as they come, never half a character, stop strings held back.
//! * [`ChatTemplate`]: messages to the prompt the model was trained on.
//! * [`OutputParser`]: the answer, as it comes, to reasoning, content and calls of functions.
//! * [`GrammarFactory`]: which tokens may come next under a grammar, a JSON schema or tools.
//! * [`hugging_face_files`]: the vocabulary of a GGUF file for programs that read directories.
//!
//! Everything is read through a [`marlin_checkpoint::Checkpoint`]; damaged or unsupported input is
//! a [`TextError`] that names the file and the field.

mod byte_level;
mod error;
mod export;
mod ggml;
mod grammar;
mod hugging_face;
mod output;
mod special;
mod stream;
mod template;
mod tokenizer;
mod tools;
mod vocabulary;

pub use error::TextError;
pub use export::hugging_face_files;
pub use grammar::{
    Compiling, Grammar, GrammarFactory, GrammarLimits, GrammarMatcher, MAX_SPACES, TokenMask,
    ToolCalls, ToolChoice,
};
pub use output::{
    CallFormat, OutputEvent, OutputFormat, OutputParser, ParserOptions, ReasoningMarkers,
};
pub use stream::{Emitted, StreamDecoder, StreamOptions};
pub use template::{ChatTemplate, RenderLimits, TemplateInputs};
pub use tokenizer::{Specials, Tokenizer};
pub use tools::{Tool, ToolSet};
