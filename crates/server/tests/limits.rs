//! Limits that are set: what they let in, what they refuse, and what says so.

mod common;

use common::{Running, Setup, read};
use marlin_engine::EngineOptions;
use marlin_server::{Config, ModelLimits, QueueLimits, RequestLimits};
use marlin_text::GrammarLimits;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Everything at its least, or near it.
const SMALL: RequestLimits = RequestLimits {
    answers: 2,
    prompts: 2,
    stops: 1,
    stop_bytes: 3,
    biases: 1,
    top_logprobs: 1,
    messages: 2,
    tools: 1,
    inputs: 2,
    schema_depth: 6,
    schema_values: 12,
};

fn with(mut body: Value, more: &Value) -> Value {
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

fn base(path: &str) -> Value {
    let messages = json!([{"role": "user", "content": "Hi"}]);
    match path {
        "/v1/chat/completions" => json!({"messages": messages, "max_tokens": 2}),
        "/v1/messages" => json!({"messages": messages, "max_tokens": 2}),
        "/v1/responses" => json!({"input": messages, "max_output_tokens": 16}),
        "/v1/completions" => json!({"prompt": "Hi", "max_tokens": 2}),
        "/v1/embeddings" => json!({"input": "Hi"}),
        _ => json!({"messages": messages}),
    }
}

fn tool(depth: usize, anthropic: bool) -> Value {
    let schema = (0..depth).fold(json!({}), |inner, _| json!({"items": inner}));
    match anthropic {
        true => json!({"name": "f", "input_schema": schema}),
        false => json!({"type": "function", "function": {"name": "f", "parameters": schema}}),
    }
}

/// Path, what is let in, what is refused, and the field that is named.
fn rows() -> Vec<(&'static str, Value, Value, &'static str)> {
    let chat = "/v1/chat/completions";
    let message = json!({"role": "user", "content": "Hi"});
    let format = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}});
    let deep = (0..8).fold(json!({}), |inner, _| json!({"items": inner}));
    let shallow = json!({"type": "array", "items": {"type": "string"}});
    vec![
        (chat, json!({"n": 2}), json!({"n": 3}), "n"),
        (chat, json!({"stop": "abc"}), json!({"stop": ["a", "b"]}), "stop"),
        (chat, json!({"stop": ["abc"]}), json!({"stop": "abcd"}), "stop"),
        (
            chat,
            json!({"logit_bias": {"1": 1}}),
            json!({"logit_bias": {"1": 1, "2": 1}}),
            "logit_bias",
        ),
        (
            chat,
            json!({"logprobs": true, "top_logprobs": 1}),
            json!({"logprobs": true, "top_logprobs": 2}),
            "top_logprobs",
        ),
        (
            chat,
            json!({"messages": [message, message]}),
            json!({"messages": [message, message, message]}),
            "messages",
        ),
        (
            chat,
            json!({"tools": [tool(2, false)]}),
            json!({"tools": [tool(1, false), tool(1, false)]}),
            "tools",
        ),
        (chat, json!({}), json!({"tools": [tool(9, false)]}), "tools[0]"),
        (chat, format(shallow.clone()), format(deep), "response_format.json_schema.schema"),
        (
            chat,
            format(json!({"enum": [1, 2, 3]})),
            format(json!({"enum": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]})),
            "response_format.json_schema.schema",
        ),
        (
            "/v1/completions",
            json!({"prompt": ["a", "b"]}),
            json!({"prompt": ["a", "b", "c"]}),
            "prompt",
        ),
        ("/v1/completions", json!({"logprobs": 1}), json!({"logprobs": 2}), "logprobs"),
        (
            "/v1/embeddings",
            json!({"input": ["a", "b"]}),
            json!({"input": ["a", "b", "c"]}),
            "input",
        ),
        ("/v1/messages", json!({}), json!({"messages": [message, message, message]}), "messages"),
        ("/v1/messages", json!({}), json!({"stop_sequences": ["a", "b"]}), "stop_sequences"),
        ("/v1/messages", json!({}), json!({"tools": [tool(1, true), tool(1, true)]}), "tools"),
        ("/v1/messages", json!({}), json!({"tools": [tool(9, true)]}), "tools[0]"),
        ("/v1/responses", json!({}), json!({"input": [message, message, message]}), "input"),
        (
            "/v1/responses",
            json!({"include": ["message.output_text.logprobs"], "top_logprobs": 1}),
            json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2}),
            "top_logprobs",
        ),
        ("/tokenize", json!({}), json!({"messages": [message, message, message]}), "messages"),
        ("/apply-template", json!({}), json!({"tools": [tool(1, false), tool(1, false)]}), "tools"),
    ]
}

fn start(limits: RequestLimits) -> Running {
    let config = Config { limits, ..Config::default() };
    Setup { config, tools: true, ..Setup::default() }.start()
}

#[test]
fn what_a_request_may_hold_is_as_set() {
    let (small, usual) = (start(SMALL), start(RequestLimits::default()));
    usual.says("{}");
    for (path, fits, over, field) in rows() {
        let (fits, over) = (with(base(path), &fits), with(base(path), &over));
        let response = small.post(path, &fits);
        let ours = !response.body.contains(&format!("\"{field}\""));
        assert!(response.status == 200 || ours, "{path} {fits}: {}", response.body);
        let refused = small.post(path, &over);
        assert_eq!(refused.status, 400, "{path} {over}: {}", refused.body);
        let error = &refused.json()["error"];
        match path {
            "/v1/messages" => {
                assert!(error["message"].as_str().unwrap().contains(field), "{error}")
            }
            _ => assert_eq!(error["param"], field, "{path} {over}: {error}"),
        }
        let taken = usual.post(path, &over);
        assert_ne!(taken.status, 400, "{path} {over}: {}", taken.body);
    }
    // The description says the same.
    let described = |server: &Running, path: &str, pointer: &str| {
        let document = server.get("/openapi.json").json();
        let schema = &document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            ["schema"]["properties"];
        schema.pointer(pointer).cloned().unwrap_or_else(|| panic!("{pointer} of {path}: {schema}"))
    };
    for (path, pointer, small_value, usual_value) in [
        ("/v1/chat/completions", "/n/maximum", 2, 16),
        ("/v1/chat/completions", "/messages/maxItems", 2, 4096),
        ("/v1/chat/completions", "/tools/maxItems", 1, 128),
        ("/v1/chat/completions", "/top_logprobs/maximum", 1, 20),
        ("/v1/chat/completions", "/logit_bias/maxProperties", 1, 1024),
        ("/v1/chat/completions", "/stop/anyOf/0/anyOf/0/maxLength", 3, 256),
        ("/v1/chat/completions", "/stop/anyOf/0/anyOf/1/maxItems", 1, 4),
        ("/v1/completions", "/prompt/anyOf/2/maxItems", 2, 64),
        ("/v1/embeddings", "/input/anyOf/1/maxItems", 2, 2048),
        ("/v1/messages", "/tools/maxItems", 1, 128),
        ("/v1/responses", "/top_logprobs/maximum", 1, 20),
    ] {
        assert_eq!(described(&small, path, pointer), small_value, "{path} {pointer}");
        assert_eq!(described(&usual, path, pointer), usual_value, "{path} {pointer}");
    }
}

#[test]
fn heads_and_idle_connections_are_bounded_as_set() {
    let config = Config {
        max_head_bytes: 8 << 10,
        max_header_fields: 20,
        idle_timeout: Duration::from_millis(300),
        header_timeout: Duration::from_millis(200),
        ..Config::default()
    };
    let server = Setup { config, ..Setup::default() }.start();
    let with_head = |server: &Running, bytes: usize, fields: usize| {
        let long = format!("x-long: {}\r\n", "x".repeat(bytes));
        let many: String = (0..fields).map(|i| format!("x-{i}: y\r\n")).collect();
        let head =
            format!("GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{long}{many}\r\n");
        server.raw(head.as_bytes()).status
    };
    assert_eq!(with_head(&server, 6_000, 10), 200);
    assert_eq!(with_head(&server, 9_000, 0), 431);
    assert_eq!(with_head(&server, 10, 30), 431);
    let usual = Setup::default().start();
    assert_eq!(with_head(&usual, 60_000, 90), 200);
    assert_eq!(with_head(&usual, 70_000, 0), 431);
    let long_path = format!(
        "GET /health?{} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        "x".repeat(17_000)
    );
    assert_eq!(usual.raw(long_path.as_bytes()).status, 414);
    // A connection is kept for the next request, for a while.
    let mut stream = server.connect();
    for _ in 0..3 {
        stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        let mut some = [0; 1024];
        assert!(stream.read(&mut some).unwrap() > 0);
        std::thread::sleep(Duration::from_millis(50));
    }
    let begun = Instant::now();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    let idle = begun.elapsed();
    assert!((200..2000).contains(&idle.as_millis()), "closed after {idle:?}");
}

/// Beside a cache full of prompts under way, as many caches of them may wait as is set.
#[test]
fn prompts_that_wait_are_bounded_by_the_cache() {
    for (caches, accepted) in [(0.0, 1), (1.0, 2), (2.0, 3)] {
        let queue = QueueLimits { answers: 256, pools: caches };
        let limits = ModelLimits { queue, ..ModelLimits::default() };
        let options = EngineOptions {
            max_context: Some(512),
            num_blocks: Some(32),
            mixed_chunk: 64,
            max_batch: 1,
            ..EngineOptions::default()
        };
        let server = Setup { limits, options, ..Setup::default() }.start();
        server.behaviour.pass_us.store(10_000, Ordering::Relaxed);
        // The cache holds 512 tokens; each prompt nearly fills it.
        let ask = |first: u32| {
            let prompt: Vec<u32> = (0..440).map(|i| 300 + first * 7 + i).collect();
            json!({"prompt": prompt, "max_tokens": 60, "ignore_eos": true, "stream": true})
        };
        let mut open = Vec::new();
        let mut statuses = Vec::new();
        for first in 0..5 {
            let mut stream = server.open("/v1/completions", &ask(first));
            let mut head = [0; 12];
            // Streams are answered at once, whether they wait or not.
            stream.read_exact(&mut head).unwrap();
            statuses.push(String::from_utf8_lossy(&head[9..]).into_owned());
            open.push(stream);
        }
        let taken = statuses.iter().filter(|status| *status == "200").count();
        assert_eq!(taken, accepted, "{caches} caches may wait: {statuses:?}");
        assert_eq!(statuses.last().map(String::as_str), Some("429"));
        drop(open);
        server.idle(Duration::from_secs(2));
    }
}

#[test]
fn grammars_and_templates_have_the_time_that_is_set() {
    let grammars = GrammarLimits {
        compile_time: Duration::from_millis(1),
        max_compiling: 1,
        ..GrammarLimits::default()
    };
    let limits = ModelLimits { grammars, template_time: Duration::ZERO, ..ModelLimits::default() };
    let server = Setup { limits: limits.clone(), ..Setup::default() }.start();
    let rules: String = (0..60).map(|i| format!("A{i}: A{} A{}\n", i + 1, i + 1)).collect();
    let source = format!("start: A0\n{rules}A60: \"x\"");
    let bomb =
        json!({"prompt": "Hi", "max_tokens": 2, "grammar": {"type": "lark", "value": source}});
    let usual =
        json!({"prompt": "Hi", "max_tokens": 2, "grammar": {"type": "regex", "value": "a+"}});
    // The vocabulary is made ready by the first, whatever becomes of it.
    server.post("/v1/completions", &usual);
    let begun = Instant::now();
    while limits.grammars.compiling.count() > 0 {
        assert!(begun.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(1));
    }
    let given_up = server.post("/v1/completions", &bomb);
    assert_eq!(given_up.status, 400, "{}", given_up.body);
    assert!(given_up.body.contains("not compiled within 1ms"), "{}", given_up.body);
    let full = server.post("/v1/completions", &usual);
    assert_eq!(full.status, 429, "{}", full.body);
    assert!(full.headers.contains_key("retry-after"));
    let template = server.post("/apply-template", &base("/apply-template"));
    assert_eq!(template.status, 400);
    assert!(template.body.contains("takes longer than"), "{}", template.body);
    // Answers without a grammar have nothing to do with it.
    let plain = read(server.open("/v1/completions", &json!({"prompt": "Hi", "max_tokens": 2})));
    assert_eq!(plain.status, 200);
}
