//! Chat templates against the prompts that transformers renders (fixtures/make_template_fixtures.py).

use bytes::Bytes;
use marlin_checkpoint::{Checkpoint, Container};
use marlin_text::{ChatTemplate, RenderLimits, Specials, TemplateInputs, TextError, Tokenizer};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn goldens() -> Value {
    serde_json::from_slice(&std::fs::read(fixtures().join("templates.json")).unwrap()).unwrap()
}

fn template(source: &str) -> Result<ChatTemplate, TextError> {
    let sources = BTreeMap::from([("default".to_owned(), source.to_owned())]);
    ChatTemplate::new("test", sources, Some("<s>".into()), Some("</s>".into()))
}

/// Compares `template` with `prompts`; returns what differs.
fn compare(name: &str, template: &ChatTemplate, cases: &Value, prompts: &Value) -> Vec<String> {
    let mut wrong = Vec::new();
    for (key, expected) in prompts.as_object().unwrap() {
        let case = &cases[key];
        let inputs = TemplateInputs {
            tools: case["tools"].as_array().map(Vec::as_slice),
            add_generation_prompt: case["add_generation_prompt"] == true,
            extra: case["extra"].as_object(),
            ..TemplateInputs::new(case["messages"].as_array().unwrap())
        };
        match (template.render(&inputs), expected["text"].as_str()) {
            (Ok(found), Some(expected)) if found == expected => {}
            (Err(_), None) => {}
            (Ok(found), Some(expected)) => {
                let same = found.chars().zip(expected.chars()).take_while(|(a, b)| a == b).count();
                let rest = |text: &str| text.chars().skip(same).take(60).collect::<String>();
                let (found, expected) = (rest(&found), rest(expected));
                wrong.push(format!("{name}, {key}: {found:?}, not {expected:?}"));
            }
            (found, _) => wrong.push(format!("{name}, {key}: {found:?}, not {expected}")),
        }
    }
    wrong
}

#[test]
fn templates_render_as_transformers() {
    let goldens = goldens();
    let mut wrong = Vec::new();
    for row in goldens["templates"].as_array().unwrap() {
        let name = row["name"].as_str().unwrap();
        let template = template(row["source"].as_str().unwrap()).unwrap();
        wrong.extend(compare(name, &template, &goldens["cases"], &row["prompts"]));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn templates_of_real_models_render_as_transformers() {
    let goldens = goldens();
    let mut wrong = Vec::new();
    for row in goldens["models"].as_array().unwrap() {
        let name = row["name"].as_str().unwrap();
        let gguf = name.ends_with(".gguf");
        let variable = if gguf { "MARLIN_TEST_MODELS" } else { "MARLIN_TEST_TOKENIZERS" };
        let Some(folder) = std::env::var_os(variable) else {
            println!("skipped {name}: {variable} does not name a folder");
            continue;
        };
        let path = Path::new(&folder).join(name);
        if !path.exists() {
            println!("skipped: {} does not exist", path.display());
            continue;
        }
        let checkpoint = if gguf { Checkpoint::open(&path).unwrap() } else { directory(&path) };
        let tokenizer = Tokenizer::open(&checkpoint).unwrap();
        let template = ChatTemplate::open(&checkpoint, &tokenizer).unwrap().unwrap();
        wrong.extend(compare(name, &template, &goldens["cases"], &row["prompts"]));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The text files of a directory, without a model.
fn directory(path: &Path) -> Checkpoint {
    let sidecars = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), std::fs::read(path.join(name)).ok()?.into())))
        .collect();
    let container = Container::HuggingFace { config: json!({}), generation_config: None };
    Checkpoint::from_parts(path.into(), container, [], sidecars)
}

#[test]
fn sources_in_order_of_precedence() {
    let folder = fixtures().join("glm-stories");
    let named = json!([
        {"name": "default", "template": "config"},
        {"name": "tool_use", "template": "with tools"},
    ]);
    let rows: &[(&str, Value, &str)] = &[
        ("chat_template.jinja", json!("file"), "file"),
        ("chat_template.json", json!({"chat_template": "json"}), "json"),
        ("tokenizer_config.json", json!({"chat_template": named}), "config"),
    ];
    let mut sidecars: BTreeMap<String, Bytes> = BTreeMap::new();
    sidecars.insert(
        "tokenizer.json".into(),
        std::fs::read(folder.join("tokenizer.json")).unwrap().into(),
    );
    let open = |sidecars: &BTreeMap<String, Bytes>| {
        let container = Container::HuggingFace { config: json!({}), generation_config: None };
        let checkpoint = Checkpoint::from_parts("model".into(), container, [], sidecars.clone());
        let tokenizer = Tokenizer::open(&checkpoint).unwrap();
        ChatTemplate::open(&checkpoint, &tokenizer).unwrap()
    };
    assert!(open(&sidecars).is_none());
    let messages = [json!({"role": "user", "content": "x"})];
    for (name, value, expected) in rows.iter().rev() {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        sidecars.insert((*name).into(), text.into());
        let template = open(&sidecars).unwrap();
        assert_eq!(template.render(&TemplateInputs::new(&messages)).unwrap(), *expected);
        if template.names().len() == 2 {
            let mut inputs = TemplateInputs::new(&messages);
            inputs.tools = Some(&[]);
            assert_eq!(template.render(&inputs).unwrap(), "with tools");
            inputs.template = Some("rag");
            let error = template.render(&inputs).unwrap_err().to_string();
            assert!(error.contains("called rag") && error.contains("default, tool_use"), "{error}");
        }
    }
}

#[test]
fn errors_name_the_line() {
    let error = template("a\n{% if %}\n").unwrap_err();
    assert!(matches!(&error, TextError::Template { line: 2, .. }), "{error}");
    let refusing = "a\n\n{{ raise_exception('needs a system message') }}";
    let error = template(refusing).unwrap().render(&TemplateInputs::new(&[])).unwrap_err();
    assert!(matches!(&error, TextError::Template { line: 3, .. }), "{error}");
    assert!(error.to_string().contains("needs a system message"), "{error}");
}

#[test]
fn bombs_stop() {
    let bombs = [
        "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(99999) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{{ 'x' * 10000000000 }}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% for a in range(100000) %}{% for b in range(100000) %}{% set x = a * b %}{% endfor %}{% endfor %}",
        "{% for a in range(100000) %}{% for b in range(100000) %}{% set x = messages | tojson | length %}{% endfor %}{% endfor %}",
        "{% for a in messages %}{% for b in messages %}{% for c in messages %}{% for d in messages %}{{ messages | tojson }}{% endfor %}{% endfor %}{% endfor %}{% endfor %}",
    ];
    let messages = vec![json!({"role": "user", "content": "x".repeat(10_000)}); 100];
    for bomb in bombs {
        let clock = Instant::now();
        let error = template(bomb).unwrap().render(&TemplateInputs::new(&messages));
        let seconds = clock.elapsed();
        println!("{seconds:?}: {}", error.as_ref().unwrap_err());
        assert!(
            error.is_err()
                && seconds < Duration::from_secs(if cfg!(debug_assertions) { 5 } else { 2 }),
            "{bomb}: {seconds:?}"
        );
    }
}

#[test]
fn limits_hold() {
    let messages = [json!({"role": "user", "content": "x"})];
    let render = |source: &str, limits: RenderLimits| {
        let inputs = TemplateInputs { limits, ..TemplateInputs::new(&messages) };
        template(source).unwrap().render(&inputs)
    };
    let short = RenderLimits { max_bytes: 8, ..RenderLimits::default() };
    assert_eq!(render("{{ 'é' * 4 }}", short).unwrap(), "éééé");
    let error = render("line\n{{ 'x' * 9 }}", short).unwrap_err().to_string();
    assert!(error.contains("longer than 8 bytes"), "{error}");
    let quick = RenderLimits { max_time: Duration::from_millis(1), ..RenderLimits::default() };
    let loops = "{% for a in range(1000) %}{% for b in range(1000) %}x{% endfor %}{% endfor %}";
    let clock = Instant::now();
    let error = render(loops, quick).unwrap_err().to_string();
    assert!(error.contains("longer than 1ms"), "{error}");
    assert!(clock.elapsed() < Duration::from_secs(1), "{:?}", clock.elapsed());
}

/// Templates in the manner of the families, each with what it makes of a call.
const CALLING: [(&str, &str, &str); 5] = [
    (
        "Qwen",
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}",
        r#"{"city": "Köln", "days": [1, 2]}"#,
    ),
    (
        "GLM",
        "{% for m in messages %}{% for c in m.tool_calls %}{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v if v is string else v | tojson }}{% endfor %}{% endfor %}{% endfor %}",
        "<city>Köln<days>[1, 2]",
    ),
    (
        "DeepSeek",
        "{% for m in messages %}{% for c in m['tool_calls'] %}{{ m['content'] + '\u{ff5c}' + c['function']['arguments'] + '\u{ff5c}' }}{% endfor %}{% endfor %}",
        "\u{ff5c}{\"city\": \"Köln\", \"days\": [1, 2]}\u{ff5c}",
    ),
    (
        "printed",
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}{% endfor %}",
        r#"{"city": "Köln", "days": [1, 2]}"#,
    ),
    (
        "either",
        "{% for m in messages %}{% for c in m.tool_calls %}{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}{% endif %}{% endfor %}{% endfor %}",
        r#"{"city": "Köln", "days": [1, 2]}"#,
    ),
];

#[test]
fn arguments_of_calls_are_what_the_template_reads() {
    for (name, source, expected) in CALLING {
        let template = template(source).unwrap();
        for arguments in [
            json!({"city": "Köln", "days": [1, 2]}),
            json!("{\"city\": \"Köln\", \"days\": [1, 2]}"),
        ] {
            let messages = [json!({"role": "assistant", "content": null, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}},
            ]})];
            let prepared = template.prepare(&messages, None, None);
            let found = template.render(&TemplateInputs::new(&prepared)).unwrap();
            assert_eq!(found, expected, "{name}");
        }
    }
}

#[test]
fn messages_are_prepared() {
    let template = template(CALLING[0].1).unwrap();
    let rows = [
        (json!({"content": "x", "more": 1}), json!({"content": "x", "more": 1})),
        (
            json!({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}),
            json!({"content": "a\nb"}),
        ),
        (
            json!({"content": [{"type": "text", "text": "a"}, {"type": "image"}]}),
            json!({"content": [{"type": "text", "text": "a"}, {"type": "image"}]}),
        ),
        (json!({"content": "x", "tool_calls": null}), json!({"content": "x"})),
        (
            json!({"tool_calls": [{"function": {"name": "f", "arguments": ""}}, {"name": "g"}]}),
            json!({"tool_calls": [{"function": {"name": "f", "arguments": {}}}, {"name": "g", "arguments": {}}], "content": ""}),
        ),
        // What the model wrote is shown to it as it was.
        (
            json!({"content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{oops"}}]}),
            json!({"content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{oops"}}]}),
        ),
        (json!("no message"), json!("no message")),
    ];
    for (given, expected) in rows {
        assert_eq!(template.prepare(std::slice::from_ref(&given), None, None), [expected]);
    }
}

#[test]
fn sources_are_told() {
    let sources = BTreeMap::from([("b".to_owned(), "2".to_owned()), ("a".into(), "1".into())]);
    let template = ChatTemplate::new("test", sources, None, None).unwrap();
    assert_eq!(template.names(), ["a", "b"]);
    assert_eq!(template.sources(), ["1", "2"]);
}

/// A rendered prompt that clients send on to a completion endpoint, which adds the token again.
#[test]
fn the_first_token_is_not_doubled() {
    let mut tokens: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    tokens.extend(["<s>".into(), "</s>".into(), "<unk>".into()]);
    let mut kinds = vec![6; 256];
    kinds.extend([3, 3, 2]);
    let Value::Object(metadata) = json!({
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": vec![0; 259],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.unknown_token_id": 258,
        "tokenizer.ggml.add_space_prefix": false,
    }) else {
        unreachable!()
    };
    let container = Container::Gguf { metadata };
    let checkpoint = Checkpoint::from_parts("m".into(), container, [], BTreeMap::new());
    let tokenizer = Tokenizer::open(&checkpoint).unwrap();
    let a = u32::from(b'a');
    assert_eq!(tokenizer.encode("a", Specials::PROMPT).unwrap(), [256, a]);
    assert_eq!(tokenizer.encode("<s>a", Specials::PROMPT).unwrap(), [256, a]);
    assert_eq!(tokenizer.encode("<s>a", Specials::TEMPLATE).unwrap(), [256, a]);
    // Text of a user stays text.
    let literal = tokenizer.encode("<s>a", Specials { add: true, parse: false }).unwrap();
    assert_eq!(literal.len(), 5);
}
