use super::*;
use crate::protocol::tests::{agent, arguments, call, last, piece, reasoning, whole};

fn message_of(value: Value) -> Value {
    message(value, "messages[0]").unwrap()
}

#[test]
fn earlier_calls_and_thoughts_for_templates() {
    let function = |arguments: Value| json!({"name": "look", "arguments": arguments});
    let call = |arguments: Value| json!({"id": "call_1", "type": "function", "function": function(arguments)});
    let turn = |more: Value| {
        let mut turn = json!({"role": "assistant", "content": null});
        for (key, value) in more.as_object().unwrap() {
            turn[key] = value.clone();
        }
        turn
    };
    let read =
        json!({"role": "assistant", "content": "", "tool_calls": [call(json!({"at": "sky"}))]});
    // As text, as an object, and as a chunk of a stream has them.
    assert_eq!(message_of(turn(json!({"tool_calls": [call(json!("{\"at\": \"sky\"}"))]}))), read);
    assert_eq!(message_of(turn(json!({"tool_calls": [call(json!({"at": "sky"}))]}))), read);
    let mut indexed = call(json!({"at": "sky"}));
    indexed["index"] = json!(0);
    assert_eq!(message_of(turn(json!({"tool_calls": [indexed]}))), read);
    assert_eq!(message_of(turn(json!({"tool_calls": []}))).get("tool_calls"), None);
    for name in ["reasoning_content", "reasoning"] {
        let mut thought = json!({"content": "Yes."});
        thought[name] = json!("Hm");
        assert_eq!(message_of(turn(thought))["reasoning_content"], "Hm", "{name}");
    }
    let user = json!({"role": "user", "content": "a", "reasoning_content": "b"});
    assert_eq!(message_of(user).get("reasoning_content"), None, "only answers are thought about");

    let refused = |value: Value| message(value, "messages[0]").unwrap_err().param.unwrap();
    for (more, param) in [
        (json!({"tool_calls": {}}), "messages[0].tool_calls"),
        (json!({"tool_calls": [{"id": "1"}]}), "messages[0].tool_calls[0].function"),
        (json!({"tool_calls": [call(json!("{"))]}), "messages[0].tool_calls[0].function.arguments"),
        (
            json!({"tool_calls": [{"type": "custom", "function": {}}]}),
            "messages[0].tool_calls[0].type",
        ),
        (json!({"reasoning_content": 1}), "messages[0].reasoning_content"),
        (json!({"function_call": {"name": "f"}}), "messages[0].function_call"),
    ] {
        assert_eq!(refused(turn(more.clone())), param, "{more}");
    }
}

#[test]
fn an_answer_with_thoughts_and_calls() {
    let mut cut = whole(vec![piece(&[call(0, "wait"), arguments(0, "{}")]), last(Finish::Length)]);
    cut.content = "So".into();
    let response = response_of("m", None, &[whole(agent()), cut]);
    let choice = &response["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    let message = &choice["message"];
    assert_eq!(message["content"], "I will look.");
    assert_eq!(message["reasoning_content"], "Hm, yes.");
    let calls = message["tool_calls"].as_array().unwrap();
    assert_eq!(calls[0]["function"], json!({"name": "look", "arguments": "{\"at\": \"sky\"}"}));
    assert_eq!(calls[1]["function"], json!({"name": "wait", "arguments": "{}"}));
    assert_ne!(calls[0]["id"], calls[1]["id"]);
    assert_eq!(calls[0]["type"], "function");
    let details = &response["usage"]["completion_tokens_details"];
    assert_eq!(details["reasoning_tokens"], 3, "the opening marker among them");
    assert_eq!(response["choices"][1]["finish_reason"], "length");
    let only_calls =
        whole(vec![piece(&[call(0, "wait"), arguments(0, "{}")]), last(Finish::ToolCalls)]);
    assert_eq!(
        response_of("m", None, &[only_calls])["choices"][0]["message"]["content"],
        Value::Null
    );
}

#[test]
fn a_stream_with_thoughts_and_calls() {
    let mut out = Vec::new();
    let mut stream = Stream::of("m", None, 1, true);
    agent().into_iter().for_each(|piece| stream.piece(piece, &mut out));
    stream.end(&mut out);
    let text = String::from_utf8(out).unwrap();
    let events: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let (done, chunks) = events.split_last().unwrap();
    assert_eq!(*done, "[DONE]");
    let chunks: Vec<Value> = chunks.iter().map(|c| serde_json::from_str(c).unwrap()).collect();
    let deltas: Vec<&Value> = chunks.iter().map(|c| &c["choices"][0]["delta"]).collect();
    let joined = |field: &str| deltas.iter().filter_map(|d| d[field].as_str()).collect::<String>();
    assert_eq!(deltas[0], &json!({"role": "assistant", "content": ""}));
    assert_eq!(
        (joined("reasoning_content"), joined("content")),
        ("Hm, yes.".into(), "I will look.".into())
    );
    let calls: Vec<&Value> = deltas.iter().filter_map(|d| d["tool_calls"].get(0)).collect();
    let of = |index: usize| calls.iter().filter(move |call| call["index"] == index);
    for (index, name, pieces) in
        [(0, "look", vec!["{\"at\": ", "\"sky\"}"]), (1, "wait", vec!["{}"])]
    {
        let mut calls = of(index);
        let first = calls.next().unwrap();
        assert_eq!(first["function"], json!({"name": name, "arguments": ""}));
        assert!(first["id"].as_str().unwrap().starts_with("call_") && first["type"] == "function");
        let rest: Vec<&str> = calls.map(|c| c["function"]["arguments"].as_str().unwrap()).collect();
        assert_eq!(rest, pieces);
    }
    let end = &chunks[chunks.len() - 2];
    assert_eq!(end["choices"][0]["finish_reason"], "tool_calls");
    let usage = &chunks[chunks.len() - 1]["usage"];
    assert_eq!(usage["completion_tokens_details"]["reasoning_tokens"], 3);

    let mut out = Vec::new();
    let mut stream = Stream::of("m", None, 1, false);
    stream.piece(piece(&[reasoning("Hm")]), &mut out);
    let gone = ApiError::internal("gone");
    stream.piece(last(Finish::Failed(gone)), &mut out);
    let text = String::from_utf8(out).unwrap();
    assert!(
        text.contains("\"error\":{\"message\":\"gone\"") && !text.contains("\"stop\""),
        "{text}"
    );
}
