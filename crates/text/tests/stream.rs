//! Properties of the incremental decoder.

use marlin_checkpoint::{Checkpoint, Container};
use marlin_text::{StreamOptions, Tokenizer};
use proptest::prelude::*;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::LazyLock;

/// One token for each byte, two that end inside characters, and three special ones.
static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let mut tokens: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    let mut kinds = vec![6; 256];
    for (text, kind) in
        [("\u{2581}", 1), ("\u{2581}stop", 1), ("<s>", 3), ("</s>", 3), ("<unk>", 2)]
    {
        tokens.push(text.into());
        kinds.push(kind);
    }
    let metadata = json!({
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": vec![0; kinds.len()],
        "tokenizer.ggml.bos_token_id": 258,
        "tokenizer.ggml.eos_token_id": 259,
        "tokenizer.ggml.unknown_token_id": 260,
    });
    let serde_json::Value::Object(metadata) = metadata else { unreachable!() };
    let container = Container::Gguf { metadata };
    Tokenizer::open(&Checkpoint::from_parts("m".into(), container, [], BTreeMap::new())).unwrap()
});

/// Tokens that spell `text`, with byte tokens.
fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// Ids that are characters more often than chance would make them.
fn ids() -> impl Strategy<Value = Vec<u32>> {
    let piece = prop_oneof![
        any::<char>().prop_map(|character| bytes(&character.to_string())),
        "[ab ]{1,3}".prop_map(|text| bytes(&text)),
        (0u32..261).prop_map(|id| vec![id]),
    ];
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

fn whole(ids: &[u32]) -> String {
    let mut all = Vec::new();
    for &id in ids {
        if !TOKENIZER.is_special(id).unwrap() {
            all.extend_from_slice(TOKENIZER.token_bytes(id).unwrap());
        }
    }
    let text = all.strip_prefix(b" ").unwrap_or(&all);
    String::from_utf8_lossy(text).into_owned()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pieces_make_the_whole(ids in ids()) {
        let mut stream = TOKENIZER.stream(StreamOptions::default());
        let mut text = String::new();
        for &id in &ids {
            text.push_str(&stream.push(id).unwrap().text);
        }
        text.push_str(&stream.finish().text);
        prop_assert_eq!(&text, &whole(&ids));
        prop_assert_eq!(text, TOKENIZER.decode(&ids).unwrap());
    }

    #[test]
    fn stop_strings_never_leak(ids in ids(), stop in prop::collection::vec("[ab ]{1,3}", 1..4)) {
        let options = StreamOptions { stop: stop.clone(), ..StreamOptions::default() };
        let mut stream = TOKENIZER.stream(options);
        let mut text = String::new();
        let mut stopped = None;
        for &id in &ids {
            let emitted = stream.push(id).unwrap();
            prop_assert!(stopped.is_none() || emitted.text.is_empty());
            text.push_str(&emitted.text);
            stopped = stopped.or(emitted.stopped_by);
        }
        let last = stream.finish();
        text.push_str(&last.text);
        stopped = stopped.or(last.stopped_by);
        let all = whole(&ids);
        // The stop string that is complete first, the longest of those.
        let first = stop.iter().enumerate().filter_map(|(index, stop)| {
            let start = all.find(stop.as_str())?;
            Some((start + stop.len(), start, index))
        }).min();
        match first {
            None => {
                prop_assert_eq!(text, all);
                prop_assert_eq!(stopped, None);
            }
            Some((_, start, index)) => {
                prop_assert_eq!(&text, &all[..start]);
                prop_assert_eq!(stopped.map(|found| &stop[found]), Some(&stop[index]));
            }
        }
    }
}

#[test]
fn characters_wait_until_they_are_whole() {
    let mut stream = TOKENIZER.stream(StreamOptions::default());
    let mut pieces: Vec<String> =
        bytes("é🐭x").iter().map(|&id| stream.push(id).unwrap().text).collect();
    pieces.push(stream.finish().text);
    assert_eq!(pieces, ["", "é", "", "", "", "🐭", "x", ""]);
}

#[test]
fn invalid_bytes_are_shown_once_proven() {
    let mut stream = TOKENIZER.stream(StreamOptions::default());
    let pieces: Vec<String> =
        [0xf0, 0x9f, 0x41, 0xff, 0xe2].iter().map(|&id| stream.push(id).unwrap().text).collect();
    assert_eq!(pieces, ["", "", "\u{fffd}A", "\u{fffd}", ""]);
    assert_eq!(stream.finish().text, "\u{fffd}");
}

#[test]
fn possible_stop_strings_are_held_back() {
    let options =
        StreamOptions { stop: vec!["</end>".into(), String::new()], ..StreamOptions::default() };
    let mut stream = TOKENIZER.stream(options);
    let pieces: Vec<String> =
        bytes("a</x</end>b").iter().map(|&id| stream.push(id).unwrap().text).collect();
    assert_eq!(pieces.concat(), "a</x");
    assert_eq!(pieces[..4], ["a", "", "", "</x"]);
    let last = stream.finish();
    assert_eq!((last.text.as_str(), last.stopped_by), ("", Some(0)));
}

#[test]
fn special_tokens_that_are_asked_for_are_shown() {
    let ids = [258, 97, 259, 98, 260];
    let text = |show: &[&str]| {
        let show = show.iter().map(|text| (*text).to_owned()).collect();
        TOKENIZER.decode_with(&ids, StreamOptions { show, ..StreamOptions::default() }).unwrap()
    };
    assert_eq!(text(&[]), "ab");
    assert_eq!(text(&["</s>", "<no token>"]), "a</s>b");
}
