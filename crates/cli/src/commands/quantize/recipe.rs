//! Rates by hand, and choices of the quantizer by name.

use crate::exit;
use crate::glob::glob;
use anyhow::Result;
use marlin_convert::{Exl3Options, Plan};
use serde_json::Value;

/// Sets the rates that the lines of a recipe name: `PATTERN BITS`, `*` matching anything, `#` a comment.
pub fn apply_recipe(text: &str, plan: &Plan, bits: &mut [f64]) -> Result<(), String> {
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let at = number + 1;
        let (pattern, rate) = line
            .rsplit_once(char::is_whitespace)
            .ok_or(format!("line {at}: expected PATTERN BITS"))?;
        let rate: f64 = rate.parse().map_err(|e| format!("line {at}: {rate:?}: {e}"))?;
        let pattern = pattern.trim();
        let mut matched = false;
        for (g, group) in plan.groups.iter().enumerate() {
            let keys = plan.targets.iter().filter(|t| t.group == g).map(|t| t.spec.key.as_str());
            if keys.chain([group.name.as_str()]).any(|key| glob(pattern, key)) {
                bits[g] = rate;
                matched = true;
            }
        }
        if !matched {
            return Err(format!("line {at}: {pattern} matches no matrix"));
        }
    }
    Ok(())
}

/// The quantizer's choices with `KEY=VALUE`s applied.
pub fn settings(changes: &[String]) -> Result<Exl3Options> {
    let mut value = serde_json::to_value(Exl3Options::default())?;
    for change in changes {
        let (key, text) = change
            .split_once('=')
            .ok_or_else(|| exit::usage(format!("--set {change}: expected KEY=VALUE")))?;
        let known = flat_keys(&value).join(", ");
        let unknown = || exit::usage(format!("--set {change}: unknown key; there are {known}"));
        let place = key.split('.').try_fold(&mut value, |v, k| v.get_mut(k)).ok_or_else(unknown)?;
        let refuse = |e: serde_json::Error| exit::usage(format!("--set {change}: {e}"));
        *place = match place {
            // A word stands for itself.
            Value::String(_) => Value::String(text.to_owned()),
            _ => serde_json::from_str(text).map_err(refuse)?,
        };
        serde_json::from_value::<Exl3Options>(value.clone()).map_err(refuse)?;
    }
    Ok(serde_json::from_value(value)?)
}

fn flat_keys(value: &Value) -> Vec<String> {
    let Some(object) = value.as_object() else { return Vec::new() };
    let of = |(key, value): (&String, &Value)| match value.is_object() {
        true => flat_keys(value).into_iter().map(|k| format!("{key}.{k}")).collect(),
        false => vec![key.clone()],
    };
    object.iter().flat_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use marlin_convert::pooling::MomentsRule;

    #[test]
    fn choices_are_set_by_name_or_refused() {
        let changes = ["damping=0.5".to_owned(), "scales.exponent=1.0".to_owned()];
        let options = settings(&changes).unwrap();
        assert_eq!((options.damping, options.scales.exponent), (0.5, 1.0));
        let words = ["calibration.moments=pooled".to_owned(), "search=64".to_owned()];
        let options = settings(&words).unwrap();
        assert_eq!((options.calibration.moments, options.search), (MomentsRule::Pooled, 64));
        let bad = ["damping", "dumping=1", "damping=x", "scales=1", "calibration.through=air"];
        for bad in bad {
            let error = settings(&[bad.to_owned()]).unwrap_err().to_string();
            assert!(error.starts_with(&format!("--set {bad}: ")), "{error}");
        }
    }
}
