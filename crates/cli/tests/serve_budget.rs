//! What `marlin serve` refuses before it listens.
#![cfg(feature = "embedded-model")]

use std::process::{Command, Stdio};

/// The budget for models is for weights and cache together, of every model that is configured.
#[test]
fn a_model_that_can_never_fit_is_refused_with_the_numbers() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/glm-stories");
    let second = format!("second={folder}");
    for (model, more) in [("", &[][..]), (&second, &["--cache-tokens", "100000000"])] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_marlin"));
        command.args(["serve", "--port", "0", "--device", "cpu"]).args(more);
        let budget = if model.is_empty() { "1K" } else { "1G" };
        command.args(["--model-memory", budget]).stdin(Stdio::null());
        if !model.is_empty() {
            command.args(["-m", model]);
        }
        let output = command.output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(4), "{told}");
        for words in ["bytes of weights and", "of cache for", "--model-memory is"] {
            assert!(told.contains(words), "{told}");
        }
        assert!(told.contains("second") != model.is_empty(), "{told}");
    }
}
