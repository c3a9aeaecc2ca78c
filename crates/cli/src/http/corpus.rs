//! Replays the inputs kept for the fuzz target `sse`, and a good stream damaged in every place.

#[path = "../../tests/corpus/checks.rs"]
mod checks;

use std::time::{Duration, Instant};

#[test]
fn kept_inputs() {
    marlin_testkit::replay("sse", |path, bytes| {
        let started = Instant::now();
        checks::sse(bytes);
        assert!(started.elapsed() < Duration::from_secs(1), "{} is slow", path.display());
    });
}

#[test]
fn damaged_streams() {
    let stream = b"b\r\n: here\r\n\r\n\r\n1e\r\nevent: x\ndata: {\"a\": 1}\ndata:\n\r\n\r\nd\r\n\xEF\xBB\xBFdata: \xE2\x98\n\r\n0\r\n\r\n";
    checks::sse(stream);
    for at in 0..stream.len() {
        for byte in [0, b'\r', b'\n', b':', b'9', b' ', 0xFF] {
            let mut damaged = stream.to_vec();
            damaged[at] = byte;
            checks::sse(&damaged);
        }
        checks::sse(&[&stream[..at], &stream[at + 1..]].concat());
        checks::sse(&stream[..at]);
    }
}
