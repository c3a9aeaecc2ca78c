//! `marlin eval compare` as a program: several models, in groups when they do not fit in memory together.

mod common;

use common::{source, stderr};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn marlin(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_marlin"));
    command.args(arguments).stdin(Stdio::null()).env("NO_COLOR", "1").output().unwrap()
}

fn name(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn models_that_do_not_fit_together_are_compared_in_groups_with_the_same_result() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    let made: Vec<_> = ["2", "4", "8"].map(|bits| (bits, directory.path().join(bits))).into();
    for (bits, output) in &made {
        let more = ["--calibration", name(&text), "--calibration-columns", "64", "--bits", bits];
        let arguments = [&["quantize", name(&model), "-o", name(output)][..], &more].concat();
        let output = marlin(&arguments);
        assert!(output.status.success(), "{}", stderr(&output));
    }
    let mut arguments = vec!["eval", "compare"];
    arguments.extend(made.iter().map(|(_, path)| name(path)));
    // Named twice, and the reference among them: neither is compared again.
    arguments.extend([name(&made[0].1), name(&model), "--reference", name(&model)]);
    arguments.extend(["--text", name(&text), "--window", "64", "--score-from", "32"]);
    arguments.extend(["--windows", "4", "--json"]);
    let together = marlin(&arguments);
    assert!(together.status.success(), "{}", stderr(&together));
    assert!(!stderr(&together).contains("fit in memory"), "{}", stderr(&together));
    // No room for any: one at a time.
    arguments.extend(["--max-memory", "1K"]);
    let apart = marlin(&arguments);
    assert!(apart.status.success(), "{}", stderr(&apart));
    assert!(stderr(&apart).contains("1 of the 3 models left fit in memory"), "{}", stderr(&apart));

    let read = |output: &Output| -> Value { serde_json::from_slice(&output.stdout).unwrap() };
    let (together, apart) = (read(&together), read(&apart));
    assert_eq!(together, apart);
    assert_eq!(together["reference"], name(&model));
    assert_eq!((&together["windows"], &together["tokens_scored"]), (&4.into(), &128.into()));
    let rows = together["models"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|r| r["model"].as_str().unwrap()).collect();
    assert_eq!(names, [&model, &made[0].1, &made[1].1, &made[2].1].map(|p| name(p)));
    assert_eq!(rows[0]["is_reference"], true);
    let divergence: Vec<f64> =
        rows[1..].iter().map(|r| r["kl_divergence"].as_f64().unwrap()).collect();
    assert!(divergence.is_sorted_by(|a, b| a > b), "{divergence:?}");
    for field in ["file_bytes", "bits_per_weight", "bits_per_weight_linears", "perplexity"] {
        assert!(rows.iter().all(|r| r[field].as_f64().unwrap() > 0.0), "{field}: {rows:?}");
    }
}

#[test]
fn models_that_cannot_be_compared_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    let alone = marlin(&["eval", "compare", name(&model), "--text", name(&text)]);
    assert_eq!(alone.status.code(), Some(2), "{}", stderr(&alone));
    assert!(stderr(&alone).contains("nothing to compare"), "{}", stderr(&alone));
    let missing = marlin(&["eval", "compare", name(&model), "/nowhere", "--text", name(&text)]);
    assert_eq!(missing.status.code(), Some(3), "{}", stderr(&missing));
    assert!(stderr(&missing).contains("/nowhere"), "{}", stderr(&missing));
}

#[test]
fn perplexity_beside_a_reference_is_what_a_comparison_finds() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    let made = directory.path().join("3");
    let more = ["--calibration", name(&text), "--calibration-columns", "64", "--bits", "3"];
    let output = marlin(&[&["quantize", name(&model), "-o", name(&made)][..], &more].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let windows = ["--text", name(&text), "--window", "64", "--score-from", "32", "--windows", "3"];
    let read = |arguments: &[&str]| -> Value {
        let beside = ["--reference", name(&model), "--json"];
        let output = marlin(&[&["eval"], arguments, &windows, &beside].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let alone = read(&["perplexity", "-m", name(&made)]);
    let compared = read(&["compare", name(&made)]);
    let rows = compared["models"].as_array().unwrap();
    let row = rows.iter().find(|r| r["is_reference"] != true).unwrap();
    for field in ["perplexity", "kl_divergence", "top1_agreement"] {
        assert_eq!(alone[field], row[field], "{field}");
    }
    assert!(alone["kl_divergence"].as_f64().unwrap() > 0.0, "{alone}");
    assert_eq!(alone["reference"], name(&model));
    // A model beside itself.
    let same = read(&["perplexity", "-m", name(&model)]);
    assert_eq!((&same["kl_divergence"], &same["top1_agreement"]), (&0.0.into(), &1.0.into()));
}
