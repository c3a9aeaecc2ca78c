//! A token from what a device found in a row of logits, without the row: the one that the whole row would give.

use super::select::{self, Candidate};
use super::{Luck, SampleContext, Sampled, Sampler, SamplingParams, TokenLogprobs};
use marlin_tensor::{Selected, Selection};

/// Largest logits that are asked for where nothing says how many will do, and most that are.
const USUAL: usize = 256;

impl SamplingParams {
    /// What has to be found in a row of logits; `None` when every logit counts.
    pub(crate) fn selection(&self, context: &SampleContext<'_>) -> Option<Selection> {
        let options = self.options();
        if options.adjusts_logits() || !context.banned.is_empty() {
            return None;
        }
        let greedy = options.temperature == 0.0;
        let temperature = if greedy { 1.0 } else { options.temperature };
        let choices = match options.top_k {
            _ if greedy => 1,
            None if !options.truncates() => return None,
            top_k => top_k.unwrap_or(USUAL),
        };
        // Probabilities are those of the model itself.
        if options.logprobs.is_some() && temperature != 1.0 {
            return None;
        }
        let count = choices.max(options.logprobs.unwrap_or(0));
        (count <= USUAL).then_some(Selection { count, temperature })
    }
}

impl Sampler {
    /// Chooses the token after `context.tokens`, of whose logits `found` is what
    /// [`selection`](SamplingParams::selection) asked for; `None` when that does not decide it.
    pub(crate) fn sample_found(
        &mut self,
        found: &Selected,
        params: &SamplingParams,
        context: &SampleContext<'_>,
    ) -> Option<Sampled> {
        let options = params.options();
        let &(best, max) = found.largest.first()?;
        let candidates = &mut self.buffers.candidates;
        candidates.clear();
        let all = found.largest.iter().map(|&(token, weight)| Candidate { token, weight });
        let token = if options.temperature == 0.0 {
            best
        } else {
            candidates.extend(all);
            match options.top_k {
                Some(k) if k > found.largest.len() => return None,
                Some(k) => {
                    candidates.truncate(k);
                    select::truncate_largest(max, options, candidates);
                }
                None if !select::truncate_found(max, found.total, options, candidates) => {
                    return None;
                }
                None => {}
            }
            Luck::new(options, context.tokens.len() as u64).pick(candidates)
        };
        let logprob = options.logprobs.map(|top| TokenLogprobs::of_found(found, token, top));
        Some(Sampled { token, logprob })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{SamplingOptions, TokenCounts, Xtc};
    use super::*;
    use marlin_testkit::selected;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_was_found_gives_the_token_of_the_whole_row(
            logits in prop::collection::vec((-60i16..60).prop_map(|l| f32::from(l) / 8.0), 1..900),
            top_k in prop::option::of(1usize..60),
            top_p in prop::sample::select(vec![0.0f32, 0.3, 0.9, 0.99, 1.0]),
            min_p in prop::sample::select(vec![0.0f32, 0.02, 0.5]),
            temperature in prop::sample::select(vec![0.0f32, 0.3, 1.0]),
            logprobs in prop::option::of(0usize..5),
            xtc in prop::bool::ANY,
            seed in 0u64..1000,
        ) {
            let xtc = xtc.then_some(Xtc { probability: 0.5, threshold: 0.1 });
            let options =
                SamplingOptions { temperature, top_k, top_p, min_p, logprobs, xtc, seed, ..Default::default() };
            let params = SamplingParams::new(options).unwrap();
            let counts = TokenCounts::new(&[1, 2], &params);
            let context = SampleContext { tokens: &[1, 2], prompt_len: 2, counts: &counts, banned: &[] };
            let mut sampler = Sampler::new();
            let expected = sampler.sample(&logits, &params, &context).unwrap();
            if let Some(wanted) = params.selection(&context) {
                let found = selected(&logits, wanted);
                if let Some(sampled) = sampler.sample_found(&found, &params, &context) {
                    prop_assert_eq!(sampled.token, expected.token);
                    let of = |s: &Sampled| s.logprob.as_ref().map(|l| (l.top.len(), (l.logprob * 1e4).round()));
                    prop_assert_eq!(of(&sampled), of(&expected));
                } else {
                    // A nucleus or a rest larger than what was asked for.
                    prop_assert!(temperature > 0.0 && (top_k.is_none() || top_k > Some(logits.len())));
                }
            }
        }
    }

    #[test]
    fn what_every_logit_counts_for_is_not_asked_of_a_device() {
        let counts = TokenCounts::default();
        let of = |options: SamplingOptions, banned: &[u32]| {
            let context = SampleContext { tokens: &[], prompt_len: 0, counts: &counts, banned };
            SamplingParams::new(options).unwrap().selection(&context)
        };
        let plain = SamplingOptions::default;
        assert_eq!(of(plain(), &[]), None);
        assert_eq!(
            of(SamplingOptions { repetition_penalty: 1.1, ..SamplingOptions::greedy() }, &[]),
            None
        );
        assert_eq!(of(SamplingOptions { top_k: Some(1000), ..plain() }, &[]), None);
        assert_eq!(
            of(
                SamplingOptions { top_k: Some(9), temperature: 0.5, logprobs: Some(1), ..plain() },
                &[]
            ),
            None
        );
        assert_eq!(of(SamplingOptions::greedy(), &[7]), None);
        let greedy = of(SamplingOptions::greedy(), &[]);
        assert_eq!(greedy, Some(Selection { count: 1, temperature: 1.0 }));
        let nucleus = of(SamplingOptions { top_p: 0.9, temperature: 0.5, ..plain() }, &[]);
        assert_eq!(nucleus, Some(Selection { count: 256, temperature: 0.5 }));
    }
}
