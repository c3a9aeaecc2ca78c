//! Answers that have to look like something.

mod common;

use common::{Running, Setup};
use marlin_engine::EngineOptions;
use serde_json::{Value, json};
use std::io::Read;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

fn ask(server: &Running, more: &Value) -> common::Response {
    let mut body = json!({"messages": [{"role": "user", "content": "Go"}], "max_tokens": 200});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    server.post("/v1/chat/completions", &body)
}

fn answer(server: &Running, more: &Value) -> Value {
    let response = ask(server, more);
    assert_eq!(response.status, 200, "{more}: {}", response.body);
    response.json()["choices"][0].clone()
}

fn schema(schema: Value) -> Value {
    let named = json!({"name": "answer", "strict": true, "schema": schema});
    json!({"response_format": {"type": "json_schema", "json_schema": named}})
}

#[test]
fn json_of_a_schema() {
    let server = Setup::default().start();
    let body = schema(json!({
        "type": "object",
        "properties": {
            "kind": {"enum": ["cat", "dog"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 30},
            "tame": {"type": "boolean"},
        },
        "required": ["kind", "age", "tame"],
        "additionalProperties": false,
    }));
    for seed in 0..5 {
        let mut body = body.clone();
        body["seed"] = seed.into();
        body["temperature"] = json!(2.0);
        let choice = answer(&server, &body);
        let text = choice["message"]["content"].as_str().unwrap();
        let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert!(["cat", "dog"].contains(&value["kind"].as_str().unwrap()), "{text}");
        assert!((0..=30).contains(&value["age"].as_i64().unwrap()), "{text}");
        assert!(value["tame"].is_boolean(), "{text}");
        assert_eq!(choice["finish_reason"], "stop");
        body["stream"] = true.into();
        let streamed = ask(&server, &body).streamed();
        assert_eq!(streamed[&0].0, text, "a stream is shaped alike");
    }
    let several = answer(
        &server,
        &json!({"response_format": {"type": "json_object"}, "n": 3, "max_tokens": 12}),
    );
    assert!(several["message"]["content"].as_str().unwrap().starts_with('{'));
}

#[test]
fn text_of_a_grammar() {
    let server = Setup::default().start();
    for (kind, value, expected) in [
        ("regex", "(yes|no)", vec!["yes", "no"]),
        ("lark", "start: \"left\" | \"right\"", vec!["left", "right"]),
        ("gbnf", "root ::= \"up\" | \"down\"", vec!["up", "down"]),
    ] {
        let body = json!({"grammar": {"type": kind, "value": value}});
        let choice = answer(&server, &body);
        let text = choice["message"]["content"].as_str().unwrap();
        assert!(expected.contains(&text), "{kind}: {text}");
        assert_eq!(choice["finish_reason"], "stop", "{kind}");
        let body =
            json!({"prompt": "Go", "max_tokens": 20, "grammar": {"type": kind, "value": value}});
        let text = server.post("/v1/completions", &body).json();
        let text = text["choices"][0]["text"].as_str().unwrap();
        assert!(expected.contains(&text.trim()), "{kind}: {text}");
    }
}

#[test]
fn what_cannot_be_enforced_is_refused() {
    let server = Setup::default().start();
    let deep =
        (0..40).fold(json!({"type": "string"}), |inner, _| json!({"properties": {"a": inner}}));
    for (more, param) in [
        (schema(json!({"type": "potato"})), "response_format"),
        (
            schema(json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})),
            "response_format",
        ),
        (schema(json!({"not": {}})), "response_format"),
        (schema(json!({"type": "array", "uniqueItems": true})), "response_format"),
        (json!({"grammar": {"type": "lark", "value": "start: start"}}), "grammar"),
        (schema(json!({"$ref": "#/nowhere"})), "response_format"),
        (schema(deep), "response_format.json_schema.schema"),
        (json!({"grammar": {"type": "regex", "value": "("}}), "grammar"),
        (json!({"grammar": {"type": "lark", "value": "start: missing"}}), "grammar"),
        (json!({"grammar": {"type": "gbnf", "value": "root ::= missing"}}), "grammar"),
        (json!({"grammar": {"type": "bnf", "value": "x"}}), "grammar.type"),
    ] {
        let response = ask(&server, &more);
        assert_eq!(response.status, 400, "{more}: {}", response.body);
        assert_eq!(response.json()["error"]["param"], param, "{more}");
    }
}

/// The time between the tokens of `answers` streams, milliseconds, sorted; `meanwhile` runs beside them.
fn gaps(server: &Running, answers: usize, meanwhile: impl FnOnce()) -> Vec<f64> {
    let body = json!({"messages": [{"role": "user", "content": "Talk"}], "max_tokens": 300,
        "ignore_eos": true, "stream": true});
    std::thread::scope(|scope| {
        let listen = || {
            let mut stream = server.open("/v1/chat/completions", &body);
            let (mut gaps, mut last, mut buffer) = (Vec::new(), None, [0; 4096]);
            while let Ok(1..) = stream.read(&mut buffer) {
                let now = Instant::now();
                gaps.extend(last.map(|last: Instant| (now - last).as_secs_f64() * 1e3));
                last = Some(now);
            }
            gaps
        };
        let streams: Vec<_> = (0..answers).map(|_| scope.spawn(listen)).collect();
        std::thread::sleep(Duration::from_millis(50));
        meanwhile();
        let mut all: Vec<f64> =
            streams.into_iter().flat_map(|stream| stream.join().unwrap()).collect();
        all.sort_by(f64::total_cmp);
        all
    })
}

/// Bombs, many at once, are stopped within two seconds, are never the server's fault, do not slow others down, and hold no
/// place afterwards.
#[test]
fn bombs_are_stopped_while_others_stream() {
    let options = EngineOptions {
        max_context: Some(1024),
        num_blocks: Some(16 * 64),
        max_batch: 16,
        ..EngineOptions::default()
    };
    let server = Setup { tools: true, options, ..Setup::default() }.start();
    server.behaviour.pass_us.store(5000, Ordering::Relaxed);
    let wide = json!({"type": "object", "properties": {
        "a": {"type": "string", "pattern": "^(a|b|c|d){1,2000}(e|f){1,2000}$"},
        "b": {"type": "string", "pattern": "^((a{1,300}){1,300}){1,300}$"},
    }, "required": ["a", "b"]});
    let many = json!({"enum": (0..9000).map(|i| format!("a value of some length {i}")).collect::<Vec<_>>()});
    let nested = (0..9).fold(json!({"type": "string"}), |inner, _| {
        json!({"anyOf": [{"type": "array", "items": inner}, {"type": "object", "additionalProperties": inner}]})
    });
    let mut template = json!({"chat_template_kwargs": {"bomb": 100_000}});
    template["max_tokens"] = json!(2);
    let bombs = [
        schema(wide),
        schema(many),
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": nested}}}),
        json!({"grammar": {"type": "regex", "value": "(x+x+)+y".repeat(200)}}),
        json!({"grammar": {"type": "lark", "value": "start: a\na: a a | \"x\" | \"\"\n"}}),
        template,
    ];
    let alone = gaps(&server, 3, || {});
    let beside = gaps(&server, 3, || {
        std::thread::scope(|scope| {
            for bomb in bombs.iter().chain(&bombs[..3]) {
                scope.spawn(|| {
                    let mut bomb = bomb.clone();
                    bomb["max_tokens"] = json!(8);
                    let start = Instant::now();
                    let response = ask(&server, &bomb);
                    let name: String = bomb.to_string().chars().take(120).collect();
                    // Two seconds and what a busy machine adds.
                    assert!(
                        start.elapsed() < Duration::from_millis(2600),
                        "{name}: {:?}",
                        start.elapsed()
                    );
                    assert!(
                        [200, 400, 429].contains(&response.status),
                        "{name}: {}",
                        response.body
                    );
                });
            }
        });
    });
    let at = |gaps: &[f64], share: f64| gaps[(gaps.len() as f64 * share) as usize];
    for share in [0.5, 0.95] {
        let (alone, beside) = (at(&alone, share), at(&beside, share));
        assert!(
            beside < 2.0 * alone + 20.0,
            "at {share}: {alone} ms alone, {beside} ms beside bombs"
        );
    }
    // What was given up ends, too: four such hold every place where grammars are compiled.
    let start = Instant::now();
    for _ in 0..8 {
        let fine = json!({"response_format": {"type": "json_object"}, "max_tokens": 4});
        let status = ask(&server, &fine).status;
        assert!(
            status == 200 || start.elapsed() < Duration::from_secs(4),
            "a place is lost: {status}"
        );
    }
    let response =
        ask(&server, &json!({"response_format": {"type": "json_object"}, "max_tokens": 4}));
    assert_eq!(response.status, 200, "{}", response.body);
}
