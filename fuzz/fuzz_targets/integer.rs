#![no_main]

#[allow(dead_code)]
#[path = "../../crates/quant/tests/corpus/checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|data: &[u8]| checks::integer(data));
