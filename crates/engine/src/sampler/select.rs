//! Truncation and the draw, without sorting the vocabulary.

use super::lanes::{exp, sum, weigh};
use marlin_tensor::Draw;
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

/// Whether any token is to be cut.
pub fn truncates(draw: &Draw) -> bool {
    draw.top_k.is_some() || draw.top_p < 1.0 || draw.min_p > 0.0
}

/// Temperature, top-k, top-p and min-p: fills `out` with what they keep, at least the best token, by token.
/// `weights` is a buffer.
pub fn truncate(
    logits: &[f32],
    max: f32,
    draw: &Draw,
    weights: &mut Vec<f32>,
    out: &mut Vec<Candidate>,
) {
    let &Draw { temperature, top_p, min_p, .. } = draw;
    if let Some(k) = draw.top_k.filter(|&k| k < logits.len()) {
        largest(logits, k, out);
        out.iter_mut().for_each(|c| c.weight = exp((c.weight - max) / temperature));
        if top_p < 1.0 {
            let total: f64 = out.iter().map(|c| f64::from(c.weight)).sum();
            keep_share(out, 0, 0.0, f64::from(top_p) * total);
        }
    } else {
        weigh(logits, max, temperature, weights);
        if top_p < 1.0 {
            nucleus(weights, top_p, out);
        } else {
            out.clear();
            let all = (0..).zip(weights.iter());
            out.extend(all.map(|(token, &weight)| Candidate { token, weight }));
        }
    }
    // One that underflows has no weight and is cut, too.
    out.retain(|c| c.weight >= min_p && c.weight > 0.0);
    // Nearly in order: a nucleus is but for its edge.
    out.sort_by_key(|c| c.token);
}

const BUCKET_SHIFT: u32 = 19;
const ONE: u32 = 1.0f32.to_bits();

/// Where a weight of 0 to 1 falls by its leading bits, exponent and four of the mantissa: larger ones first.
fn bucket(weight: f32) -> usize {
    ((ONE - weight.to_bits()) >> BUCKET_SHIFT) as usize
}

/// Top-p: the fewest candidates whose weights reach the share, those of the edge last.
///
/// Weights fall into buckets, which are in order. Those before the one in which the share is reached are kept whole, and
/// only that one is sorted.
fn nucleus(weights: &[f32], share: f32, out: &mut Vec<Candidate>) {
    const BUCKETS: usize = (ONE >> BUCKET_SHIFT) as usize + 1;
    let mut masses = [0.0f64; BUCKETS];
    for &weight in weights {
        masses[bucket(weight)] += f64::from(weight);
    }
    let wanted = f64::from(share) * masses.iter().sum::<f64>();
    let mut before = 0.0;
    let mut last = 0;
    while last + 1 < BUCKETS && before + masses[last] < wanted {
        before += masses[last];
        last += 1;
    }
    out.clear();
    let candidates = || (0..).zip(weights).map(|(token, &weight)| Candidate { token, weight });
    out.extend(candidates().filter(|c| bucket(c.weight) < last));
    let whole = out.len();
    out.extend(candidates().filter(|c| bucket(c.weight) == last));
    out[whole..].sort_unstable_by(best_first);
    keep_share(out, whole, before, wanted);
}

/// Cuts after the first token, from index `from` on, whose cumulative weight, `before` included,
/// reaches `wanted`.
fn keep_share(candidates: &mut Vec<Candidate>, from: usize, before: f64, wanted: f64) {
    let mut sum = before;
    for i in from..candidates.len() {
        sum += f64::from(candidates[i].weight);
        if sum >= wanted {
            candidates.truncate(i + 1);
            return;
        }
    }
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

/// [`pick`] from the whole vocabulary, by id; the best token's weight is 1.
pub fn pick_from_all(weights: &[f32], draw: f64) -> u32 {
    const CHUNK: usize = 1024;
    let mut left = draw * sum(weights);
    let mut last = 0;
    for (index, chunk) in weights.chunks(CHUNK).enumerate() {
        let mass = sum(chunk);
        if mass > 0.0 {
            last = index;
        }
        if left < mass {
            break;
        }
        left -= mass;
    }
    let start = last * CHUNK;
    let chunk = &weights[start..(start + CHUNK).min(weights.len())];
    let mut chosen = start;
    for (token, &weight) in (start..).zip(chunk).filter(|&(_, &weight)| weight > 0.0) {
        chosen = token;
        left -= f64::from(weight);
        if left < 0.0 {
            break;
        }
    }
    chosen as u32
}

#[cfg(test)]
mod tests {
    use super::super::lanes::argmax;
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
            let draw = Draw { top_k, top_p, min_p, temperature, ..Draw::greedy(0) };
            let max = logits[argmax(&logits)];
            let mut out = Vec::new();
            truncate(&logits, max, &draw, &mut Vec::new(), &mut out);
            prop_assert_eq!(out.is_empty(), false);

            let mut all: Vec<_> = logits.iter().enumerate()
                .map(|(i, &l)| Candidate { token: i as u32, weight: exp((l - max) / temperature) })
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
            all.sort_by_key(|c| c.token);
            prop_assert_eq!(out, all);
        }

        #[test]
        fn picking_from_all_equals_picking_from_candidates(
            weights in prop::collection::vec((0u8..6).prop_map(f32::from), 1..3000),
            draw in 0.0f64..1.0,
        ) {
            prop_assume!(weights.iter().any(|&w| w > 0.0));
            let candidates: Vec<_> = (0..).zip(&weights)
                .map(|(token, &weight)| Candidate { token, weight })
                .filter(|c| c.weight > 0.0)
                .collect();
            for draw in [draw, 0.0, 1.0 - f64::EPSILON] {
                prop_assert_eq!(pick_from_all(&weights, draw), pick(&candidates, draw));
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
