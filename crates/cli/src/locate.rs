//! From what the user wrote after `-m` to an opened checkpoint.

use crate::{embedded, exit};
use anyhow::{Context, Result};
use marlin_checkpoint::Checkpoint;
use std::path::Path;

/// Opens `model`: a directory, a `.gguf` file, a `config.json`; nothing is the embedded model.
///
/// # Errors
/// When it does not exist or is damaged.
pub fn open(model: Option<&str>) -> Result<Checkpoint> {
    let Some(model) = model else { return embedded::open() };
    let path = Path::new(model);
    if !path.exists() {
        let code = exit::NOT_FOUND;
        let message = format!(
            "{model}: no such file or directory; name a directory with config.json and safetensors, \
             a .gguf file, or leave -m out for the embedded model"
        );
        return Err(exit::Coded { code, message }.into());
    }
    Checkpoint::open(path).context("cannot open the model")
}

/// What to call `model` in results.
pub fn name(model: Option<&str>) -> &str {
    model.unwrap_or(embedded::NAME)
}
