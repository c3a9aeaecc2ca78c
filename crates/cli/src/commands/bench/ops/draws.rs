//! Tokens drawn by a device, their copy to the host included.

use super::cases::{Case, Visit};
use super::weights::Random;
use anyhow::Result;
use marlin_tensor::{Adjustment, Backend, Draw};

/// Ways to draw a token.
fn draws(vocab: usize) -> [(&'static str, Draw); 6] {
    let all = Draw { temperature: 1.0, uniform: 0.5, ..Draw::greedy(0) };
    let seen = (0..vocab as u32).step_by(vocab.div_ceil(1000));
    let seen = seen.map(|token| Adjustment { token, penalty: 1.1, add: -0.5 });
    [
        ("draw greedy", Draw::greedy(0)),
        ("draw temperature", all.clone()),
        ("draw top_k top_p", Draw { top_k: Some(40), top_p: 0.95, ..all.clone() }),
        // Of even logits a share is a few tokens only where it is cold.
        ("draw top_p", Draw { top_p: 0.9, temperature: 0.001, ..all.clone() }),
        ("draw wide top_p", Draw { top_p: 0.95, ..all.clone() }),
        ("draw penalties", Draw { adjustments: seen.collect(), ..all }),
    ]
}

/// Names of all cases.
pub fn names() -> [&'static str; 6] {
    draws(1).map(|(name, _)| name)
}

/// Calls `visit` with every case that is wanted; with none where the host draws.
pub fn each(
    backend: &dyn Backend,
    wants: &dyn Fn(&str) -> bool,
    vocab: &[usize],
    random: &mut Random,
    visit: &mut Visit<'_>,
) -> Result<()> {
    if !names().into_iter().any(wants) {
        return Ok(());
    }
    for &vocab in vocab {
        // About as wide as a model's.
        let values = random.floats(vocab).iter().map(|v| 8.0 * v).collect();
        let logits = backend.upload(1, vocab, values)?;
        for (name, draw) in draws(vocab) {
            let draw = [draw];
            if !wants(name) || backend.draw(&logits, &draw)?.is_none() {
                continue;
            }
            let case = Case::new(name, format!("[{vocab}]"), 4 * vocab, 0, |_| {
                backend.draw(&logits, &draw)?;
                Ok(())
            });
            visit(Case { waits: true, ..case })?;
        }
    }
    Ok(())
}
