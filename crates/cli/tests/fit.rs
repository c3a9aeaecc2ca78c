//! What does not fit ends with exit code 4 and the numbers, whatever the verb, and never with a crash. Addresses are what can be taken away from a
//! process here (`ulimit -v`).
#![cfg(all(feature = "embedded-model", target_os = "linux"))]

use std::process::{Command, Output, Stdio};

/// Runs `marlin` with so many kibibytes of addresses.
fn within(kibibytes: u64, arguments: &str) -> Output {
    let script = format!("ulimit -v {kibibytes}; exec \"$0\" {arguments}");
    let mut command = Command::new("sh");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_marlin")]);
    command.stdin(Stdio::null()).env("NO_COLOR", "1").output().unwrap()
}

const RUN: &str = "run --device cpu --threads 1 -n 2 --temperature 0 hello";

#[test]
fn a_model_without_room_is_refused_with_the_numbers() {
    let said = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    // From where the program starts at all to where the model fits, no step may end in a crash.
    let (mut refused, mut fits) = (Vec::new(), None);
    for mebibytes in (64..2048).step_by(16) {
        let output = within(mebibytes << 10, RUN);
        match output.status.code() {
            Some(4) if said(&output).contains("ulimit -v") => refused.push(mebibytes),
            Some(0) => {
                fits = Some(mebibytes);
                break;
            }
            code => assert!(refused.is_empty(), "{mebibytes} MiB: {code:?}, {}", said(&output)),
        }
    }
    let (Some(first), Some(_)) = (refused.first(), fits) else {
        panic!("refused at {refused:?} MiB, fits at {fits:?}");
    };
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/src/fit.rs");
    for arguments in [
        RUN,
        "chat --device cpu --threads 1",
        "bench --device cpu --threads 1 -p 8 -n 2",
        "bench memory --device cpu --threads 1",
        &format!("eval perplexity --device cpu --threads 1 --text {text}"),
        "serve --device cpu --threads 1 --port 0",
    ] {
        let output = within(first << 10, arguments);
        assert_eq!(output.status.code(), Some(4), "{arguments}: {}", said(&output));
        for part in ["weights ", "cache ", "scratch ", " are left (ulimit -v)"] {
            assert!(said(&output).contains(part), "{arguments}: {}", said(&output));
        }
    }
}

#[test]
fn a_cache_without_room_is_told_from_weights_without_room() {
    let large = format!("{RUN} --context 2048 --cache-type f32");
    let advice = |mebibytes: u64| {
        let output = within(mebibytes << 10, &large);
        (output.status.code() == Some(4)).then(|| String::from_utf8(output.stderr).unwrap())
    };
    // The cache takes 11 MB.
    let all: Vec<String> = (64..256).step_by(4).filter_map(advice).collect();
    assert!(all.iter().any(|said| said.contains("take fewer bits")), "{all:?}");
    assert!(all.iter().any(|said| said.contains("--cache-type q8")), "{all:?}");
}
