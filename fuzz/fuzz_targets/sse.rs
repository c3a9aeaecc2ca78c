#![no_main]

#[allow(dead_code)]
#[path = "../../crates/cli/tests/corpus/checks.rs"]
mod checks;
#[allow(dead_code)]
#[path = "../../crates/cli/src/http/mod.rs"]
mod http;

libfuzzer_sys::fuzz_target!(|data: &[u8]| checks::sse(data));
