//! Truncation and the draw, without sorting the vocabulary.

use super::SamplingOptions;
use std::cmp::Ordering;

/// A token that may be chosen. `weight` is a logit while selecting and then proportional to its
/// probability, 1 for the best token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    pub token: u32,
    pub weight: f32,
}

/// Best first, the lower id first among equals: a total order, so results never depend on how a
/// selection was done.
fn best_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token))
}

/// Index of the first NaN or infinity.
pub fn first_not_finite(logits: &[f32]) -> Option<usize> {
    const EXPONENT: u32 = 0x7f80_0000;
    let bad = |x: &f32| x.to_bits() & EXPONENT == EXPONENT;
    // A whole chunk at a time without an early exit, which vectorises.
    let chunk = logits.chunks(1024).position(|c| c.iter().fold(false, |any, x| any | bad(x)))?;
    logits[chunk * 1024..].iter().position(bad).map(|i| chunk * 1024 + i)
}

/// Index of the largest logit, the first among equals.
pub fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, &l) in logits.iter().enumerate() {
        if l > logits[best] {
            best = i;
        }
    }
    best
}

/// Fills `out` with the `count` largest logits, best first.
pub fn largest(logits: &[f32], count: usize, out: &mut Vec<Candidate>) {
    out.clear();
    let count = count.min(logits.len());
    if count == 0 {
        return;
    }
    // Keeps a few times `count` candidates, and cuts them down to `count` whenever that many have
    // beaten the worst of the last cut: linear in the vocabulary, and mostly one comparison a token.
    let capacity = (4 * count).max(256);
    let mut threshold = f32::NEG_INFINITY;
    for (token, &weight) in logits.iter().enumerate() {
        if weight > threshold || out.len() < count {
            out.push(Candidate { token: token as u32, weight });
            if out.len() == capacity {
                out.select_nth_unstable_by(count - 1, best_first);
                out.truncate(count);
                threshold = out[count - 1].weight;
            }
        }
    }
    if out.len() > count {
        out.select_nth_unstable_by(count - 1, best_first);
        out.truncate(count);
    }
    out.sort_unstable_by(best_first);
}

/// Temperature, top-k, top-p and min-p: fills `out` with what they keep, at least the best token.
/// Best first where top-k or top-p is on, by id otherwise.
pub fn truncate(logits: &[f32], max: f32, options: &SamplingOptions, out: &mut Vec<Candidate>) {
    let weight = |logit: f32| ((logit - max) / options.temperature).exp();
    let top_k = options.top_k.filter(|&k| k < logits.len());
    let floor = options.min_p;
    if let Some(k) = top_k {
        largest(logits, k, out);
        out.iter_mut().for_each(|c| c.weight = weight(c.weight));
        if options.top_p < 1.0 {
            let total = out.iter().map(|c| f64::from(c.weight)).sum();
            keep_share(out, options.top_p, total);
        }
    } else if options.top_p < 1.0 {
        let total: f64 = logits.iter().map(|&l| f64::from(weight(l))).sum();
        let mut count = 64;
        loop {
            largest(logits, count, out);
            out.iter_mut().for_each(|c| c.weight = weight(c.weight));
            if keep_share(out, options.top_p, total) || count >= logits.len() {
                break;
            }
            count *= 8;
        }
    } else {
        out.clear();
        let all = logits.iter().enumerate();
        out.extend(all.map(|(i, &l)| Candidate { token: i as u32, weight: weight(l) }));
    }
    if floor > 0.0 {
        out.retain(|c| c.weight >= floor);
    } else {
        out.retain(|c| c.weight > 0.0);
    }
}

/// Cuts `sorted` after the first token whose cumulative weight reaches `share * total`.
/// False when it never does.
fn keep_share(sorted: &mut Vec<Candidate>, share: f32, total: f64) -> bool {
    let wanted = f64::from(share) * total;
    let mut sum = 0.0;
    for (i, c) in sorted.iter().enumerate() {
        sum += f64::from(c.weight);
        if sum >= wanted {
            sorted.truncate(i + 1);
            return true;
        }
    }
    false
}

/// XTC: drops every token of at least `threshold` probability except the least probable of them.
pub fn exclude_top_choices(candidates: &mut Vec<Candidate>, threshold: f32) {
    let total: f64 = candidates.iter().map(|c| f64::from(c.weight)).sum();
    let least = f64::from(threshold) * total;
    let is_top = |c: &Candidate| f64::from(c.weight) >= least;
    let kept = candidates.iter().copied().filter(is_top).max_by(best_first);
    if let Some(kept) = kept {
        candidates.retain(|c| !is_top(c) || c.token == kept.token);
    }
}

/// The candidate at the share `draw` in `[0, 1)` of the total weight.
pub fn pick(candidates: &[Candidate], draw: f64) -> u32 {
    let total: f64 = candidates.iter().map(|c| f64::from(c.weight)).sum();
    let mut left = draw * total;
    for c in candidates {
        left -= f64::from(c.weight);
        if left < 0.0 {
            return c.token;
        }
    }
    // Rounding may leave a sliver beyond the last candidate.
    candidates.last().expect("truncation keeps the best token").token
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn largest_equals_a_full_sort(
            logits in prop::collection::vec((-8i8..8).prop_map(f32::from), 1..3000),
            count in 0usize..600,
        ) {
            let mut sorted: Vec<_> = logits.iter().enumerate()
                .map(|(i, &weight)| Candidate { token: i as u32, weight }).collect();
            sorted.sort_by(best_first);
            sorted.truncate(count);
            let mut out = Vec::new();
            largest(&logits, count, &mut out);
            prop_assert_eq!(out, sorted);
        }

        #[test]
        fn truncation_equals_its_definition(
            logits in prop::collection::vec(-6.0f32..6.0, 1..700),
            top_k in prop::option::of(1usize..200),
            top_p in prop::sample::select(vec![0.0f32, 0.3, 0.9, 0.999, 1.0]),
            min_p in prop::sample::select(vec![0.0f32, 0.02, 0.5, 1.0]),
            temperature in prop::sample::select(vec![0.3f32, 1.0, 3.0]),
        ) {
            let options = SamplingOptions { top_k, top_p, min_p, temperature, ..Default::default() };
            let max = logits[argmax(&logits)];
            let mut out = Vec::new();
            truncate(&logits, max, &options, &mut out);
            prop_assert_eq!(out.is_empty(), false);

            let mut all: Vec<_> = logits.iter().enumerate()
                .map(|(i, &l)| Candidate { token: i as u32, weight: ((l - max) / temperature).exp() })
                .collect();
            all.sort_by(best_first);
            all.truncate(top_k.unwrap_or(usize::MAX));
            if top_p < 1.0 {
                let total: f64 = all.iter().map(|c| f64::from(c.weight)).sum();
                let mut before = 0.0;
                let mut kept = 0;
                while kept < all.len() && (kept == 0 || before < f64::from(top_p) * total - 1e-9) {
                    before += f64::from(all[kept].weight);
                    kept += 1;
                }
                all.truncate(kept);
            }
            all.retain(|c| c.weight >= min_p);
            out.sort_by(best_first);
            prop_assert_eq!(out, all);
        }
    }

    #[test]
    fn bad_logits_are_found_wherever_they_are() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 1023, 1024, 2999] {
                let mut logits = vec![0.5; 3000];
                assert_eq!(first_not_finite(&logits), None);
                logits[at] = bad;
                assert_eq!(first_not_finite(&logits), Some(at));
            }
        }
    }

    #[test]
    fn xtc_keeps_the_least_probable_top_choice() {
        let weights = [0.5, 0.3, 0.15, 0.05];
        let all = || -> Vec<_> {
            (0..).zip(weights).map(|(token, weight)| Candidate { token, weight }).collect()
        };
        for (threshold, kept) in [
            (0.1, &[2, 3][..]),
            (0.2, &[1, 2, 3]),
            (0.4, &[0, 1, 2, 3]),
            (0.6, &[0, 1, 2, 3]),
            (0.0, &[3]),
        ] {
            let mut candidates = all();
            exclude_top_choices(&mut candidates, threshold);
            let tokens: Vec<_> = candidates.iter().map(|c| c.token).collect();
            assert_eq!(tokens, kept, "threshold {threshold}");
        }
    }
}
