//! What a grammar of a client may be at most, before anything is built from it. The compilers are
//! quadratic or recursive in places, and their fuel only counts what they have already made.

use super::Grammar;
use crate::TextError;
use serde_json::Value;

/// Depth of a schema.
pub(super) const MAX_DEPTH: usize = 64;
/// Values in a schema, keys not counted.
pub(super) const MAX_NODES: usize = 20_000;
/// Bytes of a schema's strings, keys included.
pub(super) const MAX_SCHEMA_BYTES: usize = 4 << 20;
/// Bytes of a regular expression.
pub(super) const MAX_REGEX_BYTES: usize = 16 << 10;
/// Bytes of a Lark or GBNF grammar.
pub(super) const MAX_SOURCE_BYTES: usize = 256 << 10;
/// Lines with a rule in one.
pub(super) const MAX_RULES: usize = 2_000;

/// Checks sizes, and depths where the compilers recurse.
pub(super) fn check(grammar: &Grammar) -> Result<(), TextError> {
    let failed = |reason| TextError::Grammar { kind: grammar.kind(), reason };
    match grammar {
        Grammar::JsonObject => Ok(()),
        Grammar::JsonSchema { schema, .. } => check_schema(schema).map_err(failed),
        Grammar::Regex(regex) => {
            limit("regular expression", regex.len(), MAX_REGEX_BYTES, "bytes").map_err(failed)
        }
        Grammar::Lark(source) | Grammar::Gbnf(source) => check_source(source).map_err(failed),
        Grammar::ToolCalls(calls) => {
            let schemas = calls.tools.iter().filter_map(|tool| tool.parameters.as_ref());
            let mut size = Size::default();
            for schema in schemas {
                measure(schema, 0, &mut size).map_err(failed)?;
            }
            Ok(())
        }
    }
}

fn limit(what: &str, found: usize, most: usize, unit: &str) -> Result<(), String> {
    match found <= most {
        true => Ok(()),
        false => Err(format!("the {what} has {found} {unit}; at most {most} are allowed")),
    }
}

fn check_schema(schema: &Value) -> Result<(), String> {
    match schema {
        Value::Object(_) | Value::Bool(true) => measure(schema, 0, &mut Size::default()),
        Value::Bool(false) => Err("no JSON is valid under the schema `false`".into()),
        _ => Err("expected a JSON schema, an object".into()),
    }
}

#[derive(Default)]
struct Size {
    nodes: usize,
    bytes: usize,
}

fn measure(value: &Value, depth: usize, size: &mut Size) -> Result<(), String> {
    if depth > MAX_DEPTH {
        return Err(format!("the schema is nested more than {MAX_DEPTH} deep"));
    }
    size.nodes += 1;
    if size.nodes > MAX_NODES {
        return Err(format!("the schema has more than {MAX_NODES} values"));
    }
    match value {
        Value::String(text) => size.bytes += text.len(),
        Value::Array(items) => {
            for item in items {
                measure(item, depth + 1, size)?;
            }
        }
        Value::Object(fields) => {
            for (key, item) in fields {
                size.bytes += key.len();
                if key == "pattern" || key == "format" {
                    limit("pattern", item.as_str().map_or(0, str::len), MAX_REGEX_BYTES, "bytes")?;
                }
                measure(item, depth + 1, size)?;
            }
        }
        _ => {}
    }
    limit("schema", size.bytes, MAX_SCHEMA_BYTES, "bytes of text")
}

/// Size of a grammar's text, its number of rules and the depth of its brackets, strings, character
/// classes and comments aside.
fn check_source(source: &str) -> Result<(), String> {
    limit("grammar", source.len(), MAX_SOURCE_BYTES, "bytes")?;
    let rules = source.lines().filter(|line| line.contains(':') || line.contains('%')).count();
    limit("grammar", rules, MAX_RULES, "rules")?;
    let (mut depth, mut deepest) = (0usize, 0usize);
    let mut within: Option<char> = None;
    let mut escaped = false;
    for c in source.chars() {
        if std::mem::take(&mut escaped) {
            continue;
        }
        match (within, c) {
            (Some(_), '\\') => escaped = true,
            // Nothing of this goes over lines.
            (Some(_), '\n') => within = None,
            (Some(end), _) if c == end => within = None,
            (Some(_), _) => {}
            (None, '"') => within = Some('"'),
            (None, '(' | '[' | '{') => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            (None, ')' | ']' | '}') => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    limit("grammar", deepest, MAX_DEPTH, "brackets inside one another")
}
