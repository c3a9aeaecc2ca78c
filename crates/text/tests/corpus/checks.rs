//! What must hold for any bytes at all: a vocabulary or a template, or an error that names the
//! file. Used by the fuzz targets and by the test that replays what they found.

#[path = "../common/mod.rs"]
mod common;

use bytes::Bytes;
use common::bytes_tokenizer;
use marlin_checkpoint::{Checkpoint, Container};
use marlin_text::{
    CallFormat, ChatTemplate, OutputEvent, OutputFormat, OutputParser, ParserOptions,
    ReasoningMarkers, Specials, StreamOptions, TemplateInputs, TextError, Tokenizer, ToolSet,
};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::OnceLock;

/// Whatever a vocabulary says, it gives ids of its own for these, or an error.
const LINES: [&str; 4] = ["", "Hello, w\u{f6}rld", "ab \u{1f42d} 12\t3\n", "\u{ff21}\u{fb01}\0<s>"];

fn encode(opened: Result<Tokenizer, TextError>) {
    match opened {
        Ok(tokenizer) => {
            for line in LINES {
                for specials in [Specials::NONE, Specials::PROMPT] {
                    let Ok(ids) = tokenizer.encode(line, specials) else { continue };
                    assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
                    let _ = tokenizer.decode(&ids);
                }
            }
        }
        Err(error) => assert!(error.to_string().starts_with("fuzz"), "{error}"),
    }
}

/// `data` as `tokenizer.json`.
pub fn tokenizer(data: &[u8]) {
    let sidecars = BTreeMap::from([("tokenizer.json".into(), Bytes::copy_from_slice(data))]);
    let container = Container::HuggingFace { config: json!({}), generation_config: None };
    encode(Tokenizer::open(&Checkpoint::from_parts("fuzz".into(), container, [], sidecars)));
}

/// `data` as a GGUF file whose vocabulary is read.
pub fn vocabulary(data: &[u8]) {
    let files = [("model.gguf", Bytes::copy_from_slice(data))];
    if let Ok(checkpoint) = Checkpoint::from_memory("fuzz", &files) {
        encode(Tokenizer::open(&checkpoint));
    }
}

/// `data` as a chat template.
pub fn template(data: &[u8]) {
    let Ok(source) = std::str::from_utf8(data) else { return };
    let sources = BTreeMap::from([("default".to_owned(), source.to_owned())]);
    match ChatTemplate::new("fuzz", sources, Some("<s>".into()), None) {
        Ok(template) => {
            let messages = [json!({"role": "user", "content": "Hi"})];
            let _ = template.render(&TemplateInputs::new(&messages));
        }
        Err(error) => assert!(error.to_string().starts_with("fuzz"), "{error}"),
    }
}

/// `data` as an answer of a model: one byte of choices, the lengths of chunks up to a zero, the text.
/// Any chunking gives the same events, and calls that are whole hold objects.
pub fn output(data: &[u8]) {
    let Some((&choices, rest)) = data.split_first() else { return };
    let end = rest.iter().position(|&length| length == 0).unwrap_or(rest.len());
    let (lengths, text) = rest.split_at(end);
    let Ok(text) = std::str::from_utf8(text.get(1..).unwrap_or_default()) else { return };
    let (_, calls) = CallFormat::ALL[usize::from(choices & 7) % CallFormat::ALL.len()];
    let (_, reasoning) = ReasoningMarkers::ALL[usize::from(choices >> 3 & 1)];
    let format = OutputFormat { calls: Some(calls), reasoning: Some(reasoning) };
    let options = ParserOptions {
        tools: ToolSet::Any,
        starts_in_reasoning: choices & 16 != 0,
        stream_arguments: choices & 32 != 0,
    };
    let mut whole = OutputParser::new(format, options.clone());
    let mut whole_events = whole.push(text);
    whole_events.extend(whole.finish());
    let mut cut = OutputParser::new(format, options);
    let (mut events, mut rest) = (Vec::new(), text);
    for &length in lengths {
        let at = (0..=usize::from(length).min(rest.len()))
            .rev()
            .find(|at| rest.is_char_boundary(*at))
            .unwrap_or(0);
        events.extend(cut.push(&rest[..at]));
        rest = &rest[at..];
    }
    events.extend(cut.push(rest));
    events.extend(cut.finish());
    let (whole, cut) = (joined(&whole_events), joined(&events));
    assert_eq!(cut, whole);
    for (_, text) in whole.iter().filter(|(kind, _)| kind == "arguments") {
        let value: Result<serde_json::Value, _> = serde_json::from_str(text);
        assert!(value.is_ok_and(|value| value.is_object()), "{text}");
    }
}

/// Kind and text of events, neighbours of one kind joined.
fn joined(events: &[OutputEvent]) -> Vec<(String, String)> {
    let mut out: Vec<(String, String)> = Vec::new();
    for event in events {
        let (kind, text) = match event {
            OutputEvent::Reasoning(text) => ("reasoning", text.clone()),
            OutputEvent::Content(text) => ("content", text.clone()),
            OutputEvent::ToolCallStart { index, name } => ("start", format!("{index} {name}")),
            OutputEvent::ToolCallArguments { delta, .. } => ("arguments", delta.clone()),
            OutputEvent::ToolCallEnd { complete, .. } => {
                if let Some((kind, _)) = out.last_mut().filter(|_| !complete)
                    && kind == "arguments"
                {
                    *kind = "broken".into();
                }
                ("end", complete.to_string())
            }
        };
        match out.last_mut() {
            Some((last, all)) if *last == kind && kind != "start" => all.push_str(&text),
            _ => out.push((kind.into(), text)),
        }
    }
    out
}

/// `data` as one byte of choices and token ids, two bytes each: what streams out token by token is the text of all
/// tokens, whole characters at a time, and never shows a stop string.
pub fn detokenizer(data: &[u8]) {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    let tokenizer = TOKENIZER.get_or_init(|| {
        let words = ["\u{2581}the", "\u{2581}", "end", "\u{20ac}", "EN", "\u{1f42d}"];
        bytes_tokenizer(&words, &["<tool_call>"])
    });
    let Some((&choices, ids)) = data.split_first() else { return };
    // Most ids exist; one in many does not.
    let most = tokenizer.vocab_size() as u32 + 1;
    let id = |pair: &[u8]| u32::from(u16::from_le_bytes([pair[0], pair[1]])) % most;
    let ids: Vec<u32> = ids.chunks_exact(2).map(id).collect();
    let stop = match choices >> 2 & 3 {
        0 => vec![],
        1 => vec!["end".to_owned()],
        2 => vec!["END".to_owned(), "\u{20ac}\u{20ac}".to_owned()],
        _ => vec![" ".to_owned(), String::new()],
    };
    let options = StreamOptions {
        show_special: choices & 1 != 0,
        continues_text: choices & 2 != 0,
        show: vec!["<tool_call>".to_owned()],
        ..StreamOptions::default()
    };
    let whole = tokenizer.decode_with(&ids, options.clone());
    let mut stream = tokenizer.stream(StreamOptions { stop: stop.clone(), ..options });
    let mut text = String::new();
    let mut stopped_by = None;
    for &id in &ids {
        let Ok(emitted) = stream.push(id) else {
            assert!(whole.is_err() && id as usize >= tokenizer.vocab_size(), "{id}");
            return;
        };
        text.push_str(&emitted.text);
        stopped_by = emitted.stopped_by;
        if stopped_by.is_some() {
            break;
        }
    }
    if stopped_by.is_none() {
        let emitted = stream.finish();
        text.push_str(&emitted.text);
        stopped_by = emitted.stopped_by;
    }
    let Ok(whole) = whole else {
        assert!(stopped_by.is_some(), "only what came before an unknown token is given out");
        return;
    };
    let found = stop.iter().filter(|s| !s.is_empty()).filter_map(|s| whole.find(s.as_str())).min();
    assert_eq!(stopped_by.is_some(), found.is_some(), "{whole:?}");
    assert_eq!(text, whole[..found.unwrap_or(whole.len())]);
}
