//! JSON of bounded size: `config.json`, `generation_config.json`, and a check of other files.
//!
//! `serde_json` alone lets a later duplicate key win in silence and turns a 16 MB `[0,0,…]` into
//! half a gigabyte of values. Here a duplicate key is an error that names it, and the number of
//! values is limited. Python's `json` writes `NaN`, `Infinity` and `-Infinity` bare (real
//! configurations have `"time_step_limit": [0.0, Infinity]`); they become the strings of the same
//! spelling, since JSON numbers cannot hold them.

use crate::CheckpointError;
use crate::error::{Fault, shown};
use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::path::Path;

/// Most values one file may hold. The largest known `config.json` holds 67 thousand.
const MAX_VALUES: usize = 256 * 1024;

/// Parses `bytes`, which must be a JSON object.
///
/// # Errors
/// On a syntax error, a duplicate key, too many values, or another value than an object.
pub(crate) fn parse_object(
    file: &Path,
    bytes: &[u8],
) -> Result<Map<String, Value>, CheckpointError> {
    let text = quote_non_finite(bytes);
    let mut state = State { values_left: MAX_VALUES, trail: Vec::new() };
    let mut parser = serde_json::Deserializer::from_slice(&text);
    let parsed = Seed(&mut state)
        .deserialize(&mut parser)
        .and_then(|value| parser.end().map(|()| value))
        .map_err(|e| Fault::corrupt(e.to_string()).at(file, place(&state.trail)))?;
    match parsed {
        Value::Object(object) => Ok(object),
        _ => Err(Fault::corrupt("expected a JSON object").at(file, "top level")),
    }
}

/// Checks that `bytes` are one JSON document of at most `max_values` values, at most `max_keys` of
/// them in one object, without duplicate keys.
/// Nothing is built: it takes less time and memory than to parse the file.
///
/// # Errors
/// When they are not; the error names the key.
pub fn check_json(
    file: &Path,
    bytes: &[u8],
    max_values: usize,
    max_keys: usize,
) -> Result<(), CheckpointError> {
    let mut state = Check { values: 0, max_values, max_keys, trail: Vec::new() };
    let mut parser = serde_json::Deserializer::from_slice(bytes);
    CheckSeed(&mut state)
        .deserialize(&mut parser)
        .and_then(|()| parser.end())
        .map_err(|e| Fault::corrupt(e.to_string()).at(file, place(&state.trail)))
}

struct Check<'de> {
    values: usize,
    max_values: usize,
    max_keys: usize,
    trail: Vec<Cow<'de, str>>,
}

struct CheckSeed<'s, 'de>(&'s mut Check<'de>);

impl<'de> DeserializeSeed<'de> for CheckSeed<'_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        self.0.values += 1;
        if self.0.values > self.0.max_values {
            let max = self.0.max_values;
            return Err(D::Error::custom(format_args!("more than {max} values in one file")));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for CheckSeed<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(CheckSeed(self.0))?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        // Hashes: millions of keys must not take more memory than the file. Of a million, two
        // different ones collide once in thirty million files.
        let (mut keys, hasher) = (HashSet::new(), RandomState::new());
        while let Some(Text(key)) = map.next_key::<Text>()? {
            let hash = hasher.hash_one(key.as_ref());
            self.0.trail.push(key);
            if !keys.insert(hash) {
                return Err(A::Error::custom("key appears twice"));
            }
            if keys.len() > self.0.max_keys {
                let max = self.0.max_keys;
                return Err(A::Error::custom(format_args!("more than {max} keys in one object")));
            }
            map.next_value_seed(CheckSeed(self.0))?;
            self.0.trail.pop();
        }
        Ok(())
    }
}

fn place(trail: &[impl AsRef<str>]) -> String {
    if trail.is_empty() {
        return "top level".to_owned();
    }
    trail.iter().map(|key| shown(key.as_ref())).collect::<Vec<_>>().join(".")
}

/// `bytes` with bare `NaN`, `Infinity` and `-Infinity` put in quotes.
fn quote_non_finite(bytes: &[u8]) -> Cow<'_, [u8]> {
    const WORDS: [&[u8]; 3] = [b"NaN", b"Infinity", b"-Infinity"];
    let mut out: Vec<u8> = Vec::new();
    let (mut copied, mut at, mut in_string) = (0, 0, false);
    while at < bytes.len() {
        match bytes[at] {
            b'"' => in_string = !in_string,
            b'\\' if in_string => at += 1,
            b'N' | b'I' | b'-' if !in_string => {
                if let Some(word) = WORDS.iter().find(|w| bytes[at..].starts_with(w)) {
                    out.extend_from_slice(&bytes[copied..at]);
                    out.push(b'"');
                    out.extend_from_slice(word);
                    out.push(b'"');
                    at += word.len();
                    copied = at;
                    continue;
                }
            }
            _ => {}
        }
        at += 1;
    }
    if copied == 0 {
        return Cow::Borrowed(bytes);
    }
    out.extend_from_slice(&bytes[copied..]);
    Cow::Owned(out)
}

struct State {
    values_left: usize,
    /// Keys from the top to the value being read; left as it is when an error comes up.
    trail: Vec<String>,
}

struct Seed<'s>(&'s mut State);

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.0.values_left = self.0.values_left.checked_sub(1).ok_or_else(|| {
            D::Error::custom(format_args!("more than {MAX_VALUES} values in one file"))
        })?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E: Error>(self, v: f64) -> Result<Value, E> {
        let number = Number::from_f64(v).ok_or_else(|| E::custom("number is not finite"))?;
        Ok(Value::Number(number))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::String(v.to_owned()))
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::String(v))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut out = Vec::new();
        while let Some(value) = seq.next_element_seed(Seed(self.0))? {
            out.push(value);
        }
        Ok(Value::Array(out))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut out = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            self.0.trail.push(key.clone());
            let value = map.next_value_seed(Seed(self.0))?;
            if out.insert(key, value).is_some() {
                return Err(A::Error::custom("key appears twice"));
            }
            self.0.trail.pop();
        }
        Ok(Value::Object(out))
    }
}

/// A JSON string, borrowed from the file unless it holds escapes.
pub(crate) struct Text<'de>(pub(crate) Cow<'de, str>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_borrowed_str<E>(self, v: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(v)))
            }
            fn visit_str<E>(self, v: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(v.to_owned())))
            }
        }
        deserializer.deserialize_str(TextVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Value, String> {
        parse_object(Path::new("config.json"), text.as_bytes())
            .map(Value::Object)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn values_survive() {
        let text = r#"{"a": [1, -2, 1.5, true, null, "x\"NaN"], "b": {"c": 18446744073709551615}}"#;
        assert_eq!(parse(text).unwrap(), serde_json::from_str::<Value>(text).unwrap());
    }

    #[test]
    fn python_non_finite_numbers_become_strings() {
        let found = parse(r#"{"limit": [0.0, Infinity, -Infinity,NaN], "NaN": "-Infinity"}"#);
        let expected = r#"{"limit": [0.0, "Infinity", "-Infinity", "NaN"], "NaN": "-Infinity"}"#;
        assert_eq!(found.unwrap(), serde_json::from_str::<Value>(expected).unwrap());
    }

    #[test]
    fn errors_name_the_key() {
        let rows = [
            (r#"{"a": {"b": 1, "b": 2}}"#, "config.json: a.b: key appears twice"),
            (r#"{"a": {"b": [1, }}"#, "config.json: a.b: expected value"),
            (r#"{"a": 1"#, "EOF"),
            (r#"{"a": 1} 2"#, "trailing"),
            ("[1]", "top level: expected a JSON object"),
            ("", "top level: EOF"),
            ("{\"a\": 1e999}", "out of range"),
            (r#"{"\u001b[31m": tru}"#, "\\u{1b}[31m: "),
        ];
        for (text, part) in rows {
            let error = parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        let deep = format!("{{\"a\": {}", "[".repeat(100_000));
        assert!(parse(&deep).unwrap_err().contains("recursion limit"));
        let check = |text: &str| check_json(Path::new("t.json"), text.as_bytes(), 5, 2);
        check(r#"{"a": [1, -2.5, null], "b": "x"}"#).unwrap_err();
        check(r#"{"a": [1, -2.5], "b": "x"}"#).unwrap();
        let error = check(r#"{"a": {"b": 1, "b": 2}}"#).unwrap_err().to_string();
        assert!(error.starts_with("t.json: a.b: key appears twice"), "{error}");
        let error = check(r#"{"a": [0, 0, 0, 0, 0]}"#).unwrap_err().to_string();
        assert!(error.starts_with("t.json: a: more than 5 values"), "{error}");
        let error = check(r#"{"a": 1, "b": 2, "c": 3}"#).unwrap_err().to_string();
        assert!(error.starts_with("t.json: c: more than 2 keys"), "{error}");
        let many = format!("{{\"a\": [{}0]}}", "0,".repeat(MAX_VALUES));
        assert!(parse(&many).unwrap_err().contains("a: more than 262144 values"));
    }
}
