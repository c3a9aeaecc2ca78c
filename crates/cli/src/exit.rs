//! Exit codes, by kind of failure.

use crate::console;
use marlin_checkpoint::CheckpointError;
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
#[cfg(feature = "hub")]
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

fn code(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if let Some(e) = cause.downcast_ref::<Coded>() {
            return e.code;
        }
        if let Some(e) = cause.downcast_ref::<CheckpointError>() {
            return checkpoint(e);
        }
        if let Some(ModelError::Checkpoint(e) | ModelError::Quant(QuantError::Checkpoint(e))) =
            cause.downcast_ref::<ModelError>()
        {
            return checkpoint(e);
        }
        if let Some(QuantError::Invalid { .. }) = cause.downcast_ref::<QuantError>() {
            return CORRUPT;
        }
        if let Some(e) = cause.downcast_ref::<TextError>() {
            return match e {
                TextError::Missing { .. } => NOT_FOUND,
                TextError::Corrupt { .. } => CORRUPT,
                _ => FAILED,
            };
        }
        if let Some(BackendError::OutOfMemory { .. }) = cause.downcast_ref::<BackendError>() {
            return DOES_NOT_FIT;
        }
        if let Some(e) = cause.downcast_ref::<EngineError>()
            && is_usage(e)
        {
            return USAGE;
        }
        if let Some(e) = cause.downcast_ref::<std::io::Error>()
            && e.kind() == ErrorKind::NotFound
        {
            return NOT_FOUND;
        }
    }
    FAILED
}

fn is_usage(error: &EngineError) -> bool {
    match error {
        EngineError::InModel { error, .. } => is_usage(error),
        EngineError::PromptTooLong { .. } | EngineError::Parameter { .. } => true,
        _ => false,
    }
}

fn checkpoint(error: &CheckpointError) -> u8 {
    match error {
        CheckpointError::NotFound { .. } => NOT_FOUND,
        CheckpointError::Corrupt { .. }
        | CheckpointError::Missing { .. }
        | CheckpointError::Shape { .. } => CORRUPT,
        CheckpointError::Io { source, .. } if source.kind() == ErrorKind::NotFound => NOT_FOUND,
        _ => FAILED,
    }
}
