//! How long masks take on a vocabulary of 150 thousand tokens.
//!
//! `cargo run --release -p marlin-text --example mask_time`; the tokenizer is read from
//! `qwen2.5-coder-0.5b-q4_k_m.gguf` in `MARLIN_TEST_MODELS` or `~/.cache/marlin/test-models`.

#[allow(dead_code)]
#[path = "../tests/grammar/bench.rs"]
mod bench;

use bench::{Random, Writer, schema};
use marlin_text::{CallFormat, Grammar, GrammarFactory, Tool, ToolChoice};
use serde_json::json;
use std::time::{Duration, Instant};

/// Median, 99th percentile and longest.
fn spread(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    format!(
        "median {:?}, p99 {:?}, longest {:?}, {} of them",
        at(0.5),
        at(0.99),
        at(1.0),
        times.len()
    )
}

fn main() {
    let tokenizer = match bench::large_vocabulary() {
        Ok(tokenizer) => tokenizer,
        Err(reason) => return println!("nothing to measure: {reason}"),
    };
    let factory = GrammarFactory::new(&tokenizer).expect("a vocabulary with an end");
    let started = Instant::now();
    factory.prepare().expect("a usable vocabulary");
    println!("{} tokens; tries built in {:?}", tokenizer.vocab_size(), started.elapsed());

    let tool = json!({"name": "weather", "parameters": {"type": "object", "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}},
    }, "required": ["city"], "additionalProperties": false}});
    let tools = [Tool::parse(&tool).expect("a tool")];
    let calls = |format| {
        Grammar::tool_calls(format, &tools, ToolChoice::Required, true).expect("there is a tool")
    };
    let mut random = Random(1);
    let schemas =
        (0..1_000).map(|_| Grammar::JsonSchema { schema: schema(&mut random, 3), strict: true });
    let mut writer = Writer::new(&tokenizer, 2);
    let rows: Vec<(&str, Vec<Grammar>)> = vec![
        ("1,000 random schemas", schemas.collect()),
        ("any JSON object", vec![Grammar::JsonObject; 50]),
        ("calls, hermes", vec![calls(CallFormat::Hermes); 50]),
        ("calls, glm", vec![calls(CallFormat::Glm); 50]),
        ("calls, qwen-coder", vec![calls(CallFormat::QwenCoder); 50]),
    ];
    for (name, grammars) in rows {
        let (mut compile, mut mask) = (Vec::new(), Vec::new());
        for grammar in grammars {
            let started = Instant::now();
            let mut matcher = factory.compile(&grammar).expect("a grammar that compiles");
            compile.push(started.elapsed());
            let mut text = Vec::new();
            for tokens in 0..200 {
                let started = Instant::now();
                matcher.mask().expect("a token that fits");
                mask.push(started.elapsed());
                let closing = tokens > 40 || tokens % 2 == 1;
                let next = writer.step(&mut matcher, closing, &mut text);
                if next.expect("a token that fits").is_none() {
                    break;
                }
            }
        }
        println!("{name}\n  compile {}\n  mask {}", spread(&mut compile), spread(&mut mask));
    }
}
