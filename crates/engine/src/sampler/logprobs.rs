//! Log-probabilities of the model's own distribution: before penalties, bias, temperature and
//! truncation, so that they mean the same whatever the sampling parameters are.

use super::select::Candidate;

/// Log-probability of a token and of the likeliest ones.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Natural logarithm of the chosen token's probability.
    pub logprob: f32,
    /// The likeliest tokens, best first; may or may not contain the chosen one.
    pub top: Vec<(u32, f32)>,
}

impl TokenLogprobs {
    pub(super) fn new(logits: &[f32], token: u32, top: &[Candidate]) -> Self {
        let norm = log_sum_exp(logits);
        let logprob = |logit: f32| (f64::from(logit) - norm) as f32;
        Self {
            logprob: logprob(logits[token as usize]),
            top: top.iter().map(|c| (c.token, logprob(c.weight))).collect(),
        }
    }
}

/// `ln Σ exp(l)` in f64.
pub(crate) fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
    max + sum.ln()
}
