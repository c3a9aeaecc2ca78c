//! What a draw gives, by its definition, in f64.

use marlin_tensor::{Draw, Drawn, DrawnLogits};

/// The token of `draw`, and the logits it wants; `None` when a value of the row is not finite or nothing is left to draw.
pub fn drawn(row: &[f32], draw: &Draw) -> Option<Drawn> {
    let kept = kept(row, draw)?;
    let total: f64 = kept.iter().map(|k| k.1).sum();
    let mut sum = 0.0;
    let reached = kept.iter().find(|k| {
        sum += k.1;
        sum > draw.uniform * total
    });
    let token = reached.or(kept.last())?.0;
    let logits = draw.logprobs.map(|count| {
        let mut largest: Vec<(u32, f32)> = (0..).zip(row.iter().copied()).collect();
        largest.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let max = f64::from(largest[0].1);
        largest.truncate(count);
        let norm = max + row.iter().map(|&l| (f64::from(l) - max).exp()).sum::<f64>().ln();
        DrawnLogits { own: row[token as usize], norm, largest }
    });
    Some(Drawn { token, logits })
}

/// Whether `draw` may give `token` where shares are right to `tolerance` only.
pub fn may_be_drawn(row: &[f32], draw: &Draw, token: u32, tolerance: f64) -> bool {
    let off = [0.0, -tolerance as f32, tolerance as f32];
    let about = |value: f32| off.map(|off| (value + off * value.max(1e-3)).clamp(0.0, 1.0));
    let all = |value: f32| if value < 1.0 { about(value) } else { [value; 3] };
    let excludes = |by: usize| draw.exclude.map(|share| about(share)[by]);
    all(draw.top_p).into_iter().any(|top_p| {
        about(draw.min_p).into_iter().any(|min_p| {
            (0..3).any(|by| {
                let off = Draw { top_p, min_p, exclude: excludes(by), ..draw.clone() };
                let kept = kept(row, &off).unwrap_or_default();
                let total: f64 = kept.iter().map(|k| k.1).sum();
                let before: f64 = kept.iter().take_while(|k| k.0 < token).map(|k| k.1).sum();
                kept.iter().find(|k| k.0 == token).is_some_and(|found| {
                    let (from, to) = (before / total, (before + found.1) / total);
                    (from - tolerance..=to + tolerance).contains(&draw.uniform)
                })
            })
        })
    })
}

/// Tokens that may be drawn and their weights, by token.
pub fn kept(row: &[f32], draw: &Draw) -> Option<Vec<(u32, f64)>> {
    if row.iter().any(|l| !l.is_finite()) {
        return None;
    }
    let mut adjusted = row.to_vec();
    for a in &draw.adjustments {
        let l = &mut adjusted[a.token as usize];
        *l = if *l > 0.0 { *l / a.penalty } else { *l * a.penalty };
        *l = l.clamp(f32::MIN, f32::MAX) + a.add;
    }
    let mut order: Vec<(u32, f32)> =
        (0..).zip(adjusted).filter(|l| l.1 > f32::NEG_INFINITY).collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let top = f64::from(order.first()?.1);
    if draw.temperature == 0.0 {
        return Some(vec![(order[0].0, 1.0)]);
    }
    let temperature = f64::from(draw.temperature);
    let weight = |l: f32| ((f64::from(l) - top) / temperature).exp();
    let mut kept: Vec<(u32, f64)> =
        order.into_iter().map(|(token, l)| (token, weight(l))).collect();
    kept.truncate(draw.top_k.unwrap_or(usize::MAX));
    let mass = |kept: &[(u32, f64)]| kept.iter().map(|k| k.1).sum::<f64>();
    if draw.top_p < 1.0 {
        let wanted = f64::from(draw.top_p) * mass(&kept);
        let mut sum = 0.0;
        let before = kept.iter().take_while(|k| {
            sum += k.1;
            sum < wanted
        });
        let count = before.count() + 1;
        kept.truncate(count);
    }
    kept.retain(|k| k.1 >= f64::from(draw.min_p));
    if let Some(share) = draw.exclude {
        let least = f64::from(share) * mass(&kept);
        let tops = kept.iter().take_while(|k| k.1 >= least).count();
        kept.drain(..tops.saturating_sub(1));
    }
    kept.sort_by_key(|k| k.0);
    Some(kept)
}
