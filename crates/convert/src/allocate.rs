//! How many bits each group of matrices gets.
//!
//! The rule: all start at the highest rate that fits everywhere; groups are raised a step at a time,
//! attention before feed-forward before routed experts, the ends of the stack before its middle, while
//! the budget lasts. Measured sensitivities ([`measured`]) replace the order by divergence saved per bit spent.

use crate::error::ConvertError;
use crate::plan::{Plan, Role};
use marlin_quant::exl3::{Codebook, Rate};

/// Rates that `codebook` may use; half rates are `mul1`'s alone.
pub fn rates(codebook: Codebook) -> Vec<f64> {
    let half = matches!(codebook, Codebook::Mul1(_));
    Rate::ALL.iter().filter(|r| half || !r.is_half()).map(|r| r.bits()).collect()
}

/// Weights that share the budget, and what it is.
fn budget(plan: &Plan, bits: f64) -> f64 {
    let weights: u64 = budgeted(plan).map(|g| plan.groups[g].weights).sum();
    bits * weights as f64 + 1e-6
}

fn budgeted(plan: &Plan) -> impl Iterator<Item = usize> + '_ {
    (0..plan.groups.len()).filter(|&g| plan.groups[g].role != Role::Head)
}

fn spent(plan: &Plan, bits: &[f64]) -> f64 {
    budgeted(plan).map(|g| plan.groups[g].weights as f64 * bits[g]).sum()
}

/// Bits of every group under the rule; `head_bits` goes to the head, outside the budget.
///
/// # Errors
/// When `bits` is out of range.
pub fn rule(
    plan: &Plan,
    rates: &[f64],
    bits: f64,
    head_bits: f64,
) -> Result<Vec<f64>, ConvertError> {
    let floor = floor(rates, bits)?;
    let mut chosen: Vec<f64> =
        plan.groups.iter().map(|g| if g.role == Role::Head { head_bits } else { floor }).collect();
    let mut order: Vec<usize> = budgeted(plan).collect();
    let depth = |g: usize| {
        let layer = plan.groups[g].layer;
        layer.min(plan.layers.saturating_sub(layer + 1))
    };
    order
        .sort_by_key(|&g| (std::cmp::Reverse(plan.groups[g].role), depth(g), plan.groups[g].layer));
    let budget = budget(plan, bits);
    let mut left = budget - spent(plan, &chosen);
    loop {
        let mut raised = false;
        for &g in &order {
            let Some(next) = next(rates, chosen[g]) else { continue };
            let cost = (next - chosen[g]) * plan.groups[g].weights as f64;
            if cost <= left {
                left -= cost;
                chosen[g] = next;
                raised = true;
            }
        }
        if !raised {
            return Ok(chosen);
        }
    }
}

/// Divergence that a group alone causes, by rate.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Sensitivity {
    /// Name of the group.
    pub group: String,
    /// Rates that were measured, ascending, with the mean KL divergence at the logits.
    pub divergence: Vec<(f64, f64)>,
}

impl Sensitivity {
    /// Divergence at `bits`: on a line through the logarithms of the nearest measured rates, and beyond
    /// them falling fourfold a bit, as the error of the trellis does.
    fn at(&self, bits: f64) -> f64 {
        const TINY: f64 = 1e-12;
        let below = self.divergence.iter().rev().find(|d| d.0 <= bits);
        let above = self.divergence.iter().find(|d| d.0 >= bits);
        match (below, above) {
            (Some(&(a, x)), Some(&(b, y))) if b > a => {
                let share = (bits - a) / (b - a);
                (x.max(TINY).ln() * (1.0 - share) + y.max(TINY).ln() * share).exp()
            }
            (Some(&(rate, value)), _) | (None, Some(&(rate, value))) => {
                value.max(TINY) * 4f64.powf(rate - bits)
            }
            (None, None) => 0.0,
        }
    }
}

/// Bits of every group such that the summed divergence is least within the budget: from the lowest rate
/// up, the step that saves most divergence per bit is taken next. Groups without a measurement stay at
/// the rate floor.
///
/// # Errors
/// When `bits` is out of range.
pub fn measured(
    plan: &Plan,
    rates: &[f64],
    bits: f64,
    head_bits: f64,
    sensitivities: &[Sensitivity],
) -> Result<Vec<f64>, ConvertError> {
    let floor = floor(rates, bits)?;
    let of = |g: usize| sensitivities.iter().find(|s| s.group == plan.groups[g].name);
    let lowest = rates.first().copied().unwrap_or(floor);
    let mut chosen: Vec<f64> = (0..plan.groups.len())
        .map(|g| match plan.groups[g].role {
            Role::Head => head_bits,
            _ if of(g).is_some() => lowest,
            _ => floor,
        })
        .collect();
    let mut left = budget(plan, bits) - spent(plan, &chosen);
    loop {
        let step = |g: usize| {
            let sensitivity = of(g)?;
            let weights = plan.groups[g].weights as f64;
            // The best of all higher rates, so that a small first step does not hide a good second.
            rates
                .iter()
                .filter(|&&r| r > chosen[g] && (r - chosen[g]) * weights <= left)
                .map(|&r| {
                    let saved = sensitivity.at(chosen[g]) - sensitivity.at(r);
                    (saved / ((r - chosen[g]) * weights), g, r)
                })
                .max_by(|a, b| a.0.total_cmp(&b.0))
        };
        let best = budgeted(plan).filter_map(step).max_by(|a, b| a.0.total_cmp(&b.0));
        match best {
            Some((gain, g, rate)) if gain > 0.0 => {
                left -= (rate - chosen[g]) * plan.groups[g].weights as f64;
                chosen[g] = rate;
            }
            _ => return Ok(chosen),
        }
    }
}

fn floor(rates: &[f64], bits: f64) -> Result<f64, ConvertError> {
    let in_range = rates.first().zip(rates.last()).is_some_and(|(a, b)| (*a..=*b).contains(&bits));
    match rates.iter().rev().find(|r| **r <= bits).filter(|_| in_range) {
        Some(&floor) => Ok(floor),
        None => Err(ConvertError::Option {
            field: "--bits".to_owned(),
            reason: format!("{bits} is out of range; EXL3 has 1.0 to 8.0"),
        }),
    }
}

fn next(rates: &[f64], rate: f64) -> Option<f64> {
    rates.iter().copied().find(|r| *r > rate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Group;

    fn plan() -> Plan {
        let group = |name: &str, role, layer, weights| Group {
            name: name.to_owned(),
            role,
            layer,
            weights,
            channels: 0,
        };
        Plan {
            targets: Vec::new(),
            groups: vec![
                group("0.attention", Role::Attention, 0, 100),
                group("0.experts", Role::Experts, 0, 800),
                group("1.attention", Role::Attention, 1, 100),
                group("1.experts", Role::Experts, 1, 800),
                group("head", Role::Head, 2, 500),
            ],
            layers: 2,
        }
    }

    #[test]
    fn the_rule_spends_the_surplus_on_attention_first() {
        let (plan, rates) = (plan(), rates(Codebook::Mul1(0)));
        assert_eq!(rule(&plan, &rates, 3.0, 6.0).unwrap(), [3.0, 3.0, 3.0, 3.0, 6.0]);
        // 180 bits over: two attentions by half a bit (100), again (80 left: one of 50), …
        assert_eq!(rule(&plan, &rates, 3.1, 6.0).unwrap(), [4.0, 3.0, 3.5, 3.0, 6.0]);
        assert_eq!(rule(&plan, &rates, 8.0, 8.0).unwrap(), [8.0; 5]);
        for bits in [0.5, 8.5, f64::NAN] {
            let error = rule(&plan, &rates, bits, 6.0).unwrap_err().to_string();
            assert!(error.starts_with("--bits"), "{error}");
        }
    }

    #[test]
    fn measured_bits_go_where_they_save_most_and_keep_the_budget() {
        let (plan, rates) = (plan(), rates(Codebook::Mul1(0)));
        let of = |group: &str, at3: f64| Sensitivity {
            group: group.to_owned(),
            divergence: vec![(2.0, 4.0 * at3), (4.0, at3 / 4.0)],
        };
        let found = [
            of("0.attention", 0.1),
            of("0.experts", 0.1),
            of("1.attention", 0.001),
            of("1.experts", 0.1),
        ];
        let bits = measured(&plan, &rates, 3.0, 6.0, &found).unwrap();
        assert!(bits[0] > bits[1] && bits[2] < bits[0], "{bits:?}");
        assert!(spent(&plan, &bits) <= budget(&plan, 3.0), "{bits:?}");
        assert_eq!(bits[4], 6.0);
        assert!(
            (found[0].at(3.0) - 0.1).abs() < 1e-9 && (found[0].at(5.0) - 0.1 / 16.0).abs() < 1e-9
        );
    }
}
