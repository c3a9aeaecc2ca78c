//! Steps 1 to 4 of the sampler: what earlier tokens and the user add to or take from logits, as a list of the tokens that are concerned.

use super::{Dry, SampleContext, SamplingOptions, SamplingParams};
use marlin_tensor::Adjustment;
use std::collections::HashMap;

/// How often a sequence has used each token; empty unless a penalty needs it.
#[derive(Debug, Clone, Default)]
pub struct TokenCounts {
    active: bool,
    /// Tokens in ascending order, and their occurrences in the answer: 0 for one of the prompt alone.
    answer: Vec<(u32, u32)>,
}

impl TokenCounts {
    /// Counts of a sequence that is `prompt` so far.
    pub fn new(prompt: &[u32], params: &SamplingParams) -> Self {
        let active = params.options().counts_tokens();
        let seen = if active { prompt } else { &[] };
        let mut answer: Vec<_> = seen.iter().map(|&token| (token, 0)).collect();
        answer.sort_unstable();
        answer.dedup();
        Self { active, answer }
    }

    /// Adds a token of the answer.
    pub fn push(&mut self, token: u32) {
        if self.active {
            match self.answer.binary_search_by_key(&token, |&(token, _)| token) {
                Ok(at) => self.answer[at].1 += 1,
                Err(at) => self.answer.insert(at, (token, 1)),
            }
        }
    }
}

/// All changes, by ascending token, each at most once.
pub fn adjustments(options: &SamplingOptions, context: &SampleContext<'_>) -> Vec<Adjustment> {
    let penalty = options.repetition_penalty;
    let taken = |count| match count {
        0 => 0.0,
        count => count as f32 * options.frequency_penalty + options.presence_penalty,
    };
    let seen = context.counts.answer.iter();
    let seen = seen.map(|&(token, count)| Adjustment { token, penalty, add: -taken(count) });
    let mut all: Vec<_> = seen.filter(|a| a.penalty != 1.0 || a.add != 0.0).collect();
    let seen = all.len();
    let mut add = |token, add| all.push(Adjustment { token, penalty: 1.0, add });
    if let Some(dry) = &options.dry {
        let start = dry.range.map_or(0, |r| context.tokens.len().saturating_sub(r));
        for (token, length) in repetitions(&context.tokens[start..], &dry.sequence_breakers) {
            if length >= dry.allowed_length {
                add(token, -penalty_of(dry, (length - dry.allowed_length) as f32));
            }
        }
    }
    options.logit_bias.iter().for_each(|&(token, bias)| add(token, bias));
    context.banned.iter().for_each(|&token| add(token, f32::NEG_INFINITY));
    if all.len() > seen {
        // Stable, so that a token's changes are summed in the order of the steps.
        all.sort_by_key(|a| a.token);
        all.dedup_by(|next, first| {
            let same = next.token == first.token;
            if same {
                first.add += next.add;
            }
            same
        });
    }
    all
}

/// Changes `logits` in place.
pub fn apply(logits: &mut [f32], adjustments: &[Adjustment]) {
    for &Adjustment { token, penalty, add } in adjustments {
        let logit = &mut logits[token as usize];
        let penalised = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        *logit = penalised.clamp(f32::MIN, f32::MAX) + add;
    }
}

/// Capped far above any logit and far below infinity, which would not be a number times zero.
fn penalty_of(dry: &Dry, exponent: f32) -> f32 {
    (dry.multiplier * dry.base.powf(exponent).min(1e30)).min(1e30)
}

/// For each token that has followed an earlier occurrence of the end of `tokens`: the length of
/// the longest such match. Matches contain no breaker and breakers are never listed.
fn repetitions(tokens: &[u32], breakers: &[u32]) -> HashMap<u32, usize> {
    let mut longest = HashMap::new();
    let n = tokens.len();
    let longest_match = tokens.iter().rev().take_while(|t| !breakers.contains(t)).count();
    if longest_match == 0 {
        return longest;
    }
    // Z function of the reversed tokens: z[i] is how many tokens ending at n - 1 - i equal the
    // tokens ending at n - 1. Linear, whereas comparing at every position is quadratic in a loop.
    let at = |i: usize| tokens[n - 1 - i];
    let mut z = vec![0; n];
    let (mut left, mut right) = (0, 0);
    for i in 1..n {
        let mut length = if i < right { z[i - left].min(right - i) } else { 0 };
        while i + length < n && at(length) == at(i + length) {
            length += 1;
        }
        z[i] = length;
        if i + length > right {
            (left, right) = (i, i + length);
        }
        let length = length.min(longest_match);
        let next = at(i - 1);
        if length > 0 && !breakers.contains(&next) {
            let entry = longest.entry(next).or_insert(0);
            *entry = length.max(*entry);
        }
    }
    longest
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn adjusted(options: SamplingOptions, prompt: &[u32], answer: &[u32]) -> Vec<f32> {
        let params = SamplingParams::new(options).unwrap();
        let mut counts = TokenCounts::new(prompt, &params);
        answer.iter().for_each(|&t| counts.push(t));
        let tokens = [prompt, answer].concat();
        let context = SampleContext {
            tokens: &tokens,
            prompt_len: prompt.len(),
            counts: &counts,
            banned: &[],
        };
        let mut logits = vec![1.0, -1.0, 2.0, -2.0, 0.5, 0.0];
        apply(&mut logits, &adjustments(params.options(), &context));
        logits
    }

    #[test]
    fn penalties_follow_their_formulas() {
        let off = SamplingOptions::default;
        let expect = |options, expected: [f32; 6]| {
            assert_eq!(adjusted(options, &[0, 1, 1], &[2, 3, 3]), expected);
        };
        // transformers' RepetitionPenaltyLogitsProcessor: once per distinct token, prompt included.
        expect(
            SamplingOptions { repetition_penalty: 2.0, ..off() },
            [0.5, -2.0, 1.0, -4.0, 0.5, 0.0],
        );
        // OpenAI: answer only, frequency by count, presence once.
        expect(
            SamplingOptions { frequency_penalty: 0.5, ..off() },
            [1.0, -1.0, 1.5, -3.0, 0.5, 0.0],
        );
        expect(
            SamplingOptions { presence_penalty: 0.5, ..off() },
            [1.0, -1.0, 1.5, -2.5, 0.5, 0.0],
        );
        expect(
            SamplingOptions {
                repetition_penalty: 2.0,
                presence_penalty: -1.0,
                frequency_penalty: 0.25,
                logit_bias: vec![(0, 10.0), (5, -100.0)],
                ..off()
            },
            [10.5, -2.0, 1.75, -3.5, 0.5, -100.0],
        );
    }

    #[test]
    fn dry_penalises_what_continues_a_repetition() {
        let dry = Dry { multiplier: 1.0, base: 2.0, allowed_length: 2, ..Dry::default() };
        // "3 4 5 0 … 3 4 5": the last three were followed by 0, so 0 continues a match of three.
        let prompt = [3, 4, 5, 0, 1, 3, 4, 5];
        let run = |dry: &Dry| {
            let options = SamplingOptions { dry: Some(dry.clone()), ..SamplingOptions::default() };
            adjusted(options, &prompt, &[])[0]
        };
        for (change, expected) in [
            (dry.clone(), 1.0 - 2.0),
            (Dry { allowed_length: 3, ..dry.clone() }, 1.0 - 1.0),
            (Dry { allowed_length: 4, ..dry.clone() }, 1.0),
            (Dry { sequence_breakers: vec![3], ..dry.clone() }, 1.0 - 1.0),
            (Dry { sequence_breakers: vec![4], ..dry.clone() }, 1.0),
            (Dry { sequence_breakers: vec![0], ..dry.clone() }, 1.0),
            (Dry { range: Some(7), ..dry.clone() }, 1.0 - 1.0),
            (Dry { multiplier: 3.0, ..dry.clone() }, 1.0 - 6.0),
        ] {
            assert_eq!(run(&change), expected, "{change:?}");
        }
    }

    #[test]
    fn a_long_loop_is_punished_hard_but_finitely() {
        let dry = Dry { multiplier: 0.8, base: 1.75, allowed_length: 2, ..Dry::default() };
        let options = SamplingOptions { dry: Some(dry), ..SamplingOptions::default() };
        let logits = adjusted(options, &[4; 4000], &[]);
        assert!(logits[4] < -1e29 && logits[4].is_finite());
    }

    proptest! {
        #[test]
        fn repetitions_equal_the_direct_search(
            tokens in prop::collection::vec(0u32..4, 0..60),
            breakers in prop::collection::vec(0u32..4, 0..2),
        ) {
            let mut expected = HashMap::new();
            for end in 1..tokens.len() {
                let (head, tail) = (&tokens[..end], &tokens[..]);
                let length = head.iter().rev().zip(tail.iter().rev())
                    .take_while(|(a, b)| a == b && !breakers.contains(a)).count();
                if length > 0 && !breakers.contains(&tokens[end]) {
                    let entry = expected.entry(tokens[end]).or_insert(0);
                    *entry = length.max(*entry);
                }
            }
            prop_assert_eq!(repetitions(&tokens, &breakers), expected);
        }
    }
}
