//! Exported tokenizer files against the GGUF vocabularies they came from.

use bytes::Bytes;
use marlin_checkpoint::{Checkpoint, Container};
use marlin_text::{
    ChatTemplate, Specials, StreamOptions, TemplateInputs, TextError, Tokenizer, hugging_face_files,
};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn read(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

fn lines(value: &Value) -> Vec<String> {
    serde_json::from_value(value.clone()).unwrap()
}

fn gguf(metadata: Value) -> Checkpoint {
    let Value::Object(metadata) = metadata else { panic!("metadata is an object") };
    let container = Container::Gguf { metadata };
    Checkpoint::from_parts("m.gguf".into(), container, [], BTreeMap::new())
}

/// The directory that the export of `checkpoint` makes. With the variable
/// `MARLIN_EXPORTED_TOKENIZERS` the files are left in a folder there called `name`, for
/// fixtures/check_export.py.
fn directory(checkpoint: &Checkpoint, name: &str) -> Checkpoint {
    let files = hugging_face_files(checkpoint).unwrap_or_else(|error| panic!("{name}: {error}"));
    if let Some(folder) = std::env::var_os("MARLIN_EXPORTED_TOKENIZERS") {
        let folder = Path::new(&folder).join(name);
        std::fs::create_dir_all(&folder).unwrap();
        for (file, bytes) in &files {
            std::fs::write(folder.join(file), bytes).unwrap();
        }
    }
    let sidecars = files.into_iter().map(|(name, bytes)| (name, Bytes::from(bytes))).collect();
    let container = Container::HuggingFace { config: json!({}), generation_config: None };
    Checkpoint::from_parts("exported".into(), container, [], sidecars)
}

/// What differs between the vocabulary of `checkpoint` and its export, on `lines`.
fn differences(name: &str, checkpoint: &Checkpoint, lines: &[String]) -> Vec<String> {
    let original = Tokenizer::open(checkpoint).unwrap();
    let exported = Tokenizer::open(&directory(checkpoint, name)).unwrap();
    assert_eq!(exported.vocab_size(), original.vocab_size(), "{name}");
    assert_eq!((exported.bos(), exported.eos()), (original.bos(), original.eos()), "{name}");
    let shown = StreamOptions { show_special: true, ..StreamOptions::default() };
    let mut wrong = Vec::new();
    let mut golden = serde_json::Map::new();
    for line in lines {
        let mut all = Vec::new();
        for (add, parse) in [(false, false), (true, false), (false, true), (true, true)] {
            let expected = original.encode(line, Specials { add, parse }).unwrap();
            let found = exported.encode(line, Specials { add, parse }).unwrap();
            if found != expected {
                wrong.push(format!(
                    "{name}, add {add}, parse {parse}, {line:?}: {found:?}, not {expected:?}"
                ));
            }
            for options in [StreamOptions::default(), shown.clone()] {
                let expected_text = original.decode_with(&expected, options.clone()).unwrap();
                let found_text = exported.decode_with(&expected, options).unwrap();
                if found_text != expected_text {
                    wrong.push(format!("{name}: {found_text:?}, not {expected_text:?}"));
                }
            }
            all.push(expected);
        }
        golden.insert(line.clone(), json!([all, original.decode(&all[0]).unwrap()]));
    }
    if let Some(folder) = std::env::var_os("MARLIN_EXPORTED_TOKENIZERS") {
        let file = Path::new(&folder).join(name).join("golden.json");
        std::fs::write(file, serde_json::to_vec(&golden).unwrap()).unwrap();
    }
    wrong
}

fn check(wrong: &[String]) {
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong[..wrong.len().min(40)].join("\n"));
}

#[test]
fn pre_tokenizers_cut_as_before() {
    let file = read("pre_tokenizers.json");
    let mut lines = lines(&file["lines"]);
    lines.extend((1..40).map(|length| format!("x{}y", " ".repeat(length))));
    lines.extend((1..12).map(|length| "1234567890123"[..length].to_owned()));
    lines.extend(["1234\u{661}2345 12".into(), "ab1234567cd89".into(), "a\t\n \n\n  b \n".into()]);
    let last = file["tokens"].as_array().unwrap().len() - 1;
    let mut kinds = vec![1; last];
    kinds.push(3);
    let mut wrong = Vec::new();
    for group in file["groups"].as_array().unwrap() {
        for name in group["names"].as_array().unwrap() {
            let checkpoint = gguf(json!({
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": name,
                "tokenizer.ggml.tokens": file["tokens"],
                "tokenizer.ggml.merges": file["merges"],
                "tokenizer.ggml.token_type": kinds,
                "tokenizer.ggml.bos_token_id": last,
                "tokenizer.ggml.eos_token_id": last,
            }));
            wrong.extend(differences(name.as_str().unwrap(), &checkpoint, &lines));
        }
    }
    check(&wrong);
}

#[test]
fn sentencepiece_merges_as_before() {
    let checkpoint = Checkpoint::open(&fixture("spm.gguf")).unwrap();
    let mut lines: Vec<String> = lines(&read("vocabularies.json")["lines"]);
    lines.extend(self::lines(&read("lines.json")));
    check(&differences("spm", &checkpoint, &lines));
}

#[test]
fn real_models_encode_and_render_as_before() {
    let Some(folder) = std::env::var_os("MARLIN_TEST_MODELS") else {
        println!("skipped: MARLIN_TEST_MODELS does not name a folder of models");
        return;
    };
    let mut lines: Vec<String> = lines(&read("lines.json"));
    for length in 1..120 {
        lines.push(" ".repeat(length) + "x");
        lines.push("\n".repeat(length));
        lines.push("=".repeat(length));
    }
    lines.extend(source_code());
    for name in ["smollm2-135m-q4_1", "qwen2.5-coder-0.5b-q4_k_m", "gemma3-270m-q4_k_m"] {
        let path = Path::new(&folder).join(format!("{name}.gguf"));
        if !path.exists() {
            println!("skipped: {} does not exist", path.display());
            continue;
        }
        let checkpoint = Checkpoint::open(&path).unwrap();
        check(&differences(name, &checkpoint, &lines));
        let exported = directory(&checkpoint, name);
        let messages = [
            json!({"role": "system", "content": "Be brief."}),
            json!({"role": "user", "content": "Wie geht's? 🙂\n"}),
        ];
        let tools = [json!({"type": "function", "function": {"name": "f", "parameters": {}}})];
        let rendered = |checkpoint: &Checkpoint| {
            let tokenizer = Tokenizer::open(checkpoint).unwrap();
            let template = ChatTemplate::open(checkpoint, &tokenizer).unwrap()?;
            let mut inputs =
                TemplateInputs { now: SystemTime::UNIX_EPOCH, ..TemplateInputs::new(&messages) };
            let plain = template.render(&inputs).unwrap();
            inputs.tools = Some(&tools);
            Some((plain, template.render(&inputs).unwrap()))
        };
        assert_eq!(rendered(&exported), rendered(&checkpoint), "{name}");
        println!("{name}: {} lines, template: {}", lines.len(), rendered(&exported).is_some());
    }
}

/// Lines of this crate's own files.
fn source_code() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut lines = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let text = std::fs::read_to_string(path).unwrap();
            lines.extend(text.lines().map(str::to_owned));
            lines.push(text);
        }
    }
    lines
}

/// A small vocabulary of each model, with everything that an export may carry.
fn small(model: &str) -> Value {
    let mut tokens: Vec<String> =
        ["<unk>", "<s>", "</s>", "a", "b", "ab", "\u{2581}", "\u{2581}a", "<tag>", "\n", "\n\n"]
            .map(str::to_owned)
            .to_vec();
    let mut kinds = vec![2, 3, 3, 1, 1, 1, 1, 1, 4, 1, 1];
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    kinds.resize(tokens.len(), 6);
    tokens.push(String::new());
    kinds.push(5);
    let scores: Vec<i64> = (0..tokens.len() as i64).map(|id| -id).collect();
    json!({
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": match model { "gemma4" => "gemma4", _ => "qwen2" },
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["\u{2581} a", "a b", "\n \n", "a b"],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": true,
        "tokenizer.ggml.add_eos_token": true,
    })
}

/// `small(model)` with fields changed, or removed where they are null.
fn changed(model: &str, changes: &Value) -> Checkpoint {
    let mut metadata = small(model);
    let fields = metadata.as_object_mut().unwrap();
    for (key, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => fields.remove(key),
            value => fields.insert(key.clone(), value.clone()),
        };
    }
    gguf(metadata)
}

const LINES: [&str; 15] = [
    "",
    "ab",
    " ab a",
    "a\u{1}b",
    // The bytes of `é` stand inside a word.
    "a\u{e9}b a\u{e9}",
    "\u{20ac}\u{1f642}b",
    "<s>ab</s>",
    "a <tag>ab<tag> a",
    "\n\n\n\na",
    "\u{2581}a",
    "<0x41>a",
    "<unk>a",
    "aab  b",
    "a</s> \n b",
    "[EMPTY_267] \u{120}",
];

#[test]
fn small_vocabularies_encode_as_before() {
    let lines = LINES.map(str::to_owned);
    let rows: &[(&str, &str, Value)] = &[
        ("small-llama", "llama", json!({})),
        ("small-prefix", "llama", json!({"tokenizer.ggml.add_space_prefix": false})),
        ("small-bos", "llama", json!({"tokenizer.ggml.add_eos_token": false})),
        ("small-gemma4", "gemma4", json!({})),
        // Most bytes have no token of their own.
        ("small-gpt2", "gpt2", json!({})),
        ("small-phi3", "gpt2", json!({"general.name": "Phi-3"})),
        (
            "small-plain",
            "gpt2",
            json!({"tokenizer.ggml.add_bos_token": null, "tokenizer.ggml.add_eos_token": null}),
        ),
        (
            "small-unknown",
            "llama",
            json!({
                "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab", "\u{2581}"],
                "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1],
                "tokenizer.ggml.scores": [0, 0, 0, -3, -4, -5, -6],
            }),
        ),
    ];
    let mut wrong = Vec::new();
    for (name, model, changes) in rows {
        wrong.extend(differences(name, &changed(model, changes), &lines));
    }
    check(&wrong);
}

#[test]
fn configuration_names_the_tokens() {
    let files: BTreeMap<String, Vec<u8>> =
        hugging_face_files(&gguf(small("llama"))).unwrap().into_iter().collect();
    assert_eq!(files.keys().collect::<Vec<_>>(), ["tokenizer.json", "tokenizer_config.json"]);
    let mut config: Value = serde_json::from_slice(&files["tokenizer_config.json"]).unwrap();
    let added = config.as_object_mut().unwrap().remove("added_tokens_decoder").unwrap();
    assert_eq!(added.as_object().unwrap().len(), 4);
    assert_eq!(
        added["8"],
        json!({
            "content": "<tag>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": false,
        })
    );
    assert_eq!(
        config,
        json!({
            "add_bos_token": true,
            "add_eos_token": true,
            "bos_token": "<s>",
            "clean_up_tokenization_spaces": false,
            "eos_token": "</s>",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 64,
            "pad_token": "</s>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
        })
    );
}

#[test]
fn templates_keep_their_names() {
    let one = changed("llama", &json!({"tokenizer.chat_template": "{{ bos_token }}one"}));
    let two = json!({
        "tokenizer.chat_template": "one",
        "tokenizer.chat_template.tool_use": "{{ eos_token }}two",
        "tokenizer.chat_templates": ["tool_use"],
    });
    let two = changed("llama", &two);
    for (checkpoint, names, prompt) in
        [(&one, vec!["default"], "<s>one"), (&two, vec!["default", "tool_use"], "</s>two")]
    {
        let exported = directory(checkpoint, "small-template");
        let tokenizer = Tokenizer::open(&exported).unwrap();
        let template = ChatTemplate::open(&exported, &tokenizer).unwrap().unwrap();
        assert_eq!(template.names(), names);
        let inputs = TemplateInputs { tools: Some(&[]), ..TemplateInputs::new(&[]) };
        assert_eq!(template.render(&inputs).unwrap(), prompt);
    }
}

#[test]
fn what_no_tokenizer_json_can_say_is_refused() {
    let spm = |tokens: Value, scores: Value| {
        json!({
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": null,
        })
    };
    let rows: &[(&str, Value, &str)] = &[
        ("t5", json!({}), "m.gguf: tokenizer.ggml.model: only gpt2, gemma4 and llama"),
        ("bert", json!({}), "m.gguf: tokenizer.ggml.model: only gpt2, gemma4 and llama"),
        (
            "llama",
            spm(json!(["<unk>", "a", "b", "ab", "ba"]), json!([0, -1, -2, -3, -3])),
            "m.gguf: tokenizer.ggml.scores: tokens 3 and 4 have the same score",
        ),
        (
            "llama",
            spm(json!(["<unk>", "a", "b", "ac"]), json!([0, -1, -2, -3])),
            "m.gguf: tokenizer.ggml.tokens[3]: \"ac\" merges from a character that is no token",
        ),
        (
            "gemma4",
            json!({"tokenizer.ggml.merges": ["a b"]}),
            "m.gguf: tokenizer.ggml.merges: no merges lead to token 10 of 2 line breaks",
        ),
        (
            "gemma4",
            json!({"tokenizer.ggml.pre": "whitespace", "tokenizer.ggml.tokens": ["a", "b", "ab"],
                "tokenizer.ggml.merges": [], "tokenizer.ggml.token_type": null,
                "tokenizer.ggml.add_eos_token": null}),
            "m.gguf: tokenizer.ggml.tokens: there is no token <0x00>",
        ),
    ];
    for (model, changes, message) in rows {
        let mut changes = changes.clone();
        if changes.get("tokenizer.ggml.tokens").is_some() {
            for key in ["bos", "eos", "unknown", "padding"] {
                changes[format!("tokenizer.ggml.{key}_token_id")] = json!(0);
            }
        }
        let error = hugging_face_files(&changed(model, &changes)).expect_err(message).to_string();
        assert!(error.starts_with(message), "{error}: {message}");
    }
    let container = Container::HuggingFace { config: json!({}), generation_config: None };
    let folder = Checkpoint::from_parts("model".into(), container, [], BTreeMap::new());
    assert!(matches!(hugging_face_files(&folder), Err(TextError::Unsupported { .. })));
}
