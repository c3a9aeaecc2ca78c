//! Replays the inputs kept for the fuzz target of this crate.

#[path = "corpus/checks.rs"]
mod checks;

use std::time::{Duration, Instant};

#[test]
fn kept_inputs() {
    marlin_testkit::replay("request", |path, bytes| {
        let started = Instant::now();
        checks::request(bytes);
        assert!(started.elapsed() < Duration::from_secs(1), "{} is slow", path.display());
    });
}

/// Every way to damage a good body, one byte at a time.
#[test]
fn damaged_bodies() {
    let body = br#"{"model":"m","messages":[{"role":"system","content":[{"type":"text","text":"a"}]},{"role":"assistant","content":null,"tool_calls":[{"id":"1","type":"function","function":{"name":"f","arguments":"{\"x\":1}"}}]},{"role":"tool","tool_call_id":"1","content":"2"}],"tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}],"stop":["x"],"logit_bias":{"1":2},"seed":-1,"n":2}"#;
    checks::request(body);
    assert!(marlin_server::read_body("/v1/chat/completions", body).is_ok());
    for at in 0..body.len() {
        for byte in [0, b'"', b'{', b'9', b'-', 0xff, b'n'] {
            let mut damaged = body.to_vec();
            damaged[at] = byte;
            checks::request(&damaged);
        }
        checks::request(&body[..at]);
        checks::request(&[&body[..at], &body[at + 1..]].concat());
    }
}
