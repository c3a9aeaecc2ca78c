//! Answers under grammars: random tokens under the mask always give what the grammar says.

#[allow(dead_code)]
#[path = "grammar/bench.rs"]
mod bench;
mod common;

use bench::{Random, Writer, schema, valid};
use marlin_checkpoint::{Checkpoint, Container};
use marlin_text::{
    CallFormat, Grammar, GrammarFactory, GrammarMatcher, OutputEvent, OutputFormat, OutputParser,
    ParserOptions, StreamOptions, TextError, Tokenizer, Tool, ToolChoice, ToolSet,
};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// A byte-level vocabulary with a few words and the control tokens of every family.
fn bytes_tokenizer(controls: &[&str]) -> Tokenizer {
    let words = ["name", "\":", "\", \"", "true", "\u{2581}the", "}}", "<tool", "_call>", "{\""];
    common::bytes_tokenizer(&words, &[&["<|end|>"], controls].concat())
}

fn stories() -> Tokenizer {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/glm-stories");
    let names = ["tokenizer.json", "tokenizer_config.json"];
    let sidecars = names.iter().filter_map(|name| {
        Some(((*name).to_owned(), std::fs::read(folder.join(name)).ok()?.into()))
    });
    let container = Container::HuggingFace { config: json!({}), generation_config: None };
    let checkpoint = Checkpoint::from_parts(folder.clone(), container, [], sidecars.collect());
    Tokenizer::open(&checkpoint).unwrap()
}

/// Whether bytes are taken one after the other and the answer may end after them.
fn accepts(factory: &GrammarFactory, grammar: &Grammar, text: &str) -> bool {
    let mut matcher = factory.compile(grammar).unwrap();
    for byte in text.bytes() {
        if !matcher.mask().unwrap().allows(u32::from(byte))
            || matcher.accept(u32::from(byte)).is_err()
        {
            return false;
        }
    }
    matcher.may_stop().unwrap()
}

#[test]
fn random_schemas_give_valid_json() {
    let mut tokenizers = vec![
        ("bytes".to_owned(), bytes_tokenizer(&[]), 1_000),
        ("stories".into(), stories(), 1_000),
    ];
    match bench::large_vocabulary() {
        Ok(tokenizer) => tokenizers.push(("Qwen2.5-Coder".into(), tokenizer, 1_000)),
        Err(reason) => println!("skipped the large vocabulary: {reason}"),
    }
    for (name, tokenizer, count) in tokenizers {
        let factory = GrammarFactory::new(&tokenizer).unwrap();
        let mut random = Random(1);
        let mut writer = Writer::new(&tokenizer, 2);
        let mut tokens = 0;
        for index in 0..count {
            let schema = schema(&mut random, 3);
            let grammar = Grammar::JsonSchema { schema: schema.clone(), strict: true };
            let mut matcher =
                factory.compile(&grammar).unwrap_or_else(|e| panic!("{name}: {schema}: {e}"));
            let ids = writer
                .walk(&mut matcher, 4_000)
                .unwrap_or_else(|text| panic!("{name} {index}: no end under {schema}: {text}"));
            tokens += ids.len();
            let text = tokenizer
                .decode_with(
                    &ids,
                    StreamOptions { continues_text: true, ..StreamOptions::default() },
                )
                .unwrap();
            let value: Value = serde_json::from_str(&text)
                .unwrap_or_else(|error| panic!("{name} {index}: {error}: {text}\n{schema}"));
            assert!(valid(&value, &schema), "{name} {index}: {value}\n{schema}");
        }
        println!("{name}: {count} schemas, {tokens} tokens");
    }
}

#[test]
fn sources_accept_what_they_say() {
    let factory = GrammarFactory::new(&bytes_tokenizer(&[])).unwrap();
    let schema = |schema| Grammar::JsonSchema { schema, strict: false };
    let gbnf = |source: &str| Grammar::Gbnf(source.into());
    let expression = r#"
        # Sums of products.
        root ::= sum "\n"?
        sum ::= product (("+" | "-") product)*
        product ::= atom ([*/] atom)*   # left to right
        atom ::= number
          | ("(" sum   # over two lines
              ")")
        number ::= [0-9]{1,3} ("." digit+)?
        digit ::= [0-9]
    "#;
    let rows: Vec<(Grammar, &[&str], &[&str])> = vec![
        (Grammar::JsonObject, &["{}", "{\"a\": [1, null]}"], &["[]", "{", "x", ""]),
        (schema(json!({"type": "string", "minLength": 1})), &["\"a\""], &["\"\"", "1"]),
        (schema(json!(true)), &["1", "null", "{\n  \"a\": 1}"], &["", "nul"]),
        // Overlapping choices are read as `anyOf`.
        (
            schema(json!({"oneOf": [{"type": "integer"}, {"type": "number"}]})),
            &["1", "1.5"],
            &["\"\""],
        ),
        (Grammar::Regex("(yes|no)( sir)?".into()), &["yes", "no sir"], &["", "yes ", "maybe"]),
        (Grammar::Regex("a/b".into()), &["a/b"], &["ab"]),
        (Grammar::Lark("start: \"a\" b*\nb: \"b\" | \"c\"".into()), &["a", "abcb"], &["", "ba"]),
        (gbnf("root ::= \"yes\" | \"no\""), &["yes", "no"], &["", "maybe"]),
        (
            gbnf(expression),
            &["1", "1+2*3", "(1.25-2)*3\n", "((1))"],
            &["", "1+", "1234", "(1", "1\n\n"],
        ),
        (
            gbnf("root ::= [^a-c\\]\\n]+ \"\\u00e9\\x41\" .?"),
            &["xyéA", "déA\n"],
            &["aéA", "xé", "]éA"],
        ),
        (
            gbnf("root ::= x{2} y{1,} z{0,2}\nx ::= \"x\"\ny ::= [y]\nz ::= \"\" | \"z\""),
            &["xxy", "xxyyyz"],
            &["xy", "xx", "xxyzzz"],
        ),
        (gbnf("root ::= \"[\" (root (\",\" root)*)? \"]\""), &["[]", "[[],[[]]]"], &["[", "[,]"]),
        (gbnf("root ::= \"a\" | \"ab\" | \"abc\"\n"), &["a", "ab", "abc"], &["abcd", "b"]),
    ];
    for (grammar, good, bad) in rows {
        for text in good {
            assert!(accepts(&factory, &grammar, text), "{grammar:?} refuses {text:?}");
        }
        for text in bad {
            assert!(!accepts(&factory, &grammar, text), "{grammar:?} accepts {text:?}");
        }
    }
}

#[test]
fn calls_are_forced_and_read_back() {
    let markers = [
        "[TOOL_CALLS]",
        "[ARGS]",
        "<\u{ff5c}tool\u{2581}calls\u{2581}begin\u{ff5c}>",
        "<\u{ff5c}tool\u{2581}sep\u{ff5c}>",
        "</arg_value>",
    ];
    let tools = [
        json!({"name": "weather", "parameters": {"type": "object", "properties": {
            "city": {"type": "string", "maxLength": 9}, "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"enum": ["C", "F"]}, "place": {"$ref": "#/$defs/place"},
        }, "required": ["city", "days"], "additionalProperties": false,
        "$defs": {"place": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}}}}),
        json!({"name": "now"}),
    ];
    let tools: Vec<Tool> = tools.iter().map(|tool| Tool::parse(tool).unwrap()).collect();
    for controls in [&[] as &[&str], &markers] {
        let tokenizer = bytes_tokenizer(controls);
        let factory = GrammarFactory::new(&tokenizer).unwrap();
        for (name, format) in CallFormat::ALL {
            let output = OutputFormat { calls: Some(format), reasoning: None };
            for (which, parallel) in [
                (ToolChoice::Named("weather"), false),
                (ToolChoice::Named("now"), false),
                (ToolChoice::Required, true),
            ] {
                let grammar = Grammar::tool_calls(format, &tools, which, parallel).unwrap();
                let compiled = factory.compile(&grammar).unwrap_or_else(|e| panic!("{name}: {e}"));
                for seed in 0..20 {
                    let ids = Writer::new(&tokenizer, seed)
                        .walk(&mut compiled.clone(), 4_000)
                        .unwrap_or_else(|text| panic!("{name}: no end: {text}"));
                    let show = StreamOptions {
                        show: output.markers(),
                        continues_text: true,
                        ..StreamOptions::default()
                    };
                    let text = tokenizer.decode_with(&ids, show).unwrap();
                    let options = ParserOptions {
                        tools: ToolSet::Only(tools.clone()),
                        ..ParserOptions::default()
                    };
                    let mut parser = OutputParser::new(output, options);
                    let mut events = parser.push(&text);
                    events.extend(parser.finish());
                    check_calls(name, &text, &events, which, parallel);
                }
            }
        }
    }
}

fn takes(compiled: &GrammarMatcher, ids: &[u32]) -> bool {
    let mut matcher = compiled.clone();
    let all =
        ids.iter().all(|&id| matcher.mask().unwrap().allows(id) && matcher.accept(id).is_ok());
    all && matcher.may_stop().unwrap()
}

/// Where the model may choose it may write anything but a call that is none.
#[test]
fn calls_are_held_to_their_schemas_where_there_may_be_none() {
    let markers = ["[TOOL_CALLS]", "[ARGS]", "<tool_call>", "</tool_call>", "<think>", "</think>"];
    let schema = |key: &str, value: Value| json!({"type": "object", "properties": {key: value}, "required": [key], "additionalProperties": false});
    let days = schema("days", json!({"type": "integer", "minimum": 1, "maximum": 14}));
    let city = schema("city", json!({"enum": ["Oslo", "Rome"]}));
    let tool =
        |parameters| Tool::parse(&json!({"name": "weather", "parameters": parameters})).unwrap();
    let (strict, other) = (vec![tool(days)], vec![tool(city)]);
    for controls in [&[] as &[&str], &markers] {
        let tokenizer = bytes_tokenizer(controls);
        let factory = GrammarFactory::new(&tokenizer).unwrap();
        let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
        for (name, format) in CallFormat::ALL {
            let compile = |tools: &[Tool], which| {
                let grammar = Grammar::tool_calls(format, tools, which, true).unwrap();
                factory.compile(&grammar).unwrap_or_else(|e| panic!("{name}: {e}"))
            };
            let free = compile(&strict, ToolChoice::Auto);
            for text in ["", "Hello <b>{x}</b> [1] <tool", "a\n\nb"] {
                assert!(takes(&free, &bytes(text)), "{name} {controls:?}: {text:?}");
            }
            let write = |tools: &[Tool], seed| {
                let mut forced = compile(tools, ToolChoice::Required);
                Writer::new(&tokenizer, seed).walk(&mut forced, 4_000).unwrap()
            };
            let before = if format == CallFormat::Llama3 { "" } else { "So\n" };
            let with = |ids: Vec<u32>| [bytes(before), ids].concat();
            for seed in 0..12 {
                let good = with(write(&strict, seed));
                assert!(takes(&free, &good), "{name} {controls:?}: {:?}", tokenizer.decode(&good));
                let bad = with(write(&other, seed));
                assert!(!takes(&free, &bad), "{name} {controls:?}: {:?}", tokenizer.decode(&bad));
            }
        }
    }
}

fn check_calls(
    format: &str,
    text: &str,
    events: &[OutputEvent],
    which: ToolChoice,
    parallel: bool,
) {
    let schema = json!({"type": "object", "properties": {
        "city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["C", "F"]},
        "place": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
    }, "required": ["city", "days"], "additionalProperties": false});
    let mut calls = 0;
    let mut called = "";
    for event in events {
        match event {
            OutputEvent::ToolCallStart { name, .. } => {
                called = name;
                calls += 1;
                assert!(
                    which == ToolChoice::Required || which == ToolChoice::Named(name),
                    "{text}"
                );
            }
            OutputEvent::ToolCallArguments { delta, .. } => {
                let value: Value = serde_json::from_str(delta).unwrap();
                assert!(value.is_object(), "{format}: {text}");
                assert!(called != "weather" || valid(&value, &schema), "{format}: {text}: {value}");
            }
            OutputEvent::ToolCallEnd { complete, .. } => assert!(complete),
            other => panic!("{format}: {other:?} in {text:?}"),
        }
    }
    assert!(calls == 1 || parallel && calls > 1, "{format}: {calls} calls in {text:?}");
}

#[test]
fn a_tool_choice_names_a_tool() {
    let none = Grammar::tool_calls(CallFormat::Glm, &[], ToolChoice::Required, true);
    assert!(none.unwrap_err().to_string().contains("no tools"));
    let tools = [Tool { name: "now".into(), parameters: None }];
    let other = Grammar::tool_calls(CallFormat::Glm, &tools, ToolChoice::Named("then"), true);
    assert!(other.unwrap_err().to_string().contains("then"));
}

fn ids(matcher: &mut GrammarMatcher) -> Vec<u32> {
    matcher.mask().unwrap().ids().collect()
}

#[test]
fn a_matcher_tells_where_it_is() {
    let tokenizer = bytes_tokenizer(&[]);
    let factory = GrammarFactory::new(&tokenizer).unwrap();
    let end = tokenizer.end_ids()[0];
    let mut matcher = factory.compile(&Grammar::Regex("ab?".into())).unwrap();
    let (a, b) = (u32::from(b'a'), u32::from(b'b'));
    assert_eq!(ids(&mut matcher), [a]);
    assert!(!matcher.may_stop().unwrap() && !matcher.is_done());
    // A wrong token changes nothing.
    for wrong in [b, end, 100_000] {
        assert!(matcher.accept(wrong).is_err());
        assert_eq!(ids(&mut matcher), [a]);
    }
    matcher.accept(a).unwrap();
    assert!(matcher.may_stop().unwrap() && !matcher.is_done());
    let mut other = matcher.clone();
    let mut expected = vec![b];
    expected.extend(tokenizer.end_ids());
    assert_eq!(ids(&mut matcher), expected);
    matcher.accept(b).unwrap();
    assert!(matcher.may_stop().unwrap() && matcher.is_done());
    assert_eq!(ids(&mut matcher), tokenizer.end_ids());
    matcher.accept(end).unwrap();
    assert!(matcher.is_done() && matcher.accept(end).is_err());
    // The clone is where it was.
    assert!(!other.is_done());
    other.accept(b).unwrap();
    let mut logits = vec![0.0; tokenizer.vocab_size() + 50];
    other.mask().unwrap().apply(&mut logits);
    let finite: Vec<u32> =
        (0..logits.len() as u32).filter(|&id| logits[id as usize] == 0.0).collect();
    assert_eq!(finite, tokenizer.end_ids());
}

#[test]
fn wrong_grammars_are_errors() {
    let factory = GrammarFactory::new(&bytes_tokenizer(&[])).unwrap();
    let strict = |schema| Grammar::JsonSchema { schema, strict: true };
    let rows = [
        (strict(json!({"type": "strin"})), "json_schema"),
        (strict(json!({"type": "array", "uniqueItems": true})), "uniqueItems"),
        (
            Grammar::JsonSchema { schema: json!({"uniqueItems": true}), strict: false },
            "uniqueItems",
        ),
        (strict(json!({"oneOf": [{"type": "integer"}, {"type": "number"}]})), "oneOf"),
        (strict(json!({"$ref": "#/$defs/gone"})), "gone"),
        (strict(json!({"$ref": "https://example.org/schema"})), "json_schema"),
        (strict(json!({"type": "integer", "minimum": 5, "maximum": 4})), "json_schema"),
        (strict(json!({"allOf": [{"multipleOf": 99_991}, {"multipleOf": 9_973}]})), "multipleOf"),
        (strict(json!({"type": "number", "multipleOf": 1e-12})), "multipleOf"),
        (strict(json!(false)), "false"),
        (strict(json!("x")), "object"),
        (Grammar::Regex("(".into()), "regex"),
        (Grammar::Lark("start: missing".into()), "missing"),
        (Grammar::Lark(String::new()), "lark"),
        (Grammar::Gbnf("a ::= \"x\"".into()), "root"),
        (Grammar::Gbnf("root ::= gone".into()), "gone"),
        (Grammar::Gbnf("root ::= \"a\"\nroot ::= \"b\"".into()), "line 2"),
        (Grammar::Gbnf("root ::= \"a".into()), "line 1"),
        (Grammar::Gbnf("root ::= [z-a]".into()), "range"),
        (Grammar::Gbnf("root ::= \"a\"{9999}".into()), "2000"),
        (Grammar::Gbnf("root ::= (\"a\"".into()), ")"),
    ];
    for (grammar, part) in rows {
        let error = factory.compile(&grammar).map(|_| ()).unwrap_err();
        assert!(matches!(error, TextError::Grammar { .. }));
        let error = error.to_string();
        println!("{error}");
        assert!(error.contains(part), "{grammar:?}: {error}");
        assert!(!error.contains("backtrace") && !error.contains("panic"), "{error}");
    }
}

/// Grammars that would take for ever or all memory.
fn bombs() -> Vec<(&'static str, Grammar)> {
    let schema = |schema| Grammar::JsonSchema { schema, strict: false };
    let nested = |depth: usize, wrap: &dyn Fn(Value) -> Value| {
        (0..depth).fold(json!({"type": "string"}), |inner, _| wrap(inner))
    };
    let chain = |define: &str, rules: usize| -> String {
        (0..rules).map(|i| format!("a{i}{define} a{}\n", i + 1)).collect()
    };
    let many: serde_json::Map<String, Value> =
        (0..6_000).map(|i| (format!("p{i}"), json!({"type": "string"}))).collect();
    let choices: Vec<Value> = (0..12)
        .map(|i| json!({"anyOf": [
            {"properties": {format!("a{i}"): {"type": "string"}}}, {"properties": {format!("b{i}"): {"type": "number"}}},
            {"required": [format!("c{i}")]},
        ]}))
        .collect();
    vec![
        ("deep", schema(nested(100, &|s| json!({"items": s})))),
        ("deep enough", schema(nested(30, &|s| json!({"type": "array", "items": s})))),
        ("nodes", schema(json!({"enum": vec![1; 30_000]}))),
        ("properties", schema(json!({"type": "object", "properties": many}))),
        (
            "enum",
            schema(
                json!({"enum": (0..18_000).map(|i| format!("{i} {}", "x".repeat(100))).collect::<Vec<_>>()}),
            ),
        ),
        ("choices", schema(json!({"allOf": choices}))),
        ("nested allOf", schema(nested(13, &|s| json!({"allOf": [s, s]})))),
        (
            "nested anyOf",
            schema(nested(12, &|s| json!({"anyOf": [s.clone(), {"type": "array", "items": s}]}))),
        ),
        ("maxItems", schema(json!({"type": "array", "minItems": 1_000_000_000}))),
        (
            "nested items",
            schema(nested(
                8,
                &|s| json!({"type": "array", "items": s, "minItems": 900, "maxItems": 1_000}),
            )),
        ),
        ("maxLength", schema(json!({"type": "string", "minLength": 100_000_000}))),
        ("lengths", schema(json!({"type": "string", "minLength": 10_000, "maxLength": 20_000}))),
        (
            "pattern",
            schema(json!({"type": "string", "pattern": "^((a{1,500}b?){1,500}c){1,500}$"})),
        ),
        (
            "patterns",
            schema(
                json!({"allOf": (0..30).map(|i| json!({"pattern": format!("(.*[{}]){{{i}}}.*", i % 10)})).collect::<Vec<_>>()}),
            ),
        ),
        (
            "multiples",
            schema(
                json!({"type": "integer", "multipleOf": 104_729, "minimum": 1, "maximum": 1_000_000_000}),
            ),
        ),
        (
            "products",
            schema(
                json!({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}, {"multipleOf": 9949}]}),
            ),
        ),
        (
            "pattern properties",
            schema(json!({"patternProperties": (0..400)
                .map(|i| (format!("^x{i}_"), json!({"type": "string"})))
                .collect::<serde_json::Map<_, _>>()})),
        ),
        (
            "schema in lark",
            Grammar::Lark(format!(
                "start: %json {}",
                json!({"allOf": (0..30)
                .map(|i| json!({"pattern": format!("(.*[{}]){{{i}}}.*", i % 10)}))
                .collect::<Vec<_>>()})
            )),
        ),
        (
            "intersections",
            Grammar::Lark(format!(
                "start: A\nA: {}",
                (0..30)
                    .map(|i| format!("/(.*[{}]){{{i}}}.*/", i % 10))
                    .collect::<Vec<_>>()
                    .join(" & ")
            )),
        ),
        (
            "substrings",
            Grammar::Lark(format!(
                "start: %regex {}",
                json!({"substring_chars": "abcab".repeat(40_000)})
            )),
        ),
        (
            "words",
            Grammar::Lark(format!(
                "start: %regex {}",
                json!({"substring_words": "ab a b c ".repeat(20_000)})
            )),
        ),
        ("cycle", schema(json!({"$ref": "#"}))),
        (
            "cycle of two",
            schema(
                json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
            ),
        ),
        (
            "recursion",
            schema(json!({"anyOf": [{"$ref": "#"}, {"type": "array", "items": {"$ref": "#"}}]})),
        ),
        (
            "merge",
            schema(
                json!({"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"properties": {"x": {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}}}}),
            ),
        ),
        ("not utf-8 boundary", schema(json!({"type": ["é".repeat(200)]}))),
        ("regex", Grammar::Regex("((a|b)*c(a|b|c){1,900}){1,900}".into())),
        ("regex of classes", Grammar::Regex("(\\p{L}{1,200}\\p{N}{1,200}){1,200}".into())),
        ("regex of ends", Grammar::Regex("(.*a.{30}|.*b.{31}|.*c.{32}|.*d.{33})*".into())),
        ("regex of groups", Grammar::Regex(format!("{}a{}", "(".repeat(5_000), ")".repeat(5_000)))),
        (
            "regex of words",
            Grammar::Regex((0..2_000).map(|i| format!("w{i}")).collect::<Vec<_>>().join("|")),
        ),
        ("rules", Grammar::Lark(format!("start: a0\n{}a1900: \"x\"", chain(":", 1_900)))),
        ("too many rules", Grammar::Lark(format!("start: a0\n{}", chain(":", 5_000)))),
        (
            "terminals",
            Grammar::Lark(format!("start: A0\n{}A1900: \"x\"", chain(":", 1_900).to_uppercase())),
        ),
        (
            "doubling",
            Grammar::Lark(format!(
                "start: A0\n{}A60: \"x\"",
                (0..60).map(|i| format!("A{i}: A{} A{}\n", i + 1, i + 1)).collect::<String>()
            )),
        ),
        (
            "doubling rules",
            Grammar::Lark(format!(
                "start: a0\n{}a60: \"x\"",
                (0..60).map(|i| format!("a{i}: a{} a{}\n", i + 1, i + 1)).collect::<String>()
            )),
        ),
        (
            "brackets",
            Grammar::Lark(format!("start: {}\"a\"{}", "(".repeat(5_000), ")".repeat(5_000))),
        ),
        ("left", Grammar::Lark("start: start".into())),
        ("ambiguous", Grammar::Lark("start: s\ns: s s s | s s | \"a\" | \"\"".into())),
        ("repeat", Grammar::Lark("start: (((\"a\"{1,900}){1,900}){1,900}){1,900}".into())),
        (
            "repeat terminal",
            Grammar::Lark("start: A\nA: (((\"a\"{1,900}){1,900}){1,900}){1,900}".into()),
        ),
        (
            "gbnf brackets",
            Grammar::Gbnf(format!("root ::= {}\"a\"{}", "(".repeat(60), ")".repeat(60))),
        ),
        (
            "gbnf rules",
            Grammar::Gbnf(format!("root ::= a0\n{}a1900 ::= \"x\"", chain(" ::=", 1_900))),
        ),
        (
            "gbnf doubling",
            Grammar::Gbnf(format!(
                "root ::= a0\n{}a40 ::= \"x\"",
                (0..40).map(|i| format!("a{i} ::= a{} a{}\n", i + 1, i + 1)).collect::<String>()
            )),
        ),
        (
            "gbnf repeat",
            Grammar::Gbnf("root ::= ((([a-z]{1,2000} \".\"){1,2000}){1,2000}){1,2000}".into()),
        ),
        ("gbnf left", Grammar::Gbnf("root ::= root root | \"a\" | \"\"".into())),
    ]
}

#[test]
fn bombs_stop() {
    let tokenizer = bytes_tokenizer(&[]);
    let factory = GrammarFactory::new(&tokenizer).unwrap();
    factory.prepare().unwrap();
    for (name, bomb) in bombs() {
        let started = Instant::now();
        let compiled = factory.compile(&bomb);
        let compile_time = started.elapsed();
        let mut longest = Duration::ZERO;
        let end = match compiled {
            Err(error) => error.to_string(),
            Ok(mut matcher) => {
                let mut writer = Writer::new(&tokenizer, 3);
                let mut steps = 0;
                loop {
                    let started = Instant::now();
                    let step = writer.step(&mut matcher, false, &mut Vec::new());
                    longest = longest.max(started.elapsed());
                    steps += 1;
                    match step {
                        Ok(Some(_)) if steps < 30 => {}
                        Ok(_) => break format!("{steps} steps"),
                        Err(error) => break error.to_string(),
                    }
                }
            }
        };
        let end: String = end.chars().take(100).collect();
        println!("{name}: compiled {compile_time:?}, longest step {longest:?}: {end}");
        // The limit is two seconds; a busy machine is late to look at the clock.
        assert!(compile_time < Duration::from_secs(6), "{name}: {compile_time:?}");
        assert!(longest < Duration::from_secs(6), "{name}: {longest:?}");
        let known =
            !["NoExtension", "too many expressions", "panic"].iter().any(|w| end.contains(w));
        assert!(known, "{name}: {end}");
        // What was given up must not be in the way of what comes next.
        std::thread::sleep(if end.contains("not compiled") {
            compile_time
        } else {
            Duration::ZERO
        });
    }
}
