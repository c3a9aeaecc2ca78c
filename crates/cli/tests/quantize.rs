//! `marlin quantize` as a program: killed, interrupted, on a full disk, misused.

mod common;

use common::quantize::{command, files, run, started};
use common::{source, stderr};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

#[test]
fn killed_at_twenty_points_and_resumed_gives_the_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    let whole = directory.path().join("whole");
    let start = Instant::now();
    let output = run(&model, &text, &whole, &["--json"]);
    let took = start.elapsed();
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["bits"].as_f64().unwrap() <= 2.5, "{report}");
    assert_eq!(fs::read(whole.join("notes.txt")).unwrap(), b"kept");

    let pieces = directory.path().join("pieces");
    let mut killed = 0;
    for i in 0..20u32 {
        let mut child = started(&mut command(&model, &text, &pieces, &["--threads", "1"]));
        // Spread over a run, not in order.
        std::thread::sleep(took * (i * 7 % 20 + 1) / 24);
        match child.try_wait().unwrap() {
            Some(ended) => {
                assert!(ended.success(), "run {i}");
                fs::remove_dir_all(&pieces).unwrap();
            }
            None => {
                child.kill().unwrap();
                child.wait().unwrap();
                killed += 1;
            }
        }
    }
    assert!(killed > 3, "killed {killed} times");
    // A run that was killed after the last file was written left a finished model.
    if !pieces.join("config.json").exists() || pieces.join(".quantize").exists() {
        let output = run(&model, &text, &pieces, &[]);
        assert!(output.status.success(), "{}", stderr(&output));
    }
    let (a, b) = (files(&whole), files(&pieces));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, bytes) in &a {
        assert!(b[name] == *bytes, "{} differs", name.display());
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_keeps_what_is_finished_and_says_how_to_go_on() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    let output = directory.path().join("out");
    let child = started(&mut command(&model, &text, &output, &["-v"]));
    let tensors = output.join(".quantize/tensors");
    let deadline = Instant::now() + Duration::from_secs(60);
    let finished = || {
        fs::read_dir(&tensors).map_or(0, |d| {
            d.flatten().filter(|e| e.path().extension().is_some_and(|x| x == "safetensors")).count()
        })
    };
    while finished() == 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130), "{}", stderr(&ended));
    assert!(stderr(&ended).contains("run the same command"), "{}", stderr(&ended));
    assert!(finished() > 0);
    let resumed = run(&model, &text, &output, &[]);
    assert!(
        resumed.status.success() && stderr(&resumed).contains("resuming"),
        "{}",
        stderr(&resumed)
    );
}

/// A disk that fills while the job runs: an error that names the file, and nothing is lost.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_and_the_job_goes_on_when_there_is_room() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    let disk = directory.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=24m", "tmpfs"])
        .arg(&disk)
        .output()
        .is_ok_and(|o| o.status.success());
    if !mounted {
        eprintln!("skipped: mounting a small tmpfs needs root");
        return;
    }
    let output = disk.join("out");
    let mut child = started(&mut command(&model, &text, &output, &["-v"]));
    while !output.join(".quantize/job.json").exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    // Fill it to the last block.
    let filler = disk.join("filler");
    let _ = fs::write(&filler, vec![1u8; 32 << 20]);
    let failed = child.wait_with_output().unwrap();
    let message = stderr(&failed);
    fs::remove_file(&filler).unwrap();
    let resumed = run(&model, &text, &output, &[]);
    let small = run(&model, &text, &disk.join("large"), &["--calibration-tokens", "100000000"]);
    let unmounted = Command::new("umount").arg("-l").arg(&disk).status();
    assert!(unmounted.is_ok_and(|s| s.success()));
    assert!(!failed.status.success() && message.contains("No space left"), "{message}");
    assert!(message.contains(".quantize"), "{message}");
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    assert!(small.status.success(), "a short text needs little: {}", stderr(&small));
}

#[test]
fn misuse_is_told_before_anything_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    let output = directory.path().join("out");
    let recipe = directory.path().join("recipe.txt");
    fs::write(&recipe, "# all\n*.nothing 3\n").unwrap();
    let recipe = recipe.to_str().unwrap();
    for (more, code, says) in [
        (&["--bits", "9"][..], 2, "--bits"),
        (&["--bits", "0.9"], 2, "--bits"),
        (&["--head-bits", "5.5"], 2, "rate 5.5"),
        (&["--codebook", "mcg", "--head-bits", "2.5"], 2, "rate 2.5"),
        (&["--embedding-bits", "9"], 2, "--embedding-bits"),
        (&["--set", "nothing=1"], 2, "unknown key"),
        (&["--recipe", recipe], 2, "matches no matrix"),
        (&["--calibration", "/nowhere.txt"], 3, "/nowhere.txt"),
        (&["--max-memory", "1M"], 4, "--max-memory"),
        (&["--max-memory", "1X"], 2, "no unit"),
        (&["--max-memory", "1M", "--measure"], 4, "--measure"),
        (&["--calibration-tokens", "0"], 2, "--calibration-tokens"),
        (&["--tied", "--embedding-bits", "4"], 2, "--tied"),
    ] {
        let out = Command::new(env!("CARGO_BIN_EXE_marlin"))
            .args(["quantize"])
            .arg(&model)
            .arg("-o")
            .arg(&output)
            .args(["--calibration-columns", "64"])
            .args(if more.contains(&"--calibration") {
                vec![]
            } else {
                vec!["--calibration".into(), text.clone().into_os_string()]
            })
            .args(more)
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(code), "{more:?}: {}", stderr(&out));
        assert!(stderr(&out).contains(says), "{more:?}: {}", stderr(&out));
        assert!(!output.join("config.json").exists(), "{more:?}");
    }
}

#[test]
fn a_plan_and_a_recipe_say_the_bits_of_every_group() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    let output = directory.path().join("out");
    let recipe = directory.path().join("recipe.txt");
    fs::write(&recipe, "model.layers.0.* 2\n*.o_proj 5 # last match wins\n").unwrap();
    let more = ["--plan-only", "--json", "--recipe", recipe.to_str().unwrap()];
    let planned = run(&model, &text, &output, &more);
    assert!(planned.status.success(), "{}", stderr(&planned));
    let plan: Value = serde_json::from_slice(&planned.stdout).unwrap();
    let bits: BTreeMap<String, f64> = plan["groups"]
        .as_array()
        .unwrap()
        .iter()
        .map(|g| (g["name"].as_str().unwrap().to_owned(), g["bits"].as_f64().unwrap()))
        .collect();
    assert_eq!(bits["model.layers.0.self_attn.o"], 5.0);
    assert_eq!(bits["model.layers.1.self_attn.o"], 5.0);
    assert_eq!(bits["model.layers.0.mlp.down"], 2.0);
    assert_eq!(bits["lm_head"], 6.0);
    assert!(!output.exists());
}

/// `--calibration-columns 0` divided by zero.
#[test]
fn rows_of_no_columns_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    let output = directory.path().join("out");
    let out = Command::new(env!("CARGO_BIN_EXE_marlin"))
        .args(["quantize", "--calibration-columns", "0", "--calibration"])
        .arg(&text)
        .arg(&model)
        .arg("-o")
        .arg(&output)
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(2), "{}", stderr(&out));
    assert!(stderr(&out).contains("--calibration-columns"), "{}", stderr(&out));
}

/// A model that reads fewer tokens than the usual window was quantized, and then not measured.
#[test]
fn quality_is_measured_on_windows_that_the_model_can_read() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    let config = model.join("config.json");
    let mut fields: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    fields["max_position_embeddings"] = json!(96);
    fs::write(&config, fields.to_string()).unwrap();
    let output = directory.path().join("out");
    let page = directory.path().join("page.html");
    let more = ["--json", "--report", page.to_str().unwrap()];
    let made = run(&model, &text, &output, &more);
    assert!(made.status.success(), "{}", stderr(&made));
    let report: Value = serde_json::from_slice(&made.stdout).unwrap();
    assert!(report["quality"]["tokens_scored"].as_u64().unwrap() > 0, "{report}");
    assert!(report["encoder_seconds"].as_f64().unwrap() > 0.0, "{report}");
    assert!(page.exists());
}
