//! Answers to events: every format whole, broken and in pieces.

#[path = "output/rows.rs"]
mod rows;

use marlin_checkpoint::Checkpoint;
use marlin_text::{
    CallFormat, ChatTemplate, OutputEvent, OutputFormat, OutputParser, ParserOptions,
    ReasoningMarkers, Tokenizer, Tool, ToolSet,
};
use proptest::prelude::*;
use rows::ROWS;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// Events in one line, for tables: `r"…"` reasoning, `c"…"` content, `name{…}` a call, `name{……` one
/// that broke off.
fn show(events: &[OutputEvent]) -> String {
    let mut out = String::new();
    for event in merged(events) {
        match event {
            OutputEvent::Reasoning(text) => out.push_str(&format!(" r{text:?}")),
            OutputEvent::Content(text) => out.push_str(&format!(" c{text:?}")),
            OutputEvent::ToolCallStart { name, .. } => out.push_str(&format!(" {name}")),
            OutputEvent::ToolCallArguments { delta, .. } => out.push_str(&delta),
            OutputEvent::ToolCallEnd { complete, .. } => {
                out.push_str(if complete { "" } else { "…" });
            }
        }
    }
    out.trim_start().to_owned()
}

/// Events whose text is not cut.
fn merged(events: &[OutputEvent]) -> Vec<OutputEvent> {
    use OutputEvent::{Content, Reasoning, ToolCallArguments};
    let mut out: Vec<OutputEvent> = Vec::new();
    for event in events {
        match (out.last_mut(), event) {
            (Some(Reasoning(text)), Reasoning(more)) | (Some(Content(text)), Content(more)) => {
                text.push_str(more);
            }
            (
                Some(ToolCallArguments { index, delta }),
                ToolCallArguments { index: same, delta: more },
            ) if index == same => delta.push_str(more),
            (_, event) => out.push(event.clone()),
        }
    }
    out
}

fn tools() -> ToolSet {
    let weather = json!({"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "both": {"type": ["string", "null", "number"]},
            "flag": {"type": "boolean"},
            "list": {"$ref": "#/$defs/list"},
            "pick": {"enum": ["a", "1"]},
        },
        "$defs": {"list": {"type": "array"}},
    }}});
    let tools = [weather, json!({"name": "now"})];
    ToolSet::Only(tools.iter().map(|tool| Tool::parse(tool).unwrap()).collect())
}

fn format(name: &str) -> OutputFormat {
    let (calls, reasoning) = name.split_once('+').unwrap_or((name, ""));
    OutputFormat { calls: CallFormat::named(calls), reasoning: ReasoningMarkers::named(reasoning) }
}

fn options(stream_arguments: bool) -> ParserOptions {
    ParserOptions { tools: tools(), stream_arguments, ..ParserOptions::default() }
}

fn parse(format: OutputFormat, options: ParserOptions, chunks: &[&str]) -> Vec<OutputEvent> {
    let mut parser = OutputParser::new(format, options);
    let mut events = Vec::new();
    for chunk in chunks {
        events.extend(parser.push(chunk));
    }
    events.extend(parser.finish());
    events
}

#[test]
fn answers_become_events() {
    let mut wrong = Vec::new();
    for (name, text, whole, streamed) in ROWS {
        let streamed = if streamed.is_empty() { whole } else { streamed };
        for (streams, expected) in [(false, whole), (true, streamed)] {
            let found = show(&parse(format(name), options(streams), &[text]));
            if found != **expected {
                wrong
                    .push(format!("{name}, {text:?}, streams {streams}:\n  {found}\n  {expected}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_cut_gives_the_same_events() {
    for (name, text, ..) in ROWS {
        for streams in [false, true] {
            let whole = merged(&parse(format(name), options(streams), &[text]));
            for cut in (0..=text.len()).filter(|cut| text.is_char_boundary(*cut)) {
                let (a, b) = text.split_at(cut);
                let found = merged(&parse(format(name), options(streams), &[a, b]));
                assert_eq!(found, whole, "{name}: {a:?}, {b:?}");
            }
        }
    }
}

/// All text of the events of whole calls and of content, white space and quotes aside.
fn letters(text: &str) -> String {
    text.chars().filter(|c| c.is_alphanumeric()).collect()
}

/// Answers that hold a bit of everything: pieces of markers, calls and text in any order.
fn answers() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        prop::sample::select(vec![
            "<think>",
            "</think>",
            "[THINK]",
            "<tool_call>",
            "</tool_call>",
            "now",
            "weather",
            "<arg_key>",
            "</arg_key>",
            "<arg_value>",
            "</arg_value>",
            "<function=",
            "</function>",
            "<parameter=city>",
            "<parameter=days>",
            "</parameter>",
            "function",
            "[TOOL_CALLS]",
            "[ARGS]",
            "[CALL_ID]",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
            "```json\n",
            "```",
            "<|python_tag|>",
            ";",
            "[",
            "]",
            "{",
            "}",
            "\"",
            ":",
            ",",
            "\n",
            " ",
            ">",
            "\\u00e4",
            "\\",
            "-1.5e3",
            "0",
            "true",
            "null",
            "é🐭",
            "{\"name\": \"now\", \"arguments\": {\"a\": [1, {\"b\": \"c\\n\"}]}}",
            "{\"name\": \"weather\", \"parameters\": {",
            "{\"a\": 1}",
            "\"city\": \"x\"",
            "}}",
        ])
        .prop_map(str::to_owned),
        prop::sample::select(ROWS.iter().map(|row| row.1).collect::<Vec<_>>())
            .prop_map(str::to_owned),
        "[a-c<{\\[ \n]{0,4}",
    ];
    prop::collection::vec(piece, 0..16).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2048, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn chunks_make_the_whole(
        text in answers(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        calls in prop::sample::select(CallFormat::ALL.to_vec()),
        reasoning in prop::sample::select(vec!["", "think", "think-brackets"]),
        any in any::<bool>(),
        stream_arguments in any::<bool>(),
        starts_in_reasoning in any::<bool>(),
    ) {
        let format = OutputFormat { calls: Some(calls.1), reasoning: ReasoningMarkers::named(reasoning) };
        let tools = if any { ToolSet::Any } else { tools() };
        let options = ParserOptions { tools, starts_in_reasoning, stream_arguments };
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
        cuts.retain(|cut| text.is_char_boundary(*cut));
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let chunks: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
        let whole = merged(&parse(format, options.clone(), &[&text]));
        let cut = merged(&parse(format, options, &chunks));
        prop_assert_eq!(&cut, &whole);

        // Calls are whole, numbered and hold objects; what is no call is there.
        let (mut next, mut arguments) = (0, String::new());
        let mut rest = String::new();
        let mut calls = 0;
        for event in &whole {
            match event {
                OutputEvent::ToolCallStart { index, .. } => {
                    prop_assert_eq!(*index, next);
                    arguments.clear();
                    calls += 1;
                }
                OutputEvent::ToolCallArguments { index, delta } => {
                    prop_assert_eq!(*index, next);
                    arguments.push_str(delta);
                }
                OutputEvent::ToolCallEnd { index, complete } => {
                    prop_assert_eq!(*index, next);
                    next += 1;
                    prop_assert!(*complete || stream_arguments);
                    if *complete {
                        let value: Result<Value, _> = serde_json::from_str(&arguments);
                        prop_assert!(value.is_ok_and(|value| value.is_object()), "{}", arguments);
                    }
                }
                OutputEvent::Reasoning(text) | OutputEvent::Content(text) => rest.push_str(text),
            }
        }
        prop_assert_eq!(next, calls);
        if calls == 0 {
            let mut expected = text.clone();
            if let Some(markers) = format.reasoning && letters(&rest) != letters(&expected) {
                expected = expected.replacen(markers.close, "", 1);
                if !starts_in_reasoning {
                    expected = expected.replacen(markers.open, "", 1);
                }
                if letters(&rest) != letters(&expected) {
                    expected = text.replacen(markers.open, "", 1);
                }
            }
            prop_assert_eq!(letters(&rest), letters(&expected));
        }
    }
}

#[test]
fn text_goes_out_as_soon_as_it_is_certain() {
    let mut parser = OutputParser::new(format("hermes+think"), options(true));
    let mut pieces = Vec::new();
    for piece in [
        "<th",
        "ink>a",
        " b",
        "</",
        "think>",
        "\n\nc",
        " ",
        "<",
        "b",
        "<tool_call>{\"name\":",
        "\"now\",",
        "\"arguments\":{\"a",
        "\":1",
        "}}",
    ] {
        pieces.push(show(&parser.push(piece)));
    }
    let expected = [
        "",
        r#"r"a""#,
        r#"r" b""#,
        "",
        "",
        r#"c"c""#,
        "",
        "",
        r#"c" <b""#,
        "",
        "",
        r#"now{"a"#,
        r#"":1"#,
        "}",
    ];
    assert_eq!(pieces, expected);
    assert_eq!(parser.finish(), []);
}

#[test]
fn prompts_that_open_reasoning() {
    let format = format("hermes+think");
    assert!(format.starts_in_reasoning("<|im_start|>assistant\n<think>\n"));
    assert!(!format.starts_in_reasoning("what is <think>?<|im_end|>\n<|im_start|>assistant\n"));
    assert!(!format.starts_in_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n"));
    let options = ParserOptions { starts_in_reasoning: true, ..options(false) };
    let found = show(&parse(format, options.clone(), &["\nhm <think>\n</think>\n\nHi"]));
    assert_eq!(found, r#"r"hm <think>" c"Hi""#);
    let mut parser = OutputParser::new(format, options);
    assert!(parser.in_reasoning());
    parser.push("x</think>");
    assert!(!parser.in_reasoning());
}

#[test]
fn without_tools_calls_are_text() {
    let text = "a <tool_call>{\"name\":\"now\"}</tool_call>";
    let found = show(&parse(format("hermes"), ParserOptions::default(), &[text]));
    assert_eq!(found, format!("c{text:?}"));
}

#[test]
fn templates_tell_their_format() {
    // What the families' templates write, in words of our own.
    let rows = [
        ("{{ '<tool_call>\\n' }}{{ tool_call | tojson }}", "hermes+"),
        (
            "{% if '</think>' in content %}{% endif %}<tool_call>{{ c | tojson }}</tool_call>",
            "hermes+think",
        ),
        ("<tool_call>{{ name }}<arg_key>{{ k }}</arg_key><think></think>", "glm+think"),
        ("<tool_call>\n<function={{ name }}>\n<parameter={{ k }}>\n", "qwen-coder+"),
        ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ name }}<think>", "deepseek+think"),
        (
            "<|start_header_id|>ipython<|end_header_id|>{\"name\": name, \"parameters\": {}}",
            "llama3+",
        ),
        ("[TOOL_CALLS]{{ name }}[ARGS]{{ a }}[THINK]", "mistral+think-brackets"),
        ("{{ messages }}", "+"),
    ];
    for (source, expected) in rows {
        let sources = BTreeMap::from([("default".to_owned(), source.to_owned())]);
        let template = ChatTemplate::new("test", sources, None, None).unwrap();
        assert_eq!(OutputFormat::detect(&template), format(expected), "{source}");
    }
}

#[test]
fn real_templates_tell_their_format() {
    let Some(folder) = std::env::var_os("MARLIN_TEST_MODELS") else {
        println!("skipped: MARLIN_TEST_MODELS does not name a folder");
        return;
    };
    for (name, expected) in
        [("qwen2.5-coder-0.5b-q4_k_m.gguf", "hermes+"), ("smollm2-135m-q4_1.gguf", "+")]
    {
        let path = Path::new(&folder).join(name);
        if !path.exists() {
            println!("skipped: {} does not exist", path.display());
            continue;
        }
        let checkpoint = Checkpoint::open(&path).unwrap();
        let tokenizer = Tokenizer::open(&checkpoint).unwrap();
        let template = ChatTemplate::open(&checkpoint, &tokenizer).unwrap().unwrap();
        assert_eq!(OutputFormat::detect(&template), format(expected), "{name}");
    }
}

#[test]
fn tools_are_checked() {
    for (tool, part) in [
        (json!({"type": "function", "function": {}}), "name"),
        (json!({"name": "a b"}), "name"),
        (json!({"name": ""}), "name"),
        (json!({"name": "a", "parameters": []}), "parameters"),
    ] {
        let error = Tool::parse(&tool).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn long_answers_take_linear_time() {
    let texts = [
        "<tool_call>".repeat(10_000),
        format!(
            "<tool_call>{{\"name\":\"now\",\"arguments\":{{\"a\":\"{}",
            "<tool_call>{\"".repeat(10_000)
        ),
        format!("<tool_call>weather<arg_key>city</arg_key><arg_value>{}", "</arg".repeat(20_000)),
        format!("<tool_call>{}", "[".repeat(100_000)),
        format!("<tool_call>{{\"name\":\"now\",\"arguments\":{{\"a\":{}", "[".repeat(100_000)),
        " ".repeat(100_000),
        "{".repeat(100_000),
        "[TOOL_CALLS]".repeat(10_000),
    ];
    for text in texts {
        for (_, calls) in CallFormat::ALL {
            for streams in [false, true] {
                let format = OutputFormat { calls: Some(calls), reasoning: None };
                let started = Instant::now();
                let mut parser = OutputParser::new(format, options(streams));
                let mut events = Vec::new();
                for c in text.chars() {
                    events.extend(parser.push(c.encode_utf8(&mut [0; 4])));
                }
                events.extend(parser.finish());
                let seconds = started.elapsed();
                assert!(seconds < Duration::from_secs(5), "{calls:?}: {seconds:?}");
            }
        }
    }
}
