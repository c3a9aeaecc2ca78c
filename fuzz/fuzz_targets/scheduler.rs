#![no_main]

#[allow(dead_code)]
#[path = "../../crates/engine/tests/corpus/checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|data: &[u8]| checks::scheduler(data));
