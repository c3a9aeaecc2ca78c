//! Replays the inputs kept for the fuzz targets of this crate.

#[path = "corpus/checks.rs"]
mod checks;

use std::time::{Duration, Instant};

#[test]
fn kept_inputs() {
    type Check = fn(&[u8]);
    let targets: [(&str, Check); 5] = [
        ("tokenizer", checks::tokenizer),
        ("vocabulary", checks::vocabulary),
        ("template", checks::template),
        ("output", checks::output),
        ("detokenizer", checks::detokenizer),
    ];
    for (target, check) in targets {
        marlin_testkit::replay(target, |path, bytes| {
            println!("{}", path.display());
            let started = Instant::now();
            check(bytes);
            assert!(started.elapsed() < Duration::from_secs(2), "{} is slow", path.display());
        });
    }
}
