#![no_main]

#[allow(dead_code)]
#[path = "../../crates/text/tests/corpus/checks.rs"]
mod checks;

// The library below panics on odd files, which its caller catches; only what is not caught counts.
libfuzzer_sys::fuzz_target!(
    init: std::panic::set_hook(Box::new(|_| {})),
    |data: &[u8]| checks::tokenizer(data)
);
