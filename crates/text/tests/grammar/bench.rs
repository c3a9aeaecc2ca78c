//! Random schemas, random answers under a grammar, and a validator for those schemas: shared by the
//! tests and by the program that measures masks.

use marlin_checkpoint::Checkpoint;
use marlin_text::{
    CallFormat, Grammar, GrammarFactory, GrammarMatcher, TextError, TokenMask, Tokenizer, Tool,
    ToolChoice,
};
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Numbers that are the same in every run (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) % end as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// The tokenizer of Qwen2.5-Coder, 150 thousand tokens, or why it is not here.
pub fn large_vocabulary() -> Result<Tokenizer, String> {
    let folder = std::env::var_os("MARLIN_TEST_MODELS").map(PathBuf::from).or_else(|| {
        Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/marlin/test-models"))
    });
    let folder = folder.ok_or("neither MARLIN_TEST_MODELS nor HOME names a folder")?;
    let path = folder.join("qwen2.5-coder-0.5b-q4_k_m.gguf");
    let checkpoint = Checkpoint::open(&path).map_err(|error| error.to_string())?;
    Tokenizer::open(&checkpoint).map_err(|error| error.to_string())
}

const WORDS: [&str; 8] = ["id", "name", "größe", "a b", "\"q\"", "x\\y", "tags", "日本"];

/// A random schema that JSON exists for.
pub fn schema(random: &mut Random, depth: usize) -> Value {
    let leaf = depth == 0;
    match random.below(if leaf { 7 } else { 11 }) {
        0 => match random.below(3) {
            0 => json!({"type": "string"}),
            1 => json!({"type": "string", "maxLength": random.below(12)}),
            _ => {
                json!({"type": "string", "minLength": random.below(5), "maxLength": 5 + random.below(9)})
            }
        },
        1 => {
            let low = random.below(2_000) as i64 - 1_000;
            json!({"type": "integer", "minimum": low, "maximum": low + random.below(500) as i64})
        }
        2 => {
            let low = random.below(100) as f64 / 4.0 - 10.0;
            json!({"type": "number", "exclusiveMinimum": low, "maximum": low + 1.0 + random.below(50) as f64})
        }
        3 => json!({"type": "boolean"}),
        4 => json!({"type": ["null", "integer"]}),
        5 => {
            let values: Vec<Value> = (0..1 + random.below(5)).map(|_| literal(random)).collect();
            json!({"enum": values})
        }
        6 => json!({"const": literal(random)}),
        7 => {
            let low = random.below(3);
            let mut schema = json!({"type": "array", "items": schema(random, depth - 1)});
            schema["minItems"] = low.into();
            if random.one_in(2) {
                schema["maxItems"] = (low + random.below(3)).into();
            }
            schema
        }
        8 => {
            // Each choice has a tag of its own, so that exactly one can be right.
            let choices: Vec<Value> = (0..2 + random.below(2))
                .map(|tag| {
                    let mut choice = object(random, depth - 1);
                    choice["properties"]["kind"] = json!({"const": format!("k{tag}")});
                    let required = choice["required"].as_array_mut().expect("objects have it");
                    required.push("kind".into());
                    choice
                })
                .collect();
            json!({"oneOf": choices})
        }
        9 => {
            let choices: Vec<Value> =
                (0..2 + random.below(2)).map(|_| schema(random, depth - 1)).collect();
            json!({"anyOf": choices})
        }
        _ => object(random, depth - 1),
    }
}

fn object(random: &mut Random, depth: usize) -> Value {
    let mut properties = Map::new();
    let mut required: Vec<Value> = Vec::new();
    for _ in 0..random.below(4) {
        let name = WORDS[random.below(WORDS.len())];
        properties.insert(name.into(), schema(random, depth));
    }
    for name in properties.keys() {
        if random.one_in(2) {
            required.push(name.as_str().into());
        }
    }
    let mut schema = json!({"type": "object", "properties": properties, "required": required});
    match random.below(4) {
        0 => {}
        1 => schema["additionalProperties"] = json!({"type": "boolean"}),
        _ => schema["additionalProperties"] = json!(false),
    }
    schema
}

fn literal(random: &mut Random) -> Value {
    match random.below(6) {
        0 => Value::Null,
        1 => json!(random.one_in(2)),
        2 => json!(random.below(100_000) as i64 - 50_000),
        3 => json!([1, "two", {"three": null}]),
        4 => json!({"a": random.below(9), "b": []}),
        _ => json!(WORDS[random.below(WORDS.len())]),
    }
}

/// Whether `value` is valid under a schema that [`schema`] makes.
pub fn valid(value: &Value, schema: &Value) -> bool {
    let Value::Object(keywords) = schema else { return schema == &json!(true) };
    keywords.iter().all(|(keyword, argument)| match keyword.as_str() {
        "type" => match argument {
            Value::Array(types) => types.iter().any(|name| is_type(value, name)),
            name => is_type(value, name),
        },
        "const" => same(value, argument),
        "enum" => argument.as_array().unwrap().iter().any(|choice| same(value, choice)),
        "anyOf" => argument.as_array().unwrap().iter().any(|choice| valid(value, choice)),
        "oneOf" => {
            argument.as_array().unwrap().iter().filter(|choice| valid(value, choice)).count() == 1
        }
        "minLength" => {
            value.as_str().is_none_or(|s| s.chars().count() as u64 >= argument.as_u64().unwrap())
        }
        "maxLength" => {
            value.as_str().is_none_or(|s| s.chars().count() as u64 <= argument.as_u64().unwrap())
        }
        "minimum" => value.as_f64().is_none_or(|x| x >= argument.as_f64().unwrap()),
        "maximum" => value.as_f64().is_none_or(|x| x <= argument.as_f64().unwrap()),
        "exclusiveMinimum" => value.as_f64().is_none_or(|x| x > argument.as_f64().unwrap()),
        "minItems" => value.as_array().is_none_or(|a| a.len() as u64 >= argument.as_u64().unwrap()),
        "maxItems" => value.as_array().is_none_or(|a| a.len() as u64 <= argument.as_u64().unwrap()),
        "items" => value.as_array().is_none_or(|a| a.iter().all(|item| valid(item, argument))),
        "required" => value.as_object().is_none_or(|fields| {
            argument
                .as_array()
                .unwrap()
                .iter()
                .all(|name| fields.contains_key(name.as_str().unwrap()))
        }),
        "properties" => value.as_object().is_none_or(|fields| {
            fields
                .iter()
                .all(|(name, item)| argument.get(name).is_none_or(|schema| valid(item, schema)))
        }),
        "additionalProperties" => value.as_object().is_none_or(|fields| {
            let known = schema.get("properties");
            let known = |name: &str| known.is_some_and(|known| known.get(name).is_some());
            fields.iter().all(|(name, item)| known(name) || valid(item, argument))
        }),
        other => panic!("{other} is not validated here"),
    })
}

fn is_type(value: &Value, name: &Value) -> bool {
    match name.as_str().unwrap() {
        "string" => value.is_string(),
        "integer" => {
            value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|x| x.fract() == 0.0)
        }
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("{other} is no type"),
    }
}

/// Equality of JSON, whose numbers have no types.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        _ => a == b,
    }
}

/// Writes random answers under grammars.
pub struct Writer<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens that are one byte, by byte.
    bytes: Vec<Vec<u32>>,
    specials: Vec<u32>,
    pub random: Random,
}

impl<'a> Writer<'a> {
    pub fn new(tokenizer: &'a Tokenizer, seed: u64) -> Self {
        let mut bytes = vec![Vec::new(); 256];
        let mut specials = Vec::new();
        for id in 0..tokenizer.vocab_size() as u32 {
            if tokenizer.is_special(id).unwrap() {
                specials.push(id);
            } else if let [byte] = tokenizer.token_bytes(id).unwrap() {
                bytes[usize::from(*byte)].push(id);
            }
        }
        Self { tokenizer, bytes, specials, random: Random(seed) }
    }

    /// One random token under the mask, or the one that leads to the end soonest where `closing` says
    /// so; `None` at the end. `text`: what has been written.
    pub fn step(
        &mut self,
        matcher: &mut GrammarMatcher,
        closing: bool,
        text: &mut Vec<u8>,
    ) -> Result<Option<u32>, TextError> {
        if matcher.is_done() || closing && matcher.may_stop()? {
            return Ok(None);
        }
        let mask = matcher.mask()?;
        let closer = if closing { self.closer(mask, text) } else { None };
        let chosen = closer.unwrap_or_else(|| {
            let nth = self.random.below(mask.count());
            mask.ids().nth(nth).expect("a token that is counted")
        });
        matcher.accept(chosen)?;
        if self.tokenizer.end_ids().contains(&chosen) {
            return Ok(None);
        }
        text.extend_from_slice(self.tokenizer.token_bytes(chosen)?);
        Ok(Some(chosen))
    }

    /// What ends strings and containers first.
    fn closer(&mut self, mask: &TokenMask, text: &[u8]) -> Option<u32> {
        if let Some(marker) = self.specials.iter().find(|&&id| mask.allows(id)) {
            return Some(*marker);
        }
        let find =
            |byte: u8| self.bytes[usize::from(byte)].iter().copied().find(|&id| mask.allows(id));
        // Only strings hold a tilde, and only text between markers line breaks too.
        if find(b'~').is_some() && find(b'\n').is_some() {
            let markers: [&[u8]; 2] = [b"</arg_value>", b"\n</parameter>"];
            let begun = markers.map(|marker| {
                (0..marker.len()).rev().find(|&n| text.ends_with(&marker[..n])).unwrap_or(0)
            });
            // Which of them it is cannot be told before it has begun.
            let which = match begun[0].cmp(&begun[1]) {
                std::cmp::Ordering::Equal => self.random.below(2),
                order => usize::from(order.is_lt()),
            };
            return find(markers[which][begun[which]]);
        }
        let order = if find(b'~').is_some() { "\"" } else { "}]\"<>:,9876543210;\n" };
        order.bytes().find_map(find)
    }

    /// Random tokens to the end of an answer, or its beginning when it had none after `most`.
    pub fn walk(&mut self, matcher: &mut GrammarMatcher, most: usize) -> Result<Vec<u32>, String> {
        let (mut ids, mut text) = (Vec::new(), Vec::new());
        while ids.len() < most {
            let closing = ids.len() > 40 || self.random.one_in(2);
            match self.step(matcher, closing, &mut text) {
                Ok(Some(id)) => ids.push(id),
                Ok(None) => return Ok(ids),
                Err(error) => {
                    return Err(format!("{error} after {:?}", String::from_utf8_lossy(&text)));
                }
            }
        }
        Err(String::from_utf8_lossy(&text).into_owned())
    }
}

/// Times of compiling grammars of one kind and of making their masks.
pub struct Times {
    pub name: &'static str,
    pub compile: Vec<Duration>,
    pub mask: Vec<Duration>,
}

/// A time that this share of `times` is within.
pub fn within(times: &mut [Duration], share: f64) -> Duration {
    times.sort_unstable();
    times[((times.len() - 1) as f64 * share) as usize]
}

/// Compiles grammars of every kind for `tokenizer`, `schemas` of them random schemas, and writes an answer under each.
pub fn measure(tokenizer: &Tokenizer, schemas: usize) -> Vec<Times> {
    let factory = GrammarFactory::new(tokenizer).expect("a vocabulary with an end");
    factory.prepare().expect("a usable vocabulary");
    let tool = json!({"name": "weather", "parameters": {"type": "object", "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}},
    }, "required": ["city"], "additionalProperties": false}});
    let tools = [Tool::parse(&tool).expect("a tool")];
    let calls = |format| {
        Grammar::tool_calls(format, &tools, ToolChoice::Required, true).expect("there is a tool")
    };
    let mut random = Random(1);
    let random_schemas =
        (0..schemas).map(|_| Grammar::JsonSchema { schema: schema(&mut random, 3), strict: true });
    let mut writer = Writer::new(tokenizer, 2);
    let rows: [(&str, Vec<Grammar>); 5] = [
        ("random schemas", random_schemas.collect()),
        ("any JSON object", vec![Grammar::JsonObject; 50]),
        ("calls, hermes", vec![calls(CallFormat::Hermes); 50]),
        ("calls, glm", vec![calls(CallFormat::Glm); 50]),
        ("calls, qwen-coder", vec![calls(CallFormat::QwenCoder); 50]),
    ];
    let mut measured = Vec::new();
    for (name, grammars) in rows {
        let (mut compile, mut mask) = (Vec::new(), Vec::new());
        for grammar in grammars {
            let started = Instant::now();
            let mut matcher = factory.compile(&grammar).expect("a grammar that compiles");
            compile.push(started.elapsed());
            let mut text = Vec::new();
            for tokens in 0..200 {
                let started = Instant::now();
                matcher.mask().expect("a token that fits");
                mask.push(started.elapsed());
                let closing = tokens > 40 || tokens % 2 == 1;
                let next = writer.step(&mut matcher, closing, &mut text);
                if next.expect("a token that fits").is_none() {
                    break;
                }
            }
        }
        measured.push(Times { name, compile, mask });
    }
    measured
}
