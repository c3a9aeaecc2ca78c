//! Masks are made in less than a millisecond where the vocabulary has 150 thousand tokens.

#[allow(dead_code)]
#[path = "grammar/bench.rs"]
mod bench;
#[allow(dead_code)]
mod common;

use bench::within;
use std::time::{Duration, Instant};

/// The median of each kind of grammar. Dependencies, which do the work, are optimised in every build; the figures of a release
/// are in docs/serving.md, and are far enough below that a busy machine does not matter.
#[test]
fn the_median_mask_takes_less_than_a_millisecond() {
    let started = Instant::now();
    let tokenizer = common::large_vocabulary(150_000);
    println!("{} tokens, made in {:?}", tokenizer.vocab_size(), started.elapsed());
    assert!((149_900..=150_100).contains(&tokenizer.vocab_size()));
    for mut times in bench::measure(&tokenizer, 300) {
        let [median, late] = [0.5, 0.99].map(|share| within(&mut times.mask, share));
        println!("{}: median {median:?}, p99 {late:?} of {}", times.name, times.mask.len());
        assert!(median < Duration::from_millis(1), "{}: {median:?}", times.name);
    }
}
