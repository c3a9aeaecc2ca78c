//! Answers that have to look like something.

mod common;

use common::{Running, Setup};
use serde_json::{Value, json};
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

/// Bombs are stopped within two seconds and do not slow others down.
#[test]
fn bombs_are_stopped() {
    let server = Setup::default().start();
    let wide = json!({"type": "object", "properties": {
        "a": {"type": "string", "pattern": "^(a|b|c|d){1,2000}(e|f){1,2000}$"},
        "b": {"type": "string", "pattern": "^((a{1,300}){1,300}){1,300}$"},
    }, "required": ["a", "b"]});
    let many = json!({"enum": (0..9000).map(|i| format!("a value of some length {i}")).collect::<Vec<_>>()});
    let regex = "(x+x+)+y".repeat(200);
    for more in [schema(wide), schema(many), json!({"grammar": {"type": "regex", "value": regex}})]
    {
        let start = Instant::now();
        let response = ask(&server, &more);
        assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
        assert!([200, 400, 500].contains(&response.status), "{}", response.body);
    }
    let start = Instant::now();
    assert_eq!(ask(&server, &json!({"max_tokens": 5})).status, 200);
    assert!(start.elapsed() < Duration::from_secs(1));
}
