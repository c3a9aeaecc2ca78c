//! Calls of functions and thoughts, from the model's text to what clients read.

mod common;

use common::{Running, Setup};
use marlin_engine::EngineOptions;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const ARGUMENTS: &str = r#"{"at": "the \"evening\" sky", "times": 3, "deep": {"a": [1, 2]}}"#;

/// Thoughts, text, and a call; several where `calls` is larger.
fn answer(calls: usize) -> String {
    let call =
        format!("\n<tool_call>\n{{\"name\": \"look\", \"arguments\": {ARGUMENTS}}}\n</tool_call>");
    format!("<think>\nA sky.\n</think>\n\nI will look.{}", call.repeat(calls))
}

fn server() -> Running {
    let options = EngineOptions {
        max_context: Some(1024),
        num_blocks: Some(4 * 64),
        max_batch: 8,
        ..EngineOptions::default()
    };
    Setup { tools: true, options, ..Setup::default() }.start()
}

fn tool(name: &str) -> Value {
    let parameters = json!({"type": "object", "properties": {"at": {"enum": ["sky", "sea"]}},
        "required": ["at"], "additionalProperties": false});
    json!({"type": "function", "function": {"name": name, "parameters": parameters}})
}

fn chat(more: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Look"}], "max_tokens": 300,
        "temperature": 0, "tools": [tool("look"), tool("wait")]});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

fn whole(server: &Running, more: Value) -> Value {
    let response = server.post(CHAT, &chat(more.clone()));
    assert_eq!(response.status, 200, "{more}: {}", response.body);
    response.json()["choices"][0].clone()
}

/// What a client puts together from a stream.
#[derive(Debug, Default)]
struct Streamed {
    content: String,
    reasoning: String,
    /// Function, arguments and in how many pieces they came.
    calls: Vec<(String, String, usize)>,
    finish: Option<String>,
    error: Option<String>,
}

fn streamed(server: &Running, mut more: Value) -> Streamed {
    more["stream"] = json!(true);
    let response = server.post(CHAT, &chat(more));
    let events = response.events();
    let (done, chunks) = events.split_last().unwrap();
    assert_eq!(done, "[DONE]");
    let mut all = Streamed::default();
    for chunk in chunks {
        let chunk: Value = serde_json::from_str(chunk).unwrap();
        if let Some(error) = chunk["error"]["message"].as_str() {
            all.error = Some(error.to_owned());
            continue;
        }
        assert!(all.finish.is_none(), "a chunk after the end: {chunk}");
        let choice = &chunk["choices"][0];
        let delta = &choice["delta"];
        all.content += delta["content"].as_str().unwrap_or_default();
        all.reasoning += delta["reasoning_content"].as_str().unwrap_or_default();
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = call["index"].as_u64().unwrap() as usize;
            if let Some(name) = call["function"]["name"].as_str() {
                assert_eq!((index, &call["type"]), (all.calls.len(), &json!("function")));
                assert!(call["id"].as_str().unwrap().starts_with("call_"));
                all.calls.push((name.to_owned(), String::new(), 0));
            }
            let arguments = call["function"]["arguments"].as_str().unwrap();
            all.calls[index].1 += arguments;
            all.calls[index].2 += usize::from(!arguments.is_empty());
        }
        all.finish = choice["finish_reason"].as_str().map(str::to_owned);
    }
    all
}

fn functions(choice: &Value) -> Vec<(String, String)> {
    let calls = choice["message"]["tool_calls"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let call =
        |call: &Value| (text(&call["function"]["name"]), text(&call["function"]["arguments"]));
    calls.iter().map(call).collect()
}

#[test]
fn a_call_comes_whole_and_in_deltas() {
    let server = server();
    for calls in [1, 2] {
        server.says(&answer(calls));
        let choice = whole(&server, json!({}));
        let message = &choice["message"];
        assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
        assert_eq!(
            (&message["content"], &message["reasoning_content"]),
            (&json!("I will look."), &json!("A sky."))
        );
        let expected = vec![("look".to_owned(), ARGUMENTS.to_owned()); calls];
        assert_eq!(functions(&choice), expected);

        let all = streamed(&server, json!({}));
        assert_eq!((&*all.content, &*all.reasoning), ("I will look.", "A sky."));
        assert_eq!(all.finish.as_deref(), Some("tool_calls"), "{all:?}");
        let (names, pieces): (Vec<_>, Vec<_>) = all
            .calls
            .into_iter()
            .map(|(name, arguments, pieces)| ((name, arguments), pieces))
            .unzip();
        assert_eq!(names, expected);
        assert!(
            pieces.iter().all(|pieces| *pieces > 4),
            "a call comes while it is written: {pieces:?}"
        );
    }
}

#[test]
fn one_call_where_parallel_ones_are_not_wanted() {
    let server = server();
    server.says(&answer(3));
    let one = json!({"parallel_tool_calls": false});
    let choice = whole(&server, one.clone());
    assert_eq!(functions(&choice), [("look".to_owned(), ARGUMENTS.to_owned())]);
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], "I will look.", "no part of a marker leaks");
    let all = streamed(&server, one);
    assert_eq!(all.content, "I will look.");
    assert_eq!((all.calls.len(), &*all.calls[0].1), (1, ARGUMENTS), "{all:?}");
    assert_eq!(all.finish.as_deref(), Some("tool_calls"));
}

#[test]
fn a_model_that_would_rather_talk_has_to_call() {
    let server = server();
    server.says("I would rather not.");
    assert_eq!(whole(&server, json!({}))["message"]["content"], "I would rather not.");
    let named = json!({"type": "function", "function": {"name": "wait"}});
    for (choice, names) in [(json!("required"), &["look", "wait"][..]), (named, &["wait"])] {
        let more = json!({"tool_choice": choice, "parallel_tool_calls": false});
        let answer = whole(&server, more.clone());
        assert_eq!(answer["finish_reason"], "tool_calls", "{answer}");
        assert_eq!(answer["message"]["content"], Value::Null);
        let calls = functions(&answer);
        assert!(calls.len() == 1 && names.contains(&&*calls[0].0), "{calls:?}");
        let arguments: Value = serde_json::from_str(&calls[0].1).unwrap();
        assert!(["sky", "sea"].contains(&arguments["at"].as_str().unwrap()), "{arguments}");
        let all = streamed(&server, more);
        assert_eq!((&all.calls[0].0, &all.calls[0].1), (&calls[0].0, &calls[0].1));
        assert_eq!(all.finish.as_deref(), Some("tool_calls"));
    }
    server.says(&answer(1));
    let none = whole(&server, json!({"tool_choice": "none"}));
    assert_eq!((&none["finish_reason"], functions(&none).len()), (&json!("stop"), 0));
    assert!(none["message"]["content"].as_str().unwrap().contains("<tool_call>"));
}

/// A model that may call or talk is held to the schemas of strict functions, and to those alone.
#[test]
fn strict_functions_are_strict_where_the_model_may_choose() {
    let server = server();
    let strict = |name: &str, strict: bool| {
        let mut tool = tool(name);
        tool["function"]["strict"] = json!(strict);
        tool
    };
    let more = json!({"tools": [strict("look", true), strict("wait", false)]});
    let call = |name: &str| {
        format!(
            "Well.\n<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {{\"at\": \"moon\"}}}}\n</tool_call>"
        )
    };
    server.says("I would rather not <tool>.");
    assert_eq!(whole(&server, more.clone())["message"]["content"], "I would rather not <tool>.");
    server.says(&call("wait"));
    assert_eq!(
        functions(&whole(&server, more.clone())),
        [("wait".to_owned(), r#"{"at": "moon"}"#.to_owned())]
    );
    server.says(&call("look"));
    let lax = json!({"tools": [strict("look", false)]});
    assert_eq!(
        functions(&whole(&server, lax)),
        [("look".to_owned(), r#"{"at": "moon"}"#.to_owned())]
    );
    for stream in [false, true] {
        let (content, calls) = if stream {
            let all = streamed(&server, more.clone());
            assert_eq!(all.error, None);
            (
                all.content,
                all.calls.into_iter().map(|(name, arguments, _)| (name, arguments)).collect(),
            )
        } else {
            let choice = whole(&server, more.clone());
            (choice["message"]["content"].as_str().unwrap().to_owned(), functions(&choice))
        };
        assert_eq!(content, "Well.");
        let calls: Vec<(String, String)> = calls;
        assert_eq!((calls.len(), &*calls[0].0), (1, "look"), "{calls:?}");
        let arguments: Value = serde_json::from_str(&calls[0].1).unwrap();
        assert!(["sky", "sea"].contains(&arguments["at"].as_str().unwrap()), "{arguments}");
    }
    // What cannot be enforced is refused where it is to be.
    let mut odd = strict("look", true);
    odd["function"]["parameters"] = json!({"type": "object", "not": {}});
    let response = server.post(CHAT, &chat(json!({"tools": [odd]})));
    assert_eq!((response.status, &response.json()["error"]["param"]), (400, &json!("tools")));
}

/// A client that puts deltas together has a JSON object, or is told that it has not.
#[test]
fn half_a_call_is_never_passed_off_as_one() {
    let server = server();
    let half = "<tool_call>\n{\"name\": \"look\", \"arguments\": {\"at\": ";
    for broken in [format!("{half}]}}}}\n</tool_call> and so on"), format!("{half}\"sk")] {
        server.says(&broken);
        let choice = whole(&server, json!({}));
        assert_eq!((functions(&choice).len(), &choice["finish_reason"]), (0, &json!("stop")));
        assert_eq!(choice["message"]["content"], *broken, "whole it is text");
        let all = streamed(&server, json!({}));
        assert_eq!((all.finish, all.calls.len(), &*all.content), (None, 1, ""));
        assert!(all.error.unwrap().contains("broke off a call"));
    }
    // Cut off by its length it is a beginning, and the end says so.
    server.says(&answer(1));
    let mut begun = 0;
    for most in (20..120).step_by(5) {
        let all = streamed(&server, json!({"max_tokens": most}));
        let Some((_, arguments, _)) = all.calls.first() else { continue };
        let whole = *arguments == ARGUMENTS;
        let finish = all.finish.as_deref();
        assert!(finish == Some("length") || whole && finish == Some("tool_calls"), "{all:?}");
        assert!(all.error.is_none() && ARGUMENTS.starts_with(arguments), "{all:?}");
        begun += usize::from(!whole && !arguments.is_empty());
    }
    assert!(begun > 2, "{begun} were cut in their arguments");
}

#[test]
fn results_and_thoughts_come_back_as_messages() {
    let server = server();
    server.says("Blue.");
    let call = json!({"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{\"at\": \"sky\"}"}});
    let messages = json!([
        {"role": "user", "content": "Look"},
        {"role": "assistant", "content": null, "reasoning_content": "A sky.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "blue"},
    ]);
    let prompt = server.post("/apply-template", &json!({"messages": messages})).json();
    let prompt = prompt["prompt"].as_str().unwrap().to_owned();
    assert!(
        prompt.contains("<think>\nA sky.\n</think>") && prompt.contains("<|im_start|>tool\nblue"),
        "{prompt}"
    );
    assert!(prompt.contains(r#"{"name": "look", "arguments": {"at": "sky"}}"#), "{prompt}");
    assert_eq!(whole(&server, json!({"messages": messages}))["message"]["content"], "Blue.");
}

#[test]
fn other_protocols_stream_arguments_too() {
    let server = server();
    server.says(&answer(1));
    let function = tool("look")["function"].clone();
    let schema = &function["parameters"];
    let mut flat = function.clone();
    flat["type"] = json!("function");
    let responses = json!({"input": "Look", "tools": [flat], "max_output_tokens": 300, "temperature": 0, "stream": true});
    let messages = json!({"messages": [{"role": "user", "content": "Look"}], "max_tokens": 300, "temperature": 0,
        "tools": [{"name": "look", "input_schema": schema}], "stream": true});
    for (path, body, kind, field) in [
        ("/v1/responses", responses, "response.function_call_arguments.delta", "/delta"),
        ("/v1/messages", messages, "content_block_delta", "/delta/partial_json"),
    ] {
        let response = server.post(path, &body);
        assert_eq!(response.status, 200, "{path}: {}", response.body);
        let events: Vec<Value> =
            response.events().iter().map(|event| serde_json::from_str(event).unwrap()).collect();
        let deltas: Vec<&str> = events
            .iter()
            .filter(|event| event["type"] == kind)
            .filter_map(|event| event.pointer(field)?.as_str())
            .collect();
        assert!(deltas.len() > 4, "{path}: {deltas:?}");
        assert_eq!(deltas.concat(), ARGUMENTS, "{path}");
        let end = &events[events.len() - 1];
        let ended = match path {
            "/v1/responses" => {
                let output = end["response"]["output"].as_array().unwrap();
                assert_eq!(output.last().unwrap()["arguments"], ARGUMENTS);
                end["response"]["status"] == "completed"
            }
            _ => events[events.len() - 2]["delta"]["stop_reason"] == "tool_use",
        };
        assert!(ended, "{path}: {end}");
    }
}
