//! How long masks take on vocabularies of 150 thousand tokens.
//!
//! `cargo run --release -p marlin-text --example mask_time` measures one that is made for it, and the tokenizer of
//! `qwen2.5-coder-0.5b-q4_k_m.gguf` where that is in `MARLIN_TEST_MODELS` or `~/.cache/marlin/test-models`.

#[allow(dead_code)]
#[path = "../tests/grammar/bench.rs"]
mod bench;
#[allow(dead_code)]
#[path = "../tests/common/mod.rs"]
mod common;

use bench::within;
use marlin_text::Tokenizer;
use std::time::Duration;

fn spread(times: &mut [Duration]) -> String {
    format!(
        "median {:?}, p99 {:?}, longest {:?}, {} of them",
        within(times, 0.5),
        within(times, 0.99),
        within(times, 1.0),
        times.len()
    )
}

fn measure(tokenizer: &Tokenizer) {
    println!("{} tokens", tokenizer.vocab_size());
    for mut times in bench::measure(tokenizer, 1_000) {
        let (compile, mask) = (spread(&mut times.compile), spread(&mut times.mask));
        println!("  {}\n    compile {compile}\n    mask {mask}", times.name);
    }
}

fn main() {
    measure(&common::large_vocabulary(150_000));
    match bench::large_vocabulary() {
        Ok(tokenizer) => measure(&tokenizer),
        Err(reason) => println!("not measured: {reason}"),
    }
}
