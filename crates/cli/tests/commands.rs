//! The contract of the command line: exit codes, JSON fields, Ctrl-C, help. The embedded model
//! answers; nothing is downloaded.
#![cfg(feature = "embedded-model")]

use marlin_testkit::tiny_model;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn marlin(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_marlin"));
    command.args(arguments).stdin(Stdio::null()).env("NO_COLOR", "1").env("COLUMNS", "100");
    // An empty cache of its own, and no proxy or token of the person who runs the test.
    command.env("HF_HUB_CACHE", concat!(env!("CARGO_TARGET_TMPDIR"), "/no-hub-cache"));
    command
}

fn run(arguments: &[&str]) -> Output {
    marlin(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Verbs of a help text.
fn verbs(help: &str) -> Vec<String> {
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names = lines.take_while(|line| !line.is_empty());
    let names = names.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    names.filter(|name| !["", "help"].contains(name)).map(str::to_owned).collect()
}

#[test]
fn marlin_alone_prints_help_with_three_examples() {
    let output = run(&[]);
    assert!(output.status.success() && output.stderr.is_empty());
    let help = text(&output.stdout);
    let (_, examples) = help.split_once("Examples:\n").unwrap();
    assert_eq!(examples.lines().filter(|line| line.starts_with("  marlin ")).count(), 3);
}

#[test]
fn every_verb_has_help_with_examples() {
    let mut open = vec![vec![]];
    let mut seen = 0;
    while let Some(path) = open.pop() {
        let mut arguments: Vec<&str> = path.iter().map(String::as_str).collect();
        arguments.push("--help");
        let help = text(&run(&arguments).stdout);
        assert!(help.contains("Example"), "marlin {}", arguments.join(" "));
        seen += 1;
        open.extend(verbs(&help).into_iter().map(|verb| [path.clone(), vec![verb]].concat()));
    }
    assert!(seen > 12, "{seen}");
}

#[test]
fn completions_know_every_verb() {
    let verbs = verbs(&text(&run(&["--help"]).stdout));
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = text(&run(&["completions", shell]).stdout);
        for verb in &verbs {
            assert!(script.contains(verb.as_str()), "{shell}: {verb}");
        }
    }
}

/// A copy of a tiny model with one file changed.
fn changed(name: &str, file: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> String {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("commands-{name}"));
    fs::create_dir_all(&folder).unwrap();
    for entry in fs::read_dir(tiny_model("llama")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    let bytes = fs::read(folder.join(file)).unwrap();
    fs::write(folder.join(file), change(bytes)).unwrap();
    folder.to_str().unwrap().to_owned()
}

#[test]
fn exit_codes_say_what_happened() {
    let model = tiny_model("llama");
    let model = model.to_str().unwrap();
    let cut = changed("cut", "model.safetensors", |bytes| bytes[..bytes.len() / 2].to_vec());
    let syntax = changed("syntax", "config.json", |_| b"{\"model_type\": ".to_vec());
    let shape = changed("shape", "config.json", |bytes| {
        text(&bytes).replace("\"vocab_size\": 97", "\"vocab_size\": 98").into_bytes()
    });
    let unknown = changed("unknown", "config.json", |bytes| {
        text(&bytes).replace("\"silu\"", "\"mystery\"").into_bytes()
    });
    let garbage = format!("{}/garbage.gguf", env!("CARGO_TARGET_TMPDIR"));
    fs::write(&garbage, "G").unwrap();
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/src/main.rs");
    let logits = |model| vec!["eval", "logits", "-m", model, "--tokens", "1", "-o", "/dev/null"];
    let rows: Vec<(Vec<&str>, i32, &str)> = vec![
        (vec!["run", "-n", "1", "Hi"], 0, ""),
        (vec!["-v"], 2, "subcommand"),
        (vec!["run", "--no-such-flag"], 2, "--no-such-flag"),
        (vec!["run"], 2, "no prompt"),
        (vec!["run", "--temperature=-1", "Hi"], 2, "temperature"),
        (vec!["run", "--top-p", "2", "Hi"], 2, "top_p"),
        (vec!["run", "--context", "4000000000", "Hi"], 2, "context"),
        (vec!["run", "--context", "4", "Write a long story"], 2, "context"),
        (vec!["run", "-m", "./no-such-model", "Hi"], 3, "no such file"),
        (vec!["run", "-m", "no-such/model", "Hi"], 3, "marlin pull no-such/model"),
        (vec!["inspect", "./no-such-model.gguf"], 3, "no such file"),
        (vec!["tokenize", "--file", "no-such-file.txt"], 3, "no-such-file.txt"),
        (vec!["tokenize", "-m", model, "Hi"], 3, "tokenizer.json is missing"),
        (vec!["eval", "perplexity", "--text", "no-such-file.txt"], 3, "no-such-file.txt"),
        (vec!["eval", "perplexity", "--text", page, "--window", "0"], 2, "window"),
        (vec!["bench", "-p", "2048", "--batch", "4000000", "--json"], 4, "does not fit: it needs"),
        (vec!["bench", "-p", "0", "-n", "0"], 2, "nothing to measure"),
        (vec!["bench", "--batch", "0"], 2, "--batch"),
        (vec!["bench", "-p", "100000000"], 2, "pp100000000: 100000000 tokens do not fit"),
        (vec!["bench", "--depth", "100000000"], 2, "do not fit the model's context"),
        (vec!["bench", "--pg", "512"], 2, "as in 512,128"),
        (vec!["bench", "memory", "-p", "100000000"], 2, "do not fit the context"),
        (vec!["inspect", &garbage], 6, "garbage.gguf: magic number"),
        (vec!["inspect", &cut], 6, "model.safetensors: "),
        (logits(&cut), 6, "model.safetensors: "),
        (vec!["inspect", &syntax], 6, "config.json: "),
        (vec!["inspect", &shape], 6, "model.embed_tokens.weight: expected shape [98, 72]"),
        (logits(&shape), 6, "model.embed_tokens.weight: expected shape [98, 72]"),
        (vec!["inspect", &unknown], 1, "config.json: hidden_act: \"mystery\""),
    ];
    for (arguments, code, message) in rows {
        let output = run(&arguments);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(message), "{arguments:?}: {said}");
        assert!(code == 0 || output.stdout.is_empty(), "{arguments:?}");
    }
}

#[test]
fn json_documents_have_their_fields() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (story, logits, task) = (file("story.txt"), file("logits.npy"), file("task.jsonl"));
    let messages = file("messages.json");
    fs::write(&story, "Once upon a time there was a little mouse. ".repeat(8)).unwrap();
    fs::write(&task, r#"{"query": "A mouse is", "choices": ["small", "green"], "gold": 0}"#)
        .unwrap();
    fs::write(&messages, r#"[{"role": "user", "content": "Hi"}]"#).unwrap();
    let perplexity = ["perplexity", "nll", "tokens_scored", "windows", "activations"];
    let windows = ["eval", "perplexity", "--window", "16", "--score-from", "8", "--windows", "2"];
    let rows: Vec<(Vec<&str>, Vec<&str>)> = vec![
        (
            vec!["run", "-n", "3", "--json", "Hi"],
            vec![
                "text",
                "tokens",
                "finish_reason",
                "prompt_tokens",
                "completion_tokens",
                "prompt_tokens_per_second",
                "decode_tokens_per_second",
                "activations",
            ],
        ),
        (
            vec!["inspect", "--json"],
            vec![
                "architecture",
                "parameters",
                "active_parameters",
                "bits_per_weight",
                "model_bytes",
                "cache_bytes_per_token",
                "defaults_taken",
                "fields_not_read",
                "tensors/0/name",
                "tensors/0/format",
                "tensors/0/kernel",
            ],
        ),
        (vec!["tokenize", "--json", "Hello world"], vec!["ids/2", "pieces/2", "count", "text"]),
        (vec!["tokenize", "--json", "--template", &messages], vec!["ids/2", "text"]),
        ([&windows[..], &["--text", &story, "--json"]].concat(), perplexity.to_vec()),
        (
            vec!["eval", "logits", "--tokens", "1,2", "-o", &logits, "--json"],
            vec!["output", "shape/1", "dtype"],
        ),
        (
            vec!["eval", "choices", "--task", &task, "--json"],
            vec!["rows", "accuracy", "accuracy_normalized", "activations"],
        ),
        (
            vec!["bench", "-p", "4", "-n", "2", "-r", "1", "--json"],
            vec![
                "0/test",
                "0/batch",
                "0/threads",
                "0/tokens_per_second",
                "0/stddev",
                "0/model_bytes",
                "0/gigabytes_per_second",
                "1/test",
            ],
        ),
        (
            vec!["doctor", "--json"],
            vec![
                "version",
                "cpu/level",
                "cpu/best",
                "cpu/amx_needs",
                "devices/0",
                "missing",
                "tune/folder",
                "hub/cache",
                "formats/0",
            ],
        ),
        (vec!["list", "--json"], vec![]),
    ];
    for (arguments, fields) in rows {
        let output = run(&arguments);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        for field in fields {
            let value = document.pointer(&format!("/{field}"));
            assert!(value.is_some_and(|v| !v.is_null()), "{arguments:?}: {field} in {document}");
        }
    }
    let written = fs::read(&logits).unwrap();
    assert!(written.starts_with(b"\x93NUMPY") && written.len() > 2 * 4096 * 4);
}

/// A number was an invalid value, and a second GPU could be reached by `CUDA_VISIBLE_DEVICES` only.
#[test]
fn devices_are_named_by_kind_and_number() {
    let said = |device: &str, verb: &[&str]| {
        let output = run(&[verb, &["--device", device]].concat());
        (output.status.code(), text(&output.stderr))
    };
    let verbs: [&[&str]; 7] = [
        &["run", "-n", "1", "Hi"],
        &["eval", "logits", "--tokens", "1", "-o", "/dev/null"],
        &["inspect"],
        &["bench", "-p", "1", "-n", "0", "-r", "1"],
        &["bench", "memory"],
        &["serve", "--port", "0"],
        &["tune"],
    ];
    for verb in verbs {
        for (device, says) in [
            ("cuda:0,1", "not on several at once"),
            ("cpu:1", "cpu has no numbers"),
            ("gpu", "choose one of auto, cpu, cuda, metal, vulkan"),
        ] {
            let (code, said) = said(device, verb);
            assert_eq!(code, Some(2), "{verb:?} {device}: {said}");
            assert!(said.contains(says), "{verb:?} {device}: {said}");
        }
        // Not built, and then not there: no machine has so many.
        for runtime in ["cuda", "vulkan"] {
            let (code, said) = said(&format!("{runtime}:77"), verb);
            let expected = if said.contains("this build has no") { 2 } else { 3 };
            assert_eq!(code, Some(expected), "{verb:?}: {said}");
            assert!(said.contains(&format!("--device {runtime}:77")), "{verb:?}: {said}");
        }
    }
    let (_, said) = said("vulkan:77", verbs[0]);
    assert!(said.contains("there are cpu"), "{said}");
    let output = run(&["run", "--device", "cpu", "-n", "1", "Hi"]);
    assert!(output.status.success());
}

/// It named the best instruction set whatever `MARLIN_CPU` said, and took what `run` refused.
#[test]
fn doctor_and_run_agree_about_the_processor() {
    let with = |level: &str, arguments: &[&str]| {
        let output = marlin(arguments).env("MARLIN_CPU", level).output().unwrap();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    for level in ["scalar", "SCALAR", " Scalar "] {
        let (code, said, _) = with(level, &["doctor", "--json"]);
        let document: Value = serde_json::from_str(&said).unwrap();
        assert_eq!((code, document["cpu"]["level"].as_str()), (Some(0), Some("scalar")));
        assert_eq!(document["cpu"]["forced"].as_str(), Some(level));
        assert_eq!(with(level, &["run", "-n", "1", "Hi"]).0, Some(0));
    }
    let (code, said, _) = with("", &["doctor"]);
    assert!(code == Some(0) && !said.contains("MARLIN_CPU"), "{said}");
    let absent = if cfg!(target_arch = "aarch64") { "avx2" } else { "neon" };
    for verb in [&["doctor"][..], &["run", "-n", "1", "Hi"]] {
        let (code, _, said) = with(absent, verb);
        assert_eq!(code, Some(2), "{verb:?}: {said}");
        assert!(said.contains(&format!("this machine has no {absent}")), "{said}");
    }
}

/// Models that quantizers of the Hugging Face world made: what is inspected, and what every verb then loads.
#[test]
fn integer_checkpoints_are_inspected_and_evaluated() {
    for (name, tensor, format) in [
        ("gptq", "model.layers.0.mlp.down_proj", "int4_g128"),
        ("gptq_desc_act", "model.layers.1.mlp.up_proj", "int4_g64_ordered"),
        ("awq", "model.layers.0.self_attn.q_proj", "int4_g64"),
        ("packed", "model.layers.0.self_attn.o_proj", "int8_g128"),
        ("packed_moe", "model.layers.1.mlp.experts.4.down_proj", "int4_g32"),
    ] {
        let model = format!("{}/../models/fixtures/integer/{name}", env!("CARGO_MANIFEST_DIR"));
        let output = run(&["inspect", &model, "--json"]);
        assert!(output.status.success(), "{name}: {}", text(&output.stderr));
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        let tensors = document["tensors"].as_array().unwrap();
        let found = tensors.iter().find(|t| t["name"] == tensor).unwrap();
        assert_eq!(found["format"], format, "{found}");
        let logits = format!("{}/integer-{name}.npy", env!("CARGO_TARGET_TMPDIR"));
        let output = run(&["eval", "logits", "-m", &model, "--tokens", "1,2,3", "-o", &logits]);
        assert!(output.status.success(), "{name}: {}", text(&output.stderr));
        assert_eq!(fs::read(&logits).unwrap().len(), 128 + 3 * 97 * 4, "{name}");
    }
}

#[test]
fn quiet_and_verbose_are_heard_on_stderr() {
    let answer = |flag: &str| run(&[flag, "run", "--seed", "1", "-n", "4", "--stats", "Hi"]);
    let (quiet, verbose) = (answer("--quiet"), answer("--verbose"));
    assert!(quiet.stderr.is_empty(), "{}", text(&quiet.stderr));
    let said = text(&verbose.stderr);
    assert!(said.contains("loaded in") && said.contains("tok/s"), "{said}");
    assert_eq!(said.lines().filter(|line| line.contains("tok/s")).count(), 1, "{said}");
    assert_eq!(quiet.stdout, verbose.stdout);
    assert!(!quiet.stdout.contains(&0x1b));
}

#[cfg(unix)]
#[test]
fn interrupts_end_with_130_and_a_whole_line() {
    use std::io::Read;
    let interrupt = |id: u32| {
        let done = Command::new("kill").args(["-INT", &id.to_string()]).status().unwrap();
        assert!(done.success());
    };
    // While an answer is written: what came so far, and the end of the line.
    let mut child =
        marlin(&["run", "--seed", "1", "--logit-bias", "2=-100", "--stop", "\u{7f}", "Hi"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut said = vec![0; 8];
    out.read_exact(&mut said).unwrap();
    interrupt(child.id());
    out.read_to_end(&mut said).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
    assert!(said.ends_with(b"\n"));
    // While anything else runs: at once.
    let child = marlin(&["run", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(500));
    interrupt(child.id());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(output.stdout.is_empty());
}
