//! The sampler against the definition of a draw, which a device that draws itself is held to as well.

use super::{
    Dry, SampleContext, Sampled, Sampler, SamplingOptions, SamplingParams, TokenCounts, Xtc,
};
use marlin_testkit::draws::{drawn, may_be_drawn};
use proptest::prelude::*;

fn options() -> impl Strategy<Value = SamplingOptions> {
    let cuts = (
        prop::sample::select(vec![0.0f32, 0.3, 1.0, 2.5]),
        prop::option::of(1usize..60),
        prop::sample::select(vec![0.0f32, 0.3, 0.9, 0.99, 1.0]),
        prop::sample::select(vec![0.0f32, 0.02, 0.5]),
        prop::bool::ANY,
    );
    let changes = (
        prop::sample::select(vec![1.0f32, 1.3]),
        prop::sample::select(vec![0.0f32, 0.4]),
        prop::sample::select(vec![0.0f32, -0.3]),
        prop::collection::vec((0u32..10, -3.0f32..3.0), 0..4),
        prop::bool::ANY,
    );
    let rest = (0u64..1000, prop::option::of(0usize..5));
    (cuts, changes, rest).prop_map(|(cuts, changes, (seed, logprobs))| {
        let (temperature, top_k, top_p, min_p, xtc) = cuts;
        let (repetition_penalty, frequency_penalty, presence_penalty, logit_bias, dry) = changes;
        SamplingOptions {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            logit_bias,
            dry: dry.then(Dry::default),
            xtc: xtc.then_some(Xtc { probability: 0.5, threshold: 0.1 }),
            seed,
            logprobs,
        }
    })
}

proptest! {
    #[test]
    fn a_token_is_that_of_its_draw(
        logits in prop::collection::vec((-60i16..60).prop_map(|l| f32::from(l) / 8.0), 10..900),
        options in options(),
        tokens in prop::collection::vec(0u32..10, 1..20),
        banned in prop::collection::vec(0u32..10, 0..3),
    ) {
        let params = SamplingParams::new(options).unwrap();
        let prompt_len = tokens.len() / 2;
        let mut counts = TokenCounts::new(&tokens[..prompt_len], &params);
        tokens[prompt_len..].iter().for_each(|&t| counts.push(t));
        let context = SampleContext { tokens: &tokens, prompt_len, counts: &counts, banned: &banned };
        let found = Sampler::new().sample(&logits, &params, &context).unwrap();
        let draw = params.draw(0, &context);
        let expected = drawn(&logits, &draw).unwrap();
        prop_assert!(
            found.token == expected.token || may_be_drawn(&logits, &draw, found.token, 1e-6),
            "{} for {} by {:?}", found.token, expected.token, draw
        );
        if found.token == expected.token {
            let expected = Sampled::from(expected).logprob;
            let rounded = |s: &Option<super::TokenLogprobs>| {
                s.as_ref().map(|l| ((l.logprob * 1e4).round(), l.top.iter().map(|t| t.0).collect::<Vec<_>>()))
            };
            prop_assert_eq!(rounded(&found.logprob), rounded(&expected));
        }
    }
}
