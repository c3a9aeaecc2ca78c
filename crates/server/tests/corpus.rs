//! Replays the inputs kept for the fuzz target of this crate.

#[path = "corpus/checks.rs"]
mod checks;

use std::time::{Duration, Instant};

#[test]
fn kept_inputs() {
    marlin_testkit::replay("request", |path, bytes| {
        let started = Instant::now();
        checks::request(bytes);
        assert!(started.elapsed() < Duration::from_secs(1), "{} is slow", path.display());
    });
}

/// Every way to damage a good body, one byte at a time.
#[test]
fn damaged_bodies() {
    let body = br#"{"model":"m","messages":[{"role":"system","content":[{"type":"text","text":"a"}]},{"role":"assistant","content":null,"tool_calls":[{"id":"1","type":"function","function":{"name":"f","arguments":"{\"x\":1}"}}]},{"role":"tool","tool_call_id":"1","content":"2"}],"tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}],"stop":["x"],"logit_bias":{"1":2},"seed":-1,"n":2}"#;
    let messages = br#"{"model":"m","max_tokens":9,"system":[{"type":"text","text":"a"}],"messages":[{"role":"user","content":"a"},{"role":"assistant","content":[{"type":"thinking","thinking":"b","signature":""},{"type":"tool_use","id":"1","name":"f","input":{"x":1}}]},{"role":"user","content":[{"type":"tool_result","tool_use_id":"1","content":[{"type":"text","text":"2"}],"is_error":true}]}],"tools":[{"name":"f","input_schema":{"type":"object"}}],"tool_choice":{"type":"tool","name":"f"},"thinking":{"type":"enabled","budget_tokens":5},"stop_sequences":["x"],"metadata":{"user_id":"u"}}"#;
    let responses = br#"{"model":"m","instructions":"a","input":[{"role":"user","content":[{"type":"input_text","text":"a"}]},{"type":"reasoning","id":"r","summary":[],"content":[{"type":"reasoning_text","text":"b"}]},{"type":"function_call","call_id":"1","name":"f","arguments":"{\"x\":1}"},{"type":"function_call_output","call_id":"1","output":"2"}],"tools":[{"type":"function","name":"f","parameters":{"type":"object"}}],"tool_choice":"auto","text":{"format":{"type":"json_schema","name":"n","schema":{}}},"include":["message.output_text.logprobs"],"top_logprobs":2,"metadata":{"a":"b"}}"#;
    damage("/v1/chat/completions", body);
    damage("/v1/messages", messages);
    damage("/v1/responses", responses);
    let messages = br#"{"messages":[{"role":"user","content":"a"}],"tools":[{"type":"function","function":{"name":"f"}}],"chat_template_kwargs":{"a":1},"add_generation_prompt":true}"#;
    let embeddings = br#"{"input":["a",[1,2]],"encoding_format":"base64","pooling":"last","dimensions":2,"user":"u"}"#;
    damage("/v1/embeddings", embeddings);
    let perplexity = br#"{"text":"a","window":4,"score_from":1,"include_token_logprobs":true}"#;
    damage("/v1/perplexity", perplexity);
    damage("/tokenize", br#"{"prompt":"a","add_special_tokens":true,"return_token_strs":true}"#);
    damage("/tokenize", messages);
    damage("/detokenize", br#"{"model":"m","tokens":[1,2,3]}"#);
    damage("/apply-template", messages);
}

/// Damages `body`, which `path` takes as it is.
fn damage(path: &str, body: &[u8]) {
    checks::request(body);
    assert!(marlin_server::read_body(path, body).is_ok());
    for at in 0..body.len() {
        for byte in [0, b'"', b'{', b'9', b'-', 0xff, b'n'] {
            let mut damaged = body.to_vec();
            damaged[at] = byte;
            checks::request(&damaged);
        }
        checks::request(&body[..at]);
        checks::request(&[&body[..at], &body[at + 1..]].concat());
    }
}
