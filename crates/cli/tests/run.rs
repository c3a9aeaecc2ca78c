//! `marlin run` with a model on disk.

mod common;

use common::{source, stderr};
use serde_json::{Value, json};
use std::fs;
use std::process::{Command, Stdio};

/// What the publisher says of an answer's length holds until the user says otherwise.
#[test]
fn the_publishers_limit_ends_an_answer() {
    let directory = tempfile::tempdir().unwrap();
    let (model, _) = source(directory.path());
    let limits = json!({ "max_new_tokens": 5, "do_sample": false });
    fs::write(model.join("generation_config.json"), limits.to_string()).unwrap();
    for (more, most) in [(&[][..], 5), (&["-n", "3"], 3), (&["-n", "9"], 9)] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_marlin"));
        command.args(["run", "--raw", "--json", "-m"]).arg(&model).args(more).arg("A small");
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        let count = answer["completion_tokens"].as_u64().unwrap();
        // The tiny model may end by itself.
        assert!(count == most || answer["finish_reason"] == "stop" && count < most, "{answer}");
    }
}
