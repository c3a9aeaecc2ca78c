//! Vectors of texts: pooled hidden states.

use super::{BLOCK_SIZE, CHUNK, GoOn, Reader, check_tokens, check_wanted};
use crate::{EngineError, LanguageModel};
use marlin_tensor::Batch;

/// How the hidden states of a text become one vector.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    #[default]
    Mean,
    /// That of the last token, which alone has seen the whole text.
    Last,
}

impl std::fmt::Display for Pooling {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(match self {
            Self::Mean => "mean",
            Self::Last => "last",
        })
    }
}

/// The pooled states after the final norm of `tokens`, of length 1: `[hidden_size]`.
///
/// # Errors
/// When there are no tokens, too many, one is unknown, the model fails or gives NaN, or it is not to go on.
pub fn embed(
    model: &dyn LanguageModel,
    tokens: &[u32],
    pooling: Pooling,
    go_on: GoOn,
) -> Result<Vec<f32>, EngineError> {
    if tokens.is_empty() {
        return Err(EngineError::EmptyPrompt);
    }
    check_tokens("input", tokens, model)?;
    let reader = Reader::new(model, tokens.len())?;
    let mut sum: Vec<f64> = Vec::new();
    for (i, chunk) in tokens.chunks(CHUNK).enumerate() {
        check_wanted(go_on)?;
        let mut batch = Batch::new(BLOCK_SIZE);
        let (table, limit) = (reader.table.blocks(), tokens.len() as u32);
        batch.push(chunk, i * CHUNK, table, limit, 0);
        let states = model.download(&model.hidden(&batch, &reader.cache)?)?;
        let columns = states.len() / chunk.len();
        sum.resize(columns, 0.0);
        for state in states.chunks_exact(columns) {
            match pooling {
                Pooling::Mean => sum.iter_mut().zip(state).for_each(|(s, v)| *s += f64::from(*v)),
                Pooling::Last => sum.iter_mut().zip(state).for_each(|(s, v)| *s = f64::from(*v)),
            }
        }
    }
    let length = sum.iter().map(|v| v * v).sum::<f64>().sqrt();
    if !(length.is_finite() && length > 0.0) {
        return Err(EngineError::Embedding { length });
    }
    Ok(sum.into_iter().map(|v| (v / length) as f32).collect())
}
