//! From the moments that were gathered to those a matrix is quantized with.
//!
//! Experts may have seen too few tokens for a Hessian of their own.
//! An expert with fewer rows than inputs has a singular Hessian: it would be quantized as if most directions
//! did not matter. It borrows from the other experts of its block, in proportion to what it lacks:
//! `H ← (n·H + (k − n)·H̄) / k` with `n` own rows, `k` inputs, and `H̄` the mean over all rows of all experts.

use crate::exl3::basis::Random;
use crate::hessian::{Hessian, Hessians};
use crate::report::fnv;
use std::collections::{BTreeMap, BTreeSet};

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

/// Sums over all experts of a block, by what they are inputs of.
#[derive(Debug, Default)]
pub struct Pools(Hessians);

impl Pools {
    /// Adds what the experts among `hessians` have seen. However the labels come in parts, the sums are the same
    /// as long as they come in the same order.
    pub fn add<'a>(&mut self, hessians: &Hessians, order: impl IntoIterator<Item = &'a str>) {
        for label in order {
            if let (Some(name), Some(hessian)) = (pool_of(label), hessians.get(label)) {
                let new = || Hessian::new(hessian.size());
                self.0.entry(name).or_insert_with(new).merge(hessian);
            }
        }
    }

    /// The sums by name.
    pub fn sums(&self) -> &Hessians {
        &self.0
    }

    fn of(&self, label: &str) -> Option<&Hessian> {
        self.0.get(&pool_of(label)?)
    }
}

impl From<Hessians> for Pools {
    fn from(sums: Hessians) -> Self {
        Self(sums)
    }
}

/// The moments of `labels` that `rule` asks for, in place of those gathered; says by label what a starved expert
/// borrowed.
pub fn prepare(
    rule: MomentsRule,
    hessians: &mut Hessians,
    labels: &BTreeSet<String>,
    pools: &Pools,
) -> BTreeMap<String, String> {
    if rule == MomentsRule::Pooled {
        for label in labels {
            if let Some(pool) = pools.of(label) {
                let new = || Hessian::new(pool.size());
                hessians.entry(label.clone()).or_insert_with(new).lean_only_on(pool);
            }
        }
        return BTreeMap::new();
    }
    let notes = pool_starved(hessians, labels, pools);
    if rule == MomentsRule::Random {
        for (label, hessian) in hessians.iter_mut() {
            let mut random = Random(fnv(label.as_bytes()));
            let mut order: Vec<usize> = (0..hessian.size()).collect();
            for i in (1..order.len()).rev() {
                order.swap(i, (random.draw() % (i as u64 + 1)) as usize);
            }
            hessian.exchange(&order);
        }
    }
    notes
}

/// Mixes the pooled moments into starved experts, also those that no token reached; says by label what was done.
fn pool_starved(
    hessians: &mut Hessians,
    labels: &BTreeSet<String>,
    pools: &Pools,
) -> BTreeMap<String, String> {
    let mut notes = BTreeMap::new();
    for label in labels {
        let Some(pool) = pools.of(label) else { continue };
        let size = pool.size() as u64;
        let own = hessians.get(label).map_or(0, Hessian::rows);
        if own < size && pool.rows() > own {
            let new = || Hessian::new(pool.size());
            hessians.entry(label.clone()).or_insert_with(new).lean_on(pool, size - own);
            notes.insert(
                label.clone(),
                format!("{own} tokens for {size} inputs: pooled with the block's other experts"),
            );
        }
    }
    notes
}

/// `"model.layers.1.mlp.experts.down"` of `model.layers.1.mlp.experts.7.down`; none of what is no expert's.
pub fn pool_of(label: &str) -> Option<String> {
    let (block, rest) = label.split_once(".experts.")?;
    let (_, input) = rest.split_once('.')?;
    Some(format!("{block}.experts.{input}"))
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
        let order = ["1.experts.1.down", "1.experts.0.down", "1.experts.2.down", "1.qkv"];
        let labels: BTreeSet<String> = order.map(str::to_owned).into();
        let of = |rule| {
            let mut hessians = gathered();
            let mut pools = Pools::default();
            pools.add(&hessians, order);
            let notes = prepare(rule, &mut hessians, &labels, &pools);
            (hessians, notes)
        };
        let mean = |h: &Hessians, label: &str| h[label].mean().unwrap();
        let (own, notes) = of(MomentsRule::Own);
        assert_eq!(mean(&own, "1.experts.1.down"), b.mean().unwrap());

        let mut both = b.clone();
        both.merge(&a);
        // An expert that no token reached had no moments at all.
        let borrowed = mean(&own, "1.experts.2.down");
        let near = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-5;
        assert!(borrowed.data.iter().zip(&both.mean().unwrap().data).all(near));
        assert!(notes.len() == 1 && notes["1.experts.2.down"].starts_with("0 tokens"), "{notes:?}");
        assert_eq!(own["1.experts.2.down"].rows(), 0);

        let (pooled, _) = of(MomentsRule::Pooled);
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
        let (random, _) = of(MomentsRule::Random);
        let (real, random) = (mean(&own, "1.experts.1.down"), mean(&random, "1.experts.1.down"));
        assert_eq!(sorted(&real), sorted(&random));
        assert!((0..3).all(|i| (0..3).all(|j| random.row(i)[j] == random.row(j)[i])));
    }
}
