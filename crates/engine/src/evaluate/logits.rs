//! Raw logits of given tokens.

use super::{Reader, check_tokens};
use crate::{EngineError, LanguageModel};

/// Calls `sink` with consecutive rows of logits `[n, vocab_size]`, one row for each of `tokens`.
///
/// # Errors
/// When a token is unknown, the tokens do not fit the context, the model fails, or `sink` does.
pub fn for_each_logits(
    model: &dyn LanguageModel,
    tokens: &[u32],
    sink: &mut dyn FnMut(&[f32]) -> Result<(), EngineError>,
) -> Result<(), EngineError> {
    check_tokens("tokens", tokens, model)?;
    let reader = Reader::new(model, tokens.len())?;
    let mut stream = reader.stream(tokens, 0);
    while let Some((_, rows)) = stream.next()? {
        sink(&rows)?;
    }
    Ok(())
}

/// Logits `[tokens, vocab_size]`, row-major.
///
/// # Errors
/// As [`for_each_logits`].
pub fn logits(model: &dyn LanguageModel, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
    let mut all = Vec::with_capacity(tokens.len() * model.vocab_size());
    for_each_logits(model, tokens, &mut |rows| {
        all.extend_from_slice(rows);
        Ok(())
    })?;
    Ok(all)
}
