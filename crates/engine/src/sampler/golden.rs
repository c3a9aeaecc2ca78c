//! The sampler against what transformers and llama.cpp make of the same logits
//! (`fixtures/sampler.json`, versions inside, written by `fixtures/make_sampler_fixture.py`).

use super::{Dry, SampleContext, SamplingOptions, SamplingParams, TokenCounts, Xtc};
use super::{argmax, penalty, select};
use serde_json::Value;

fn float(value: &Value, key: &str, default: f32) -> f32 {
    value.get(key).map_or(default, |v| v.as_f64().unwrap() as f32)
}

fn options(o: &Value) -> SamplingOptions {
    let off = SamplingOptions::default();
    SamplingOptions {
        temperature: float(o, "temperature", off.temperature),
        top_k: o.get("top_k").map(|k| k.as_u64().unwrap() as usize),
        top_p: float(o, "top_p", off.top_p),
        min_p: float(o, "min_p", off.min_p),
        repetition_penalty: float(o, "repetition_penalty", off.repetition_penalty),
        frequency_penalty: float(o, "frequency_penalty", off.frequency_penalty),
        presence_penalty: float(o, "presence_penalty", off.presence_penalty),
        dry: o.get("dry").map(|d| Dry {
            multiplier: float(d, "multiplier", 0.0),
            base: float(d, "base", 0.0),
            allowed_length: d["allowed_length"].as_u64().unwrap() as usize,
            ..Dry::default()
        }),
        xtc: o.get("xtc").map(|x| Xtc {
            probability: float(x, "probability", 0.0),
            threshold: float(x, "threshold", 0.0),
        }),
        ..off
    }
}

fn tokens(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

#[test]
fn penalties_and_truncation_equal_transformers_and_llama_cpp() {
    let fixture: Value = serde_json::from_str(include_str!("../../fixtures/sampler.json")).unwrap();
    let cases = fixture["cases"].as_array().unwrap();
    assert!(cases.len() >= 19);
    for case in cases {
        let name = format!("{} {}", case["by"], case["options"]);
        let params = SamplingParams::new(options(&case["options"])).unwrap();
        let (prompt, answer) = (tokens(&case["prompt"]), tokens(&case["answer"]));
        let mut counts = TokenCounts::new(&prompt, &params);
        answer.iter().for_each(|&t| counts.push(t));
        let all = [&prompt[..], &answer].concat();
        let context =
            SampleContext { tokens: &all, prompt_len: prompt.len(), counts: &counts, banned: &[] };
        let mut logits = floats(&fixture["logits"]);
        let draw = params.draw(0, &context);
        penalty::apply(&mut logits, &draw.adjustments);
        if let Some(expected) = case.get("logits") {
            for (token, (found, expected)) in logits.iter().zip(floats(expected)).enumerate() {
                assert!(
                    (found - expected).abs() < 2e-6,
                    "{name}: token {token} {found} {expected}"
                );
            }
            continue;
        }
        let mut kept = Vec::new();
        let max = logits[argmax(&logits)];
        select::truncate(&logits, max, &draw, &mut Vec::new(), &mut kept);
        if let Some(xtc) = &params.options().xtc {
            select::exclude_top_choices(&mut kept, xtc.threshold);
        }
        kept.sort_by_key(|c| c.token);
        let total: f32 = kept.iter().map(|c| c.weight).sum();
        let expected = case["probabilities"].as_array().unwrap();
        assert_eq!(kept.len(), expected.len(), "{name}");
        for (found, expected) in kept.iter().zip(expected) {
            assert_eq!(u64::from(found.token), expected[0].as_u64().unwrap(), "{name}");
            let probability = expected[1].as_f64().unwrap() as f32;
            assert!((found.weight / total - probability).abs() < 1e-6, "{name} {}", found.token);
        }
    }
}
