//! `marlin quantize --measure` as a program, and what is refused or planned before it.

mod common;

use common::quantize::{command, files, run, started};
use common::{source, stderr};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// Measurements that are kept in `output`.
fn kept(output: &Path) -> usize {
    let read = || -> Option<Value> {
        serde_json::from_slice(&fs::read(output.join(".measure/sensitivities.json")).ok()?).ok()
    };
    let Some(kept) = read() else { return 0 };
    let groups = kept["sensitivities"].as_array().unwrap();
    groups.iter().map(|g| g["divergence"].as_array().unwrap().len()).sum()
}

/// A killed run lost every measurement: they were written once, at the end.
#[test]
fn killed_while_measuring_and_resumed_gives_the_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    let whole = directory.path().join("whole");
    let made = run(&model, &text, &whole, &["--measure", "--threads", "3"]);
    assert!(made.status.success(), "{}", stderr(&made));
    assert!(!whole.join(".measure").exists());
    let whole = files(&whole);

    // One thread, and killed after every few measurements.
    let pieces = directory.path().join("pieces");
    let more = ["--measure", "--threads", "1"];
    let (mut kills, mut last) = (0, 0);
    loop {
        let mut child = started(&mut command(&model, &text, &pieces, &more));
        let deadline = Instant::now() + Duration::from_secs(60);
        let goal = last + 1 + kills % 3;
        while kept(&pieces) < goal && child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "{last} measurements after {kills} kills");
            std::thread::sleep(Duration::from_millis(1));
        }
        if child.try_wait().unwrap().is_some() || pieces.join(".quantize").exists() {
            child.kill().unwrap();
            child.wait().unwrap();
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let now = kept(&pieces);
        assert!(now >= goal, "{now} kept, {goal} were there before the kill");
        (kills, last) = (kills + 1, now);
        // Three blocks of four groups at two rates.
        if last >= 20 {
            break;
        }
    }
    assert!(kills >= 3, "killed {kills} times");
    if !pieces.join("config.json").exists() || pieces.join(".quantize").exists() {
        let made = run(&model, &text, &pieces, &more);
        assert!(made.status.success(), "{}", stderr(&made));
        assert!(stderr(&made).contains("measurements are done"), "{}", stderr(&made));
    }
    let pieces = files(&pieces);
    assert_eq!(whole.keys().collect::<Vec<_>>(), pieces.keys().collect::<Vec<_>>());
    for (name, bytes) in &whole {
        assert!(pieces[name] == *bytes, "{} differs", name.display());
    }
}

/// What was measured is not taken for another model, text or setting.
#[test]
fn measurements_belong_to_one_model_text_and_setting() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    let output = directory.path().join("out");
    let mut child = started(&mut command(&model, &text, &output, &["--measure"]));
    while !output.join(".quantize").exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let file = output.join(".measure/sensitivities.json");
    let found = fs::read(&file).unwrap();
    let longer = directory.path().join("longer.txt");
    common::text(&longer, 30);
    let changed = directory.path().join("changed");
    fs::create_dir(&changed).unwrap();
    for entry in fs::read_dir(&model).unwrap().flatten() {
        fs::copy(entry.path(), changed.join(entry.file_name())).unwrap();
    }
    let mut config: Value =
        serde_json::from_slice(&fs::read(changed.join("config.json")).unwrap()).unwrap();
    config["rms_norm_eps"] = json!(1e-2);
    fs::write(changed.join("config.json"), config.to_string()).unwrap();
    let seed = ["--seed", "1"];
    let damping = ["--set", "damping=0.5"];
    for (what, model, text, more, known) in [
        ("same", &model, &text, &[][..], true),
        ("text", &model, &longer, &[], false),
        ("model", &changed, &text, &[], false),
        ("seed", &model, &text, &seed, false),
        ("quantizer", &model, &text, &damping, false),
        ("fresh", &model, &text, &["--fresh"], false),
    ] {
        let other = directory.path().join(format!("of_{what}"));
        fs::create_dir_all(other.join(".measure")).unwrap();
        fs::write(other.join(".measure/sensitivities.json"), &found).unwrap();
        let more = [&["--measure", "--plan-only", "--json"][..], more].concat();
        let planned = run(model, text, &other, &more);
        assert!(planned.status.success(), "{what}: {}", stderr(&planned));
        let plan: Value = serde_json::from_slice(&planned.stdout).unwrap();
        assert_eq!(plan["to_measure"].is_null(), known, "{what}: {plan}");
    }
}

/// `--plan-only --measure` measured for as long as the job itself would have.
#[test]
fn a_plan_measures_nothing_and_says_what_is_needed() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    let output = directory.path().join("out");
    let planned = run(&model, &text, &output, &["--measure", "--plan-only"]);
    assert!(planned.status.success(), "{}", stderr(&planned));
    let shown = String::from_utf8(planned.stdout).unwrap();
    for says in ["--measure would take 12 groups at 1.5 and 3.5 bits", " free", "memory: at least"]
    {
        assert!(shown.contains(says), "{says}: {shown}");
    }
    let planned = run(&model, &text, &output, &["--measure", "--plan-only", "--json"]);
    let plan: Value = serde_json::from_slice(&planned.stdout).unwrap();
    assert_eq!(plan["to_measure"], json!({"groups": 12, "rates": [1.5, 3.5]}));
    for field in ["disk_bytes", "free_disk_bytes", "memory_bytes"] {
        assert!(plan[field].as_u64().unwrap() > 0, "{field}: {plan}");
    }
    assert!(!output.exists());
}

/// A model that is refused is refused at once, `--measure` or not: for what the machine has when the user gives no
/// limit.
#[cfg(target_os = "linux")]
#[test]
fn what_cannot_fit_is_refused_before_anything_is_done() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    // Moments of as many inputs take terabytes; the file of zeros takes no disk.
    let wide = 1 << 18;
    let mut config: Value =
        serde_json::from_slice(&fs::read(model.join("config.json")).unwrap()).unwrap();
    config["intermediate_size"] = json!(wide);
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    let file = model.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let mut at = 0u64;
    for (name, tensor) in header.as_object_mut().unwrap() {
        if name == "__metadata__" {
            continue;
        }
        let wide_at = if name.ends_with("down_proj.weight") { 1 } else { 0 };
        if name.contains(".mlp.") {
            tensor["shape"][wide_at] = json!(wide);
        }
        let shape = tensor["shape"].as_array().unwrap();
        let size = if tensor["dtype"] == "F32" { 4 } else { 2 };
        let length = size * shape.iter().map(|d| d.as_u64().unwrap()).product::<u64>();
        tensor["data_offsets"] = json!([at, at + length]);
        at += length;
    }
    let header = header.to_string();
    let mut start = (header.len() as u64).to_le_bytes().to_vec();
    start.extend(header.into_bytes());
    fs::write(&file, &start).unwrap();
    let sparse = fs::OpenOptions::new().write(true).open(&file).unwrap();
    sparse.set_len(start.len() as u64 + at).unwrap();

    let output = directory.path().join("out");
    for more in [&[][..], &["--measure"]] {
        let refused = run(&model, &text, &output, more);
        assert_eq!(refused.status.code(), Some(4), "{more:?}: {}", stderr(&refused));
        for says in ["are available now", "insist with --max-memory"] {
            assert!(stderr(&refused).contains(says), "{more:?}: {}", stderr(&refused));
        }
        assert!(!output.exists(), "{more:?}");
    }
    let refused = run(&model, &text, &output, &["--max-memory", "1G"]);
    assert!(stderr(&refused).contains("--max-memory allows 1073741824"), "{}", stderr(&refused));
}

/// It was measured first, and refused hours later.
#[test]
fn a_finished_model_is_refused_before_it_is_measured() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    let output = directory.path().join("out");
    assert!(run(&model, &text, &output, &[]).status.success());
    let refused = run(&model, &text, &output, &["--measure"]);
    assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
    assert!(stderr(&refused).contains("finished model"), "{}", stderr(&refused));
    assert!(!output.join(".measure").exists());
}
