//! Perplexity of a text, and how far a model is from a reference on it.
//!
//! The tokens are cut into consecutive windows; a last one that is not full is dropped. Each
//! window starts from an empty cache, and its positions `score_from .. window` are scored: the
//! token at position p by the logits at p - 1. Every scored token so has between `score_from` and
//! `window - 1` tokens before it, and figures depend neither on chunking nor on other windows.
//!
//! `nll` is the mean of `-ln p(token)`, `perplexity` its exponential, `kl_divergence` the mean of
//! `Σ q ln(q / p)` with q the reference's distribution and p the model's, `top1_agreement` the
//! share of positions where both have the same likeliest token. Log-softmax and sums are f64.

use super::{Reader, check_row, check_tokens};
use crate::sampler::{argmax, log_sum_exp};
use crate::{EngineError, LanguageModel};

/// Which tokens are scored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PerplexityOptions {
    /// Tokens per window.
    pub window: usize,
    /// First scored position of each window, at least 1.
    pub score_from: usize,
    /// Score only this many windows; `None` scores all.
    pub windows: Option<usize>,
}

impl Default for PerplexityOptions {
    fn default() -> Self {
        Self { window: 512, score_from: 256, windows: None }
    }
}

/// How far an evaluation is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PerplexityProgress {
    /// Windows scored.
    pub windows: usize,
    /// Windows to score.
    pub total: usize,
    /// Perplexity so far.
    pub perplexity: f64,
}

/// The result.
#[derive(Debug, Clone, PartialEq)]
pub struct PerplexityReport {
    /// `exp(nll)`.
    pub perplexity: f64,
    /// Mean negative log-likelihood, nats per token.
    pub nll: f64,
    /// Tokens that were scored.
    pub tokens_scored: usize,
    /// Windows that were scored.
    pub windows: usize,
    /// Mean KL(reference ‖ model), nats, when there was a reference.
    pub kl_divergence: Option<f64>,
    /// Share of positions with the reference's likeliest token, when there was a reference.
    pub top1_agreement: Option<f64>,
}

/// Scores `tokens` (a text without special tokens) under `model`.
///
/// # Errors
/// When an option is out of range, the text has fewer windows than asked for or none, a token is
/// unknown, the reference has another vocabulary, or a model fails or gives NaN.
pub fn perplexity(
    model: &dyn LanguageModel,
    tokens: &[u32],
    options: &PerplexityOptions,
    reference: Option<&dyn LanguageModel>,
    progress: &mut dyn FnMut(PerplexityProgress),
) -> Result<PerplexityReport, EngineError> {
    let &PerplexityOptions { window, score_from, windows } = options;
    if window < 2 || window > model.max_context() {
        let found = format!("{window} with a model of {}", model.max_context());
        let expected = "2 to the model's context";
        return Err(EngineError::Parameter { field: "window", expected, found });
    }
    if score_from == 0 || score_from >= window {
        let found = format!("{score_from} with a window of {window}");
        let expected = "at least 1 and below the window";
        return Err(EngineError::Parameter { field: "score_from", expected, found });
    }
    let total = windows.unwrap_or(tokens.len() / window).max(1);
    let needed = total.saturating_mul(window);
    if tokens.len() < needed {
        let found = tokens.len();
        return Err(EngineError::TooFewTokens { what: "perplexity windows", needed, found });
    }
    let tokens = &tokens[..needed];
    check_tokens("text", tokens, model)?;
    if let Some(reference) = reference
        && reference.vocab_size() != model.vocab_size()
    {
        let (reference, model) = (reference.vocab_size(), model.vocab_size());
        return Err(EngineError::VocabularyMismatch { reference, model });
    }

    let vocab_size = model.vocab_size();
    // The last token is only predicted, never read.
    let reader = Reader::new(model, window - 1)?;
    let reference = reference.map(|m| Reader::new(m, window - 1)).transpose()?;
    let (mut nll, mut divergence, mut agreements, mut scored) = (0.0, 0.0, 0, 0);
    for (index, window) in tokens.chunks_exact(window).enumerate() {
        let read = &window[..window.len() - 1];
        let mut expected = reference.as_ref().map(|r| r.stream(read, score_from - 1));
        let mut stream = reader.stream(read, score_from - 1);
        while let Some((position, rows)) = stream.next()? {
            let compare = match &mut expected {
                Some(expected) => expected.next()?,
                None => None,
            };
            for (i, row) in rows.chunks_exact(vocab_size).enumerate() {
                check_row(row, position + i + 1)?;
                let norm = log_sum_exp(row);
                nll += norm - f64::from(row[window[position + i + 1] as usize]);
                scored += 1;
                if let Some((_, rows)) = &compare {
                    let target = &rows[i * vocab_size..][..vocab_size];
                    check_row(target, position + i + 1)?;
                    divergence += kl_divergence(target, row, norm);
                    agreements += usize::from(argmax(target) == argmax(row));
                }
            }
        }
        let perplexity = (nll / scored as f64).exp();
        progress(PerplexityProgress { windows: index + 1, total, perplexity });
    }
    let mean = nll / scored as f64;
    Ok(PerplexityReport {
        perplexity: mean.exp(),
        nll: mean,
        tokens_scored: scored,
        windows: total,
        kl_divergence: reference.is_some().then(|| divergence / scored as f64),
        top1_agreement: reference.is_some().then(|| agreements as f64 / scored as f64),
    })
}

/// `Σ q (ln q - ln p)` of logits, where `norm` is the log-sum-exp of the model's.
fn kl_divergence(reference: &[f32], model: &[f32], norm: f64) -> f64 {
    let reference_norm = log_sum_exp(reference);
    reference
        .iter()
        .zip(model)
        .map(|(&r, &m)| {
            let log_q = f64::from(r) - reference_norm;
            log_q.exp() * (log_q - (f64::from(m) - norm))
        })
        .sum()
}
