//! `marlin quantize` as a program: killed, interrupted, on a full disk, misused.

mod common;

use common::quantize::{command, files, run, started};
use common::{source, source_of, stderr};
use marlin_checkpoint::{read_safetensors, write_safetensors};
use marlin_tensor::HostTensor;
use marlin_testkit::Noise;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Kills runs at `kills` random points; every run that ends, at once or resumed, gives the same files.
fn kill_at_random_points(model: &Path, text: &Path, directory: &Path, kills: usize, seed: u64) {
    let whole = directory.join("whole");
    let start = Instant::now();
    let made = run(model, text, &whole, &["--threads", "1"]);
    let took = start.elapsed();
    assert!(made.status.success(), "{}", stderr(&made));
    let whole = files(&whole);
    let pieces = directory.join("pieces");
    // A run that is killed after its last file has its name is a finished one.
    let is_finished = || pieces.join("config.json").exists() && !pieces.join(".quantize").exists();
    let compare = |when: &str| {
        let made = files(&pieces);
        assert_eq!(whole.keys().collect::<Vec<_>>(), made.keys().collect::<Vec<_>>(), "{when}");
        for (name, bytes) in &whole {
            assert!(made[name] == *bytes, "{when}: {} differs", name.display());
        }
        fs::remove_dir_all(&pieces).unwrap();
    };
    let (mut noise, mut killed, mut finished) = (Noise(seed), 0, 0);
    while killed < kills {
        let wait = took.mul_f64(0.6 * (noise.bits() >> 11) as f64 / (1u64 << 53) as f64);
        let mut child = started(&mut command(model, text, &pieces, &["--threads", "1"]));
        std::thread::sleep(wait);
        let when =
            format!("seed {seed}, {killed} kills, {finished} finished, {wait:?} of {took:?}");
        println!("{when}");
        match child.try_wait().unwrap() {
            Some(ended) => assert!(ended.success(), "{when}"),
            None => {
                child.kill().unwrap();
                child.wait().unwrap();
                killed += 1;
            }
        }
        if is_finished() {
            compare(&when);
            finished += 1;
            assert!(finished < 3 * kills, "the machine is too uneven to kill anything: {when}");
        }
    }
    let made = run(model, text, &pieces, &["--threads", "3"]);
    assert!(made.status.success(), "{}", stderr(&made));
    compare("the last");
}

#[test]
fn killed_at_twenty_random_points_and_resumed_gives_the_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    kill_at_random_points(&model, &text, directory.path(), 20, 1);
    let made = run(&model, &text, &directory.path().join("told"), &["--json"]);
    let report: Value = serde_json::from_slice(&made.stdout).unwrap();
    assert!(report["bits"].as_f64().unwrap() <= 2.5, "{report}");
    assert_eq!(fs::read(directory.path().join("told/notes.txt")).unwrap(), b"kept");
}

/// Routed experts, latent attention and a prediction layer.
#[test]
fn a_mixture_killed_at_random_points_and_resumed_gives_the_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source_of("glm4_moe_lite", directory.path());
    kill_at_random_points(&model, &text, directory.path(), 6, 2);
}

#[cfg(unix)]
#[test]
fn ctrl_c_keeps_what_is_finished_and_says_how_to_go_on() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    // A name that a shell would take apart.
    let output = directory.path().join("it's $HOME & a;b *(c)");
    let child = started(&mut command(&model, &text, &output, &["-v", "--threads", "1"]));
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
    // What was printed is what goes on, as it stands.
    let said = stderr(&ended);
    let line = said.lines().skip_while(|l| !l.contains("run the same command")).nth(1).unwrap();
    let resumed = Command::new("sh").args(["-c", line]).output().unwrap();
    assert!(
        resumed.status.success() && stderr(&resumed).contains("resuming"),
        "{line}: {}",
        stderr(&resumed)
    );
    assert!(output.join("config.json").exists() && !output.join(".quantize").exists());
}

/// While the quality is measured there is nothing to finish: one Ctrl-C ends the program, it took two.
#[cfg(unix)]
#[test]
fn ctrl_c_ends_the_measuring_of_quality_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    let held_out = directory.path().join("held-out.txt");
    common::text(&held_out, 200);
    let output = directory.path().join("out");
    let more = ["--threads", "1", "--evaluate", held_out.to_str().unwrap(), "--fresh"];
    // A run may end before it is interrupted.
    let interrupted = (0..10).any(|_| {
        let _ = fs::remove_dir_all(&output);
        let mut child = started(&mut command(&model, &text, &output, &more));
        let is_finished =
            || output.join("config.json").exists() && !output.join(".quantize").exists();
        while !is_finished() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        // Past the removal of the job's folder, into the evaluation.
        std::thread::sleep(Duration::from_millis(30));
        Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        let ended = child.wait_with_output().unwrap();
        let said = stderr(&ended);
        ended.status.code() == Some(130) && said.contains("its quality is not measured")
    });
    assert!(interrupted);
    assert!(output.join("config.json").exists());
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
    let whole = directory.path().join("whole");
    assert!(run(&model, &text, &whole, &[]).status.success());
    let same = resumed.status.success() && files(&whole) == files(&output);
    let small = run(&model, &text, &disk.join("large"), &["--calibration-tokens", "100000000"]);
    let unmounted = Command::new("umount").arg("-l").arg(&disk).status();
    assert!(unmounted.is_ok_and(|s| s.success()));
    assert!(!failed.status.success() && message.contains("No space left"), "{message}");
    assert!(message.contains(".quantize"), "{message}");
    assert!(message.trim_end().ends_with("make room and run the same command again"), "{message}");
    assert_eq!(failed.status.code(), Some(4), "{message}");
    assert!(same, "what was resumed differs from what was made at once");
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
        (&["--head-bits", "5.5"], 2, "lm_head: mul1 has no rate 5.5"),
        (&["--head-bits", "16", "--tied"], 2, "--tied"),
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

    // The page says what the document says: it had the square of the relative error, and the tokens asked for.
    let page = fs::read_to_string(&page).unwrap();
    let small = |v: f64| match v != 0.0 && v.abs() < 1e-3 {
        true => format!("{v:.2e}"),
        false => format!("{v:.4}"),
    };
    let cells = |key: &str| -> Vec<String> {
        let mut rows = page.split("<tr>").skip(1).filter_map(|row| row.split("</tr>").next());
        let row = rows.find(|row| row.contains(&format!(">{key}</t"))).unwrap();
        let cells = row.split("</t").filter_map(|cell| Some(cell.rsplit_once('>')?.1.to_owned()));
        cells.collect()
    };
    for tensor in report["tensors"].as_array().unwrap() {
        let (proxy, relative) = (&tensor["proxy_error"], &tensor["relative_output_error"]);
        let (proxy, relative) = (proxy.as_f64().unwrap(), relative.as_f64().unwrap());
        assert!((relative * relative - proxy).abs() < 1e-9, "{tensor}");
        let cells = cells(tensor["key"].as_str().unwrap());
        assert_eq!(cells[3..5], [small(proxy), small(relative)], "{tensor}");
    }
    let tokens = stderr(&made).split("the text gives ").nth(1).unwrap().to_owned();
    let used = tokens.split(' ').next().unwrap();
    assert!(page.contains(&format!(">{used}<")) && !page.contains(">131072<"), "{used}");
    // The source is bf16: sixteen bits a weight of the matrices that were quantized, as for the result.
    assert_eq!(cells("source")[1], "16.000");
    // Both rows are bytes of files: the source's were those of its tensors.
    let size = fs::metadata(model.join("model.safetensors")).unwrap().len();
    assert_eq!(cells("source")[2], size.to_string());
    assert_eq!(cells("EXL3")[2], report["file_bytes"].to_string());
    assert_eq!(cells("EXL3")[1], format!("{:.3}", report["all_stored_bits"].as_f64().unwrap()));
}

/// Without a terminal nothing was said of finished matrices, unless asked for with -v.
#[test]
fn finished_matrices_are_told_where_there_is_no_terminal() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    for (name, more, told) in
        [("lines", &[][..], true), ("document", &["--json"], false), ("quiet", &["--quiet"], false)]
    {
        let made = run(&model, &text, &directory.path().join(name), more);
        assert!(made.status.success(), "{}", stderr(&made));
        let said = stderr(&made);
        let lines: Vec<&str> = said.lines().filter(|l| l.contains("bits, output error")).collect();
        assert_eq!(!lines.is_empty(), told, "{name}: {said}");
        let matrices = 22;
        assert!(!told || lines[0].starts_with(&format!("[1/{matrices}] model.")), "{said}");
        assert!(!told || lines.last().unwrap().starts_with("[22/22] lm_head"), "{said}");
    }
}

#[test]
fn tensors_that_are_left_out_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let (model, text) = source(directory.path());
    let file = model.join("model.safetensors");
    let found = read_safetensors(&file).unwrap();
    let mut tensors: Vec<(String, HostTensor)> =
        found.tensors.iter().map(|t| (t.name.clone(), t.plain().unwrap())).collect();
    // The second is of a part that the configuration does not have: nothing was said of it.
    for name in ["model.layers.0.sinks", "vision_tower.patch_embedding.weight"] {
        tensors.push((name.to_owned(), HostTensor::from_f32(vec![1], &[0.5])));
    }
    // Not over the file that is mapped.
    let more = directory.path().join("more.safetensors");
    write_safetensors(&more, tensors.iter().map(|(name, t)| (name.as_str(), t)), &[]).unwrap();
    fs::rename(&more, &file).unwrap();
    let page = directory.path().join("page.html");
    let says = "2 tensors of the source, 8 B, are left out: model.layers.0.sinks, vision_tower.patch_embedding.weight";
    let left_out = json!({
        "tensors": ["model.layers.0.sinks", "vision_tower.patch_embedding.weight"],
        "bytes": 8,
    });
    for more in [&["--plan-only"][..], &["--report", page.to_str().unwrap()]] {
        let more = [more, &["--json"]].concat();
        let told = run(&model, &text, &directory.path().join("out"), &more);
        assert!(told.status.success(), "{}", stderr(&told));
        assert!(stderr(&told).contains(says), "{}", stderr(&told));
        let document: Value = serde_json::from_slice(&told.stdout).unwrap();
        assert_eq!(document["left_out"], left_out, "{more:?}");
    }
    assert!(fs::read_to_string(&page).unwrap().contains("2 tensors, 8 B"));
}
