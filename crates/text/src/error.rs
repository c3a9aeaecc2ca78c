//! Why text cannot become tokens, or tokens text.

use std::path::PathBuf;

/// Error of this crate. Every variant that comes from a file names the file and the field.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The checkpoint lacks something that is needed here.
    #[error("{}: {field} is missing; {hint}", path.display())]
    Missing {
        /// File or directory.
        path: PathBuf,
        /// Metadata key or file name.
        field: String,
        /// What to do next.
        hint: String,
    },
    /// A field contradicts itself or its format.
    #[error("{}: {field}: {reason}; the file is damaged, fetch it again", path.display())]
    Corrupt {
        /// File.
        path: PathBuf,
        /// Metadata key or JSON path.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Well-formed, but not something this program reads.
    #[error("{}: {field}: {reason}", path.display())]
    Unsupported {
        /// File.
        path: PathBuf,
        /// Metadata key or JSON path.
        field: String,
        /// The value found and what is supported instead.
        reason: String,
    },
    /// A token id outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocab_size} tokens")]
    TokenId {
        /// The id.
        id: u32,
        /// Number of tokens.
        vocab_size: usize,
    },
    /// Text that the tokenizer cannot encode.
    #[error("cannot encode text: {reason}")]
    Encode {
        /// What failed.
        reason: String,
    },
    /// A chat template that does not parse, or fails on these messages.
    #[error("{origin}, line {line}: {reason}")]
    Template {
        /// File or metadata key the template came from.
        origin: String,
        /// Line in the template, from 1; 0 when unknown.
        line: usize,
        /// What failed.
        reason: String,
    },
    /// No template under the name that was asked for.
    #[error("{origin}: no chat template called {name}; there are: {available}")]
    TemplateName {
        /// File or metadata key the templates came from.
        origin: String,
        /// Name asked for.
        name: String,
        /// Names that exist, separated by commas.
        available: String,
    },
    /// A tool of a request.
    #[error("tool: {field}: {reason}")]
    Tool {
        /// Field of the function.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A grammar that cannot be compiled or followed.
    #[error("{kind}: {reason}")]
    Grammar {
        /// Kind of grammar: the name that requests call it by.
        kind: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The grammar may be right, but as many as may be are being compiled.
    #[error("other grammars take long to compile at the moment; try again")]
    TooManyGrammars,
}
