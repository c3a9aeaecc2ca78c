//! Log-probabilities of the model's own distribution: before penalties, bias, temperature and
//! truncation, so that they mean the same whatever the sampling parameters are.

use super::select::Candidate;
use marlin_tensor::DrawnLogits;

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
        let top = top.iter().map(|c| (c.token, c.weight));
        Self::of(log_sum_exp(logits), logits[token as usize], top)
    }

    /// From what a device has found.
    pub(super) fn of_drawn(logits: &DrawnLogits) -> Self {
        Self::of(logits.norm, logits.own, logits.largest.iter().copied())
    }

    fn of(norm: f64, own: f32, top: impl Iterator<Item = (u32, f32)>) -> Self {
        let logprob = |logit: f32| (f64::from(logit) - norm) as f32;
        let top = top.map(|(token, logit)| (token, logprob(logit))).collect();
        Self { logprob: logprob(own), top }
    }
}

/// `ln Σ exp(l)` in f64.
pub(crate) fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
    max + sum.ln()
}
