//! Exit codes, by kind of failure.

use crate::console;
use marlin_checkpoint::CheckpointError;
use marlin_convert::ConvertError;
use marlin_engine::EngineError;
use marlin_models::ModelError;
use marlin_quant::QuantError;
use marlin_tensor::BackendError;
use marlin_text::TextError;
use std::io::ErrorKind;
use std::process::ExitCode;

/// Anything that has no code of its own.
pub const FAILED: u8 = 1;
/// Wrong arguments; clap uses the same code.
pub const USAGE: u8 = 2;
/// A file, directory or model that does not exist.
pub const NOT_FOUND: u8 = 3;
/// Not enough memory.
pub const DOES_NOT_FIT: u8 = 4;
/// The network, or being forbidden to use it.
pub const NETWORK: u8 = 5;
/// A file that contradicts itself.
pub const CORRUPT: u8 = 6;
/// Ctrl-C.
pub const INTERRUPTED: u8 = 130;

/// An error with an exit code of its own.
#[derive(Debug)]
pub struct Coded {
    /// Exit code.
    pub code: u8,
    /// What to print.
    pub message: String,
}

impl std::fmt::Display for Coded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Coded {}

/// An error with a code.
pub fn coded(code: u8, message: impl Into<String>) -> anyhow::Error {
    Coded { code, message: message.into() }.into()
}

/// An error that says the arguments are wrong.
pub fn usage(message: impl Into<String>) -> anyhow::Error {
    coded(USAGE, message)
}

/// Prints `error` and gives its exit code. A closed pipe is not a failure.
pub fn report(error: &anyhow::Error) -> ExitCode {
    let broken_pipe = error
        .chain()
        .filter_map(|e| e.downcast_ref::<std::io::Error>())
        .any(|e| e.kind() == ErrorKind::BrokenPipe);
    if broken_pipe {
        return ExitCode::SUCCESS;
    }
    console::error(&format!("{error:#}"));
    ExitCode::from(code(error))
}

/// What a sequence ended with, with the code of its kind.
pub fn of_engine(error: &EngineError) -> anyhow::Error {
    coded(engine(error).unwrap_or(FAILED), error.to_string())
}

fn code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(known).unwrap_or(FAILED)
}

/// Code of one error of a chain. Transparent errors hide what they hold from the chain, so theirs
/// are looked into.
fn known(cause: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if let Some(e) = cause.downcast_ref::<Coded>() {
        Some(e.code)
    } else if let Some(e) = cause.downcast_ref::<CheckpointError>() {
        checkpoint(e)
    } else if let Some(e) = cause.downcast_ref::<ModelError>() {
        model(e)
    } else if let Some(e) = cause.downcast_ref::<EngineError>() {
        engine(e)
    } else if let Some(e) = cause.downcast_ref::<ConvertError>() {
        convert(e)
    } else if let Some(e) = cause.downcast_ref::<TextError>() {
        text(e)
    } else if let Some(e) = cause.downcast_ref::<BackendError>() {
        backend(e)
    } else if let Some(e) = cause.downcast_ref::<std::io::Error>() {
        (e.kind() == ErrorKind::NotFound).then_some(NOT_FOUND)
    } else {
        None
    }
}

fn model(error: &ModelError) -> Option<u8> {
    match error {
        ModelError::Checkpoint(e) => checkpoint(e),
        ModelError::Weight { source: QuantError::Invalid { .. }, .. } => Some(CORRUPT),
        ModelError::Load { source, .. } | ModelError::Backend(source) => backend(source),
        _ => None,
    }
}

fn engine(error: &EngineError) -> Option<u8> {
    match error {
        EngineError::InModel { error, .. } => engine(error),
        EngineError::Parameter { .. }
        | EngineError::EmptyPrompt
        | EngineError::PromptTooLong { .. }
        | EngineError::ContextExceeded { .. }
        | EngineError::UnknownToken { .. } => Some(USAGE),
        EngineError::Backend(e) => backend(e),
        _ => None,
    }
}

fn convert(error: &ConvertError) -> Option<u8> {
    match error {
        ConvertError::Checkpoint(e) => checkpoint(e),
        ConvertError::Model(e) => model(e),
        ConvertError::Engine(e) => engine(e),
        ConvertError::Backend(e) => backend(e),
        ConvertError::Option { .. } | ConvertError::Job { .. } => Some(USAGE),
        ConvertError::Memory { .. } | ConvertError::DiskFull { .. } => Some(DOES_NOT_FIT),
        ConvertError::Stopped => Some(INTERRUPTED),
        _ => None,
    }
}

fn text(error: &TextError) -> Option<u8> {
    match error {
        TextError::Missing { .. } => Some(NOT_FOUND),
        TextError::Corrupt { .. } => Some(CORRUPT),
        _ => None,
    }
}

fn backend(error: &BackendError) -> Option<u8> {
    matches!(error, BackendError::OutOfMemory { .. }).then_some(DOES_NOT_FIT)
}

fn checkpoint(error: &CheckpointError) -> Option<u8> {
    match error {
        CheckpointError::NotFound { .. } => Some(NOT_FOUND),
        CheckpointError::Corrupt { .. }
        | CheckpointError::Missing { .. }
        | CheckpointError::Shape { .. } => Some(CORRUPT),
        CheckpointError::Io { source, .. } if source.kind() == ErrorKind::NotFound => {
            Some(NOT_FOUND)
        }
        _ => None,
    }
}
