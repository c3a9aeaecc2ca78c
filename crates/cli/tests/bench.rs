//! `marlin bench` and what is below it, on the embedded model and on small shapes.
#![cfg(feature = "embedded-model")]

use serde_json::Value;
use std::process::{Command, Output, Stdio};

fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_marlin"));
    command.arg("bench").args(arguments).stdin(Stdio::null()).env("NO_COLOR", "1");
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The JSON document of a run that must succeed.
fn json(arguments: &[&str]) -> Value {
    let output = run(&[arguments, &["--json"]].concat());
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn profile_is_a_table_and_a_trace() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("trace.json");
    let arguments = ["-p", "8", "-n", "2", "-r", "1", "--batch", "1,2", "--profile"];
    let arguments = [&arguments[..], &[file.to_str().unwrap()]].concat();
    let rows = json(&arguments);
    assert_eq!(rows.as_array().unwrap().len(), 4);
    for row in rows.as_array().unwrap() {
        let profile = row["profile"].as_array().unwrap();
        let share: f64 = profile.iter().map(|row| row["share"].as_f64().unwrap()).sum();
        assert!((share - 1.0).abs() < 1e-6, "{share}");
        let named = |name: &str| profile.iter().any(|row| row["operator"] == name);
        assert!(named("attention") && named("between operators"), "{row}");
    }
    let trace: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let passes = |name: &str| events.iter().filter(|event| event["name"] == name).count();
    // A prompt is one pass, two tokens are two.
    assert_eq!(["pp8", "tg2", "pp8x2", "tg2x2"].map(passes), [1, 2, 1, 2]);

    let table = text(&run(&arguments).stdout);
    assert!(table.contains("tokens/s") && table.contains("total ms"), "{table}");
    // Without the option the JSON is as it was.
    let plain = json(&["-p", "4", "-n", "0", "-r", "1"]);
    assert!(plain[0].get("profile").is_none(), "{plain}");
}

#[test]
fn a_profile_that_cannot_be_written_is_an_error() {
    let output =
        run(&["-p", "2", "-n", "0", "-r", "1", "--profile", "./no-such-folder/trace.json"]);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("no-such-folder"));
}

#[test]
fn every_operator_is_measured() {
    let report = json(&["ops", "--quick", "--threads", "2"]);
    for peak in ["memory_read_gigabytes_per_second", "f32_gigaflops_per_second"] {
        assert!(report["peaks"][peak].as_f64().unwrap() > 0.0, "{peak}");
    }
    let rows = report["ops"].as_array().unwrap();
    for row in rows {
        for field in ["median_us", "bytes", "gigabytes_per_second", "share"] {
            assert!(row[field].as_f64().unwrap() > 0.0, "{field} in {row}");
        }
    }
    let count = |name: &str| rows.iter().filter(|row| row["operator"] == name).count();
    for name in
        ["linear q4_0", "linear q4_k", "linear iq2_xxs", "linear exl3", "linear fp8", "linear bf16"]
    {
        assert_eq!(count(name), 4, "{name}");
    }
    for name in ["embed bf16", "attention gqa", "attention mla", "route", "experts", "rms_norm"] {
        assert!(count(name) > 0, "{name}");
    }
    let others = ["rope", "gated", "head_linear", "sample greedy", "sample top_k top_p"];
    assert!(others.iter().all(|name| count(name) > 0));
    for name in ["attention gqa q8", "attention gqa q4", "dequantize q4_k", "dequantize exl3"] {
        assert!(count(name) > 0, "{name}");
    }
    assert!(count("bf16 to f32") == 1 && count("f32 to bf16") == 1);
    for row in rows {
        assert!(row["peak_gigabytes_per_second"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["peak_gigaflops_per_second"].as_f64().unwrap() > 0.0, "{row}");
    }
}

/// A device that this build and machine have besides the processor.
fn gpu() -> Option<&'static str> {
    let device = ["cuda", "metal", "vulkan"].into_iter().find(|device| {
        let output = run(&["-p", "1", "-n", "0", "-r", "1", "--device", device]);
        // Anything but "not built" and "not there" is to be seen.
        ![Some(2), Some(3)].contains(&output.status.code())
    });
    if device.is_none() {
        eprintln!("skipped: no GPU that this build can use");
    }
    device
}

/// It measured the processor only.
#[test]
fn operators_of_a_gpu_are_measured() {
    let Some(device) = gpu() else { return };
    let report = json(&["ops", "--quick", "--device", device]);
    assert!(report["copy"]["gigabytes_per_second"].as_f64().unwrap() > 0.0, "{report}");
    let rows = report["ops"].as_array().unwrap();
    for row in rows {
        for field in ["median_us", "bytes", "share", "peak_gigabytes_per_second"] {
            assert!(row[field].as_f64().unwrap() > 0.0, "{field} in {row}");
        }
        assert_eq!(row["bound"], "copy");
    }
    let count = |name: &str| rows.iter().filter(|row| row["operator"] == name).count();
    for name in ["linear q4_0", "linear q4_k", "linear exl3", "attention gqa", "attention gqa q8"] {
        assert!(count(name) > 0, "{name}");
    }
    for name in ["attention mla", "route", "experts", "rms_norm", "rope", "add", "draw greedy"] {
        assert!(count(name) > 0, "{name}");
    }
    assert_eq!(count("sample greedy"), 0, "the host's");
    let output = run(&["-p", "2", "-n", "0", "--device", device, "--profile", "/dev/null"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("bench ops --device"), "{}", text(&output.stderr));
}

/// It told the process's memory, of which a model on a device takes none.
#[test]
fn memory_of_a_gpu_is_the_device_s() {
    let Some(device) = gpu() else { return };
    let report = json(&["memory", "-p", "32", "--device", device]);
    let number = |field: &str| report[field].as_u64().unwrap();
    assert_eq!(report["memory"], "device");
    assert!(number("loaded_bytes") >= number("start_bytes") + number("weight_bytes"), "{report}");
    assert!(number("peak_bytes") >= number("loaded_bytes"), "{report}");
    assert!(report["scratch"]["prompt_bytes"].as_u64().unwrap() > 0, "{report}");
    assert_eq!(report["need"]["weight_bytes"], report["weight_bytes"]);
    assert!(text(&run(&["memory", "--device", device]).stdout).contains("on the device at most"));
}

#[test]
fn backends_are_compared_in_one_table() {
    let arguments = ["-p", "4", "-n", "2", "--pg", "4,2", "-r", "1", "--threads", "1,2"];
    let arguments = [&arguments[..], &["--device", "cpu"]].concat();
    let rows = json(&arguments);
    let rows = rows.as_array().unwrap();
    let column = |field: &str| -> Vec<String> {
        rows.iter().map(|row| row[field].to_string().replace('"', "")).collect()
    };
    assert_eq!(column("test"), ["pp4", "tg2", "pp4+tg2", "pp4", "tg2", "pp4+tg2"]);
    assert_eq!(column("threads"), ["1", "1", "1", "2", "2", "2"]);
    let with = |output: &str| text(&run(&[&arguments[..], &["-o", output]].concat()).stdout);
    let csv = with("csv");
    let width = |line: &str| line.split(',').count();
    assert!(csv.starts_with("model,") && csv.lines().count() == 7, "{csv}");
    let widths: Vec<usize> = csv.lines().map(width).collect();
    // Names of devices have commas, and quotes.
    assert!(csv.lines().skip(1).all(|line| line.contains("\"cpu (")), "{csv}");
    assert!(widths[1..].iter().all(|width| *width == widths[1]), "{csv}");
    let md = with("md");
    assert!(md.lines().nth(1).unwrap().contains("--:") && md.lines().count() == 8, "{md}");
    assert!(md.lines().all(|line| line.matches('|').count() == 9), "{md}");
    assert!(with("text").lines().all(|line| line.starts_with("device") || line.starts_with("cpu")));
    let both = run(&["--json", "-o", "md"]);
    assert_eq!(both.status.code(), Some(2), "{}", text(&both.stderr));
    let Some(gpu) = gpu() else { return };
    let rows = json(&["-p", "4", "-n", "2", "-r", "1", "--device", &format!("cpu,{gpu}:0")]);
    let device = |row: usize| rows[row]["device"].as_str().unwrap().to_owned();
    assert!(device(0).starts_with("cpu") && device(2).starts_with(gpu), "{rows}");
}

#[test]
fn operators_are_chosen_by_a_pattern() {
    let report = json(&["ops", "--quick", "--ops", "linear q4_?"]);
    let names: Vec<&str> = report["ops"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["operator"].as_str().unwrap())
        .collect();
    assert!(
        names.contains(&"linear q4_1") && names.iter().all(|name| name.starts_with("linear q4_"))
    );
    let table = text(&run(&["ops", "--quick", "--ops", "rms_norm"]).stdout);
    assert!(table.contains("read, buffer") && table.contains("share"), "{table}");
    let output = run(&["ops", "--ops", "liner*"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("linear q4_0"), "{}", text(&output.stderr));
}

#[test]
fn memory_is_told_by_part() {
    let report = json(&["memory", "-p", "32"]);
    let number = |path: &str| report.pointer(path).and_then(Value::as_u64).unwrap_or_default();
    assert!(number("/model_bytes") > 1 << 20 && number("/weight_bytes") > 1 << 20, "{report}");
    let per_token = number("/cache_bytes_per_token");
    assert_eq!(number("/cache/0/bytes"), per_token * number("/cache/0/context"));
    if cfg!(target_os = "linux") {
        assert!(number("/peak_bytes") >= number("/loaded_bytes"), "{report}");
        assert!(number("/scratch/prompt_bytes") >= number("/scratch/decode_bytes"), "{report}");
    }
    // What was counted on before.
    let weights = number("/need/weight_bytes") + number("/need/in_place_bytes");
    assert_eq!(weights, number("/weight_bytes"), "{report}");
    assert_eq!(number("/need/cache_bytes"), per_token * 48, "{report}");
    assert!(number("/need/scratch_bytes") >= number("/scratch/prompt_bytes"), "{report}");
    let wide = json(&["memory", "-p", "32", "--cache-type", "f32"]);
    assert_eq!(wide["cache_bytes_per_token"].as_u64(), Some(2 * per_token));
    assert!(text(&run(&["memory", "-p", "8"]).stdout).contains("weights on the device"));
    let output = run(&["memory", "-p", "100000000"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
}
