//! Replays `fuzz/corpus-kept/exl3`: inputs that reach every part of the reader, and those that once
//! broke it.

#[path = "corpus/checks.rs"]
mod checks;

use std::fs;
use std::path::Path;

#[test]
fn kept_inputs() {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus-kept/exl3");
    let inputs: Vec<_> = fs::read_dir(&kept).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(!inputs.is_empty(), "{}", kept.display());
    for input in inputs {
        println!("{}", input.display());
        checks::exl3(&fs::read(&input).unwrap());
    }
}
