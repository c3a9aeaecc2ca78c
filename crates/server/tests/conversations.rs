//! Anthropic's messages and OpenAI's responses over a socket.

mod common;

use common::{Response, Setup, read};
use marlin_server::Key;
use serde_json::{Value, json};

fn with(mut body: Value, more: Value) -> Value {
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

fn message(text: &str) -> Value {
    let messages = json!([{"role": "user", "content": text}]);
    json!({"model": "first", "messages": messages, "max_tokens": 8, "temperature": 0})
}

fn input(text: &str) -> Value {
    json!({"model": "first", "input": text, "max_output_tokens": 8, "temperature": 0})
}

/// Shows `value` to programs that know the protocol: they look for these lines in what the tests print.
fn record(name: &str, value: &Value) {
    println!("\nrecorded {name} {value}");
}

/// The data of every event, which is named as its type.
fn events(response: &Response) -> Vec<Value> {
    assert_eq!(response.status, 200, "{}", response.body);
    assert_eq!(response.headers["content-type"], "text/event-stream; charset=utf-8");
    let data: Vec<Value> =
        response.events().iter().map(|data| serde_json::from_str(data).unwrap()).collect();
    let names = response.body.lines().filter_map(|line| line.strip_prefix("event: "));
    assert!(names.eq(data.iter().map(|data| data["type"].as_str().unwrap())), "{}", response.body);
    data
}

fn texts<'a>(events: &'a [Value], kind: &str, pointer: &str) -> String {
    let of = events.iter().filter(|event| event["type"] == kind);
    of.filter_map(|event: &'a Value| event.pointer(pointer)?.as_str()).collect()
}

#[test]
fn messages_whole_and_streamed() {
    let server = Setup::default().start();
    let body = with(message("Tell me"), json!({"system": [{"type": "text", "text": "Be."}]}));
    let whole = server.post("/v1/messages", &body);
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole = whole.json();
    record("anthropic.Message", &whole);
    let text = whole["content"][0]["text"].as_str().unwrap();
    assert!(!text.is_empty());
    assert_eq!((&whole["stop_reason"], &whole["model"]), (&json!("max_tokens"), &json!("first")));
    assert_eq!(whole["usage"]["output_tokens"], 8);

    let stream = server.post("/v1/messages", &with(body.clone(), json!({"stream": true})));
    let events = events(&stream);
    record("anthropic.events", &events.clone().into());
    assert_eq!(texts(&events, "content_block_delta", "/delta/text"), text);
    assert_eq!(events.last().unwrap()["type"], "message_stop");
    let delta = &events[events.len() - 2];
    assert_eq!(delta["delta"]["stop_reason"], "max_tokens");

    // What is counted, what a stream begins with, and what an answer took are the same tokens.
    let mut count = body.clone();
    count.as_object_mut().unwrap().remove("max_tokens");
    let count = server.post("/v1/messages/count_tokens", &count).json();
    record("anthropic.MessageTokensCount", &count);
    assert_eq!(events[0]["message"]["usage"]["input_tokens"], count["input_tokens"]);
    let sum = |usage: &Value| {
        usage["input_tokens"].as_u64().unwrap() + usage["cache_read_input_tokens"].as_u64().unwrap()
    };
    assert_eq!(Some(sum(&whole["usage"])), count["input_tokens"].as_u64());
    assert_eq!(sum(&delta["usage"]), sum(&whole["usage"]));

    let stop: String = text.chars().skip(8).take(5).collect();
    let stopped = server.post("/v1/messages", &with(body, json!({"stop_sequences": [stop]})));
    let stopped = stopped.json();
    assert_eq!(
        (&stopped["stop_reason"], &stopped["stop_sequence"]),
        (&json!("stop_sequence"), &json!(stop))
    );
    assert_eq!(stopped["content"][0]["text"], text.split(&stop).next().unwrap());
}

#[test]
fn errors_are_in_the_shape_of_the_protocol() {
    let key = Key { name: "ann".into(), secret: "secret".into() };
    let server = Setup { keys: Some(vec![key]), ..Setup::default() }.start();
    let post = |path: &str, key: &str, body: &Value| {
        let headers = format!("content-type: application/json\r\n{key}");
        read(server.send("POST", path, &headers, body.to_string().as_bytes()))
    };
    let own = "x-api-key: secret\r\n";
    let wrong = with(message("a"), json!({"max_tokens": 0}));
    let unknown = with(message("a"), json!({"model": "none"}));
    for (key, body, status, kind) in [
        ("", &message("a"), 401, "authentication_error"),
        (own, &wrong, 400, "invalid_request_error"),
        (own, &unknown, 404, "not_found_error"),
    ] {
        for path in ["/v1/messages", "/v1/messages/count_tokens"] {
            let response = post(path, key, body);
            assert_eq!(response.status, status, "{path}: {}", response.body);
            let error = response.json();
            record("anthropic.error", &error);
            assert_eq!((&error["type"], &error["error"]["type"]), (&json!("error"), &json!(kind)));
        }
    }
    assert_eq!(post("/v1/messages", own, &message("a")).status, 200);
    let error = post("/v1/responses", own, &with(input("a"), json!({"store": true}))).json();
    assert_eq!(
        (&error["error"]["param"], &error["error"]["code"]),
        (&json!("store"), &json!("unsupported_parameter"))
    );
}

#[test]
fn responses_whole_and_streamed() {
    let server = Setup::default().start();
    let body = with(
        input("Tell me"),
        json!({
            "instructions": "Be.", "include": ["message.output_text.logprobs"], "top_logprobs": 2,
        }),
    );
    let whole = server.post("/v1/responses", &body);
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole = whole.json();
    record("openai.Response", &whole);
    let part = &whole["output"][0]["content"][0];
    let text = part["text"].as_str().unwrap();
    assert_eq!((&whole["status"], &whole["instructions"]), (&json!("incomplete"), &json!("Be.")));
    assert_eq!(whole["usage"]["output_tokens"], 8);
    let logprobs = part["logprobs"].as_array().unwrap();
    let tokens: String = logprobs.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!(tokens, text);
    assert!(logprobs.iter().all(|token| token["top_logprobs"].as_array().unwrap().len() == 2));

    let events = events(&server.post("/v1/responses", &with(body, json!({"stream": true}))));
    record("openai.events", &events.clone().into());
    assert_eq!(texts(&events, "response.output_text.delta", "/delta"), text);
    let last = events.last().unwrap();
    assert_eq!(last["type"], "response.incomplete");
    assert_eq!(last["response"]["output"][0]["content"], whole["output"][0]["content"]);

    // The answer goes back in, as the libraries send it.
    let mut items = vec![json!({"role": "user", "content": "Tell me"})];
    items.extend(whole["output"].as_array().unwrap().iter().cloned());
    items.push(json!({"role": "user", "content": "And then?"}));
    let more = server.post("/v1/responses", &with(input(""), json!({"input": items})));
    assert_eq!(more.status, 200, "{}", more.body);
    assert!(
        more.json()["usage"]["input_tokens"].as_u64() > whole["usage"]["input_tokens"].as_u64()
    );
}
