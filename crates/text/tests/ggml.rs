//! GGUF vocabularies against llama.cpp's ids (fixtures/make_*.py say how they were made).

use marlin_checkpoint::{Checkpoint, Container};
use marlin_testkit::mutate::{bit_flips, truncations};
use marlin_text::{Specials, StreamOptions, TextError, Tokenizer};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn read(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

fn open(metadata: Value) -> Result<Tokenizer, TextError> {
    let Value::Object(metadata) = metadata else { panic!("metadata is an object") };
    let container = Container::Gguf { metadata };
    Tokenizer::open(&Checkpoint::from_parts("m.gguf".into(), container, [], BTreeMap::new()))
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn lines(value: &Value) -> Vec<String> {
    serde_json::from_value(value["lines"].clone()).unwrap()
}

#[test]
fn pre_tokenizers_cut_as_llama_cpp() {
    let file = read("pre_tokenizers.json");
    let lines = lines(&file);
    let groups = file["groups"].as_array().unwrap();
    let last = file["tokens"].as_array().unwrap().len() - 1;
    let mut kinds = vec![1; last];
    kinds.push(3);
    let mut wrong = Vec::new();
    let mut names = 0;
    for group in groups {
        for name in group["names"].as_array().unwrap() {
            names += 1;
            let tokenizer = open(json!({
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": name,
                "tokenizer.ggml.tokens": file["tokens"],
                "tokenizer.ggml.merges": file["merges"],
                "tokenizer.ggml.token_type": kinds,
                "tokenizer.ggml.bos_token_id": last,
                "tokenizer.ggml.eos_token_id": last,
            }))
            .unwrap();
            for (index, line) in lines.iter().enumerate() {
                let differs = group.get("differs").and_then(|d| d.get(index.to_string()));
                let expected = ids(differs.unwrap_or(&groups[0]["ids"][index]));
                let found = tokenizer.encode(line, Specials::NONE).unwrap();
                if found != expected {
                    wrong.push(format!("{name} {line:?}: {found:?}, not {expected:?}"));
                }
                assert_eq!(tokenizer.decode(&found).unwrap(), *line, "{name}");
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), names * lines.len(), wrong.join("\n"));
}

#[test]
fn vocabularies_agree_with_llama_cpp() {
    let file = read("vocabularies.json");
    let lines = lines(&file);
    let mut wrong = Vec::new();
    for name in ["spm", "ugm", "wpm"] {
        let checkpoint = Checkpoint::open(&fixture(&format!("{name}.gguf"))).unwrap();
        let tokenizer = Tokenizer::open(&checkpoint).unwrap();
        for (key, specials) in
            [("ids", Specials::NONE), ("ids_with_special", Specials { add: true, parse: false })]
        {
            for (line, expected) in lines.iter().zip(file[name][key].as_array().unwrap()) {
                let found = tokenizer.encode(line, specials).unwrap();
                if found != ids(expected) {
                    wrong.push(format!("{name} {line:?}: {found:?}, not {expected}"));
                }
                if name == "spm" && specials == Specials::NONE {
                    assert_eq!(tokenizer.decode(&found).unwrap(), *line);
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn real_models_agree_with_llama_cpp() {
    let Some(folder) = std::env::var_os("MARLIN_TEST_MODELS") else {
        println!("skipped: MARLIN_TEST_MODELS does not name a folder of models");
        return;
    };
    let lines: Vec<String> = serde_json::from_value(read("lines.json")).unwrap();
    for name in ["smollm2-135m-q4_1", "qwen2.5-coder-0.5b-q4_k_m", "gemma3-270m-q4_k_m"] {
        let path = Path::new(&folder).join(format!("{name}.gguf"));
        if !path.exists() {
            println!("skipped: {} does not exist", path.display());
            continue;
        }
        let golden = read(&format!("ids_{name}.json"));
        let checkpoint = Checkpoint::open(&path).unwrap();
        let clock = Instant::now();
        let tokenizer = Tokenizer::open(&checkpoint).unwrap();
        println!("{name}: {} tokens opened in {:?}", tokenizer.vocab_size(), clock.elapsed());
        let mut wrong = Vec::new();
        for (index, line) in lines.iter().enumerate() {
            let plain = (Specials::NONE, Some(&golden["ids"][index]));
            let parsed = (Specials::TEMPLATE, golden["special_ids"].get(index.to_string()));
            for (specials, expected) in [plain, parsed] {
                let Some(expected) = expected else { continue };
                let found = tokenizer.encode(line, specials).unwrap();
                if found != ids(expected) {
                    wrong.push(format!("{specials:?} {line:?}: {found:?}, not {expected}"));
                }
            }
        }
        assert!(wrong.is_empty(), "{name}: {}\n{}", wrong.len(), wrong.join("\n"));
    }
}

/// A small vocabulary of each model, as metadata.
fn small(model: &str) -> Map<String, Value> {
    let tokens = json!(["<unk>", "<s>", "</s>", "a", "b", "ab", "\u{2581}", "\u{2581}a", "c"]);
    let Value::Object(mut map) = json!({
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1, 4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.scores": [0, 0, 0, -1, -2, -3, -4, -5, -6],
    }) else {
        unreachable!()
    };
    if model == "gpt2" {
        map.insert("tokenizer.ggml.pre".into(), "qwen2".into());
        map.insert("tokenizer.ggml.merges".into(), json!(["a b"]));
    }
    map
}

#[test]
fn small_vocabularies_open() {
    for model in ["gpt2", "llama", "t5", "bert"] {
        let tokenizer = open(Value::Object(small(model))).unwrap();
        assert_eq!(tokenizer.vocab_size(), 9);
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), Some(2)), "{model}");
        assert!(tokenizer.end_ids().contains(&2));
        let ids = tokenizer.encode("ab", Specials { add: true, parse: false }).unwrap();
        assert!(!ids.is_empty(), "{model}: {ids:?}");
    }
}

#[test]
fn bad_metadata_is_an_error_that_names_the_field() {
    let tokens = "tokenizer.ggml.tokens";
    let rows: &[(&str, &str, Value, &str)] = &[
        ("gpt2", "tokenizer.ggml.model", json!("no_vocab"), "tokenizer.ggml.model: \"no_vocab\""),
        ("gpt2", "tokenizer.ggml.model", json!("rwkv"), "tokenizer.ggml.model: \"rwkv\""),
        ("gpt2", "tokenizer.ggml.model", json!(3), "tokenizer.ggml.model: expected a string"),
        ("gpt2", "tokenizer.ggml.model", Value::Null, "tokenizer.ggml.model is missing"),
        ("gpt2", "tokenizer.ggml.pre", json!("mystery"), "tokenizer.ggml.pre: \"mystery\""),
        ("gpt2", "tokenizer.ggml.pre", Value::Null, "tokenizer.ggml.pre is missing"),
        ("gpt2", "tokenizer.ggml.merges", Value::Null, "tokenizer.ggml.merges is missing"),
        (
            "gpt2",
            "tokenizer.ggml.merges",
            json!(["a b", "a z"]),
            "merges[1]: there is no token \"z\"",
        ),
        ("gpt2", "tokenizer.ggml.merges", json!(["b a"]), "merges[0]: there is no token \"ba\""),
        ("gpt2", "tokenizer.ggml.merges", json!(["ab"]), "merges[0]: \"ab\" is not two pieces"),
        ("gpt2", "tokenizer.ggml.merges", json!(["é"]), "merges[0]"),
        ("gpt2", "tokenizer.ggml.merges", json!([""]), "merges[0]"),
        ("gpt2", "tokenizer.ggml.merges", json!([7]), "merges[0]: expected a string"),
        ("llama", tokens, json!([]), "tokens: there are no tokens"),
        ("llama", tokens, Value::Null, "tokenizer.ggml.tokens is missing"),
        ("llama", tokens, json!("abc"), "tokens: expected an array"),
        ("llama", tokens, json!(["a", "b", "a"]), "tokens[2]: \"a\" is already token 0"),
        ("llama", "tokenizer.ggml.scores", Value::Null, "tokenizer.ggml.scores is missing"),
        ("llama", "tokenizer.ggml.scores", json!([1, 2]), "scores: 2 values for 9 tokens"),
        ("t5", "tokenizer.ggml.scores", json!([0, 0, 0, null, 0, 0, 0, 0, 0]), "scores[3]"),
        ("llama", "tokenizer.ggml.scores", json!([0, 0, 0, 1e300, 0, 0, 0, 0, 0]), "scores[3]"),
        ("bert", "tokenizer.ggml.token_type", json!([1]), "token_type: 1 values for 9 tokens"),
        ("bert", "tokenizer.ggml.token_type", json!([1, 1, 1, 1, 1, 1, 1, 1, 9]), "token_type[8]"),
        ("llama", "tokenizer.ggml.bos_token_id", json!(9), "bos_token_id: 9 is outside"),
        ("llama", "tokenizer.ggml.eos_token_id", json!(-1), "eos_token_id: expected a token id"),
        ("llama", "tokenizer.ggml.eot_token_id", json!(77), "eot_token_id: 77 is outside"),
        (
            "llama",
            "tokenizer.ggml.add_bos_token",
            json!("yes"),
            "add_bos_token: expected a boolean",
        ),
        ("t5", "tokenizer.ggml.precompiled_charsmap", json!([255, 255, 255, 127, 0]), "charsmap"),
        ("t5", "tokenizer.ggml.precompiled_charsmap", json!([4, 0, 0]), "charsmap"),
        ("t5", "tokenizer.ggml.precompiled_charsmap", json!([999]), "charsmap: expected bytes"),
    ];
    for (model, key, value, message) in rows {
        let mut map = small(model);
        match value {
            Value::Null => map.remove(*key),
            value => map.insert((*key).into(), value.clone()),
        };
        let error = open(Value::Object(map)).expect_err(message).to_string();
        assert!(error.starts_with("m.gguf: ") && error.contains(message), "{error}: {message}");
    }
}

#[test]
fn damaged_character_map_is_an_error_not_a_panic() {
    let mut map = small("t5");
    // One unit whose children lie far outside.
    let trie = [4, 0, 0, 0, 0, 255, 255, 127, b'a', 0];
    map.insert("tokenizer.ggml.precompiled_charsmap".into(), json!(trie));
    let tokenizer = open(Value::Object(map)).unwrap();
    let error = tokenizer.encode("ab", Specials::NONE).unwrap_err().to_string();
    assert!(error.contains("precompiled_charsmap is damaged"), "{error}");
}

#[test]
fn damaged_files_are_errors_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    for name in ["spm", "ugm", "wpm"] {
        let good = std::fs::read(fixture(&format!("{name}.gguf"))).unwrap();
        let mut opened = 0;
        for (place, copy) in truncations(&good).chain(bit_flips(&good)) {
            std::fs::write(&path, copy).unwrap();
            let clock = Instant::now();
            let tokenizer = Checkpoint::open(&path)
                .map_err(|error| error.to_string())
                .and_then(|checkpoint| Tokenizer::open(&checkpoint).map_err(|e| e.to_string()));
            match tokenizer {
                Err(error) => assert!(error.contains("m.gguf: "), "{name} {place}: {error}"),
                // A changed letter in a token is a different, valid vocabulary.
                Ok(tokenizer) => {
                    opened += 1;
                    for line in ["", "Hello, w\u{f6}rld \u{1f42d} 12\t3", "\u{ff21}\u{fb01}\0"] {
                        if let Ok(ids) = tokenizer.encode(line, Specials::PROMPT) {
                            tokenizer.decode(&ids).unwrap();
                        }
                    }
                }
            }
            assert!(clock.elapsed() < Duration::from_secs(2), "{name} {place}");
        }
        assert!(opened > 20, "{name}: {opened}");
    }
}

#[test]
fn special_tokens_claim_text_longest_first() {
    let mut map = small("gpt2");
    map.insert("tokenizer.ggml.tokens".into(), json!(["abc", "bcde", "a", "b", "c", "d", "e"]));
    map.insert("tokenizer.ggml.token_type".into(), json!([3, 3, 1, 1, 1, 1, 1]));
    map.insert("tokenizer.ggml.merges".into(), json!([]));
    let tokenizer = open(Value::Object(map)).unwrap();
    assert_eq!(tokenizer.encode("abcde", Specials::TEMPLATE).unwrap(), [2, 1]);
    assert_eq!(tokenizer.encode("abcd", Specials::TEMPLATE).unwrap(), [0, 5]);
    assert_eq!(tokenizer.encode("abcde", Specials::NONE).unwrap(), [2, 3, 4, 5, 6]);
}

#[test]
fn special_tokens_take_white_space_along() {
    let mut map = small("gpt2");
    map.insert("general.name".into(), "Phi-3 mini".into());
    map.insert("tokenizer.ggml.tokens".into(), json!(["<|end|>", "<s>", "\u{120}", "a"]));
    map.insert("tokenizer.ggml.token_type".into(), json!([3, 3, 1, 1]));
    map.insert("tokenizer.ggml.merges".into(), json!([]));
    map.insert("tokenizer.ggml.eos_token_id".into(), json!(0));
    map.insert("tokenizer.ggml.seperator_token_id".into(), json!(0));
    let tokenizer = open(Value::Object(map)).unwrap();
    assert_eq!(tokenizer.encode("<|end|> \n a", Specials::TEMPLATE).unwrap(), [0, 3]);
    assert_eq!(tokenizer.encode("<s> a", Specials::TEMPLATE).unwrap(), [1, 2, 3]);
}

#[test]
fn sentencepiece_shows_no_space_before_the_first_word() {
    let tokenizer = open(Value::Object(small("llama"))).unwrap();
    let (a, b) = (7, 4);
    assert_eq!(tokenizer.decode(&[1, a, b, a]).unwrap(), "ab a");
    let continues = StreamOptions { continues_text: true, ..StreamOptions::default() };
    assert_eq!(tokenizer.decode_with(&[a, b, a], continues).unwrap(), " ab a");
    let shown = StreamOptions { show_special: true, ..StreamOptions::default() };
    assert_eq!(tokenizer.decode_with(&[1, a], shown).unwrap(), "<s> a");
}

#[test]
fn long_words_take_linear_time() {
    for model in ["gpt2", "llama", "t5", "bert"] {
        let tokenizer = open(Value::Object(small(model))).unwrap();
        for text in ["ab".repeat(200_000), " ".repeat(400_000), "c".repeat(400_000)] {
            let clock = Instant::now();
            tokenizer.encode(&text, Specials::NONE).unwrap();
            let seconds = clock.elapsed();
            assert!(seconds < Duration::from_secs(20), "{model}: {seconds:?}");
        }
    }
}
