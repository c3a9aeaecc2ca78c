//! `marlin tune` as a program, on the GPUs that the build finds; without one, what it says then.

use marlin_testkit::tiny_model;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn marlin(caches: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_marlin"));
    command.args(arguments).env("NO_COLOR", "1").env("XDG_CACHE_HOME", caches);
    command.output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn model() -> String {
    tiny_model("llama").to_str().unwrap().to_owned()
}

#[test]
fn without_a_gpu_it_says_what_to_do() {
    let caches = tempfile::tempdir().unwrap();
    let cpu = marlin(caches.path(), &["tune", &model(), "--device", "cpu"]);
    assert_eq!(cpu.status.code(), Some(2));
    assert!(stderr(&cpu).contains("only kernels of GPUs are tuned"), "{}", stderr(&cpu));
    let rows = marlin(caches.path(), &["tune", &model(), "--rows", "0"]);
    assert_eq!(rows.status.code(), Some(2));
    assert!(stderr(&rows).contains("1..=4096"), "{}", stderr(&rows));
    if cfg!(not(any(feature = "cuda", feature = "vulkan", target_os = "macos"))) {
        let auto = marlin(caches.path(), &["tune", &model()]);
        assert_eq!(auto.status.code(), Some(2));
        assert!(stderr(&auto).contains("build it with --features"), "{}", stderr(&auto));
    }
    assert_eq!(fs::read_dir(caches.path()).unwrap().count(), 0, "nothing was tuned");
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_keeps_what_it_found_and_goes_on() {
    use std::io::{BufRead, BufReader, Read};
    use std::process::Stdio;
    if cfg!(not(feature = "vulkan")) {
        eprintln!("skipped: a build without vulkan");
        return;
    }
    let caches = tempfile::tempdir().unwrap();
    let model = model();
    let arguments = ["tune", &model, "--device", "vulkan", "--rows", "1,2,4,8"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_marlin"));
    command.args(arguments).env("XDG_CACHE_HOME", caches.path());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    // A row of the table ends so: "3 of 3".
    let verified = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().rev().take(3).collect();
        matches!(words[..], [all, "of", right] if all.parse::<u32>().is_ok() && all == right)
    };
    let mut line = String::new();
    while !verified(&line) {
        line.clear();
        if out.read_line(&mut line).unwrap() == 0 {
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
            eprintln!("skipped: {}", stderr(&output));
            return;
        }
    }
    let done = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(done.success());
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    let found = 1 + rest.lines().filter(|line| verified(line)).count();
    let json = [&arguments[..], &["--json"]].concat();
    let again = marlin(caches.path(), &json);
    assert!(again.status.success(), "{}", stderr(&again));
    let again: Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!(again["kept"], found, "{again}");
    assert!(!again["results"].as_array().unwrap().is_empty(), "{again}");
}

/// The file of choices in `caches`.
fn choices(caches: &Path) -> PathBuf {
    let files =
        fs::read_dir(caches.join("marlin/tune")).unwrap().map(|entry| entry.unwrap().path());
    files.into_iter().find(|path| path.extension().is_some_and(|e| e == "json")).unwrap()
}

#[test]
fn what_it_finds_is_kept_used_and_checked() {
    if cfg!(not(feature = "vulkan")) {
        eprintln!("skipped: a build without vulkan");
        return;
    }
    let caches = tempfile::tempdir().unwrap();
    let tune = |more: &[&str]| {
        let model = model();
        let arguments =
            [&["tune", &model, "--device", "vulkan", "--rows", "1,3", "--json"], more].concat();
        let output = marlin(caches.path(), &arguments);
        let json = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        (output, json)
    };
    let (output, first) = tune(&[]);
    if output.status.code() == Some(3) {
        eprintln!("skipped: {}", stderr(&output));
        return;
    }
    assert!(output.status.success(), "{}", stderr(&output));
    let results = first["results"].as_array().unwrap();
    assert!(results.len() > 4 && first["kept"] == 0, "{first}");
    for row in results {
        assert_eq!(row["verified"], true, "{row}");
        assert!(row["gain"].as_f64().unwrap() >= 1.0, "{row}");
        let variants = row["variants"].as_array().unwrap();
        assert!(variants.len() > 1 && variants.iter().all(|v| v["verified"] == true), "{row}");
    }
    // Three rows are of the class of four.
    assert!(
        results.iter().any(|row| row["rows"] == 4) && results.iter().all(|row| row["rows"] != 3)
    );

    let (_, again) = tune(&[]);
    assert_eq!(again["results"].as_array().unwrap().len(), 0, "{again}");
    assert_eq!(again["kept"], results.len());
    let (_, forced) = tune(&["--force"]);
    assert_eq!(forced["results"].as_array().unwrap().len(), results.len());

    let path = choices(caches.path());
    assert_eq!(first["file"].as_str().unwrap(), path.to_str().unwrap());
    let model = model();
    let bench = || {
        let arguments =
            ["bench", "-m", &model, "-p", "4", "-n", "2", "-r", "1", "--device", "vulkan", "-v"];
        let output = marlin(caches.path(), &arguments);
        assert!(output.status.success(), "{}", stderr(&output));
        stderr(&output)
    };
    let said = bench();
    assert!(said.contains(&format!(": {} choices", results.len())), "{said}");

    // Of another driver, and cut off: a line, and the rules.
    let whole = fs::read_to_string(&path).unwrap();
    let driver = first["key"]["driver"].as_str().unwrap();
    let key = |driver: &str| format!("\"driver\": \"{driver}\"");
    fs::write(&path, whole.replace(&key(driver), &key("0.0"))).unwrap();
    let said = bench();
    assert!(
        said.contains("note: tuned kernels are not used") && said.contains("tuned for driver"),
        "{said}"
    );
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let said = bench();
    assert!(
        said.contains("note: tuned kernels are not used") && said.contains("damaged"),
        "{said}"
    );
    let (output, mended) = tune(&[]);
    assert!(stderr(&output).contains("damaged"), "{}", stderr(&output));
    assert_eq!(mended["results"].as_array().unwrap().len(), results.len());
    fs::read_to_string(&path).map(|text| assert!(text.ends_with('}'))).unwrap();
}
