#![no_main]

#[allow(dead_code)]
#[path = "../../crates/text/tests/corpus/checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|data: &[u8]| checks::detokenizer(data));
