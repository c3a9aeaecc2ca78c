//! Choosing experts.

use marlin_tensor::{Router, Scoring};

/// For each row of `logits: [rows, num_experts]`, writes the chosen expert ids and weights, best
/// first, to `ids` and `weights`, each `[rows, top_k]`. Equal choices go to the lower index.
pub(crate) fn route(
    logits: &[f32],
    bias: Option<&[f32]>,
    router: &Router,
    ids: &mut [u32],
    weights: &mut [f32],
) {
    let outputs = ids.chunks_exact_mut(router.top_k).zip(weights.chunks_exact_mut(router.top_k));
    for (logits, (ids, weights)) in logits.chunks_exact(router.num_experts).zip(outputs) {
        let scores = score(logits, router.scoring);
        let mut choices = scores.clone();
        if let Some(bias) = bias {
            choices.iter_mut().zip(bias).for_each(|(c, b)| *c += b);
        }
        exclude_groups(&mut choices, router);
        for (id, expert) in ids.iter_mut().zip(best(&choices, router.top_k)) {
            *id = expert as u32;
        }
        for (weight, &id) in weights.iter_mut().zip(&*ids) {
            *weight = scores[id as usize];
        }
        if router.normalize {
            let total = weights.iter().sum::<f32>() + 1e-20;
            weights.iter_mut().for_each(|w| *w /= total);
        }
        weights.iter_mut().for_each(|w| *w *= router.scaling_factor);
    }
}

fn score(logits: &[f32], scoring: Scoring) -> Vec<f32> {
    match scoring {
        Scoring::Sigmoid => logits.iter().map(|&x| 1.0 / (1.0 + (-x).exp())).collect(),
        Scoring::Softmax => {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exps: Vec<f32> = logits.iter().map(|&x| (x - max).exp()).collect();
            let total: f32 = exps.iter().sum();
            exps.iter().map(|e| e / total).collect()
        }
    }
}

/// Sets the choices of groups that may not be used to minus infinity. (DeepSeek-V2's code sets
/// them to 0, which chooses the same experts because its scores are positive.)
fn exclude_groups(choices: &mut [f32], router: &Router) {
    if router.num_groups <= 1 {
        return;
    }
    let size = router.num_experts / router.num_groups;
    let group_score = |group: &[f32]| -> f32 {
        best(group, router.group_score_experts).iter().map(|&i| group[i]).sum()
    };
    let group_scores: Vec<f32> = choices.chunks_exact(size).map(group_score).collect();
    let kept = best(&group_scores, router.top_k_groups);
    for (i, group) in choices.chunks_exact_mut(size).enumerate() {
        if !kept.contains(&i) {
            group.fill(f32::NEG_INFINITY);
        }
    }
}

/// Indices of the `count` largest values, largest first, the lower index first among equals.
fn best(values: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order.truncate(count);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTER: Router = Router {
        scoring: Scoring::Softmax,
        num_experts: 4,
        top_k: 2,
        num_groups: 1,
        top_k_groups: 1,
        group_score_experts: 1,
        normalize: false,
        scaling_factor: 1.0,
    };

    fn routed(logits: &[f32], bias: Option<&[f32]>, router: &Router) -> (Vec<u32>, Vec<f32>) {
        let rows = logits.len() / router.num_experts;
        let (mut ids, mut weights) = (vec![0; rows * router.top_k], vec![0.0; rows * router.top_k]);
        route(logits, bias, router, &mut ids, &mut weights);
        (ids, weights)
    }

    #[test]
    fn softmax_over_all_experts() {
        let logits = [0.0, 2.0f32.ln(), 0.0, 4.0f32.ln()];
        let (ids, weights) = routed(&logits, None, &ROUTER);
        assert_eq!(ids, [3, 1]);
        assert!((weights[0] - 0.5).abs() < 1e-6 && (weights[1] - 0.25).abs() < 1e-6);
        let router = Router { normalize: true, scaling_factor: 3.0, ..ROUTER };
        let (_, weights) = routed(&logits, None, &router);
        assert!((weights[0] - 2.0).abs() < 1e-6 && (weights[1] - 1.0).abs() < 1e-6);
    }

    #[test]
    fn ties_go_to_the_lower_index() {
        assert_eq!(routed(&[1.0, 1.0, 1.0, 1.0], None, &ROUTER).0, [0, 1]);
        assert_eq!(routed(&[0.0, 1.0, 2.0, 1.0], None, &ROUTER).0, [2, 1]);
    }

    #[test]
    fn bias_chooses_but_does_not_weigh() {
        let router = Router { scoring: Scoring::Sigmoid, ..ROUTER };
        let (ids, weights) = routed(&[0.0, 1.0, 2.0, 3.0], Some(&[5.0, 0.0, 0.0, 0.0]), &router);
        assert_eq!(ids, [0, 3]);
        assert!((weights[0] - 0.5).abs() < 1e-6);
    }

    #[test]
    fn groups_are_scored_by_their_best_and_the_others_excluded() {
        let grouped = Router { scoring: Scoring::Sigmoid, num_groups: 2, ..ROUTER };
        let logits = [3.0, -9.0, 2.0, 2.5];
        assert_eq!(routed(&logits, None, &grouped).0, [0, 1]);
        let by_two = Router { group_score_experts: 2, ..grouped };
        assert_eq!(routed(&logits, None, &by_two).0, [3, 2]);
        let both = Router { top_k_groups: 2, ..by_two };
        assert_eq!(routed(&logits, None, &both).0, [0, 3]);
    }
}
