//! What the tests of several protocols share, and those of turns and tallies.

use super::turns::Turns;
use crate::answer::{Delta, Finish, Piece, Tally, TokenChance, Whole};
use crate::generate::{Generate, Prompt};
use marlin_checkpoint::{Checkpoint, Container};
use marlin_engine::Usage;
use marlin_text::Tokenizer;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

pub(super) fn reasoning(text: &str) -> Delta {
    Delta::Reasoning(text.to_owned())
}

pub(super) fn content(text: &str) -> Delta {
    Delta::Content(text.to_owned())
}

pub(super) fn call(index: usize, name: &str) -> Delta {
    Delta::Call { index, name: name.to_owned() }
}

pub(super) fn arguments(index: usize, text: &str) -> Delta {
    Delta::Arguments { index, text: text.to_owned() }
}

/// One token that brings `deltas`.
pub(super) fn piece(deltas: &[Delta]) -> Piece {
    let (deltas, chances) = (deltas.to_vec(), Vec::new());
    Piece { choice: 0, deltas, chances, tokens: vec![1], finish: None }
}

/// The last piece of an answer to 10 tokens, of which 4 were computed before.
pub(super) fn last(finish: Finish) -> Piece {
    let usage = Usage { prompt_tokens: 10, completion_tokens: 7, cached_tokens: 4 };
    let (deltas, chances, tokens) = Default::default();
    Piece { choice: 0, deltas, chances, tokens, finish: Some((finish, usage)) }
}

pub(super) fn whole(pieces: Vec<Piece>) -> Whole {
    let mut whole = Whole::default();
    pieces.into_iter().for_each(|piece| whole.take(piece));
    whole
}

/// Thoughts, an answer and two calls.
pub(super) fn agent() -> Vec<Piece> {
    vec![
        piece(&[]),
        piece(&[reasoning("Hm")]),
        piece(&[reasoning(", yes.")]),
        piece(&[]),
        piece(&[content("I will ")]),
        piece(&[content("look.")]),
        piece(&[call(0, "look"), arguments(0, "{\"at\": "), arguments(0, "\"sky\"}")]),
        piece(&[call(1, "wait"), arguments(1, "{}")]),
        last(Finish::ToolCalls),
    ]
}

/// Names and data of server-sent events, which are to agree.
pub(super) fn events(bytes: &[u8]) -> Vec<(String, Value)> {
    let text = std::str::from_utf8(bytes).unwrap();
    let event = |frame: &str| {
        let (name, data) = frame.split_once('\n').unwrap();
        let name = name.strip_prefix("event: ").unwrap();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(data["type"], name, "{frame}");
        (name.to_owned(), data)
    };
    text.split_terminator("\n\n").map(event).collect()
}

/// Shows `value` to programs that know the protocol: they look for these lines in what the tests print.
pub(super) fn record(name: &str, value: &Value) {
    println!("\nrecorded {name} {value}");
}

/// Every event of a stream, shown too.
pub(super) fn recorded(name: &str, bytes: &[u8]) -> Vec<(String, Value)> {
    let events = events(bytes);
    let data: Vec<_> = events.iter().map(|(_, data)| data.clone()).collect();
    record(name, &data.into());
    events
}

/// `base` with the fields of `more`, those that are null left out.
pub(super) fn with(mut base: Value, more: Value) -> Value {
    let map = base.as_object_mut().unwrap();
    for (key, value) in more.as_object().unwrap().clone() {
        map.insert(key, value);
    }
    map.retain(|_, value| !value.is_null());
    base
}

/// Messages, tools and variables for the template.
pub(super) fn chat(generate: &Generate) -> (Value, Value, &Map<String, Value>) {
    match &generate.prompt {
        Prompt::Chat { messages, tools, extra } => (json!(messages), json!(tools), extra),
        _ => panic!("no chat"),
    }
}

/// One token for every byte.
pub(super) fn tokenizer() -> Tokenizer {
    let mut tokens: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    tokens.extend(["<s>", "</s>", "<unk>"].map(str::to_owned));
    let mut kinds = vec![6; 256];
    kinds.extend([3, 3, 2]);
    let metadata = json!({
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": vec![0; kinds.len()],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.unknown_token_id": 258,
    });
    let metadata = metadata.as_object().unwrap().clone();
    let container = Container::Gguf { metadata };
    Tokenizer::open(&Checkpoint::from_parts("m".into(), container, [], BTreeMap::new())).unwrap()
}

/// A piece of one token that reports how likely it was.
pub(super) fn likely(token: u32, deltas: &[Delta]) -> Piece {
    let chance = TokenChance { token, logprob: -0.5, top: vec![(token, -0.5), (120, -2.0)] };
    Piece { chances: vec![chance], tokens: vec![token], ..piece(deltas) }
}

#[test]
fn neighbours_become_one_turn() {
    let mut turns = Turns::default();
    turns.say("system", "a");
    turns.say("system", "b");
    turns.say("user", "c");
    turns.think("d");
    turns.call("1", "f", json!({}));
    turns.say("assistant", "e");
    turns.call("2", "g", json!({"x": 1}));
    assert_eq!(turns.role(), Some("assistant"));
    turns.result("at", "2", "h").unwrap();
    turns.result("at", "1", "i").unwrap();
    let error = turns.result("at", "3", "j").unwrap_err();
    assert_eq!(error.param.as_deref(), Some("at"));
    turns.open("user");
    let function = |name, arguments: Value| json!({"name": name, "arguments": arguments});
    assert_eq!(
        json!(turns.into_messages()),
        json!([
            {"role": "system", "content": "a\nb"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "e", "reasoning_content": "d", "tool_calls": [
                {"id": "1", "type": "function", "function": function("f", json!({}))},
                {"id": "2", "type": "function", "function": function("g", json!({"x": 1}))},
            ]},
            {"role": "tool", "content": "h", "tool_call_id": "2", "name": "g"},
            {"role": "tool", "content": "i", "tool_call_id": "1", "name": "f"},
            {"role": "user", "content": ""},
        ])
    );
}

#[test]
fn markers_are_of_neither_part() {
    let tally = |pieces: &[Piece]| {
        let mut tally = Tally::default();
        pieces.iter().for_each(|piece| tally.take(piece));
        let content: Vec<_> = tally.content.iter().map(|chance| chance.token).collect();
        (tally.reasoning, content)
    };
    let thought = reasoning("t");
    let text = content("c");
    // The opening marker counts as Anthropic counts it; the closing one is neither.
    let answer = [
        likely(1, &[]),
        likely(2, std::slice::from_ref(&thought)),
        likely(3, &[]),
        likely(4, std::slice::from_ref(&thought)),
        likely(5, &[]),
        likely(6, std::slice::from_ref(&text)),
        // Two tokens of one character.
        likely(7, &[]),
        likely(8, std::slice::from_ref(&text)),
        likely(9, &[]),
        likely(10, &[call(0, "f")]),
        likely(11, &[]),
    ];
    assert_eq!(tally(&answer), (4, vec![6, 7, 8]));
    // A first character of two tokens.
    assert_eq!(tally(&[likely(1, &[]), likely(2, &[text])]), (0, vec![1, 2]));
    assert_eq!(tally(&[likely(1, &[])]), (0, vec![]));
    assert_eq!(whole(agent()).tally.reasoning, 3);
}

/// Bodies that openai 3.57.0 and anthropic 2.14.0 for Python send when answers like ours go on, and for `parse`.
#[test]
fn official_libraries_are_understood() {
    use crate::Fields;
    use crate::protocol::messages::MessagesRequest;
    use crate::protocol::responses::ResponsesRequest;
    let fields = |body: &str| Fields::parse(body.as_bytes()).unwrap();
    let messages = r#"{"max_tokens": 5, "messages": [{"role": "user", "content": "a"}, {"role": "assistant",
        "content": [{"signature": "", "thinking": "Hm, yes.", "type": "thinking"}, {"text": "I will look.",
        "type": "text"}, {"id": "toolu_1", "input": {"at": "sky"}, "name": "look", "type": "tool_use"}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "x"}]}],
        "model": "m"}"#;
    let responses = r#"{"model": "m", "input": [{"role": "user", "content": "a"}, {"id": "rs_1", "summary": [],
        "type": "reasoning", "content": [{"text": "Hm, yes.", "type": "reasoning_text"}],
        "encrypted_content": null, "status": "completed"}, {"id": "msg_1", "content": [{"annotations": [],
        "text": "I will look.", "type": "output_text", "logprobs": []}], "role": "assistant", "status":
        "completed", "type": "message"}, {"arguments": "{\"at\": \"sky\"}", "call_id": "toolu_1",
        "name": "look", "type": "function_call", "id": "fc_1", "status": "completed"},
        {"type": "function_call_output", "call_id": "toolu_1", "output": "x"}]}"#;
    let anthropic = MessagesRequest::parse(fields(messages)).unwrap().generate;
    let openai = ResponsesRequest::parse(fields(responses)).unwrap().generate;
    let (turns, _, _) = chat(&anthropic);
    assert_eq!(turns, chat(&openai).0);
    assert_eq!(turns[1]["reasoning_content"], "Hm, yes.");
    assert_eq!(turns[1]["tool_calls"][0]["function"]["arguments"]["at"], "sky");
    assert_eq!(turns[2]["name"], "look");

    let messages = r#"{"max_tokens": 5, "messages": [{"role": "user", "content": "a"}], "model": "m",
        "output_config": {"format": {"schema": {"type": "object", "title": "Out", "properties": {"a":
        {"type": "integer", "title": "A"}}, "additionalProperties": false, "required": ["a"]},
        "type": "json_schema"}}}"#;
    let responses = r#"{"model": "m", "input": "a", "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": {"type": "json_schema", "strict": true, "name": "Out", "schema": {"properties":
        {"a": {"title": "A", "type": "integer"}}, "required": ["a"], "title": "Out", "type": "object",
        "additionalProperties": false}}}, "tools": [{"type": "function", "name": "Out", "description": null,
        "parameters": {"properties": {"a": {"title": "A", "type": "integer"}}, "required": ["a"], "title":
        "Out", "type": "object", "additionalProperties": false}, "strict": true}]}"#;
    let anthropic = MessagesRequest::parse(fields(messages)).unwrap().generate;
    let openai = ResponsesRequest::parse(fields(responses)).unwrap().generate;
    assert_eq!(anthropic.shape, openai.shape);
    assert_eq!(chat(&openai).1[0]["function"]["name"], "Out");
}
