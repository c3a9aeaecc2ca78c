//! What is asked: prompts from a seeded generator, and the requests that carry them.

use crate::args::bench::{Endpoint, Serve};
use serde_json::{Value, json};
use std::time::Duration;

const WORDS: [&str; 30] = [
    "river", "stone", "lantern", "copper", "window", "garden", "engine", "winter", "market",
    "thread", "harbor", "ladder", "signal", "forest", "bridge", "candle", "mirror", "valley",
    "anchor", "paper", "circle", "planet", "summer", "bottle", "hammer", "ribbon", "corner",
    "basket", "meadow", "silver",
];

/// SplitMix64: a step and a mix of it, so that neighbouring seeds give unrelated numbers.
#[derive(Debug, Clone)]
pub struct Draw(u64);

impl Draw {
    /// A sequence of its own for every pair.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut first = Self(seed);
        Self(first.next() ^ stream.wrapping_mul(0xD129_0B26_5E55_0A2B))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In (0, 1].
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    fn words(&mut self, count: u32) -> String {
        let words: Vec<&str> =
            (0..count).map(|_| WORDS[(self.next() % WORDS.len() as u64) as usize]).collect();
        words.join(" ")
    }
}

/// Streams of the seed that are not a prompt's.
const PREFIX: u64 = u64::MAX;
const ARRIVALS: u64 = u64::MAX - 1;

/// When requests of a Poisson process of `rate` per second arrive.
pub fn arrivals(seed: u64, rate: f64, count: usize) -> Vec<Duration> {
    let mut draw = Draw::new(seed, ARRIVALS);
    let mut now = 0.0;
    let times = (0..count).map(|_| {
        now += -draw.unit().ln() / rate;
        Duration::from_secs_f64(now)
    });
    times.collect()
}

/// The requests of a run, by number.
#[derive(Debug)]
pub struct Prompts<'a> {
    args: &'a Serve,
    seed: u64,
    prefix: String,
}

impl<'a> Prompts<'a> {
    /// Those of one seed.
    pub fn new(args: &'a Serve, seed: u64) -> Self {
        let words = Draw::new(seed, PREFIX).words(args.shared_prefix_words);
        let prefix = if words.is_empty() { words } else { format!("{words}. ") };
        Self { args, seed, prefix }
    }

    /// The text of request `i`.
    pub fn text(&self, i: usize) -> String {
        let i = if self.args.same_prompt { 0 } else { i as u64 };
        let words = Draw::new(self.seed, i).words(self.args.prompt_words);
        format!("{}Story {i}. Write a short story that uses these words: {words}.", self.prefix)
    }

    /// Path below the server's root.
    pub fn path(&self) -> &'static str {
        match self.args.endpoint {
            Endpoint::Chat => "/v1/chat/completions",
            Endpoint::Completions => "/v1/completions",
        }
    }

    /// The body of request `i`.
    pub fn body(&self, i: usize, stream: bool) -> Value {
        let mut body = json!({
            "model": self.args.model,
            "max_tokens": self.args.max_tokens,
            "temperature": self.args.temperature,
            // Not every reader of JSON knows the upper half of 64 bits.
            "seed": self.seed & 0x7FFF_FFFF,
            "stream": stream,
        });
        match self.args.endpoint {
            Endpoint::Chat => body["messages"] = json!([{"role": "user", "content": self.text(i)}]),
            Endpoint::Completions => body["prompt"] = json!(self.text(i)),
        }
        if stream {
            body["stream_options"] = json!({"include_usage": true});
        }
        if !self.args.no_ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        body
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_come_at_the_rate() {
        let times = arrivals(7, 50.0, 20_000);
        assert!(
            times.is_sorted()
                && times == arrivals(7, 50.0, 20_000)
                && times != arrivals(8, 50.0, 20_000)
        );
        // Of 20,000 the mean gap is within 3 % nearly always; the spread of an exponential equals its mean.
        let gaps: Vec<f64> =
            times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let spread =
            (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        assert!(
            (mean * 50.0 - 1.0).abs() < 0.03 && (spread * 50.0 - 1.0).abs() < 0.05,
            "{mean} {spread}"
        );
    }

    #[test]
    fn numbers_are_spread_evenly() {
        let mut counts = [0_u32; 30];
        for stream in 0..300 {
            let text = Draw::new(1, stream).words(100);
            for word in text.split(' ') {
                counts[WORDS.iter().position(|w| *w == word).unwrap()] += 1;
            }
        }
        assert!(counts.iter().all(|&count| (850..1150).contains(&count)), "{counts:?}");
    }
}
