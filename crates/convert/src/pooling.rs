//! Experts that saw too few tokens for a Hessian of their own.
//!
//! An expert with fewer rows than inputs has a singular Hessian: it would be quantized as if most directions
//! did not matter. It borrows from the other experts of its block, in proportion to what it lacks:
//! `H ← (n·H + (k − n)·H̄) / k` with `n` own rows, `k` inputs, and `H̄` the mean over all rows of all experts.

use crate::hessian::{Hessian, Hessians};
use std::collections::BTreeMap;

/// Mixes the pooled moments into starved experts; says by label what was done.
pub fn pool_starved(hessians: &mut Hessians) -> BTreeMap<String, String> {
    let mut pools: BTreeMap<(String, String), Hessian> = BTreeMap::new();
    for (label, hessian) in hessians.iter() {
        if let Some(kind) = kind(label) {
            let new = || Hessian::new(hessian.size());
            pools.entry(kind).or_insert_with(new).merge(hessian);
        }
    }
    let mut notes = BTreeMap::new();
    for (label, hessian) in hessians.iter_mut() {
        let Some(pool) = kind(label).and_then(|kind| pools.get(&kind)) else { continue };
        let (own, size) = (hessian.rows(), hessian.size() as u64);
        if own < size && pool.rows() > own {
            hessian.lean_on(pool, size - own);
            notes.insert(
                label.clone(),
                format!("{own} tokens for {size} inputs: pooled with the block's other experts"),
            );
        }
    }
    notes
}

/// `("model.layers.1.mlp.experts", "down")` of `model.layers.1.mlp.experts.7.down`.
fn kind(label: &str) -> Option<(String, String)> {
    let (prefix, rest) = label.split_once(".experts.")?;
    let (_, input) = rest.split_once('.')?;
    Some((prefix.to_owned(), input.to_owned()))
}
