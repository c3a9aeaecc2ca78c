//! `marlin launch`: what it prints, a shell reads; what it runs, sees it.

use serde_json::Value;
use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_marlin"));
    command
        .arg("launch")
        .args(arguments)
        .env("NO_COLOR", "1")
        .env("ANTHROPIC_API_KEY", "of somewhere else")
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn agents_are_listed() {
    let listed = text(&run(&[]).stdout);
    for name in ["aider", "claude", "codex", "opencode"] {
        assert!(listed.lines().any(|line| line.starts_with(name)), "{listed}");
    }
    let json: Value = serde_json::from_slice(&run(&["--json"]).stdout).unwrap();
    assert_eq!(json.as_array().unwrap().len(), listed.lines().count());
}

#[cfg(unix)]
#[test]
fn a_shell_reads_what_is_printed() {
    let names: Value = serde_json::from_slice(&run(&["--json"]).stdout).unwrap();
    for name in names.as_array().unwrap().iter().map(|row| row["agent"].as_str().unwrap()) {
        let arguments =
            [name, "--url", "http://127.0.0.1:1234/v1", "--model", "org/model", "--api-key", "k-1"];
        let settings: Value =
            serde_json::from_slice(&run(&[&arguments[..], &["--json"]].concat()).stdout).unwrap();
        let script = text(&run(&arguments).stdout);
        let shown = Command::new("sh")
            .args(["-eu", "-c", &format!("{script}\nenv")])
            .env_clear()
            .output()
            .unwrap();
        assert!(shown.status.success(), "{name}: {script}\n{}", text(&shown.stderr));
        let shown = text(&shown.stdout);
        for (variable, value) in settings["variables"].as_object().unwrap() {
            let line = format!("{variable}={}", value.as_str().unwrap());
            assert!(shown.lines().any(|shown| shown == line), "{name}: {line} not in\n{shown}");
        }
    }
}

#[cfg(unix)]
#[test]
fn a_command_sees_the_variables() {
    let script = "echo $ANTHROPIC_BASE_URL $ANTHROPIC_AUTH_TOKEN $ANTHROPIC_MODEL [$ANTHROPIC_API_KEY]; exit 7";
    let output =
        run(&["claude", "--url", "http://host:9/v1", "--model", "m", "--", "sh", "-c", script]);
    assert_eq!(
        (text(&output.stdout).as_str(), output.status.code()),
        ("http://host:9 local m []\n", Some(7))
    );
    // The agent's own command gets its arguments, before those of the user.
    let folder = tempfile::tempdir().unwrap();
    let codex = folder.path().join("codex");
    std::fs::write(&codex, "#!/bin/sh\nfor a; do echo \"<$a>\"; done; echo $MARLIN_API_KEY\n")
        .unwrap();
    std::fs::set_permissions(&codex, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let output = run(&["codex", "--api-key", "k", "--", codex.to_str().unwrap(), "exec", "say hi"]);
    let shown = text(&output.stdout);
    assert!(
        shown.contains("base_url = \"http://127.0.0.1:8080/v1\"")
            && shown.ends_with("<default>\n<exec>\n<say hi>\nk\n"),
        "{shown}"
    );
}

#[test]
fn mistakes_are_told() {
    for (arguments, code, words) in [
        (&["emacs"][..], 2, "expected one of aider"),
        (&["claude", "--url", "localhost:8080"], 2, "--url"),
        (&["claude", "--model", "a'b"], 2, "--model"),
        (&["claude", "--api-key", "a b"], 2, "--api-key"),
        (&["claude", "--model", ""], 2, "--model is empty"),
        (&["crush", "--", "crush"], 2, "crush.json"),
        (&["claude", "--", "./no-such-program"], 3, "no-such-program"),
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(words), "{arguments:?}: {}", text(&output.stderr));
    }
}
