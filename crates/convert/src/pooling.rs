//! From the moments that were gathered to those a matrix is quantized with.
//!
//! Experts may have seen too few tokens for a Hessian of their own.
//! An expert with fewer rows than inputs has a singular Hessian: it would be quantized as if most directions
//! did not matter. It borrows from the other experts of its block, in proportion to what it lacks:
//! `H ← (n·H + (k − n)·H̄) / k` with `n` own rows, `k` inputs, and `H̄` the mean over all rows of all experts.

use crate::exl3::basis::Random;
use crate::hessian::{Hessian, Hessians};
use crate::report::fnv;
use std::collections::BTreeMap;

/// Choices of the calibration. All but the defaults are there to show what the defaults are worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct CalibrationRule {
    /// Second moments that a matrix is quantized with.
    pub moments: MomentsRule,
    /// What the inputs of a block have gone through.
    pub through: Through,
}

/// Second moments that a matrix is quantized with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MomentsRule {
    /// Those of its own inputs.
    #[default]
    Own,
    /// Of an expert: those of all experts of its block.
    Pooled,
    /// Its own with the inputs exchanged at random: the spectrum is right, no direction is.
    Random,
}

/// What the inputs of a block have gone through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Through {
    /// The blocks before it as they were quantized.
    #[default]
    Quantized,
    /// The blocks before it as they are in the source.
    Source,
}

/// The moments that `rule` asks for in place of those gathered; says by label what a starved expert borrowed.
pub fn prepare(rule: MomentsRule, hessians: &mut Hessians) -> BTreeMap<String, String> {
    match rule {
        MomentsRule::Own => pool_starved(hessians),
        MomentsRule::Pooled => {
            let pools = pools(hessians);
            for (label, hessian) in hessians.iter_mut() {
                if let Some(pool) = kind(label).and_then(|kind| pools.get(&kind)) {
                    hessian.lean_only_on(pool);
                }
            }
            BTreeMap::new()
        }
        MomentsRule::Random => {
            let notes = pool_starved(hessians);
            for (label, hessian) in hessians.iter_mut() {
                let mut random = Random(fnv(label.as_bytes()));
                let mut order: Vec<usize> = (0..hessian.size()).collect();
                for i in (1..order.len()).rev() {
                    order.swap(i, (random.draw() % (i as u64 + 1)) as usize);
                }
                hessian.exchange(&order);
            }
            notes
        }
    }
}

/// Sums over all experts of a block, by what they are inputs of.
fn pools(hessians: &Hessians) -> BTreeMap<(String, String), Hessian> {
    let mut pools: BTreeMap<(String, String), Hessian> = BTreeMap::new();
    for (label, hessian) in hessians {
        if let Some(kind) = kind(label) {
            let new = || Hessian::new(hessian.size());
            pools.entry(kind).or_insert_with(new).merge(hessian);
        }
    }
    pools
}

/// Mixes the pooled moments into starved experts; says by label what was done.
fn pool_starved(hessians: &mut Hessians) -> BTreeMap<String, String> {
    let pools = pools(hessians);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::Matrix;

    fn seen(rows: &[[f32; 3]]) -> Hessian {
        let mut hessian = Hessian::new(3);
        hessian.add(Matrix::new(rows.len(), 3, rows.concat()));
        hessian
    }

    #[test]
    fn rules_choose_whose_moments_are_used() {
        let many = [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0], [1.0, 1.0, 0.0]];
        let (a, b) = (seen(&many), seen(&[[0.0, 0.0, 5.0], [1.0, 0.0, 1.0], [2.0, 2.0, 2.0]]));
        let gathered = || -> Hessians {
            let other = ("1.qkv".to_owned(), a.clone());
            let labels = ["1.experts.0.down", "1.experts.1.down"].map(str::to_owned);
            labels.into_iter().zip([a.clone(), b.clone()]).chain([other]).collect()
        };
        let of = |rule| {
            let mut hessians = gathered();
            assert!(prepare(rule, &mut hessians).is_empty());
            hessians
        };
        let mean = |h: &Hessians, label: &str| h[label].mean().unwrap();
        let own = of(MomentsRule::Own);
        assert_eq!(mean(&own, "1.experts.1.down"), b.mean().unwrap());

        let pooled = of(MomentsRule::Pooled);
        let mut both = a.clone();
        both.merge(&b);
        for label in ["1.experts.0.down", "1.experts.1.down"] {
            assert_eq!(mean(&pooled, label), both.mean().unwrap());
            assert_eq!(pooled[label].rows(), own[label].rows());
        }
        assert_eq!(mean(&pooled, "1.qkv"), a.mean().unwrap());

        // The same numbers at other places, symmetric as before.
        let sorted = |m: &Matrix| {
            let mut values = m.data.clone();
            values.sort_by(f32::total_cmp);
            values
        };
        let random = of(MomentsRule::Random);
        let (real, random) = (mean(&own, "1.experts.1.down"), mean(&random, "1.experts.1.down"));
        assert_eq!(sorted(&real), sorted(&random));
        assert!((0..3).all(|i| (0..3).all(|j| random.row(i)[j] == random.row(j)[i])));
    }
}
