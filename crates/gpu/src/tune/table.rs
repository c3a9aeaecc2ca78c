//! Choices in memory.

use super::{Facts, MOST_ROWS, Shape, Variant, candidates, class};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Classes of rows.
const CLASSES: usize = MOST_ROWS.ilog2() as usize + 1;

/// The variant that a shape has, and what it was measured to take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// What it is for.
    pub shape: Shape,
    /// Class of rows, or every number of rows.
    pub rows: Option<usize>,
    /// What won; it may be the rule's own.
    pub variant: Variant,
    /// What the rule says.
    pub rule: Variant,
    /// Microseconds of the rule's variant, median.
    pub rule_us: f64,
    /// Microseconds of the winner, median.
    pub best_us: f64,
}

/// All choices for a device.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tuned(BTreeMap<(Shape, Option<usize>), Choice>);

impl Tuned {
    /// Takes `choice`, in place of an earlier one.
    pub fn insert(&mut self, choice: Choice) {
        self.0.insert((choice.shape.clone(), choice.rows), choice);
    }

    /// Takes all of `newer`.
    pub fn merge(&mut self, newer: &Self) {
        newer.iter().for_each(|choice| self.insert(choice.clone()));
    }

    /// The choice for `shape` with a class of rows, or with every number.
    pub fn get(&self, shape: &Shape, rows: Option<usize>) -> Option<&Choice> {
        self.0.get(&(shape.clone(), rows))
    }

    /// All of them, by shape and rows.
    pub fn iter(&self) -> impl Iterator<Item = &Choice> {
        self.0.values()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The variant for `shape`, if there is one that the device can run.
    pub fn variant(&self, shape: &Shape, rows: Option<usize>, facts: &Facts) -> Option<Variant> {
        let variant = self.get(shape, rows)?.variant;
        candidates(shape, rows, facts).contains(&variant).then_some(variant)
    }

    /// Everything that is chosen for `shape`.
    pub fn choices(&self, shape: &Shape, facts: &Facts) -> Choices {
        Choices {
            every: self.variant(shape, None, facts),
            by_rows: std::array::from_fn(|i| self.variant(shape, Some(1 << i), facts)),
        }
    }
}

/// What is chosen for one matrix; nothing where the rule holds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Choices {
    /// For every number of rows.
    pub every: Option<Variant>,
    by_rows: [Option<Variant>; CLASSES],
}

impl Choices {
    /// The variant for `rows` rows.
    pub fn of(&self, rows: usize) -> Option<Variant> {
        self.by_rows[class(rows).ilog2() as usize]
    }

    /// The same with another variant in a class, or for every number of rows.
    pub fn with(mut self, rows: Option<usize>, variant: Variant) -> Self {
        match rows {
            Some(rows) => self.by_rows[class(rows).ilog2() as usize] = Some(variant),
            None => self.every = Some(variant),
        }
        self
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn choice(out_features: usize, rows: usize, variant: Variant) -> Choice {
        Choice {
            shape: Shape::Linear { format: "q4_0".to_owned(), out_features, in_features: 256 },
            rows: Some(rows),
            variant,
            rule: Variant::Decode { planes: 4, tile: rows.min(16) as u32 },
            rule_us: 10.0,
            best_us: 8.0,
        }
    }

    const FACTS: Facts = Facts {
        plane: 8,
        most_units: 1024,
        tensor_cores: false,
        warpgroups: false,
        simdgroup_matrices: false,
    };

    #[test]
    fn a_choice_serves_its_class_and_shape_only() {
        let mut tuned = Tuned::default();
        let variant = Variant::Decode { planes: 2, tile: 8 };
        tuned.insert(choice(64, 16, variant));
        let choices = tuned.choices(&choice(64, 16, variant).shape, &FACTS);
        for rows in [9, 15, 16] {
            assert_eq!(choices.of(rows), Some(variant), "{rows} rows");
        }
        for rows in [1, 8, 17, 100_000] {
            assert_eq!(choices.of(rows), None, "{rows} rows");
        }
        let other = tuned.choices(&choice(65, 16, variant).shape, &FACTS);
        assert_eq!(other, Choices::default());
    }

    #[test]
    fn a_later_choice_takes_the_place_of_an_earlier_one() {
        let mut tuned = Tuned::default();
        tuned.insert(choice(64, 1, Variant::Decode { planes: 2, tile: 1 }));
        let mut newer = Tuned::default();
        newer.insert(choice(64, 1, Variant::Decode { planes: 8, tile: 1 }));
        newer.insert(choice(64, 2, Variant::Decode { planes: 2, tile: 2 }));
        tuned.merge(&newer);
        assert_eq!(tuned, newer);
        assert_eq!(tuned.len(), 2);
    }

    #[test]
    fn what_the_device_cannot_run_is_not_chosen() {
        let mut tuned = Tuned::default();
        tuned.insert(choice(64, 64, Variant::Halves));
        let shape = choice(64, 64, Variant::Halves).shape;
        assert_eq!(tuned.choices(&shape, &FACTS), Choices::default());
        let hopper = Facts { plane: 32, tensor_cores: true, warpgroups: true, ..FACTS };
        assert_eq!(tuned.choices(&shape, &hopper).of(64), Some(Variant::Halves));
    }
}
