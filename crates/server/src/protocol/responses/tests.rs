use super::*;
use crate::answer::Piece;
use crate::protocol::Encoder;
use crate::protocol::tests::{
    agent, arguments, call, chat, content, events, last, likely, piece, reasoning, record,
    recorded, tokenizer, whole, with,
};
use marlin_text::ToolSet;
use std::sync::Arc;

fn parse(more: Value) -> Result<ResponsesRequest, ApiError> {
    ResponsesRequest::parse(Fields::of(with(json!({"model": "m", "input": "Hi"}), more), "")?)
}

fn weather() -> Value {
    json!({"type": "function", "name": "weather", "description": "Tells it.", "strict": true,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}})
}

#[test]
fn input_for_templates() {
    let user = json!({"role": "user", "content": "Hi"});
    let called = |id: &str| {
        json!({"type": "function_call", "call_id": id, "name": "weather",
        "arguments": "{\"city\": \"Rom\"}", "id": "fc_1", "status": "completed"})
    };
    let call = |id: &str| {
        json!({"id": id, "type": "function", "function": {
            "name": "weather", "arguments": {"city": "Rom"},
        }})
    };
    let told = |id: &str, text: &str| json!({"role": "tool", "content": text, "tool_call_id": id, "name": "weather"});
    let rows = [
        (json!({}), json!([user])),
        (json!({"instructions": "Be."}), json!([{"role": "system", "content": "Be."}, user])),
        (
            json!({"instructions": "Be.", "input": [
                {"role": "developer", "content": "Be brief."},
                {"type": "message", "role": "user", "content": [
                    {"type": "input_text", "text": "H", "prompt_cache_breakpoint": {"mode": "explicit"}},
                    {"type": "input_text", "text": "i"},
                ]},
            ]}),
            json!([{"role": "system", "content": "Be.\nBe brief."}, user]),
        ),
        // What our responses are made of goes back in.
        (
            json!({"input": [
                {"role": "user", "content": "Hi"},
                {"type": "reasoning", "id": "rs_1", "summary": [], "status": "completed",
                    "content": [{"type": "reasoning_text", "text": "Look."}], "encrypted_content": null},
                {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
                    "phase": null, "content": [
                        {"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []},
                    ]},
                called("a"), with(called("b"), json!({"caller": {"type": "direct"}})),
                {"type": "function_call_output", "call_id": "a", "output": "sun"},
                {"type": "function_call_output", "call_id": "b", "id": "fco_1", "output": [
                    {"type": "input_text", "text": "rain"},
                ]},
            ]}),
            json!([
                user,
                {"role": "assistant", "content": "I look.", "reasoning_content": "Look.",
                    "tool_calls": [call("a"), call("b")]},
                told("a", "sun"), told("b", "rain"),
            ]),
        ),
        // Summaries stand in for thoughts that are not there.
        (
            json!({"input": [
                {"type": "reasoning", "id": "rs_1", "summary": [
                    {"type": "summary_text", "text": "A"}, {"type": "summary_text", "text": "B"},
                ]},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
                {"role": "user", "content": "Hi"},
            ]}),
            json!([{"role": "assistant", "content": "No.", "reasoning_content": "A\nB"}, user]),
        ),
    ];
    for (body, expected) in rows {
        let request = parse(body.clone()).unwrap_or_else(|error| panic!("{body}: {error}"));
        assert_eq!(chat(&request.generate).0, expected, "{body}");
    }
}

#[test]
fn fields_of_the_protocol() {
    let request = parse(json!({
        "temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_output_tokens": 99, "stream": true,
        "stream_options": {"include_obfuscation": false}, "truncation": "auto", "store": false,
        "include": ["message.output_text.logprobs", "reasoning.encrypted_content"],
        "top_logprobs": 2, "metadata": {"a": "b"}, "user": "u", "background": false,
        "prompt_cache_key": "k", "service_tier": "auto", "max_tool_calls": 3, "conversation": null,
        "reasoning": {"effort": "high", "summary": "auto"}, "instructions": "Be.",
        "text": {"verbosity": "medium", "format": {"type": "text"}},
    }))
    .unwrap();
    assert!(request.stream && request.echo.logprobs && !request.echo.one_call);
    let choosing = &request.generate.choosing;
    assert_eq!((choosing.n, choosing.max_tokens, choosing.logprobs), (1, Some(99), Some(2)));
    assert!(choosing.truncate_prompt);
    let shown = format!("{choosing:?}");
    for part in ["temperature: Some(0.7)", "top_p: Some(0.9)", "top_k: Some(5)"] {
        assert!(shown.contains(part), "{shown}");
    }
    let extra = json!({"enable_thinking": true, "reasoning_effort": "high"});
    assert_eq!(json!(chat(&request.generate).2), extra);
    assert_eq!(
        Value::Object(request.echo.fields),
        json!({
            "instructions": "Be.", "max_output_tokens": 99, "max_tool_calls": 3,
            "metadata": {"a": "b"}, "parallel_tool_calls": true,
            "reasoning": {"effort": "high", "summary": null}, "temperature": 0.7,
            "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [],
            "top_logprobs": 2, "top_p": 0.9, "truncation": "auto", "user": "u",
            "safety_identifier": null, "prompt_cache_key": "k",
        })
    );
    let plain = parse(json!({})).unwrap();
    let choosing = &plain.generate.choosing;
    assert_eq!(
        (choosing.max_tokens, choosing.logprobs, choosing.truncate_prompt),
        (None, None, false)
    );
    let given = |more| parse(more).unwrap().generate.choosing;
    assert_eq!(given(json!({"include": ["message.output_text.logprobs"]})).logprobs, Some(0));
    assert!(given(json!({"truncate_prompt": true})).truncate_prompt);
}

#[test]
fn tools_and_choices() {
    let calls = |name: Option<&str>, parallel| {
        Some(Shape::Calls { name: name.map(str::to_owned), parallel })
    };
    // The model may choose, and the function is strict.
    let strict = Some(Shape::Strict { names: vec!["weather".into()], parallel: true });
    let named = json!({"type": "function", "name": "weather"});
    let rows = [
        (json!(null), 1, strict.clone()),
        (json!("auto"), 1, strict),
        (json!("required"), 1, calls(None, true)),
        (named, 1, calls(Some("weather"), true)),
        (json!("none"), 0, None),
    ];
    for (choice, told, shape) in rows {
        let request = parse(json!({"tools": [weather()], "tool_choice": choice})).unwrap();
        assert_eq!(chat(&request.generate).1.as_array().unwrap().len(), told, "{choice}");
        assert_eq!(request.generate.tools == ToolSet::None, told == 0, "{choice}");
        assert_eq!(request.generate.shape, shape, "{choice}");
        let expected = if choice.is_null() { json!("auto") } else { choice };
        assert_eq!(request.echo.fields["tool_choice"], expected);
        assert_eq!(request.echo.fields["tools"], json!([weather()]));
    }
    let one =
        json!({"tools": [weather()], "tool_choice": "required", "parallel_tool_calls": false});
    let request = parse(one).unwrap();
    assert_eq!(request.generate.shape, calls(None, false));
    assert!(request.echo.one_call);
    assert_eq!(
        chat(&request.generate).1,
        json!([{"type": "function", "function": {
            "name": "weather", "description": "Tells it.", "parameters": {
                "type": "object", "properties": {"city": {"type": "string"}},
            },
        }}])
    );
}

#[test]
fn formats() {
    let format =
        json!({"type": "json_schema", "name": "n", "schema": {"type": "array"}, "strict": true});
    let rows = [
        (json!({}), None),
        (json!({"text": {}}), None),
        (json!({"text": {"format": {"type": "text"}}}), None),
        (json!({"text": {"format": {"type": "json_object"}}}), Some(Shape::JsonObject)),
        (
            json!({"text": {"format": format}}),
            Some(Shape::JsonSchema { schema: json!({"type": "array"}), strict: true }),
        ),
        (
            json!({"grammar": {"type": "gbnf", "value": "root ::= \"a\""}}),
            Some(Shape::Gbnf("root ::= \"a\"".into())),
        ),
    ];
    for (body, shape) in rows {
        let request = parse(body.clone()).unwrap_or_else(|error| panic!("{body}: {error}"));
        let plain = json!({"type": "text"});
        let format = body.pointer("/text/format").unwrap_or(&plain);
        assert_eq!(request.echo.fields["text"], json!({"format": format}), "{body}");
        assert_eq!(request.generate.shape, shape, "{body}");
    }
}

#[test]
fn bodies_that_are_refused() {
    let item = |item: Value| json!({"input": [item]});
    let part = |part: Value| json!({"input": [{"role": "user", "content": [part]}]});
    let tool = |more: Value| json!({"tools": [with(weather(), more)]});
    let format = |format: Value| json!({"text": {"format": format}});
    let many: Map<String, Value> = (0..17).map(|i| (i.to_string(), "a".into())).collect();
    // The body, the field that is named, a part of what is said.
    let rows = [
        (json!({"input": null}), "input", "is missing"),
        (json!({"input": []}), "input", "1 to 4096 items"),
        (json!({"input": 5}), "input", "a string or a list"),
        (item(json!("a")), "input[0]", "an object"),
        (item(json!({"content": "a"})), "input[0].role", "is missing"),
        (item(json!({"role": "tool", "content": "a"})), "input[0].role", "developer"),
        (item(json!({"role": "user"})), "input[0].content", "is missing"),
        (item(json!({"role": "user", "content": "a", "x": 1})), "input[0].x", "unknown"),
        (
            part(json!({"type": "input_image", "image_url": "u"})),
            "input[0].content[0]",
            "only text",
        ),
        (part(json!({"type": "input_text"})), "input[0].content[0]", "is missing"),
        (
            item(json!({"type": "function_call", "name": "f", "arguments": "{}"})),
            "input[0].call_id",
            "is missing",
        ),
        (
            item(json!({"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"})),
            "input[0].arguments",
            "JSON text of an object",
        ),
        (
            item(json!({"type": "function_call_output", "call_id": "a", "output": "b"})),
            "input[0].call_id",
            "\"a\"",
        ),
        (
            item(json!({"type": "function_call_output", "call_id": "a"})),
            "input[0].output",
            "is missing",
        ),
        (
            item(json!({"type": "reasoning", "summary": [], "encrypted_content": "x"})),
            "input[0].encrypted_content",
            "leave the item out",
        ),
        (
            item(json!({"type": "reasoning", "content": [{"type": "text", "text": "x"}]})),
            "input[0].content[0].type",
            "reasoning_text",
        ),
        (
            item(json!({"type": "item_reference", "id": "msg_1"})),
            "input[0]",
            "send the item itself",
        ),
        (item(json!({"type": "web_search_call", "id": "ws_1"})), "input[0]", "web_search_call"),
        (json!({"previous_response_id": "resp_1"}), "previous_response_id", "whole conversation"),
        (json!({"conversation": "conv_1"}), "conversation", "whole conversation"),
        (json!({"store": true}), "store", "store: false"),
        (json!({"background": true}), "background", "nothing is stored"),
        (json!({"prompt": {"id": "pmpt_1"}}), "prompt", "send their text"),
        (
            json!({"context_management": [{"type": "compaction"}]}),
            "context_management",
            "not supported",
        ),
        (json!({"service_tier": "priority"}), "service_tier", "one tier"),
        (json!({"temperature": -1}), "temperature", "a number from"),
        (json!({"top_p": 2}), "top_p", "from 0 to 1"),
        (json!({"max_output_tokens": 0}), "max_output_tokens", "from 1"),
        (json!({"max_tokens": 5}), "max_tokens", "unknown"),
        (json!({"n": 2}), "n", "unknown"),
        (json!({"stream_options": {}}), "stream_options", "only with stream"),
        (json!({"truncation": "some"}), "truncation", "auto or disabled"),
        (
            json!({"include": ["file_search_call.results"]}),
            "include[0]",
            "message.output_text.logprobs",
        ),
        (json!({"top_logprobs": 2}), "top_logprobs", "only with include"),
        (json!({"top_logprobs": 21}), "top_logprobs", "from 0 to 20"),
        (json!({"metadata": {"a": 5}}), "metadata", "up to 16 strings"),
        (json!({"metadata": many}), "metadata", "up to 16 strings"),
        (json!({"metadata": {"a": "b".repeat(513)}}), "metadata", "up to 16 strings"),
        (tool(json!({"type": null})), "tools[0].type", "is missing"),
        (tool(json!({"type": "web_search"})), "tools[0]", "only functions"),
        (tool(json!({"name": null})), "tools[0].name", "is missing"),
        (tool(json!({"parameters": 5})), "tools[0]", "parameters"),
        (tool(json!({"function": {}})), "tools[0].function", "unknown"),
        (tool(json!({"defer_loading": true})), "tools[0].defer_loading", "every function"),
        (json!({"tool_choice": "required"}), "tool_choice", "no such function"),
        (json!({"tool_choice": "some"}), "tool_choice", "none, auto, required"),
        (
            json!({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}),
            "tool_choice",
            "none, auto, required",
        ),
        (json!({"reasoning": {"effort": "huge"}}), "reasoning.effort", "medium"),
        (json!({"reasoning": {"summary": "long"}}), "reasoning.summary", "concise"),
        (json!({"reasoning": {"mode": "pro"}}), "reasoning.mode", "one mode"),
        (json!({"text": {"verbosity": "low"}}), "text.verbosity", "instructions"),
        (format(json!({"type": "xml"})), "text.format.type", "json_schema"),
        (format(json!({"type": "json_schema", "name": "a"})), "text.format.schema", "is missing"),
        (format(json!({"type": "json_schema", "schema": {}})), "text.format.name", "is missing"),
        (
            format(json!({"type": "json_schema", "name": "a", "schema": 5})),
            "text.format.schema",
            "a JSON schema",
        ),
        (
            with(
                format(json!({"type": "json_object"})),
                json!({"grammar": {"type": "regex", "value": "a"}}),
            ),
            "grammar",
            "only without",
        ),
    ];
    for (body, param, part) in rows {
        let error = parse(body.clone()).err().unwrap_or_else(|| panic!("{body} was taken"));
        assert_eq!(error.param.as_deref(), Some(param), "{body}: {error}");
        assert!(error.message.contains(part), "{body}: {error}");
    }
}

fn echo(more: Value) -> Echo {
    parse(more).unwrap().echo
}

/// Ids and times as they always are, so that the rest can be compared.
fn plain(value: &mut Value) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(plain),
        Value::Object(map) => {
            for (key, value) in map {
                match key.as_str() {
                    "id" | "item_id" | "call_id" => {
                        let id = value.as_str().unwrap();
                        *value = id.split_inclusive('_').next().unwrap().into();
                    }
                    "created_at" | "completed_at" if value.is_number() => *value = 1.into(),
                    _ => plain(value),
                }
            }
        }
        _ => {}
    }
}

#[test]
fn whole_answers() {
    let tools = json!({"tools": [weather()], "instructions": "Be.", "metadata": {"a": "b"},
        "reasoning": {"effort": "low"}, "temperature": 0.1});
    let mut response = response_of("m", &tokenizer(), echo(tools), &whole(agent()));
    record("openai.Response", &response);
    let id = response["output"][2]["call_id"].clone();
    assert_ne!(id, response["output"][3]["call_id"]);
    plain(&mut response);
    let (done, text) = ("completed", "reasoning_text");
    assert_eq!(
        response,
        json!({
            "id": "resp_", "object": "response", "created_at": 1, "completed_at": 1,
            "status": "completed", "background": false, "error": null, "incomplete_details": null,
            "model": "m",
            "output": [
                {"id": "rs_", "type": "reasoning", "status": done, "summary": [],
                    "content": [{"type": text, "text": "Hm, yes."}], "encrypted_content": null},
                {"id": "msg_", "type": "message", "status": done, "role": "assistant", "content": [
                    {"type": "output_text", "text": "I will look.", "annotations": [], "logprobs": []},
                ]},
                {"id": "fc_", "type": "function_call", "status": done, "call_id": "call_",
                    "name": "look", "arguments": "{\"at\": \"sky\"}"},
                {"id": "fc_", "type": "function_call", "status": done, "call_id": "call_",
                    "name": "wait", "arguments": "{}"},
            ],
            "previous_response_id": null, "store": false,
            "usage": {
                "input_tokens": 10,
                "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
                "output_tokens": 7, "output_tokens_details": {"reasoning_tokens": 3},
                "total_tokens": 17,
            },
            "instructions": "Be.", "max_output_tokens": null, "max_tool_calls": null,
            "metadata": {"a": "b"}, "parallel_tool_calls": true,
            "reasoning": {"effort": "low", "summary": null}, "temperature": 0.1,
            "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [weather()],
            "top_logprobs": 0, "top_p": null, "truncation": "disabled", "user": null,
            "safety_identifier": null, "prompt_cache_key": null,
        })
    );

    let one = echo(json!({"parallel_tool_calls": false}));
    let response = response_of("m", &tokenizer(), one, &whole(agent()));
    assert_eq!(response["output"].as_array().unwrap().len(), 3);

    let cut = whole(vec![piece(&[reasoning("a")]), piece(&[content("b")]), last(Finish::Length)]);
    let schema = json!({"text": {"format": {"type": "json_schema", "name": "n", "schema": {}}}});
    let response = response_of("m", &tokenizer(), echo(schema), &cut);
    record("openai.Response", &response);
    assert_eq!(response["status"], "incomplete");
    assert_eq!(response["incomplete_details"], json!({"reason": "max_output_tokens"}));
    assert_eq!(response["completed_at"], Value::Null);
    assert_eq!(response["output"][0]["status"], "completed");
    assert_eq!(response["output"][1]["status"], "incomplete");

    let nothing =
        response_of("m", &tokenizer(), echo(json!({})), &whole(vec![last(Finish::Length)]));
    record("openai.Response", &nothing);
    assert_eq!(nothing["output"], json!([]));
}

fn stream(echo: Echo, pieces: Vec<Piece>) -> Vec<u8> {
    let tokenizer = echo.logprobs.then(|| Arc::new(tokenizer()));
    let (mut stream, mut out) = (Stream::of("m", tokenizer, echo), Vec::new());
    stream.begin(&mut out);
    pieces.into_iter().for_each(|piece| stream.piece(piece, &mut out));
    stream.end(&mut out);
    out
}

/// Events in short: a type without its prefix, the item, and what is new.
fn short(events: &[(String, Value)]) -> Vec<String> {
    let short = |(name, data): &(String, Value)| {
        let mut line = name.strip_prefix("response.").unwrap_or(name).to_owned();
        if let Some(index) = data["output_index"].as_u64() {
            line = format!("{index} {line}");
        }
        for key in ["delta", "text", "arguments"] {
            if let Some(text) = data[key].as_str() {
                line = format!("{line} {text}");
            }
        }
        line
    };
    events.iter().map(short).collect()
}

#[test]
fn streamed_answers() {
    let events = recorded("openai.events", &stream(echo(json!({"tools": [weather()]})), agent()));
    let look = "{\"at\": \"sky\"}";
    assert_eq!(
        short(&events),
        [
            "created",
            "in_progress",
            "0 output_item.added",
            "0 content_part.added",
            "0 reasoning_text.delta Hm",
            "0 reasoning_text.delta , yes.",
            "0 reasoning_text.done Hm, yes.",
            "0 content_part.done",
            "0 output_item.done",
            "1 output_item.added",
            "1 content_part.added",
            "1 output_text.delta I will ",
            "1 output_text.delta look.",
            "1 output_text.done I will look.",
            "1 content_part.done",
            "1 output_item.done",
            "2 output_item.added",
            "2 function_call_arguments.delta {\"at\": ",
            "2 function_call_arguments.delta \"sky\"}",
            &format!("2 function_call_arguments.done {look}"),
            "2 output_item.done",
            "3 output_item.added",
            "3 function_call_arguments.delta {}",
            "3 function_call_arguments.done {}",
            "3 output_item.done",
            "completed",
        ]
    );
    for (i, (_, data)) in events.iter().enumerate() {
        assert_eq!(data["sequence_number"], i);
    }
    // An item has one id from its beginning to the response that holds it.
    let response = &events[25].1["response"];
    for (index, item) in response["output"].as_array().unwrap().iter().enumerate() {
        let own = events.iter().filter(|(_, data)| data["output_index"] == index);
        for (_, data) in own {
            let id = data.get("item_id").unwrap_or(&data["item"]["id"]);
            assert_eq!(*id, item["id"]);
        }
    }
    assert_eq!(events[0].1["response"]["id"], response["id"]);
    assert_eq!(events[0].1["response"]["output"], json!([]));
    assert_eq!(events[2].1["item"]["content"], json!([]));

    // What is streamed is what is given out whole.
    let mut streamed = response.clone();
    let tools = echo(json!({"tools": [weather()]}));
    let mut whole = response_of("m", &tokenizer(), tools, &whole(agent()));
    plain(&mut streamed);
    plain(&mut whole);
    assert_eq!(streamed, whole);
}

#[test]
fn streams_that_end_early() {
    let cut = vec![piece(&[content("a")]), last(Finish::Length)];
    let cut = recorded("openai.events", &stream(echo(json!({})), cut));
    let (name, data) = cut.last().unwrap();
    assert_eq!(name, "response.incomplete");
    assert_eq!(data["response"]["output"][0]["status"], "incomplete");
    assert_eq!(data["response"]["incomplete_details"]["reason"], "max_output_tokens");

    let failed = Finish::Failed(ApiError::internal("broken"));
    let pieces = vec![piece(&[content("a")]), last(failed)];
    let failed = recorded("openai.events", &stream(echo(json!({})), pieces));
    let names = short(&failed);
    assert_eq!(names[names.len() - 3..], ["0 output_item.done", "error", "failed"]);
    let error = &failed[failed.len() - 2].1;
    assert_eq!((&error["code"], &error["message"]), (&json!("server_error"), &json!("broken")));
    assert_eq!(error["error"]["message"], "broken");
    let response = &failed[failed.len() - 1].1["response"];
    assert_eq!(response["status"], "failed");
    assert_eq!(response["error"], json!({"code": "server_error", "message": "broken"}));
    assert_eq!(response["usage"], Value::Null);

    let one = echo(json!({"parallel_tool_calls": false}));
    let pieces = vec![
        piece(&[call(0, "f"), arguments(0, "{}"), call(1, "g"), arguments(1, "{}")]),
        piece(&[content("a")]),
        piece(&[arguments(0, "late")]),
        last(Finish::ToolCalls),
    ];
    let one = events(&stream(one, pieces));
    let kinds: Vec<_> = one.last().unwrap().1["response"]["output"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| item["type"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(kinds, ["function_call", "message"]);
}

#[test]
fn logprobs_of_messages() {
    let asked = || echo(json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2}));
    let token = |byte: char| u32::from(byte);
    let pieces = || {
        vec![
            likely(token('<'), &[]),
            likely(token('t'), &[reasoning("t")]),
            likely(token('>'), &[]),
            likely(token('a'), &[content("a")]),
            likely(0xC3, &[]),
            likely(0xA9, &[content("é")]),
            likely(257, &[]),
            last(Finish::Stop { by: None }),
        ]
    };
    let response = response_of("m", &tokenizer(), asked(), &whole(pieces()));
    record("openai.Response", &response);
    let logprobs = &response["output"][1]["content"][0]["logprobs"];
    let first = json!({"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [
        {"token": "a", "logprob": -0.5, "bytes": [97]}, {"token": "x", "logprob": -2.0, "bytes": [120]},
    ]});
    assert_eq!(logprobs[0], first);
    let bytes = |logprobs: &Value| -> Vec<u64> {
        let tokens = logprobs.as_array().unwrap().iter();
        tokens
            .flat_map(|token| token["bytes"].as_array().unwrap())
            .map(|b| b.as_u64().unwrap())
            .collect()
    };
    assert_eq!(bytes(logprobs), [97, 0xC3, 0xA9]);

    let events = recorded("openai.events", &stream(asked(), pieces()));
    let deltas = events.iter().filter(|(name, _)| name == "response.output_text.delta");
    let deltas: Vec<_> = deltas.map(|(_, data)| bytes(&data["logprobs"])).collect();
    assert_eq!(deltas, [vec![97], vec![0xC3, 0xA9]]);
    let done = events.iter().find(|(name, _)| name == "response.output_text.done").unwrap();
    assert_eq!(&done.1["logprobs"], logprobs);
    let last = &events.last().unwrap().1["response"];
    assert_eq!(&last["output"][1]["content"][0]["logprobs"], logprobs);
}
