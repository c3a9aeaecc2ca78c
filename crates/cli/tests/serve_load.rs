//! `marlin bench serve` against a server in this process.

#[path = "common/stream_server.rs"]
mod stream_server;

use serde_json::Value;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

fn run(url: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_marlin"));
    command.args(["bench", "serve", url]).args(arguments).stdin(Stdio::null()).env("NO_COLOR", "1");
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The JSON document of a run, and its exit code.
fn json(url: &str, arguments: &[&str]) -> (Value, Option<i32>) {
    let output = run(url, &[arguments, &["--json"]].concat());
    let parsed = serde_json::from_slice(&output.stdout);
    (
        parsed.unwrap_or_else(|_| panic!("{arguments:?}: {}", text(&output.stderr))),
        output.status.code(),
    )
}

fn number(report: &Value, path: &str) -> f64 {
    report.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("{path} in {report}"))
}

#[test]
fn every_token_of_every_stream_is_counted() {
    let url = stream_server::start(Duration::from_millis(2));
    let (report, code) = json(
        &url,
        &[
            "--concurrency",
            "5",
            "--requests",
            "23",
            "--max-tokens",
            "9",
            "--one-event-per-token",
            "--verify",
            "4",
            "--prompt-words",
            "7",
        ],
    );
    assert_eq!(code, Some(0), "{report}");
    for (path, expected) in [
        ("/sent", 23.0),
        ("/good", 23.0),
        ("/failed", 0.0),
        ("/completion_tokens", 207.0),
        ("/text_events", 207.0),
        // The end, the usage and [DONE] of each.
        ("/events", 276.0),
        ("/events_per_token/one", 23.0),
        ("/finish_reasons/length", 23.0),
        ("/most_at_once", 5.0),
        ("/verified/asked", 4.0),
        ("/verified/same", 4.0),
        ("/concurrency", 5.0),
        // "Story N. Write a short story that uses these words:" and the words.
        ("/prompt_tokens", 23.0 * 17.0),
    ] {
        assert_eq!(number(&report, path), expected, "{path} in {report}");
    }
    // Nine tokens are eight gaps of a step of 2 ms at least.
    assert!(
        number(&report, "/itl_ms/p50") >= 1.0 && number(&report, "/end_to_end_ms/p50") >= 16.0,
        "{report}"
    );
    assert!(number(&report, "/ttft_ms/p50") <= number(&report, "/end_to_end_ms/p50"));
    let rate = number(&report, "/completion_tokens") / number(&report, "/seconds");
    assert!((number(&report, "/tokens_per_second") / rate - 1.0).abs() < 1e-6);
    assert_eq!(report["token_count_from"], "usage");
    assert!(report.get("distinct_answers").is_none());
}

#[test]
fn the_table_says_the_same() {
    let url = stream_server::start(Duration::ZERO);
    let output =
        run(&url, &["--requests", "4", "--max-tokens", "3", "--same-prompt", "--seed", "5"]);
    let table = text(&output.stdout);
    for words in [
        "4 good, 0 failed",
        "12 out (usage)",
        "first token",
        "finished by 4 length",
        "1 different answers",
        "p99",
    ] {
        assert!(table.contains(words), "{words}: {table}");
    }
    assert!(text(&output.stderr).contains("seed 5"), "{}", text(&output.stderr));
}

#[test]
fn an_open_loop_sends_by_the_clock() {
    let url = stream_server::start(Duration::from_millis(20));
    // An answer takes 100 ms and more, so that several are under way at once.
    let (report, code) = json(
        &url,
        &[
            "--rate",
            "100",
            "--requests",
            "60",
            "--max-tokens",
            "5",
            "--endpoint",
            "completions",
            "--seed",
            "3",
        ],
    );
    assert_eq!(code, Some(0), "{report}");
    assert_eq!((number(&report, "/good"), number(&report, "/rate")), (60.0, 100.0));
    assert!(
        report.get("concurrency").is_none() && number(&report, "/most_at_once") > 3.0,
        "{report}"
    );
    // Sixty arrivals at a hundred a second.
    assert!(number(&report, "/seconds") > 0.3, "{report}");
}

#[test]
fn bytes_may_be_cut_anywhere_and_connections_closed_between() {
    let url = stream_server::start(Duration::ZERO);
    for model in ["torn", "forgets", "closes"] {
        for endpoint in ["chat", "completions"] {
            let arguments = [
                "--requests",
                "20",
                "--concurrency",
                "3",
                "--max-tokens",
                "11",
                "--one-event-per-token",
            ];
            let (report, code) =
                json(&url, &[&arguments[..], &["--model", model, "--endpoint", endpoint]].concat());
            assert_eq!(
                (code, number(&report, "/text_events")),
                (Some(0), 220.0),
                "{model} {report}"
            );
        }
    }
}

#[test]
fn what_is_lost_or_mixed_up_is_a_failure() {
    let url = stream_server::start(Duration::ZERO);
    for (model, words) in [
        ("cut", "closed within the body"),
        ("silent", "nothing came for 1 s"),
        ("html", "HTTP 502: <html>no</html>"),
        ("not http", "220 mail ready"),
        ("no done", "without [DONE]"),
        ("no reason", "without a finish_reason"),
        ("loses", "4 events with text for 5 tokens"),
        ("mixes", "another answer"),
        ("late", "after [DONE]"),
        ("error", "out of blocks"),
        ("unknown", "HTTP 404: no such model"),
        ("key", "HTTP 401: wrong key"),
    ] {
        let arguments = [
            "--requests",
            "3",
            "--max-tokens",
            "5",
            "--timeout",
            "1",
            "--one-event-per-token",
            "--warmup",
            "0",
        ];
        let (report, code) = json(&url, &[&arguments[..], &["--model", model]].concat());
        assert_eq!((code, number(&report, "/failed")), (Some(1), 3.0), "{model}: {report}");
        let said = report["errors"][0]["message"].as_str().unwrap();
        assert!(said.contains(words), "{words}: {said}");
        assert_eq!(number(&report, "/errors/0/count"), 3.0);
    }
    let (report, code) =
        json(&url, &["--requests", "2", "--model", "key", "--api-key", stream_server::KEY]);
    assert_eq!((code, number(&report, "/good")), (Some(0), 2.0), "{report}");
    // Without the option, fewer events than tokens are counted, not refused.
    let (report, code) = json(&url, &["--requests", "2", "--model", "loses", "--max-tokens", "5"]);
    assert_eq!((code, number(&report, "/events_per_token/fewer")), (Some(0), 2.0), "{report}");
    // An answer that another way of asking does not give.
    let (report, code) = json(&url, &["--requests", "2", "--model", "differs", "--verify", "2"]);
    assert_eq!((code, number(&report, "/verified/different/1")), (Some(1), 1.0), "{report}");
}

#[test]
fn a_server_that_cannot_be_asked_is_told_at_once() {
    let url = stream_server::start(Duration::ZERO);
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (url, arguments, code, words) in [
        (url.as_str(), &["--model", "unknown"][..], 1, "no such model"),
        (&format!("http://{closed}"), &[], 5, "is the server running?"),
        ("ftp://127.0.0.1", &[], 2, "ftp is not measured"),
        (&url.replace("http", "https"), &[], 5, "--ca-file names a certificate"),
        (&url, &["--ca-file", "x", "--insecure"], 2, "--insecure"),
        (&url, &["--rate", "0"], 2, "--rate"),
        (&url, &["--rate", "1", "--concurrency", "2"], 2, "--concurrency"),
        (&url, &["--requests", "0"], 2, "--requests"),
        (&url, &["--api-key", "a\nb"], 2, "--api-key"),
    ] {
        let output = run(url, arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(words), "{words}: {}", text(&output.stderr));
    }
}
