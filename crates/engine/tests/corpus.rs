//! Replays the inputs kept for the fuzz target of this crate.

#[path = "corpus/checks.rs"]
mod checks;

use std::time::{Duration, Instant};

#[test]
fn kept_inputs() {
    marlin_testkit::replay("scheduler", |path, bytes| {
        println!("{}", path.display());
        let started = Instant::now();
        checks::scheduler(bytes);
        assert!(started.elapsed() < Duration::from_secs(2), "{} is slow", path.display());
    });
}
