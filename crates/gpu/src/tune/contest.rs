//! Who wins: the rule's variant, unless another one is right and faster by a margin.

use super::{Choice, Shape, Variant};
use serde::Serialize;

/// Rounds in which all are timed in turns, so that a clock that changes changes it for all.
const ROUNDS: usize = 9;
/// Runs of each before that are not counted.
const WARM_UP: usize = 2;
/// By how much of the rule's time a variant must be faster.
const MARGIN: f64 = 0.03;

/// A variant that can be run. What goes wrong is said in words.
pub struct Entrant<'a> {
    /// Which.
    pub variant: Variant,
    /// On the difference from the reference, relative to its largest value.
    pub tolerance: f64,
    /// All outputs.
    pub outputs: Box<dyn FnMut() -> Result<Vec<f32>, String> + 'a>,
    /// Microseconds of a run.
    pub time: Box<dyn FnMut() -> Result<f64, String> + 'a>,
}

/// Some of the outputs as they should be.
#[derive(Debug, Clone)]
pub struct Reference {
    /// Places and values.
    pub expected: Vec<(usize, f64)>,
}

impl Reference {
    /// Says where `found` is something else.
    fn check(&self, found: &[f32], tolerance: f64) -> Result<(), String> {
        if let Some(at) = found.iter().position(|v| !v.is_finite()) {
            return Err(format!("output {at} is {}", found[at]));
        }
        let largest = self.expected.iter().fold(0.0f64, |m, (_, v)| m.max(v.abs()));
        for &(at, expected) in &self.expected {
            let found = *found.get(at).ok_or_else(|| format!("only {} outputs", found.len()))?;
            let difference = (f64::from(found) - expected).abs();
            // Not a number is no small difference either.
            if difference > tolerance * largest || difference.is_nan() {
                return Err(format!(
                    "output {at} is {found}, the reference {expected:.6}: more than {tolerance:.0e} of {largest:.3} off"
                ));
            }
        }
        Ok(())
    }
}

/// How a variant did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Contestant {
    /// Which.
    pub variant: Variant,
    /// Median microseconds, where it was right and ran.
    pub us: Option<f64>,
    /// Whether its outputs are those of the reference, and where that is promised, the rule's to the bit.
    pub verified: bool,
    /// What went wrong.
    pub problem: Option<String>,
}

/// What came of a class.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// What was tuned.
    pub shape: Shape,
    /// Class of rows, or every number of rows.
    pub rows: Option<usize>,
    /// The rule's variant.
    pub rule: Variant,
    /// The rule's first.
    pub contestants: Vec<Contestant>,
    /// What won; none when the rule's own variant failed, since nothing is to be compared with it.
    pub choice: Option<Choice>,
}

/// Verifies and times `entrants`, the rule's first.
///
/// # Panics
/// When there are none.
pub fn hold(
    shape: Shape,
    rows: Option<usize>,
    reference: &Reference,
    mut entrants: Vec<Entrant>,
) -> Outcome {
    let rule = entrants[0].variant;
    let mut of_rule: Option<Vec<f32>> = None;
    let mut contestants = Vec::with_capacity(entrants.len());
    for entrant in &mut entrants {
        let outputs = (entrant.outputs)().and_then(|outputs| {
            reference.check(&outputs, entrant.tolerance)?;
            Ok(outputs)
        });
        let checked = outputs.and_then(|outputs| match &of_rule {
            None => {
                of_rule = Some(outputs);
                Ok(())
            }
            Some(same) if rule.keeps_bits() && entrant.variant.keeps_bits() => {
                same_bits(same, &outputs)
            }
            Some(_) => Ok(()),
        });
        let (verified, problem) = (checked.is_ok(), checked.err());
        contestants.push(Contestant { variant: entrant.variant, us: None, verified, problem });
        if of_rule.is_none() {
            // The rule's variant is wrong: that is no measure.
            break;
        }
    }
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); contestants.len()];
    if of_rule.is_some() {
        for round in 0..WARM_UP + ROUNDS {
            for (i, entrant) in entrants.iter_mut().enumerate() {
                if contestants[i].problem.is_some() {
                    continue;
                }
                match (entrant.time)() {
                    Ok(us) if round >= WARM_UP => times[i].push(us),
                    Ok(_) => {}
                    Err(problem) => contestants[i].problem = Some(problem),
                }
            }
        }
    }
    for (contestant, times) in contestants.iter_mut().zip(times) {
        contestant.us = contestant.problem.is_none().then(|| median(times));
    }
    let choice = contestants[0].us.map(|rule_us| {
        let beats = contestants[1..].iter().filter_map(|c| Some((c.us?, c.variant)));
        let best = beats.min_by(|a, b| a.0.total_cmp(&b.0));
        let best = best.filter(|(us, _)| *us < rule_us * (1.0 - MARGIN));
        let (best_us, variant) = best.unwrap_or((rule_us, rule));
        Choice { shape: shape.clone(), rows, variant, rule, rule_us, best_us }
    });
    Outcome { shape, rows, rule, contestants, choice }
}

fn same_bits(expected: &[f32], found: &[f32]) -> Result<(), String> {
    let differs = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits();
    match expected.iter().zip(found).position(differs) {
        _ if expected.len() != found.len() => Err(format!("{} outputs", found.len())),
        Some(at) => Err(format!("output {at} is {}, the rule's {}", found[at], expected[at])),
        None => Ok(()),
    }
}

/// To the nanosecond, so that a file gives back what was written.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2] * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: Variant = Variant::Decode { planes: 4, tile: 8 };
    const OTHER: Variant = Variant::Decode { planes: 2, tile: 8 };
    const ROUNDED: Variant = Variant::Halves;

    fn entrant(variant: Variant, outputs: Vec<f32>, us: f64) -> Entrant<'static> {
        Entrant {
            variant,
            tolerance: 1e-3,
            outputs: Box::new(move || Ok(outputs.clone())),
            time: Box::new(move || Ok(us)),
        }
    }

    fn outcome(entrants: Vec<Entrant>) -> Outcome {
        let shape = Shape::Linear { format: "q4_0".to_owned(), out_features: 4, in_features: 32 };
        let reference = Reference { expected: vec![(0, 1.0), (3, -2.0)] };
        hold(shape, Some(8), &reference, entrants)
    }

    const RIGHT: [f32; 4] = [1.0, 7.0, 8.0, -2.0];

    #[test]
    fn the_fastest_right_variant_wins_by_a_margin() {
        for (us, winner, best_us) in
            [(9.0, OTHER, 9.0), (9.69, OTHER, 9.69), (9.71, RULE, 10.0), (11.0, RULE, 10.0)]
        {
            let entrants =
                vec![entrant(RULE, RIGHT.to_vec(), 10.0), entrant(OTHER, RIGHT.to_vec(), us)];
            let choice = outcome(entrants).choice.unwrap();
            assert_eq!((choice.variant, choice.best_us, choice.rule_us), (winner, best_us, 10.0));
        }
    }

    #[test]
    fn a_wrong_variant_never_wins() {
        let wrong: [(Vec<f32>, &str); 6] = [
            (vec![1.0, 7.0, 8.0, -2.1], "the reference"),
            (vec![1.0, 7.0, f32::NAN, -2.0], "NaN"),
            (vec![1.0, f32::INFINITY, 8.0, -2.0], "inf"),
            (vec![1.0, 7.0, 8.0], "outputs"),
            (vec![1.0, 7.0, 8.0, -2.0, 0.0], "outputs"),
            // Where nobody looked at the reference, bits tell.
            (vec![1.0, 7.000001, 8.0, -2.0], "the rule's"),
        ];
        for (outputs, said) in wrong {
            let entrants = vec![entrant(RULE, RIGHT.to_vec(), 10.0), entrant(OTHER, outputs, 1.0)];
            let found = outcome(entrants);
            assert_eq!(found.choice.unwrap().variant, RULE);
            let loser = &found.contestants[1];
            assert!(!loser.verified && loser.us.is_none());
            let problem = loser.problem.as_deref().unwrap();
            assert!(problem.contains(said), "{problem}");
        }
    }

    #[test]
    fn a_variant_with_other_sums_need_only_be_right() {
        let near = vec![1.0005, 7.01, 8.0, -2.0];
        let entrants = vec![entrant(RULE, RIGHT.to_vec(), 10.0), entrant(ROUNDED, near, 5.0)];
        assert_eq!(outcome(entrants).choice.unwrap().variant, ROUNDED);
    }

    #[test]
    fn nothing_is_chosen_when_the_rule_is_wrong() {
        let entrants = vec![entrant(RULE, vec![0.0; 4], 10.0), entrant(OTHER, RIGHT.to_vec(), 1.0)];
        let found = outcome(entrants);
        assert_eq!(found.choice, None);
        assert!(!found.contestants[0].verified);
    }

    #[test]
    fn a_variant_that_fails_while_it_is_timed_is_out() {
        let mut failing = entrant(OTHER, RIGHT.to_vec(), 1.0);
        let mut runs = 0;
        failing.time = Box::new(move || {
            runs += 1;
            if runs > 4 { Err("out of registers".to_owned()) } else { Ok(1.0) }
        });
        let found = outcome(vec![entrant(RULE, RIGHT.to_vec(), 10.0), failing]);
        assert_eq!(found.choice.unwrap().variant, RULE);
        assert_eq!(found.contestants[1].problem.as_deref(), Some("out of registers"));
    }
}
