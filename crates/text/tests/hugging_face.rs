//! `tokenizer.json` of the embedded model, and damaged copies of it.

use bytes::Bytes;
use marlin_checkpoint::{Checkpoint, Container};
use marlin_testkit::mutate::{bit_flips, truncations};
use marlin_text::{Specials, StreamOptions, TextError, Tokenizer};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

fn file(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/glm-stories");
    std::fs::read(folder.join(name)).unwrap()
}

fn open(
    tokenizer: Vec<u8>,
    config: Value,
    settings: Option<Vec<u8>>,
) -> Result<Tokenizer, TextError> {
    let mut sidecars = BTreeMap::from([("tokenizer.json".to_owned(), Bytes::from(tokenizer))]);
    if let Some(settings) = settings {
        sidecars.insert("tokenizer_config.json".into(), settings.into());
    }
    let container =
        Container::HuggingFace { config, generation_config: Some(json!({"eos_token_id": [2, 0]})) };
    Tokenizer::open(&Checkpoint::from_parts("model".into(), container, [], sidecars))
}

fn stories() -> Tokenizer {
    open(file("tokenizer.json"), json!({}), Some(file("tokenizer_config.json"))).unwrap()
}

#[test]
fn ids_of_the_embedded_model() {
    let tokenizer = stories();
    // `tokenizers` 0.23.3 (Python) gives the same ids.
    let rows: &[(&str, Specials, &[u32])] = &[
        ("Hello world", Specials::NONE, &[42, 4024, 643]),
        ("<|im_start|>user\n", Specials::TEMPLATE, &[1, 494, 275, 201]),
        ("", Specials::PROMPT, &[]),
    ];
    for (text, specials, ids) in rows {
        let found = tokenizer.encode(text, *specials).unwrap();
        assert_eq!(found, *ids, "{text:?}");
    }
    let story = tokenizer.encode("In the dense jungle, a dragon named Luminara", Specials::NONE);
    assert_eq!(story.unwrap()[..8], [637, 264, 2990, 1045, 14, 260, 782, 420]);
    let literal = tokenizer.encode("<|im_start|>", Specials::NONE).unwrap();
    assert!(literal.len() > 1 && !literal.contains(&1), "{literal:?}");
    assert_eq!(tokenizer.decode(&literal).unwrap(), "<|im_start|>");
    assert_eq!(tokenizer.vocab_size(), 4096);
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (None, Some(2)));
    assert_eq!(tokenizer.end_ids(), [0, 2]);
    assert_eq!(tokenizer.token_id("<|im_end|>"), Some(2));
    assert!(tokenizer.is_special(2).unwrap() && !tokenizer.is_special(42).unwrap());
    assert_eq!(tokenizer.token_bytes(2).unwrap(), b"<|im_end|>");
    assert!(matches!(tokenizer.token_bytes(4096), Err(TextError::TokenId { id: 4096, .. })));
    assert!(tokenizer.decode(&[1, u32::MAX]).is_err());
}

#[test]
fn text_survives() {
    let tokenizer = stories();
    let lines: Vec<String> = serde_json::from_slice(
        &std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/lines.json")).unwrap(),
    )
    .unwrap();
    for line in &lines {
        let ids = tokenizer.encode(line, Specials::NONE).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), *line);
        let special = tokenizer.encode(line, Specials::TEMPLATE).unwrap();
        let shown = StreamOptions { show_special: true, ..StreamOptions::default() };
        assert_eq!(tokenizer.decode_with(&special, shown).unwrap(), *line);
    }
}

#[test]
fn damaged_files_are_errors_in_time() {
    let good = file("tokenizer.json");
    let mut refused = 0;
    for (place, copy) in truncations(&good).chain(bit_flips(&good)) {
        let clock = Instant::now();
        match open(copy, json!({}), None) {
            Err(error) => {
                let text = error.to_string();
                assert!(text.starts_with("model/tokenizer.json: "), "{place}: {text}");
                refused += 1;
            }
            // A changed letter in a token is a different, valid vocabulary.
            Ok(tokenizer) => {
                let _ = tokenizer.encode("Once upon a time <|im_end|>", Specials::PROMPT);
            }
        }
        assert!(clock.elapsed() < Duration::from_secs(2), "{place}: {:?}", clock.elapsed());
    }
    assert!(refused > 60, "{refused}");
}

#[test]
fn bad_fields_are_named() {
    let good: Value = serde_json::from_slice(&file("tokenizer.json")).unwrap();
    let rows: &[(&str, Value, &str)] = &[
        ("/model", Value::Null, "model"),
        ("/model/type", json!("Mystery"), "model"),
        ("/model/vocab", json!({}), "m"),
        ("/model/vocab/a", json!(4_000_000_000u32), "model.vocab"),
        ("/model/vocab/a", json!(-1), "model"),
        ("/model/merges", json!(["zz qq"]), "model"),
        ("/model/merges/0", json!(["a"]), "model"),
        ("/added_tokens", json!(3), "added_tokens"),
        ("/added_tokens/0/id", json!(77), "added_tokens[0].id"),
        ("/added_tokens/0/content", json!(null), "added_tokens"),
        (
            "/decoder",
            json!({"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": true}),
            "decoder.type",
        ),
        ("/decoder", json!({"type": 3}), "decoder.type"),
        ("/decoder", json!([1]), "decoder.type"),
        ("/decoder", json!({"type": "Sequence"}), "decoder.decoders"),
        (
            "/pre_tokenizer",
            json!({"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": false}),
            "pre_tokenizer",
        ),
        ("/pre_tokenizer", json!({"type": "Mystery"}), "pre_tokenizer"),
        ("/normalizer", json!({"type": "Mystery"}), "normalizer"),
        // Says that it is 4 GB long; found by the fuzz target.
        (
            "/normalizer",
            json!({"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
            "precompiled_charsmap: the trie is longer",
        ),
        (
            "/normalizer",
            json!({"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": "AAAAAQAAAAA="}]}),
            "precompiled_charsmap: the trie is longer",
        ),
        ("/post_processor", json!({"type": "Mystery"}), "post_processor"),
        // Found by the fuzz target.
        (
            "/post_processor",
            json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [9_999_999], "tokens": ["<s>"]}}}),
            "post_processor: it adds token 9999999",
        ),
        ("/version", json!("9.0"), "version"),
    ];
    for (pointer, value, field) in rows {
        let mut copy = good.clone();
        *copy.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer}")) = value.clone();
        let error = open(copy.to_string().into_bytes(), json!({}), None).expect_err(pointer);
        let text = error.to_string();
        assert!(text.starts_with(&format!("model/tokenizer.json: {field}")), "{pointer}: {text}");
    }
}

#[test]
fn duplicate_and_endless_vocabularies_are_refused() {
    let file = |vocab: &str| {
        let model = format!(r#"{{"type":"BPE","vocab":{{{vocab}"z":0}},"merges":[]}}"#);
        format!(r#"{{"version":"1.0","added_tokens":[],"model":{model}}}"#).into_bytes()
    };
    let error = open(file(r#""a":1,"b":2,"a":3,"#), json!({}), None).unwrap_err().to_string();
    assert!(error.starts_with("model/tokenizer.json: model.vocab.a: key appears twice"), "{error}");
    let entries: Vec<String> = (0..5_000_000).map(|i| format!(r#""{i}":{i},"#)).collect();
    let many = file(&entries.concat());
    let clock = Instant::now();
    let error = open(many, json!({}), None).unwrap_err().to_string();
    assert!(clock.elapsed() < Duration::from_secs(2), "{:?}", clock.elapsed());
    assert!(error.starts_with("model/tokenizer.json: model.vocab."), "{error}");
    assert!(error.contains("more than 1048576 keys"), "{error}");
}

#[test]
fn bad_ids_are_named() {
    let tokenizer = file("tokenizer.json");
    let error = open(tokenizer.clone(), json!({"eos_token_id": 5000}), None).unwrap_err();
    assert!(error.to_string().contains("config.json: eos_token_id: 5000"), "{error}");
    let error = open(tokenizer.clone(), json!({"eos_token_id": "x"}), None).unwrap_err();
    assert!(error.to_string().contains("config.json: eos_token_id"), "{error}");
    let settings = json!({"bos_token": "<none>"}).to_string().into_bytes();
    let error = open(tokenizer.clone(), json!({}), Some(settings)).unwrap_err();
    assert!(error.to_string().contains("tokenizer_config.json: bos_token"), "{error}");
    let error = open(tokenizer, json!({}), Some(b"{".to_vec())).unwrap_err();
    assert!(error.to_string().contains("tokenizer_config.json: (JSON syntax)"), "{error}");
}

#[test]
fn absent_tokenizer_is_named() {
    let container = Container::HuggingFace { config: json!({}), generation_config: None };
    let checkpoint = Checkpoint::from_parts("model".into(), container, [], BTreeMap::new());
    let error = Tokenizer::open(&checkpoint).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json is missing"), "{error}");
}

#[test]
fn requested_bos_is_added_once() {
    let settings = json!({"bos_token": {"content": "<|im_start|>"}, "add_bos_token": true});
    let tokenizer =
        open(file("tokenizer.json"), json!({}), Some(settings.to_string().into_bytes())).unwrap();
    assert_eq!(tokenizer.encode("Hello", Specials::PROMPT).unwrap()[0], 1);
    let ids = tokenizer.encode("<|im_start|>Hello", Specials::PROMPT).unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == 1).count(), 1);
    assert_ne!(tokenizer.encode("Hello", Specials::NONE).unwrap()[0], 1);
}

#[test]
fn large_vocabularies_open_fast() {
    let Some(folder) = std::env::var_os("MARLIN_TEST_TOKENIZERS") else {
        println!("skipped: MARLIN_TEST_TOKENIZERS does not name a folder");
        return;
    };
    // Ids by `transformers` 5.23.0; DeepSeek's configuration asks for BOS and its tokenizer.json
    // does not add it.
    let rows: [(&str, &[u32]); 2] = [("qwen3", &[9707, 1879]), ("deepseek_v3", &[0, 19923, 2058])];
    for (name, ids) in rows {
        let read = |file: &str| std::fs::read(Path::new(&folder).join(name).join(file));
        let (Ok(tokenizer), Ok(settings)) = (read("tokenizer.json"), read("tokenizer_config.json"))
        else {
            println!("skipped: {name} is not there");
            continue;
        };
        let clock = Instant::now();
        let tokenizer = open(tokenizer, json!({}), Some(settings)).unwrap();
        println!("{name}: {} tokens opened in {:?}", tokenizer.vocab_size(), clock.elapsed());
        assert_eq!(tokenizer.encode("Hello world", Specials::PROMPT).unwrap(), ids);
        assert!(clock.elapsed() < Duration::from_secs(20));
    }
}

/// FNV-1a of the ids as little-endian bytes, as fixtures/make_tokenizer_json_fixtures.py has it.
fn digest(ids: &[u32]) -> u32 {
    ids.iter()
        .flat_map(|id| id.to_le_bytes())
        .fold(0x811c_9dc5, |state, byte| (state ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[test]
fn lines_agree_with_the_python_package() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let read = |name: &str| std::fs::read(fixtures.join(name)).unwrap();
    let lines: Vec<String> = serde_json::from_slice(&read("lines.json")).unwrap();
    let golden: Value = serde_json::from_slice(&read("tokenizer_json.json")).unwrap();
    for name in ["glm-stories", "qwen3", "deepseek_v3"] {
        let large = std::env::var_os("MARLIN_TEST_TOKENIZERS");
        let folder = match name {
            "glm-stories" => fixtures.clone(),
            _ => large.map(Into::into).unwrap_or_default(),
        };
        let Ok(file) = std::fs::read(folder.join(name).join("tokenizer.json")) else {
            println!("skipped {name}: not in the folder that MARLIN_TEST_TOKENIZERS names");
            continue;
        };
        let tokenizer = open(file, json!({}), None).unwrap();
        let mut wrong = Vec::new();
        for (key, specials) in [("plain", Specials::NONE), ("special", Specials::TEMPLATE)] {
            for (line, expected) in lines.iter().zip(golden[name][key].as_array().unwrap()) {
                let ids = tokenizer.encode(line, specials).unwrap();
                if u64::from(digest(&ids)) != expected.as_u64().unwrap() {
                    wrong.push(format!("{key} {line:?}: {ids:?}"));
                }
            }
        }
        assert!(wrong.is_empty(), "{name}: {}\n{}", wrong.len(), wrong.join("\n"));
    }
}
