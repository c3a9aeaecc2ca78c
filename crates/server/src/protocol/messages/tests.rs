use super::*;
use crate::protocol::tests::{
    agent, arguments, call, chat, content, last, piece, reasoning, record, recorded, whole, with,
};
use marlin_text::ToolSet;
use std::time::Duration;

fn parse(more: Value) -> Result<MessagesRequest, ApiError> {
    let user = json!([{"role": "user", "content": "Hi"}]);
    let base = json!({"model": "m", "max_tokens": 64, "messages": user});
    MessagesRequest::parse(Fields::of(with(base, more), "")?)
}

fn weather() -> Value {
    json!({"name": "weather", "description": "Tells it.", "input_schema": {
        "type": "object", "properties": {"city": {"type": "string"}},
    }})
}

#[test]
fn messages_for_templates() {
    let user = json!({"role": "user", "content": "Hi"});
    let ephemeral = json!({"type": "ephemeral", "ttl": "1h"});
    let used =
        |id: &str| json!({"type": "tool_use", "id": id, "name": "weather", "input": {"city": id}});
    let result =
        |id: &str, more: Value| with(json!({"type": "tool_result", "tool_use_id": id}), more);
    let called = |id: &str| {
        json!({"id": id, "type": "function", "function": {
            "name": "weather", "arguments": {"city": id},
        }})
    };
    let told = |id: &str, text: &str| json!({"role": "tool", "content": text, "tool_call_id": id, "name": "weather"});
    let rows = [
        (json!({}), json!([user])),
        (json!({"system": "Be."}), json!([{"role": "system", "content": "Be."}, user])),
        (
            json!({"system": [
                {"type": "text", "text": "A", "cache_control": ephemeral},
                {"type": "text", "text": "B", "citations": null},
            ]}),
            json!([{"role": "system", "content": "A\nB"}, user]),
        ),
        (
            json!({"messages": [
                {"role": "user", "content": "A"},
                {"role": "user", "content": [{"type": "text", "text": "B"}, {"type": "text", "text": "C"}]},
                {"role": "assistant", "content": "D"},
                {"role": "assistant", "content": []},
                {"role": "user", "content": "E"},
            ]}),
            json!([
                {"role": "user", "content": "A\nB\nC"},
                {"role": "assistant", "content": "D"},
                {"role": "user", "content": "E"},
            ]),
        ),
        (
            json!({"messages": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "Look.", "signature": ""},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "I look.", "citations": null},
                    used("a"), with(used("b"), json!({"cache_control": ephemeral})), used("c"), used("d"),
                ]},
                {"role": "user", "content": [
                    result("a", json!({"content": "sun"})),
                    result("b", json!({"content": [{"type": "text", "text": "rain"}], "is_error": false})),
                    result("c", json!({"content": "gone", "is_error": true, "cache_control": ephemeral})),
                    result("d", json!({"content": "ERROR 5", "is_error": true})),
                    {"type": "text", "text": "And?"},
                ]},
            ]}),
            json!([
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": "I look.", "reasoning_content": "Look.",
                    "tool_calls": [called("a"), called("b"), called("c"), called("d")]},
                told("a", "sun"), told("b", "rain"), told("c", "Error: gone"), told("d", "ERROR 5"),
                {"role": "user", "content": "And?"},
            ]),
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
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "stop_sequences": ["END", "."],
        "stream": true, "metadata": {"user_id": "u"}, "service_tier": "auto",
        "cache_control": {"type": "ephemeral"}, "speed": "standard", "seed": null,
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "chat_template_kwargs": {"mood": "mild"}, "priority": 1, "timeout": 5,
    }))
    .unwrap();
    assert!(request.stream && !request.one_call);
    assert_eq!(request.model.as_deref(), Some("m"));
    let choosing = &request.generate.choosing;
    assert_eq!((choosing.n, choosing.max_tokens), (1, Some(64)));
    assert_eq!(choosing.stop, ["END", "."]);
    let shown = format!("{choosing:?}");
    for part in ["temperature: Some(0.5)", "top_p: Some(0.9)", "top_k: Some(40)"] {
        assert!(shown.contains(part), "{shown}");
    }
    assert_eq!(request.generate.tools, ToolSet::None);
    assert_eq!(chat(&request.generate).2["mood"], "mild");
}

#[test]
fn tools_and_choices() {
    let calls = |name: Option<&str>, parallel| {
        Some(Shape::Calls { name: name.map(str::to_owned), parallel })
    };
    // The choice, how many tools the model is told of, the shape, whether one call is given out.
    let rows = [
        (json!(null), 1, None, false),
        (json!({"type": "auto"}), 1, None, false),
        (json!({"type": "auto", "disable_parallel_tool_use": true}), 1, None, true),
        (json!({"type": "any"}), 1, calls(None, true), false),
        (json!({"type": "any", "disable_parallel_tool_use": true}), 1, calls(None, false), true),
        (json!({"type": "tool", "name": "weather"}), 1, calls(Some("weather"), true), false),
        (json!({"type": "none"}), 0, None, false),
    ];
    for (choice, told, shape, one_call) in rows {
        let request = parse(json!({"tools": [weather()], "tool_choice": choice})).unwrap();
        let (_, tools, _) = chat(&request.generate);
        assert_eq!(tools.as_array().unwrap().len(), told, "{choice}");
        assert_eq!((request.generate.shape, request.one_call), (shape, one_call), "{choice}");
        assert_eq!(request.generate.tools == ToolSet::None, told == 0, "{choice}");
    }
    let own = json!({
        "type": "custom", "cache_control": {"type": "ephemeral"}, "strict": true,
        "eager_input_streaming": true, "defer_loading": false, "allowed_callers": ["direct"],
    });
    let request = parse(json!({"tools": [with(weather(), own)]})).unwrap();
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
fn thinking_and_output() {
    let rows = [
        (json!({}), json!({}), None),
        (
            json!({"thinking": {"type": "enabled", "budget_tokens": 32}}),
            json!({"enable_thinking": true}),
            None,
        ),
        (
            json!({"thinking": {"type": "adaptive", "display": "summarized"}}),
            json!({"enable_thinking": true}),
            None,
        ),
        (json!({"thinking": {"type": "disabled"}}), json!({"enable_thinking": false}), None),
        (json!({"output_config": {"effort": "max"}}), json!({"reasoning_effort": "max"}), None),
        (
            json!({"output_config": {"format": {"type": "json_schema", "schema": {"type": "array"}}}}),
            json!({}),
            Some(Shape::JsonSchema { schema: json!({"type": "array"}), strict: true }),
        ),
        (
            json!({"grammar": {"type": "regex", "value": "a+"}}),
            json!({}),
            Some(Shape::Regex("a+".into())),
        ),
    ];
    for (body, extra, shape) in rows {
        let request = parse(body.clone()).unwrap_or_else(|error| panic!("{body}: {error}"));
        assert_eq!(json!(chat(&request.generate).2), extra, "{body}");
        assert_eq!(request.generate.shape, shape, "{body}");
    }
}

#[test]
fn bodies_that_are_refused() {
    let message =
        |role: &str, content: Value| json!({"messages": [{"role": role, "content": content}]});
    let block = |role: &str, block: Value| message(role, json!([block]));
    let tool = |more: Value| json!({"tools": [with(weather(), more)]});
    let image =
        json!({"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}});
    let result = |content: Value| {
        json!({"messages": [
            {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": content}]},
        ]})
    };
    // The body, the field that is named, a part of what is said.
    let rows = [
        (json!({"max_tokens": null}), "max_tokens", "is missing"),
        (json!({"max_tokens": 0}), "max_tokens", "from 1 to"),
        (json!({"messages": null}), "messages", "is missing"),
        (json!({"messages": []}), "messages", "at least one"),
        (json!({"messages": [1]}), "messages[0]", "an object"),
        (json!({"messages": [{"content": "a"}]}), "messages[0].role", "is missing"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content", "is missing"),
        (message("tool", json!("a")), "messages[0].role", "user, assistant or system"),
        (message("user", json!(1)), "messages[0].content", "a string or a list"),
        (message("assistant", json!("The answer is (")), "messages", "goes on from it"),
        (block("user", json!({"text": "a"})), "messages[0].content[0].type", "is missing"),
        (block("user", json!({"type": "text"})), "messages[0].content[0].text", "is missing"),
        (
            block("user", json!({"type": "text", "text": "a", "x": 1})),
            "messages[0].content[0].x",
            "unknown",
        ),
        (block("user", image.clone()), "messages[0].content[0]", "\"image\""),
        (
            block("user", json!({"type": "tool_use", "id": "a", "name": "f", "input": {}})),
            "messages[0].content[0]",
            "role user",
        ),
        (
            block("system", json!({"type": "thinking", "thinking": "a"})),
            "messages[0].content[0]",
            "role system",
        ),
        (
            block("assistant", json!({"type": "tool_use", "id": "a", "name": "f", "input": []})),
            "messages[0].content[0].input",
            "an object",
        ),
        (
            block("assistant", json!({"type": "tool_use", "id": "a", "name": "f"})),
            "messages[0].content[0].input",
            "is missing",
        ),
        (
            block("user", json!({"type": "tool_result", "tool_use_id": "a"})),
            "messages[0].content[0].tool_use_id",
            "no",
        ),
        (result(json!([image])), "messages[1].content[0].content[0]", "only text"),
        (result(json!(5)), "messages[1].content[0].content", "a string or a list"),
        (json!({"system": 5}), "system", "a string or a list"),
        (json!({"system": [{"type": "image"}]}), "system[0]", "only text"),
        (json!({"temperature": 1.5}), "temperature", "from 0 to 1"),
        (json!({"top_p": -1}), "top_p", "from 0 to 1"),
        (json!({"top_k": -1}), "top_k", "whole number"),
        (json!({"stop_sequences": [""]}), "stop_sequences", "1 to 256 bytes"),
        (json!({"stream": "yes"}), "stream", "true or false"),
        (tool(json!({"name": null})), "tools[0].name", "is missing"),
        (tool(json!({"input_schema": null})), "tools[0].input_schema", "is missing"),
        (tool(json!({"input_schema": true})), "tools[0].input_schema", "an object"),
        (tool(json!({"type": "bash_20250124"})), "tools[0].type", "only custom"),
        (tool(json!({"name": "a b"})), "tools[0]", "no name of a function"),
        (tool(json!({"input_examples": [{}]})), "tools[0].input_examples", "description"),
        (tool(json!({"defer_loading": true})), "tools[0].defer_loading", "every tool"),
        (tool(json!({"parameters": {}})), "tools[0].parameters", "unknown"),
        (json!({"tool_choice": "auto"}), "tool_choice", "an object"),
        (json!({"tool_choice": {"type": "some"}}), "tool_choice.type", "auto, any"),
        (json!({"tool_choice": {"type": "any"}}), "tool_choice", "no such function"),
        (json!({"tool_choice": {"type": "tool"}}), "tool_choice.name", "is missing"),
        (
            with(tool(json!({})), json!({"tool_choice": {"type": "tool", "name": "f"}})),
            "tool_choice",
            "no such function",
        ),
        (json!({"tool_choice": {"type": "auto", "name": "f"}}), "tool_choice.name", "unknown"),
        (json!({"thinking": true}), "thinking", "an object"),
        (json!({"thinking": {"type": "some"}}), "thinking.type", "enabled"),
        (json!({"thinking": {"type": "enabled"}}), "thinking.budget_tokens", "is missing"),
        (
            json!({"thinking": {"type": "enabled", "budget_tokens": 64}}),
            "thinking.budget_tokens",
            "max_tokens",
        ),
        (
            json!({"thinking": {"type": "disabled", "budget_tokens": 5}}),
            "thinking.budget_tokens",
            "unknown",
        ),
        (
            json!({"thinking": {"type": "adaptive", "display": "omitted"}}),
            "thinking.display",
            "shown",
        ),
        (json!({"output_config": {"effort": "huge"}}), "output_config.effort", "low"),
        (
            json!({"output_config": {"format": {"type": "xml"}}}),
            "output_config.format.type",
            "json_schema",
        ),
        (
            json!({"output_config": {"format": {"type": "json_schema"}}}),
            "output_config.format.schema",
            "is missing",
        ),
        (
            json!({"output_config": {"format": {"type": "json_schema", "schema": {}}},
            "grammar": {"type": "regex", "value": "a"}}),
            "grammar",
            "only without",
        ),
        (json!({"metadata": {"name": "a"}}), "metadata.name", "unknown"),
        (json!({"metadata": {"user_id": 5}}), "metadata.user_id", "a string"),
        (json!({"service_tier": "priority"}), "service_tier", "one tier"),
        (json!({"mcp_servers": [{}]}), "mcp_servers", "calls no tools"),
        (json!({"container": "c"}), "container", "no containers"),
        (
            json!({"context_management": {"edits": [{"type": "compact_20260112"}]}}),
            "context_management",
            "messages you send",
        ),
        (
            json!({"chat_template_kwargs": {"messages": []}}),
            "chat_template_kwargs.messages",
            "set by the server",
        ),
        (json!({"n": 2}), "n", "unknown"),
        (json!({"logprobs": true}), "logprobs", "unknown"),
        (json!({"maxtokens": 2}), "maxtokens", "unknown"),
    ];
    for (body, param, part) in rows {
        let error = parse(body.clone()).err().unwrap_or_else(|| panic!("{body} was taken"));
        assert_eq!(error.param.as_deref(), Some(param), "{body}: {error}");
        assert!(error.message.contains(part), "{body}: {error}");
        assert_eq!(error_body(&error)["error"]["type"], "invalid_request_error", "{body}");
    }
}

#[test]
fn counting_needs_no_max_tokens() {
    let body = json!({
        "model": "m", "messages": [{"role": "user", "content": "Hi"}], "tools": [weather()],
        "thinking": {"type": "enabled", "budget_tokens": 2048}, "system": "Be.",
    });
    let count = |body| MessagesRequest::parse_for_count(Fields::of(body, "").unwrap());
    let request = count(body.clone()).unwrap();
    assert_eq!(request.generate.choosing.max_tokens, None);
    assert_eq!(chat(&request.generate).0.as_array().unwrap().len(), 2);
    let error = count(with(body, json!({"messages": null}))).err().unwrap();
    assert_eq!(error.param.as_deref(), Some("messages"));
    record("anthropic.MessageTokensCount", &count_response(12));
    assert_eq!(count_response(12), json!({"input_tokens": 12}));
}

#[test]
fn whole_answers() {
    let response = message_of("m", &whole(agent()), false);
    record("anthropic.Message", &response);
    let id = |value: &Value, prefix: &str| assert!(value.as_str().unwrap().starts_with(prefix));
    id(&response["id"], "msg_");
    id(&response["content"][2]["id"], "toolu_");
    assert_ne!(response["content"][2]["id"], response["content"][3]["id"]);
    let mut without_ids = response;
    without_ids["id"] = "".into();
    without_ids["content"][2]["id"] = "".into();
    without_ids["content"][3]["id"] = "".into();
    assert_eq!(
        without_ids,
        json!({
            "id": "", "type": "message", "role": "assistant", "model": "m",
            "content": [
                {"type": "thinking", "thinking": "Hm, yes.", "signature": ""},
                {"type": "text", "text": "I will look."},
                {"type": "tool_use", "id": "", "name": "look", "input": {"at": "sky"}},
                {"type": "tool_use", "id": "", "name": "wait", "input": {}},
            ],
            "stop_reason": "tool_use", "stop_sequence": null,
            "usage": {
                "input_tokens": 6, "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 4, "output_tokens": 7,
            },
        })
    );
    let one = message_of("m", &whole(agent()), true);
    assert_eq!(one["content"].as_array().unwrap().len(), 3);

    let stopped = Finish::Stop { by: Some("END".into()) };
    let rows = [
        (Finish::Stop { by: None }, "end_turn", json!(null)),
        (stopped, "stop_sequence", json!("END")),
        (Finish::Length, "max_tokens", json!(null)),
    ];
    for (finish, reason, stop) in rows {
        let response = message_of("m", &whole(vec![piece(&[content("a")]), last(finish)]), false);
        record("anthropic.Message", &response);
        assert_eq!((&response["stop_reason"], &response["stop_sequence"]), (&json!(reason), &stop));
    }
    assert_eq!(message_of("m", &whole(vec![last(Finish::Length)]), false)["content"], json!([]));
}

#[test]
fn inputs_are_objects() {
    for (arguments, expected) in [
        ("{\"a\": 1}", json!({"a": 1})),
        ("", json!({})),
        ("{\"a\": ", json!({"INVALID_JSON": "{\"a\": "})),
        ("[1]", json!({"INVALID_JSON": "[1]"})),
    ] {
        assert_eq!(input(arguments), expected);
    }
}

fn stream(pieces: Vec<Piece>, one_call: bool) -> Vec<u8> {
    let (mut stream, mut out) = (Stream::of("m", 10, one_call), Vec::new());
    stream.begin(&mut out);
    pieces.into_iter().for_each(|piece| stream.piece(piece, &mut out));
    stream.end(&mut out);
    out
}

/// Events in short: a type, and what is new.
fn short(events: &[(String, Value)]) -> Vec<String> {
    let short = |(name, data): &(String, Value)| match name.as_str() {
        "content_block_start" => {
            format!("{} start {}", data["index"], data["content_block"]["type"])
        }
        "content_block_stop" => format!("{} stop", data["index"]),
        "content_block_delta" => {
            let delta = &data["delta"];
            let text = ["text", "thinking", "partial_json"]
                .map(|key| delta[key].as_str())
                .into_iter()
                .flatten();
            format!("{} {} {}", data["index"], delta["type"], text.collect::<String>())
        }
        other => other.to_owned(),
    };
    events.iter().map(short).map(|line| line.replace('"', "")).collect()
}

#[test]
fn streamed_answers() {
    let events = recorded("anthropic.events", &stream(agent(), false));
    assert_eq!(
        short(&events),
        [
            "message_start",
            "0 start thinking",
            "0 thinking_delta Hm",
            "0 thinking_delta , yes.",
            "0 stop",
            "1 start text",
            "1 text_delta I will ",
            "1 text_delta look.",
            "1 stop",
            "2 start tool_use",
            "2 input_json_delta {at: ",
            "2 input_json_delta sky}",
            "2 stop",
            "3 start tool_use",
            "3 input_json_delta {}",
            "3 stop",
            "message_delta",
            "message_stop",
        ]
    );
    let start = &events[0].1["message"];
    assert_eq!(start["content"], json!([]));
    assert_eq!(start["stop_reason"], Value::Null);
    assert_eq!(start["usage"]["input_tokens"], 10);
    let block = &events[9].1["content_block"];
    assert_eq!((&block["name"], &block["input"]), (&json!("look"), &json!({})));
    let delta = &events[events.len() - 2].1;
    assert_eq!(delta["delta"], json!({"stop_reason": "tool_use", "stop_sequence": null}));
    assert_eq!(
        delta["usage"],
        usage(&Usage { prompt_tokens: 10, completion_tokens: 7, cached_tokens: 4 })
    );

    let one = short(&recorded("anthropic.events", &stream(agent(), true)));
    assert!(!one.contains(&"3 start tool_use".to_owned()), "{one:?}");

    // Content may go on after a call.
    let mixed = vec![
        piece(&[content("a"), call(0, "f"), arguments(0, "{}"), content("b")]),
        piece(&[arguments(0, "late")]),
        piece(&[reasoning("c")]),
        last(Finish::Stop { by: Some("END".into()) }),
    ];
    let events = recorded("anthropic.events", &stream(mixed, false));
    assert_eq!(
        short(&events),
        [
            "message_start",
            "0 start text",
            "0 text_delta a",
            "0 stop",
            "1 start tool_use",
            "1 input_json_delta {}",
            "1 stop",
            "2 start text",
            "2 text_delta b",
            "2 stop",
            "3 start thinking",
            "3 thinking_delta c",
            "3 stop",
            "message_delta",
            "message_stop",
        ]
    );
    assert_eq!(events[13].1["delta"]["stop_sequence"], "END");

    let nothing = recorded("anthropic.events", &stream(vec![last(Finish::Length)], false));
    assert_eq!(short(&nothing), ["message_start", "message_delta", "message_stop"]);
}

#[test]
fn streams_that_fail() {
    let failed = Finish::Failed(ApiError::internal("broken"));
    let pieces = vec![piece(&[content("a")]), last(failed)];
    let events = recorded("anthropic.failed_events", &stream(pieces, false));
    assert_eq!(short(&events), ["message_start", "0 start text", "0 text_delta a", "error"]);
    assert_eq!(
        events[3].1,
        json!({"type": "error", "error": {"type": "api_error", "message": "broken"}})
    );
}

#[test]
fn errors_have_a_type() {
    let later = Duration::from_secs(1);
    let rows = [
        (ApiError::invalid("a", "b"), "invalid_request_error"),
        (ApiError::unsupported("a", "b"), "invalid_request_error"),
        (ApiError::unauthorized(), "authentication_error"),
        (ApiError::not_found("a"), "not_found_error"),
        (ApiError::no_model("a", &["b"]), "not_found_error"),
        (ApiError::too_large(5), "request_too_large"),
        (ApiError::too_slow(), "timeout_error"),
        (ApiError::too_many("a", later), "rate_limit_error"),
        (ApiError::unavailable("a"), "overloaded_error"),
        (ApiError::deadline(), "timeout_error"),
        (ApiError::internal("a"), "api_error"),
    ];
    for (error, kind) in rows {
        let body = error_body(&error);
        // The library's list of errors lacks it; the documentation has it.
        if kind != "request_too_large" {
            record("anthropic.error", &body);
        }
        assert_eq!(body["type"], "error");
        assert_eq!(
            (&body["error"]["type"], &body["error"]["message"]),
            (&json!(kind), &json!(error.message))
        );
    }
}
