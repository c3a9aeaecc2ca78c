//! Tokens drawn from rows of logits, where a device does that.

use super::values;
use crate::draws::{drawn, kept, may_be_drawn};
use marlin_tensor::{Adjustment, Backend, Draw, Tensor};

/// How far shares may be off.
const TOLERANCE: f64 = 1e-5;

/// What a device makes of `draws`; nothing when the host draws.
fn tokens(b: &dyn Backend, logits: &Tensor, draws: &[Draw]) -> Option<Vec<Option<u32>>> {
    let all = b.draw(logits, draws).unwrap()?;
    assert_eq!(all.len(), draws.len(), "on {}", b.name());
    Some(all.into_iter().map(|d| d.map(|d| d.token)).collect())
}

/// Adjustments of every kind, of about one token of `every`.
fn adjustments(vocab: usize, every: usize, seed: u64) -> Vec<Adjustment> {
    let tokens =
        (0..vocab as u32).filter(|t| (u64::from(*t) * 7919 + seed).is_multiple_of(every as u64));
    let changes = [(1.3, 0.0), (1.0, -1.5), (0.8, 0.5), (1.0, f32::NEG_INFINITY), (2.0, -0.25)];
    let each = tokens.zip(changes.into_iter().cycle());
    each.map(|(token, (penalty, add))| Adjustment { token, penalty, add }).collect()
}

/// Every way to cut a row, alone and together.
fn cuts() -> Vec<Draw> {
    let off = || Draw { temperature: 1.0, ..Draw::greedy(0) };
    vec![
        Draw::greedy(0),
        off(),
        Draw { temperature: 0.6, ..off() },
        Draw { temperature: 3.0, ..off() },
        Draw { temperature: f32::MIN_POSITIVE, ..off() },
        Draw { top_k: Some(1), ..off() },
        Draw { top_k: Some(20), temperature: 0.7, ..off() },
        Draw { top_k: Some(300), ..off() },
        Draw { top_k: Some(1500), temperature: 2.0, ..off() },
        Draw { top_p: 0.0, ..off() },
        Draw { top_p: 0.3, ..off() },
        Draw { top_p: 0.9, ..off() },
        Draw { top_p: 0.9, temperature: 0.02, ..off() },
        Draw { top_p: 0.999, temperature: 4.0, ..off() },
        Draw { min_p: 0.05, ..off() },
        Draw { min_p: 1.0, ..off() },
        Draw { top_k: Some(40), top_p: 0.8, min_p: 0.02, ..off() },
        Draw { top_k: Some(1400), top_p: 0.95, temperature: 2.0, ..off() },
        Draw { exclude: Some(0.01), ..off() },
        Draw { exclude: Some(0.0), top_k: Some(9), ..off() },
        Draw { exclude: Some(0.004), top_p: 0.9, min_p: 0.01, ..off() },
    ]
}

/// Rows of several parts and of a rest of one, peaked and flat ones, with and without adjustments, all of them in one call: the tokens are those of exact sums, but
/// for a few whose draw falls on a border.
pub fn draws_of_rows(b: &dyn Backend) {
    let (mut all, mut exact) = (0, 0);
    for (vocab, every) in [(1, 1), (40, 1), (1000, 1), (5000, 1), (40_000, 7)] {
        // Scales at which 5000 tokens' nucleus is a few or nearly all of them.
        let scales = [12.0, 3.0];
        let rows = scales.len();
        let mut logits = values(rows * vocab, 90);
        logits.iter_mut().enumerate().for_each(|(i, l)| *l *= scales[i / vocab]);
        let x = b.upload(rows, vocab, logits.clone()).unwrap();
        let mut draws = Vec::new();
        for (i, cut) in cuts().into_iter().enumerate() {
            for row in 0..rows {
                for every in [0, 3, 50] {
                    let adjustments = match every {
                        0 => Vec::new(),
                        every => adjustments(vocab, every, i as u64),
                    };
                    let uniform = (0.137 + 0.618_033_988_75 * draws.len() as f64).fract();
                    draws.push(Draw { row, adjustments, uniform, ..cut.clone() });
                }
            }
        }
        // Parts by the hundred.
        let mut draws: Vec<Draw> = draws.into_iter().step_by(every).collect();
        let edges = [0.0, 1.0 - f64::EPSILON, 1e-9, 0.5];
        draws.extend(edges.map(|uniform| Draw { temperature: 1.0, uniform, ..Draw::greedy(0) }));
        let Some(found) = tokens(b, &x, &draws) else { return };
        for (draw, found) in draws.iter().zip(&found) {
            let what = format!("{draw:?} of {vocab} on {}", b.name());
            let row = &logits[draw.row * vocab..][..vocab];
            let expected = drawn(row, draw).map(|d| d.token);
            if let (Some(found), Some(_)) = (found, expected) {
                assert!(
                    may_be_drawn(row, draw, *found, TOLERANCE),
                    "{what}: {found} for {expected:?}"
                );
            } else {
                assert_eq!(*found, expected, "{what}");
            }
            all += 1;
            exact += usize::from(*found == expected);
        }
        // Alone as among others, and again.
        for (draw, found) in draws.iter().zip(&found).step_by(7) {
            assert_eq!(tokens(b, &x, std::slice::from_ref(draw)).unwrap(), [*found], "{draw:?}");
        }
    }
    assert!(exact * 100 >= all * 98, "{exact} of {all} tokens are those of exact sums");
}

/// As many draws as fall evenly into `[0, 1)`: every token comes as often as it is likely.
pub fn draws_follow_the_distribution(b: &dyn Backend) {
    const DRAWS: usize = 400;
    let vocab = 300;
    let logits: Vec<f32> = values(vocab, 91).iter().map(|l| l * 4.0).collect();
    let x = b.upload(1, vocab, logits.clone()).unwrap();
    let off = Draw { temperature: 1.0, ..Draw::greedy(0) };
    for cut in [
        off.clone(),
        Draw { temperature: 0.5, adjustments: adjustments(vocab, 4, 0), ..off.clone() },
        Draw { top_k: Some(30), top_p: 0.8, ..off.clone() },
        Draw { exclude: Some(0.01), min_p: 0.01, ..off },
    ] {
        let draws: Vec<Draw> = (0..DRAWS)
            .map(|i| Draw { uniform: (i as f64 + 0.5) / DRAWS as f64, ..cut.clone() })
            .collect();
        let Some(found) = tokens(b, &x, &draws) else { return };
        let mut counts = vec![0usize; vocab];
        found.iter().for_each(|t| counts[t.unwrap() as usize] += 1);
        let kept = kept(&logits, &cut).unwrap();
        let total: f64 = kept.iter().map(|k| k.1).sum();
        let mut expected = vec![0.0; vocab];
        kept.iter().for_each(|k| expected[k.0 as usize] = k.1 / total * DRAWS as f64);
        for (token, (&n, e)) in counts.iter().zip(expected).enumerate() {
            // Each border lies between two draws.
            assert!((n as f64 - e).abs() < 1.1, "token {token}: {n} for {e:.2} on {}", b.name());
            assert!(n == 0 || e > 0.0, "token {token} was cut, on {}", b.name());
        }
    }
}

/// Equals, whole rows of them too, rows that are not finite, rows of which nothing is left, and no draws at all.
pub fn draws_of_unusual_rows(b: &dyn Backend) {
    let vocab = 3000;
    let mut logits = values(4 * vocab, 92);
    for place in [vocab - 1, vocab / 2, 7] {
        logits[place] = 9.0;
    }
    logits[vocab + vocab / 3] = f32::NAN;
    logits[2 * vocab + 5] = f32::NEG_INFINITY;
    logits[3 * vocab..].fill(-1.5);
    let x = b.upload(4, vocab, logits.clone()).unwrap();
    let off = |row| Draw { temperature: 1.0, ..Draw::greedy(row) };
    let ban = |token| Adjustment { token, penalty: 1.0, add: f32::NEG_INFINITY };
    let all = |row| Draw { adjustments: (0..vocab as u32).map(ban).collect(), ..off(row) };
    let draws = [
        Draw::greedy(0),
        Draw { top_k: Some(2), uniform: 0.7, ..off(0) },
        Draw { top_p: 0.1, uniform: 0.999, ..off(0) },
        Draw { exclude: Some(0.1), uniform: 0.3, ..off(0) },
        Draw { uniform: 0.4001, ..off(3) },
        Draw { min_p: 1.0, uniform: 0.9001, ..off(3) },
        Draw::greedy(3),
        Draw::greedy(1),
        off(1),
        Draw { top_p: 0.5, ..off(2) },
        all(0),
        Draw { temperature: 0.0, ..all(3) },
    ];
    let Some(found) = tokens(b, &x, &draws) else { return };
    for (draw, found) in draws.iter().zip(found) {
        let expected = drawn(&logits[draw.row * vocab..][..vocab], draw).map(|d| d.token);
        assert_eq!(found, expected, "{draw:?} on {}", b.name());
    }
    // So many equals at the edge may be left to who reads the row.
    let cut = Draw { top_k: Some(1200), uniform: 0.5001, ..off(3) };
    let found = tokens(b, &x, std::slice::from_ref(&cut)).unwrap()[0];
    assert!(found.is_none_or(|t| t == 600), "{found:?} on {}", b.name());
    assert_eq!(tokens(b, &x, &[]).unwrap(), []);
}

/// Logits beside the token: those of the row, whatever is drawn from it.
pub fn logits_of_draws(b: &dyn Backend) {
    for vocab in [3, 700] {
        let logits: Vec<f32> = values(2 * vocab, 93).iter().map(|l| l * 8.0).collect();
        let x = b.upload(2, vocab, logits.clone()).unwrap();
        let adjustments = adjustments(vocab, 3, 0);
        let mut draws = vec![Draw { temperature: 1.0, uniform: 0.3, ..Draw::greedy(1) }];
        for (row, count) in [(0, 0), (1, 1), (0, 5), (1, 20), (0, 400)] {
            let cut = Draw { temperature: 0.7, top_k: Some(50), uniform: 0.6, ..Draw::greedy(row) };
            let cut = Draw { logprobs: Some(count), ..cut };
            draws.push(Draw { adjustments: adjustments.clone(), ..cut.clone() });
            draws.push(cut);
            draws.push(Draw { logprobs: Some(count), ..Draw::greedy(row) });
        }
        let Some(found) = b.draw(&x, &draws).unwrap() else { return };
        for (draw, found) in draws.iter().zip(found) {
            let what = format!("{draw:?} on {}", b.name());
            let expected = drawn(&logits[draw.row * vocab..][..vocab], draw).unwrap();
            let found = found.unwrap();
            assert_eq!(found.token, expected.token, "{what}");
            let (Some(found), Some(expected)) = (&found.logits, &expected.logits) else {
                assert_eq!(found.logits, expected.logits, "{what}");
                continue;
            };
            assert_eq!((found.own, &found.largest), (expected.own, &expected.largest), "{what}");
            assert!((found.norm - expected.norm).abs() < 1e-5, "{what}: {}", found.norm);
        }
    }
}
