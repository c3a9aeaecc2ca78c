//! Raw logits of given tokens.

use super::{GoOn, Reader, check_row, check_tokens};
use crate::sampler::log_sum_exp;
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

/// Calls `each` with the log-probability of every token of `tokens` from position `first` on, given all
/// before it.
///
/// # Errors
/// When a token is unknown, there are too many, the model fails or gives NaN, or it is not to go on.
pub fn for_each_logprob(
    model: &dyn LanguageModel,
    tokens: &[u32],
    first: usize,
    each: &mut dyn FnMut(f64),
    go_on: GoOn,
) -> Result<(), EngineError> {
    check_tokens("token_ids", tokens, model)?;
    let first = first.max(1);
    let reader = Reader::new(model, tokens.len())?;
    // The last token is predicted and predicts nothing.
    let mut stream = reader.stream(&tokens[..tokens.len().saturating_sub(1)], first - 1);
    stream.go_on = go_on;
    while let Some((start, rows)) = stream.next()? {
        for (i, row) in rows.chunks_exact(model.vocab_size()).enumerate() {
            check_row(row, start + i)?;
            let logit = f64::from(row[tokens[start + i + 1] as usize]);
            each(logit - log_sum_exp(row));
        }
    }
    Ok(())
}
