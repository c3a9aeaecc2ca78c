//! Perplexity of a text, and how far models are from a reference on it.
//!
//! The tokens are cut into consecutive windows; a last one that is not full is dropped. Each
//! window starts from an empty cache, and its positions `score_from .. window` are scored: the
//! token at position p by the logits at p - 1. Every scored token so has between `score_from` and
//! `window - 1` tokens before it, and figures depend neither on chunking nor on other windows.
//!
//! `nll` is the mean of `-ln p(token)`, `perplexity` its exponential. KL divergence at a position is
//! `Σ q ln(q / p)` with q the reference's distribution and p the model's, `top1_agreement` the
//! share of positions where both have the same likeliest token. Log-softmax and sums are f64.
//! The standard error takes windows, not tokens, as independent: tokens of one window are alike.
//!
//! Models that are compared read a window side by side, a chunk of logits at a time. The reference is
//! so read once for all of them, and what is held does not grow with the text: a chunk of logits
//! for each model, and one number for each scored position.

use super::{Reader, check_row, check_tokens};
use crate::sampler::{argmax, log_sum_exp};
use crate::{EngineError, LanguageModel};
use marlin_tensor::CacheType;

/// Which tokens are scored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PerplexityOptions {
    /// Tokens per window.
    pub window: usize,
    /// First scored position of each window, at least 1.
    pub score_from: usize,
    /// Score only this many windows; `None` scores all.
    pub windows: Option<usize>,
    /// How the scored models cache keys and values; a reference caches them in f32.
    pub cache_type: CacheType,
}

impl Default for PerplexityOptions {
    fn default() -> Self {
        Self { window: 512, score_from: 256, windows: None, cache_type: CacheType::F32 }
    }
}

impl PerplexityOptions {
    /// Windows to score of a text of `tokens`.
    ///
    /// # Errors
    /// When it has fewer than asked for, or none.
    pub fn windows_of(&self, tokens: usize) -> Result<usize, EngineError> {
        let total = self.windows.unwrap_or(tokens / self.window.max(1)).max(1);
        let needed = total.saturating_mul(self.window);
        if tokens < needed {
            return Err(EngineError::TooFewTokens {
                what: "perplexity windows",
                needed,
                found: tokens,
            });
        }
        Ok(total)
    }
}

/// How far an evaluation is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PerplexityProgress {
    /// Windows scored.
    pub windows: usize,
    /// Windows to score.
    pub total: usize,
    /// Perplexity so far, of the last model when there are several.
    pub perplexity: f64,
}

/// The result.
#[derive(Debug, Clone, PartialEq)]
pub struct PerplexityReport {
    /// `exp(nll)`.
    pub perplexity: f64,
    /// Standard error of `perplexity`, from the spread between windows; `None` for one window.
    pub perplexity_error: Option<f64>,
    /// Mean negative log-likelihood, nats per token.
    pub nll: f64,
    /// Tokens that were scored.
    pub tokens_scored: usize,
    /// Windows that were scored.
    pub windows: usize,
    /// Mean KL(reference ‖ model), nats, when there was a reference.
    pub kl_divergence: Option<f64>,
    /// Half of the positions diverge no more than this.
    pub kl_median: Option<f64>,
    /// 99 of 100 positions diverge no more than this.
    pub kl_p99: Option<f64>,
    /// Share of positions with the reference's likeliest token, when there was a reference.
    pub top1_agreement: Option<f64>,
}

/// A model and what errors call it.
#[derive(Clone, Copy)]
pub struct NamedModel<'a> {
    /// As the user knows it.
    pub name: &'a str,
    /// The model.
    pub model: &'a dyn LanguageModel,
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
    let models: Vec<_> = reference.into_iter().chain([model]).collect();
    let reports = score(&models, tokens, options, progress).map_err(|(_, error)| error)?;
    Ok(reports.into_iter().next_back().expect("a report per model"))
}

/// Scores `tokens` under `reference` and each of `models`, and how far each is from the reference.
/// The first report is the reference's own, without divergence.
///
/// # Errors
/// As [`perplexity`]; the model at fault is named.
pub fn compare(
    reference: NamedModel,
    models: &[NamedModel],
    tokens: &[u32],
    options: &PerplexityOptions,
    progress: &mut dyn FnMut(PerplexityProgress),
) -> Result<Vec<PerplexityReport>, EngineError> {
    let named: Vec<_> = [reference].iter().chain(models).copied().collect();
    let models: Vec<_> = named.iter().map(|n| n.model).collect();
    score(&models, tokens, options, progress).map_err(|(index, error)| match error {
        error @ EngineError::TooFewTokens { .. } => error,
        error => EngineError::InModel { name: named[index].name.to_owned(), error: error.into() },
    })
}

/// What is summed of one model.
#[derive(Default)]
struct Tally {
    /// Mean `-ln p` of each window.
    windows: Vec<f64>,
    /// Sum of `-ln p`.
    nll: f64,
    scored: usize,
    /// KL divergence at each position.
    divergences: Vec<f64>,
    agreements: usize,
}

/// One report per model; all but the first are compared with the first. An error comes with the
/// index of its model.
fn score(
    models: &[&dyn LanguageModel],
    tokens: &[u32],
    options: &PerplexityOptions,
    progress: &mut dyn FnMut(PerplexityProgress),
) -> Result<Vec<PerplexityReport>, (usize, EngineError)> {
    let &PerplexityOptions { window, score_from, .. } = options;
    for (index, &model) in models.iter().enumerate() {
        check_options(options, model).map_err(|error| (index, error))?;
        let (reference, model) = (models[0].vocab_size(), model.vocab_size());
        if reference != model {
            return Err((index, EngineError::VocabularyMismatch { reference, model }));
        }
    }
    let total = options.windows_of(tokens.len()).map_err(|error| (0, error))?;
    let tokens = &tokens[..total * window];
    check_tokens("text", tokens, models[0]).map_err(|error| (0, error))?;

    let mut readers = Vec::with_capacity(models.len());
    for (index, &model) in models.iter().enumerate() {
        // The last token is only predicted, never read.
        let is_reference = index == 0 && models.len() > 1;
        let cache_type = if is_reference { CacheType::F32 } else { options.cache_type };
        let reader = Reader::with_cache(model, window - 1, cache_type);
        readers.push(reader.map_err(|error| (index, error))?);
    }
    let vocab_size = models[0].vocab_size();
    let mut tallies: Vec<Tally> = models.iter().map(|_| Tally::default()).collect();
    let mut target = Target::default();
    for (done, window) in tokens.chunks_exact(window).enumerate() {
        let read = &window[..window.len() - 1];
        let before: Vec<f64> = tallies.iter().map(|tally| tally.nll).collect();
        let mut streams: Vec<_> = readers.iter().map(|r| r.stream(read, score_from - 1)).collect();
        loop {
            // Chunks depend on the vocabulary alone, so that those of all models match.
            let mut chunks = Vec::with_capacity(models.len());
            for (index, stream) in streams.iter_mut().enumerate() {
                chunks.extend(stream.next().map_err(|error| (index, error))?);
            }
            let Some(&(start, ref first)) = chunks.first() else { break };
            for i in 0..first.len() / vocab_size {
                let position = start + i + 1;
                let token = window[position] as usize;
                for (index, ((_, rows), tally)) in chunks.iter().zip(&mut tallies).enumerate() {
                    let row = &rows[i * vocab_size..][..vocab_size];
                    check_row(row, position).map_err(|error| (index, error))?;
                    let norm = log_sum_exp(row);
                    tally.nll += norm - f64::from(row[token]);
                    tally.scored += 1;
                    if index > 0 {
                        tally.divergences.push(target.divergence(row, norm));
                        tally.agreements += usize::from(target.best == argmax(row));
                    } else if models.len() > 1 {
                        target.set(row, norm);
                    }
                }
            }
        }
        let scored = (window.len() - score_from) as f64;
        for (tally, before) in tallies.iter_mut().zip(before) {
            tally.windows.push((tally.nll - before) / scored);
        }
        let last = tallies.last().expect("there is a model");
        let perplexity = (last.nll / last.scored as f64).exp();
        progress(PerplexityProgress { windows: done + 1, total, perplexity });
    }
    Ok(tallies.into_iter().map(Tally::report).collect())
}

fn check_options(
    options: &PerplexityOptions,
    model: &dyn LanguageModel,
) -> Result<(), EngineError> {
    let &PerplexityOptions { window, score_from, .. } = options;
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
    Ok(())
}

impl Tally {
    fn report(mut self) -> PerplexityReport {
        let nll = self.nll / self.scored as f64;
        let perplexity = nll.exp();
        let n = self.windows.len() as f64;
        let squares: f64 = self.windows.iter().map(|mean| (mean - nll).powi(2)).sum();
        let nll_error = (n > 1.0).then(|| (squares / (n - 1.0) / n).sqrt());
        let compared = !self.divergences.is_empty();
        let mean = self.divergences.iter().sum::<f64>() / self.scored as f64;
        self.divergences.sort_by(f64::total_cmp);
        // Nearest rank: the least value that the share of positions does not exceed.
        let quantile = |share: f64| {
            let rank = (share * self.divergences.len() as f64).ceil() as usize;
            self.divergences[rank.max(1) - 1]
        };
        PerplexityReport {
            perplexity,
            perplexity_error: nll_error.map(|error| perplexity * error),
            nll,
            tokens_scored: self.scored,
            windows: self.windows.len(),
            kl_divergence: compared.then_some(mean),
            kl_median: compared.then(|| quantile(0.5)),
            kl_p99: compared.then(|| quantile(0.99)),
            top1_agreement: compared.then(|| self.agreements as f64 / self.scored as f64),
        }
    }
}

/// The reference's distribution at one position, computed once for all models.
#[derive(Default)]
struct Target {
    /// `q` and `ln q` of every token.
    probabilities: Vec<(f64, f64)>,
    best: usize,
}

impl Target {
    /// Takes a row of logits and its log-sum-exp.
    fn set(&mut self, row: &[f32], norm: f64) {
        self.best = argmax(row);
        self.probabilities.clear();
        self.probabilities.extend(row.iter().map(|&logit| {
            let log_q = f64::from(logit) - norm;
            (log_q.exp(), log_q)
        }));
    }

    /// `Σ q (ln q - ln p)` for a model's logits and their log-sum-exp.
    fn divergence(&self, row: &[f32], norm: f64) -> f64 {
        let terms = self.probabilities.iter().zip(row);
        terms.map(|(&(q, log_q), &logit)| q * (log_q - (f64::from(logit) - norm))).sum()
    }
}
