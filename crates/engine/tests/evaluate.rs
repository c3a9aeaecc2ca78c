//! Evaluation against the definitions, written out over whole contexts in f64.

mod common;

use common::HashModel;
use marlin_engine::EngineError;
use marlin_engine::evaluate::{
    Choice, ChoiceRow, NamedModel, PerplexityOptions, choices, compare, for_each_logits, logits,
    perplexity,
};

fn text(len: usize) -> Vec<u32> {
    (0..len as u64).map(|i| (common::mix(77, i) % 50) as u32).collect()
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let norm = logits.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
    logits.iter().map(|&l| f64::from(l) - norm).collect()
}

fn best(values: &[f64]) -> usize {
    (0..values.len()).rev().max_by(|&a, &b| values[a].total_cmp(&values[b])).unwrap()
}

#[test]
fn perplexity_and_divergence_equal_their_definitions() {
    let model = HashModel::default();
    let reference = HashModel { salt: 1, ..HashModel::default() };
    // Three windows of 37 and a rest that is dropped.
    let tokens = text(3 * 37 + 20);
    for (score_from, windows) in [(1, None), (20, None), (36, None), (20, Some(2))] {
        let (mut nll, mut kl, mut agree, mut scored) = (0.0, 0.0, 0, 0);
        for window in tokens.chunks_exact(37).take(windows.unwrap_or(3)) {
            for p in score_from..37 {
                let model = log_softmax(&model.logits(&window[..p]));
                let target = log_softmax(&reference.logits(&window[..p]));
                nll -= model[window[p] as usize];
                kl += target.iter().zip(&model).map(|(q, p)| q.exp() * (q - p)).sum::<f64>();
                agree += usize::from(best(&model) == best(&target));
                scored += 1;
            }
        }
        let n = f64::from(scored);
        let options =
            PerplexityOptions { window: 37, score_from, windows, ..PerplexityOptions::default() };
        let mut seen = Vec::new();
        let report = perplexity(&model, &tokens, &options, Some(&reference), &mut |p| {
            seen.push((p.windows, p.total));
        })
        .unwrap();
        let count = windows.unwrap_or(3);
        assert_eq!((report.windows, report.tokens_scored), (count, scored as usize));
        assert_eq!(seen, (1..=count).map(|i| (i, count)).collect::<Vec<_>>());
        assert!((report.nll - nll / n).abs() < 1e-9);
        assert!((report.perplexity - (nll / n).exp()).abs() < 1e-7);
        assert!((report.kl_divergence.unwrap() - kl / n).abs() < 1e-9);
        assert_eq!(report.top1_agreement, Some(agree as f64 / n));

        let alone = perplexity(&model, &tokens, &options, None, &mut |_| {}).unwrap();
        assert_eq!((alone.nll, alone.kl_divergence), (report.nll, None));
        let itself = perplexity(&model, &tokens, &options, Some(&model), &mut |_| {}).unwrap();
        assert_eq!(itself.top1_agreement, Some(1.0));
        assert!(itself.kl_divergence.unwrap().abs() < 1e-12);
    }
}

/// `reference` against `models`, named by their order from 0.
fn compared(
    reference: &HashModel,
    models: &[&HashModel],
    tokens: &[u32],
    options: &PerplexityOptions,
) -> Result<Vec<marlin_engine::evaluate::PerplexityReport>, EngineError> {
    let names = ["model 0", "model 1", "model 2"];
    let named: Vec<_> =
        models.iter().zip(names).map(|(&model, name)| NamedModel { name, model }).collect();
    let reference = NamedModel { name: "reference", model: reference };
    compare(reference, &named, tokens, options, &mut |_| {})
}

#[test]
fn a_comparison_gives_each_model_what_it_gets_alone() {
    let models = [1, 2, 3].map(|salt| HashModel { salt, ..HashModel::default() });
    let tokens = text(5 * 40);
    let options = PerplexityOptions {
        window: 40,
        score_from: 20,
        windows: None,
        ..PerplexityOptions::default()
    };
    let alone = |model: &HashModel, reference: Option<&HashModel>| {
        let reference = reference.map(|r| r as &dyn marlin_engine::LanguageModel);
        perplexity(model, &tokens, &options, reference, &mut |_| {}).unwrap()
    };
    let expected = vec![
        alone(&models[0], None),
        alone(&models[1], Some(&models[0])),
        alone(&models[2], Some(&models[0])),
        alone(&models[0], Some(&models[0])),
    ];
    let passes = || models[0].passes.load(std::sync::atomic::Ordering::Relaxed);
    let before = passes();
    let found = compared(&models[0], &[&models[1], &models[2]], &tokens, &options).unwrap();
    assert_eq!(found, expected[..3]);
    assert_eq!(passes() - before, 5 * 2, "the reference is read once: context and scored part");
    let all = [&models[1], &models[2], &models[0]];
    assert_eq!(compared(&models[0], &all, &tokens, &options).unwrap(), expected);
    assert_eq!(compared(&models[0], &[], &tokens, &options).unwrap(), expected[..1]);
}

#[test]
fn spread_equals_its_definition() {
    let model = HashModel::default();
    let reference = HashModel { salt: 1, ..HashModel::default() };
    let (window, score_from, count) = (30, 10, 6);
    let tokens = text(window * count);
    let (mut means, mut divergences) = (Vec::new(), Vec::new());
    for window in tokens.chunks_exact(window) {
        let mut nll = 0.0;
        for p in score_from..window.len() {
            let model = log_softmax(&model.logits(&window[..p]));
            let target = log_softmax(&reference.logits(&window[..p]));
            nll -= model[window[p] as usize];
            divergences.push(target.iter().zip(&model).map(|(q, p)| q.exp() * (q - p)).sum());
        }
        means.push(nll / 20.0);
    }
    divergences.sort_by(f64::total_cmp);
    let mean = means.iter().sum::<f64>() / 6.0;
    let variance = means.iter().map(|m| (m - mean).powi(2)).sum::<f64>() / 5.0;
    let options =
        PerplexityOptions { window, score_from, windows: None, ..PerplexityOptions::default() };
    let report = perplexity(&model, &tokens, &options, Some(&reference), &mut |_| {}).unwrap();
    let error = report.perplexity_error.unwrap();
    assert!((error - mean.exp() * (variance / 6.0).sqrt()).abs() < 1e-6, "{error}");
    // 120 positions: the 60th and the 119th.
    assert!((report.kl_median.unwrap() - divergences[59]).abs() < 1e-9);
    assert!((report.kl_p99.unwrap() - divergences[118]).abs() < 1e-9);
    let one = PerplexityOptions { windows: Some(1), ..options };
    let report = perplexity(&model, &tokens, &one, None, &mut |_| {}).unwrap();
    assert_eq!((report.perplexity_error, report.kl_median), (None, None));
}

#[test]
fn the_model_at_fault_is_named() {
    let good = HashModel::default();
    let other = HashModel { vocab_size: 51, ..HashModel::default() };
    let short = HashModel { max_context: 31, ..HashModel::default() };
    let broken = HashModel { nan_at: Some(20), ..HashModel::default() };
    let failing = HashModel { fail_at: Some(1), ..HashModel::default() };
    let options = PerplexityOptions {
        window: 32,
        score_from: 16,
        windows: None,
        ..PerplexityOptions::default()
    };
    let long = text(100);
    for (model, words) in [
        (&other, ["model 1", "vocabulary of 50"]),
        (&short, ["model 1", "model of 31"]),
        (&broken, ["model 1", "position 21"]),
        (&failing, ["model 1", "on fire"]),
    ] {
        let error = compared(&good, &[&good, model], &long, &options).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
    let error = compared(&broken, &[&good], &long, &options).unwrap_err().to_string();
    assert!(error.contains("reference: "), "{error}");
    let error = compared(&good, &[&good], &text(31), &options).unwrap_err().to_string();
    assert_eq!(error, "perplexity windows: needs 32 tokens, found 31");
}

#[test]
fn a_window_may_take_several_chunks_of_logits() {
    // 64 MiB hold 83 rows of this vocabulary.
    let model = HashModel { vocab_size: 200_000, ..HashModel::default() };
    let tokens = text(110);
    let options = PerplexityOptions {
        window: 110,
        score_from: 10,
        windows: None,
        ..PerplexityOptions::default()
    };
    let report = perplexity(&model, &tokens, &options, None, &mut |_| {}).unwrap();
    let score = |p: usize| -log_softmax(&model.logits(&tokens[..p]))[tokens[p] as usize];
    let expected = (10..110).map(score).sum::<f64>() / 100.0;
    assert!((report.nll - expected).abs() < 1e-8, "{} {expected}", report.nll);
}

#[test]
fn what_cannot_be_scored_is_refused() {
    let model = HashModel::default();
    let other = HashModel { vocab_size: 51, ..HashModel::default() };
    let base = PerplexityOptions {
        window: 32,
        score_from: 16,
        windows: None,
        ..PerplexityOptions::default()
    };
    let run = |tokens: &[u32], options: &PerplexityOptions, reference: Option<&HashModel>| {
        let reference = reference.map(|r| r as &dyn marlin_engine::LanguageModel);
        perplexity(&model, tokens, options, reference, &mut |_| {}).unwrap_err().to_string()
    };
    let long = text(100);
    for (message, word) in [
        (run(&text(31), &base, None), "needs 32 tokens, found 31"),
        (run(&long, &PerplexityOptions { windows: Some(4), ..base }, None), "needs 128"),
        (run(&long, &PerplexityOptions { score_from: 0, ..base }, None), "score_from"),
        (run(&long, &PerplexityOptions { score_from: 32, ..base }, None), "score_from"),
        (run(&long, &PerplexityOptions { window: 1, ..base }, None), "window"),
        (run(&long, &PerplexityOptions { window: 401, ..base }, None), "window"),
        (run(&[60; 100], &base, None), "token 60"),
        (run(&long, &base, Some(&other)), "51"),
    ] {
        assert!(message.contains(word), "{message:?} should contain {word:?}");
    }
    let broken = HashModel { nan_at: Some(20), ..HashModel::default() };
    let error = perplexity(&broken, &long, &base, None, &mut |_| {}).unwrap_err();
    assert!(matches!(error, EngineError::Logits { position: 21, .. }), "{error}");
    let error = perplexity(&model, &long, &base, Some(&broken), &mut |_| {}).unwrap_err();
    assert!(matches!(error, EngineError::Logits { position: 21, .. }), "{error}");
}

#[test]
fn logits_are_those_of_every_prefix() {
    let model = HashModel::default();
    let tokens = text(40);
    let expected: Vec<f32> = (1..=40).flat_map(|n| model.logits(&tokens[..n])).collect();
    assert_eq!(logits(&model, &tokens).unwrap(), expected);
    assert!(logits(&model, &[]).unwrap().is_empty());
    let message = logits(&model, &text(401)).unwrap_err().to_string();
    assert!(message.contains("401") && message.contains("400"), "{message}");
    assert!(logits(&model, &[50]).is_err());

    let wide = HashModel { vocab_size: 200_000, ..HashModel::default() };
    let mut sizes = Vec::new();
    for_each_logits(&wide, &tokens.repeat(5), &mut |rows| {
        sizes.push(rows.len() / 200_000);
        Ok(())
    })
    .unwrap();
    assert_eq!(sizes, [83, 83, 34]);
}

#[test]
fn choices_equal_their_definition() {
    let model = HashModel::default();
    let rows: Vec<ChoiceRow> = (0..60usize)
        .map(|i| {
            let all = text(400);
            let choice = |j: usize| {
                let len = 1 + (i * 7 + j * 5) % 40;
                let tokens = all[i + j * 50..][..len].to_vec();
                Choice { tokens, characters: len * 3 + j }
            };
            let context = all[i * 2..][..1 + (i * 5) % 90].to_vec();
            ChoiceRow { context, choices: (0..2 + i % 3).map(choice).collect(), gold: i % 2 }
        })
        .collect();
    let (mut right, mut right_normalized) = (0, 0);
    for row in &rows {
        let scores: Vec<f64> = row
            .choices
            .iter()
            .map(|c| {
                let mut seen = row.context.clone();
                let mut sum = 0.0;
                for &token in &c.tokens {
                    sum += log_softmax(&model.logits(&seen))[token as usize];
                    seen.push(token);
                }
                sum
            })
            .collect();
        let normalized: Vec<f64> =
            scores.iter().zip(&row.choices).map(|(s, c)| s / c.characters as f64).collect();
        right += usize::from(best(&scores) == row.gold);
        right_normalized += usize::from(best(&normalized) == row.gold);
    }
    assert!(right > 0 && right_normalized > 0 && right != right_normalized, "a test that tells");
    let mut calls = 0;
    let report = choices(&model, &rows, &mut |_| calls += 1).unwrap();
    assert_eq!((report.rows, calls), (60, 60));
    assert_eq!(report.accuracy, right as f64 / 60.0);
    assert_eq!(report.accuracy_normalized, right_normalized as f64 / 60.0);
}

#[test]
fn malformed_questions_are_named() {
    let model = HashModel::default();
    let choice = |tokens: &[u32], characters| Choice { tokens: tokens.to_vec(), characters };
    let good = || ChoiceRow {
        context: vec![1, 2],
        choices: vec![choice(&[3], 1), choice(&[4, 5], 2)],
        gold: 1,
    };
    for (row, word) in [
        (ChoiceRow { context: vec![], ..good() }, "query"),
        (ChoiceRow { gold: 2, ..good() }, "gold"),
        (ChoiceRow { choices: vec![], gold: 0, ..good() }, "gold"),
        (ChoiceRow { choices: vec![choice(&[], 1), choice(&[1], 1)], ..good() }, "choices"),
        (ChoiceRow { choices: vec![choice(&[1], 0), choice(&[1], 1)], ..good() }, "choices"),
        (ChoiceRow { context: vec![99], ..good() }, "token 99"),
        (ChoiceRow { context: vec![1; 399], ..good() }, "401"),
    ] {
        let error = choices(&model, &[good(), row], &mut |_| {}).unwrap_err();
        assert!(error.to_string().contains(word), "{error} should contain {word}");
    }
    assert!(choices(&model, &[], &mut |_| {}).is_err());
}
