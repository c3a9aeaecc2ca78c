//! Replays `fuzz/corpus-kept`: inputs that reach every part of the readers, and those that once
//! broke them.

#[path = "corpus/checks.rs"]
mod checks;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

#[test]
fn kept_inputs() {
    type Check = fn(&[u8]);
    let targets: [(&str, Check); 3] = [
        ("tokenizer", checks::tokenizer),
        ("vocabulary", checks::vocabulary),
        ("template", checks::template),
    ];
    for (target, check) in targets {
        let kept =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus-kept").join(target);
        let inputs: Vec<_> = fs::read_dir(&kept).unwrap().map(|e| e.unwrap().path()).collect();
        assert!(!inputs.is_empty(), "{}", kept.display());
        for input in inputs {
            println!("{}", input.display());
            let started = Instant::now();
            check(&fs::read(&input).unwrap());
            assert!(started.elapsed() < Duration::from_secs(2), "{} is slow", input.display());
        }
    }
}
