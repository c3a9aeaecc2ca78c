//! The sampler as a whole: distributions, determinism, refusals. Its parts are tested beside them.

use marlin_engine::{
    Dry, EngineError, SampleContext, Sampled, Sampler, SamplingOptions, SamplingParams,
    TokenCounts, Xtc,
};

fn off() -> SamplingOptions {
    SamplingOptions::default()
}

fn sample_at(
    logits: &[f32],
    options: &SamplingOptions,
    len: usize,
) -> Result<Sampled, EngineError> {
    let tokens = vec![0; len];
    let params = SamplingParams::new(options.clone()).unwrap();
    let counts = TokenCounts::new(&[], &params);
    let context =
        SampleContext { tokens: &tokens, prompt_len: len / 2, counts: &counts, banned: &[] };
    Sampler::new().sample(logits, &params, &context)
}

/// Draws one token at each of `draws` positions and compares counts with `expected` shares.
fn check_distribution(logits: &[f32], options: &SamplingOptions, expected: &[f64]) {
    const DRAWS: usize = 20_000;
    let tokens = vec![0; DRAWS];
    let params = SamplingParams::new(options.clone()).unwrap();
    let counts = TokenCounts::new(&[], &params);
    let mut sampler = Sampler::new();
    let mut found = vec![0usize; logits.len()];
    for position in 0..DRAWS {
        let context = SampleContext {
            tokens: &tokens[..position],
            prompt_len: 0,
            counts: &counts,
            banned: &[],
        };
        found[sampler.sample(logits, &params, &context).unwrap().token as usize] += 1;
    }
    let mut chi2 = 0.0;
    let mut bins = 0;
    for (token, (&n, &share)) in found.iter().zip(expected).enumerate() {
        if share == 0.0 {
            assert_eq!(n, 0, "{options:?}: token {token} was cut");
            continue;
        }
        let mean = share * DRAWS as f64;
        chi2 += (n as f64 - mean).powi(2) / mean;
        bins += 1;
    }
    // Wilson-Hilferty: the 99.9 % quantile of a chi-square of k degrees.
    let k = f64::from(bins - 1).max(1.0);
    let bound = k * (1.0 - 2.0 / (9.0 * k) + 3.09 * (2.0 / (9.0 * k)).sqrt()).powi(3);
    assert!(chi2 <= bound, "{options:?}: chi-square {chi2:.1} over {bound:.1}");
}

/// `weights` as shares of their sum.
fn shares(weights: &[f64]) -> Vec<f64> {
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

#[test]
fn draws_follow_the_distribution() {
    let weights = [0.05, 0.4, 0.02, 0.2, 0.1, 0.13, 0.07, 0.03];
    let logits: Vec<f32> = weights.iter().map(|w: &f64| w.ln() as f32 + 3.0).collect();
    let keep = |tokens: &[usize]| {
        let kept = |(i, &w)| if tokens.contains(&i) { w } else { 0.0 };
        shares(&weights.iter().enumerate().map(kept).collect::<Vec<_>>())
    };
    let power = |p: f64| shares(&weights.map(|w| w.powf(p)));
    for seed in [1, u64::MAX] {
        let off = || SamplingOptions { seed, ..off() };
        for (options, expected) in [
            (off(), shares(&weights)),
            (SamplingOptions { temperature: 0.5, ..off() }, power(2.0)),
            (SamplingOptions { temperature: 2.0, ..off() }, power(0.5)),
            (SamplingOptions { top_k: Some(3), ..off() }, keep(&[1, 3, 5])),
            (SamplingOptions { top_k: Some(100), ..off() }, shares(&weights)),
            (SamplingOptions { top_p: 0.7, ..off() }, keep(&[1, 3, 5])),
            (SamplingOptions { top_p: 0.75, ..off() }, keep(&[1, 3, 4, 5])),
            (SamplingOptions { top_p: 0.0, ..off() }, keep(&[1])),
            (SamplingOptions { min_p: 0.2, ..off() }, keep(&[1, 3, 4, 5])),
            // Of the top three's 0.73, 0.4 is 55 % and 0.6 is 82 %.
            (SamplingOptions { top_k: Some(3), top_p: 0.8, ..off() }, keep(&[1, 3])),
            (SamplingOptions { top_p: 0.9, min_p: 0.3, ..off() }, keep(&[1, 3, 5])),
            (
                SamplingOptions { xtc: Some(Xtc { probability: 1.0, threshold: 0.12 }), ..off() },
                keep(&[0, 2, 4, 5, 6, 7]),
            ),
        ] {
            check_distribution(&logits, &options, &expected);
        }
        // Half of the draws without the top choices, half from all.
        let xtc = SamplingOptions { xtc: Some(Xtc { probability: 0.5, threshold: 0.12 }), ..off() };
        let mixed: Vec<f64> = keep(&[0, 2, 4, 5, 6, 7])
            .iter()
            .zip(shares(&weights))
            .map(|(a, b)| (a + b) / 2.0)
            .collect();
        check_distribution(&logits, &xtc, &mixed);
    }
}

#[test]
fn a_large_flat_vocabulary_is_drawn_evenly() {
    // Beyond the first selection of top-p, which must grow to 7/8 of 1,024 tokens.
    let logits = vec![1.5; 1024];
    let options = SamplingOptions { top_p: 0.875, ..off() };
    let mut expected = vec![1.0 / 896.0; 896];
    expected.resize(1024, 0.0);
    check_distribution(&logits, &options, &expected);
}

#[test]
fn the_same_seed_and_position_give_the_same_token() {
    let logits: Vec<f32> = (0..1000).map(|i| (i % 17) as f32 * 0.1).collect();
    let draw =
        |seed, len| sample_at(&logits, &SamplingOptions { seed, ..off() }, len).unwrap().token;
    let all = |seed| (0..50).map(|len| draw(seed, len)).collect::<Vec<_>>();
    assert_eq!(all(1), all(1));
    assert_ne!(all(1), all(2));
    assert_ne!(all(1)[..25], all(1)[25..]);
}

#[test]
fn greedy_takes_the_first_of_the_largest() {
    let options = SamplingOptions::greedy();
    for (logits, expected) in [
        (&[0.0, 2.0, 1.0][..], 1),
        (&[3.0, 3.0, 3.0], 0),
        (&[-5.0, -4.0, -4.0], 1),
        (&[f32::MIN, f32::MAX], 1),
        (&[7.0], 0),
    ] {
        assert_eq!(sample_at(logits, &options, 4).unwrap().token, expected);
    }
    for temperature in [f32::MIN_POSITIVE, 1e-45, 1e-3] {
        let options = SamplingOptions { temperature, ..off() };
        assert_eq!(sample_at(&[1.0, 1.5, 1.2], &options, 4).unwrap().token, 1);
    }
}

#[test]
fn extreme_parameters_still_give_a_token() {
    let logits = [f32::MAX, f32::MIN, 0.0, 1e30, -1e30];
    for options in [
        SamplingOptions { temperature: f32::MAX, ..off() },
        SamplingOptions { repetition_penalty: 0.01, ..off() },
        SamplingOptions { repetition_penalty: 100.0, temperature: 0.1, ..off() },
        SamplingOptions { logit_bias: vec![(0, 100.0), (0, 100.0)], ..off() },
        SamplingOptions {
            dry: Some(Dry { multiplier: f32::MAX, base: f32::MAX, ..Dry::default() }),
            xtc: Some(Xtc { probability: 1.0, threshold: 0.0 }),
            top_k: Some(1),
            ..off()
        },
    ] {
        let params = SamplingParams::new(options.clone()).unwrap();
        let counts = TokenCounts::new(&[0, 1, 2, 3, 4], &params);
        let tokens = [0, 1, 2, 0, 1, 2, 0, 1, 2];
        let context =
            SampleContext { tokens: &tokens, prompt_len: 5, counts: &counts, banned: &[4] };
        let sampled = Sampler::new().sample(&logits, &params, &context);
        assert!(sampled.is_ok_and(|s| s.token < 4), "{options:?}");
    }
}

#[test]
fn nothing_left_to_choose_is_an_error() {
    let params = SamplingParams::new(off()).unwrap();
    let counts = TokenCounts::new(&[], &params);
    let context =
        SampleContext { tokens: &[1, 0], prompt_len: 1, counts: &counts, banned: &[0, 1] };
    let error = Sampler::new().sample(&[1.0, 2.0], &params, &context).unwrap_err();
    assert!(matches!(error, EngineError::NothingToSample { step: 1 }));
}

#[test]
fn bad_logits_name_the_step() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for options in [SamplingOptions::greedy(), off()] {
            let error = sample_at(&[0.0, 1.0, bad], &options, 10).unwrap_err();
            let EngineError::Logits { step: 5, position: 10, token: 2, .. } = error else {
                panic!("{error:?}");
            };
        }
    }
}

#[test]
fn parameters_out_of_range_are_named() {
    let dry = |dry: Dry| SamplingOptions { dry: Some(dry), ..off() };
    let xtc = |probability, threshold| SamplingOptions {
        xtc: Some(Xtc { probability, threshold }),
        ..off()
    };
    let nan = f32::NAN;
    for (options, field) in [
        (SamplingOptions { temperature: nan, ..off() }, "temperature"),
        (SamplingOptions { temperature: -0.1, ..off() }, "temperature"),
        (SamplingOptions { temperature: f32::INFINITY, ..off() }, "temperature"),
        (SamplingOptions { top_k: Some(0), ..off() }, "top_k"),
        (SamplingOptions { top_p: nan, ..off() }, "top_p"),
        (SamplingOptions { top_p: 1.01, ..off() }, "top_p"),
        (SamplingOptions { top_p: -0.01, ..off() }, "top_p"),
        (SamplingOptions { min_p: nan, ..off() }, "min_p"),
        (SamplingOptions { min_p: 1.5, ..off() }, "min_p"),
        (SamplingOptions { repetition_penalty: nan, ..off() }, "repetition_penalty"),
        (SamplingOptions { repetition_penalty: 0.0, ..off() }, "repetition_penalty"),
        (SamplingOptions { presence_penalty: 2.5, ..off() }, "presence_penalty"),
        (SamplingOptions { frequency_penalty: nan, ..off() }, "frequency_penalty"),
        (SamplingOptions { logit_bias: vec![(1, nan)], ..off() }, "logit_bias"),
        (SamplingOptions { logit_bias: vec![(1, 0.0), (2, -101.0)], ..off() }, "logit_bias"),
        (dry(Dry { multiplier: -1.0, ..Dry::default() }), "dry_multiplier"),
        (dry(Dry { multiplier: nan, ..Dry::default() }), "dry_multiplier"),
        (dry(Dry { base: 0.5, ..Dry::default() }), "dry_base"),
        (dry(Dry { base: nan, ..Dry::default() }), "dry_base"),
        (dry(Dry { allowed_length: 0, ..Dry::default() }), "dry_allowed_length"),
        (xtc(nan, 0.1), "xtc_probability"),
        (xtc(1.1, 0.1), "xtc_probability"),
        (xtc(0.5, nan), "xtc_threshold"),
        (xtc(0.5, -0.1), "xtc_threshold"),
    ] {
        match SamplingParams::new(options.clone()) {
            Err(EngineError::Parameter { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{options:?}: {other:?}"),
        }
    }
}
