//! What a grammar of a client may be at most, before anything is built from it. llguidance counts the
//! fuel of most of its work, but not of all: what it does with each pair of an object's properties,
//! with intersections of many patterns and with products of `multipleOf` has no bound of its own.
//! Each was set so that what just passes compiled in about half a second where it was measured.

use super::{Grammar, GrammarLimits};
use crate::TextError;
use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// Bytes of a schema's strings, keys included.
const MAX_SCHEMA_BYTES: usize = 4 << 20;
/// Properties of an object that may be left out, any of which may come next.
const MAX_OPTIONAL: usize = 400;
/// Sum of the squares of the numbers of properties of a schema's objects.
const MAX_PROPERTY_PAIRS: usize = 2_000_000;
/// The same for `patternProperties`, which are compared more thoroughly.
const MAX_PATTERN_PAIRS: usize = 5_000;
/// Different patterns and formats where schemas may be merged, so that a string has to match many.
const MAX_MERGED_PATTERNS: usize = 12;
/// Intersections in a Lark grammar.
const MAX_INTERSECTIONS: usize = 12;
/// Product of all arguments of `multipleOf` in a schema, decimal points aside.
const MAX_MULTIPLE: f64 = 1e8;
/// Bytes of a regular expression.
const MAX_REGEX_BYTES: usize = 16 << 10;
/// Bytes of a Lark or GBNF grammar.
const MAX_SOURCE_BYTES: usize = 256 << 10;
/// Lines with a rule in one.
const MAX_RULES: usize = 2_000;

pub(super) fn check(grammar: &Grammar, limits: &GrammarLimits) -> Result<(), TextError> {
    let checked = match grammar {
        Grammar::JsonObject => Ok(()),
        Grammar::JsonSchema { schema, .. } => check_schema(schema, limits),
        Grammar::Regex(regex) => limit(regex.len(), MAX_REGEX_BYTES, "bytes"),
        Grammar::Lark(source) => check_source(source).and_then(|()| check_lark(source, limits)),
        Grammar::Gbnf(source) => check_source(source),
        Grammar::ToolCalls(calls) => {
            let mut size = Size::new(limits);
            let mut schemas = calls.tools.iter().filter_map(|tool| tool.parameters.as_ref());
            schemas.try_for_each(|schema| size.add(schema, 0)).and_then(|()| size.check())
        }
    };
    checked.map_err(|reason| TextError::Grammar { kind: grammar.kind(), reason })
}

fn limit(found: usize, most: usize, unit: &str) -> Result<(), String> {
    match found <= most {
        true => Ok(()),
        false => Err(format!("there are {found} {unit}; at most {most} are allowed")),
    }
}

fn check_schema(schema: &Value, limits: &GrammarLimits) -> Result<(), String> {
    match schema {
        Value::Object(_) | Value::Bool(true) => {
            let mut size = Size::new(limits);
            size.add(schema, 0)?;
            size.check()
        }
        Value::Bool(false) => Err("no JSON is valid under the schema `false`".into()),
        _ => Err("expected a JSON schema, an object".into()),
    }
}

/// What counts in a schema.
#[derive(Default)]
struct Size {
    max_depth: usize,
    max_nodes: usize,
    nodes: usize,
    bytes: usize,
    property_pairs: usize,
    pattern_pairs: usize,
    /// Keywords at which schemas may be merged.
    merges: bool,
    patterns: BTreeSet<String>,
    multiples: Vec<f64>,
}

impl Size {
    fn new(limits: &GrammarLimits) -> Self {
        let GrammarLimits { max_depth, max_nodes, .. } = *limits;
        Self { max_depth, max_nodes, ..Self::default() }
    }

    fn add(&mut self, value: &Value, depth: usize) -> Result<(), String> {
        if depth > self.max_depth {
            return Err(format!("the schema is nested more than {} deep", self.max_depth));
        }
        self.nodes += 1;
        limit(self.nodes, self.max_nodes, "values in the schema")?;
        match value {
            Value::String(text) => self.bytes += text.len(),
            Value::Array(items) => {
                for item in items {
                    self.add(item, depth + 1)?;
                }
            }
            Value::Object(fields) => {
                self.keywords(fields)?;
                for (key, item) in fields {
                    self.bytes += key.len();
                    self.add(item, depth + 1)?;
                }
            }
            _ => {}
        }
        limit(self.bytes, MAX_SCHEMA_BYTES, "bytes of text in the schema")
    }

    /// What the keywords of a schema cost; anything that looks like one counts.
    fn keywords(&mut self, fields: &Map<String, Value>) -> Result<(), String> {
        let number_of = |key: &str| fields.get(key).and_then(Value::as_object).map_or(0, Map::len);
        let properties = number_of("properties");
        self.property_pairs += properties * properties;
        limit(self.property_pairs, MAX_PROPERTY_PAIRS, "pairs of properties of objects")?;
        let required = fields.get("required").and_then(Value::as_array).map_or(0, Vec::len);
        let optional = properties.saturating_sub(required);
        limit(optional, MAX_OPTIONAL, "properties of one object that are not required")?;
        let patterns = number_of("patternProperties");
        self.pattern_pairs += patterns * (patterns + properties);
        limit(self.pattern_pairs, MAX_PATTERN_PAIRS, "pairs of patternProperties")?;
        self.merges |= fields.contains_key("allOf")
            || fields.contains_key("$ref") && fields.len() > 1
            || fields.contains_key("anyOf") && fields.len() > 1
            || fields.contains_key("oneOf") && fields.len() > 1;
        for key in ["pattern", "format"] {
            if let Some(Value::String(pattern)) = fields.get(key) {
                limit(pattern.len(), MAX_REGEX_BYTES, "bytes in a pattern")?;
                self.patterns.insert(pattern.clone());
            }
        }
        if let Some(multiple) = fields.get("multipleOf").and_then(Value::as_f64)
            && !self.multiples.contains(&multiple)
        {
            limit(self.multiples.len(), 64, "different values of multipleOf")?;
            self.multiples.push(multiple);
        }
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        if self.merges {
            limit(
                self.patterns.len(),
                MAX_MERGED_PATTERNS,
                "different patterns and formats in a schema that combines schemas (allOf, or $ref, \
                 anyOf, oneOf beside other keywords)",
            )?;
        }
        // The compiler multiplies those that hold for one number with 32 bits and does not look.
        let whole = |scale: f64| self.multiples.iter().all(|m| (m * scale).fract() == 0.0);
        let scale = (0..=8).map(|digits| 10f64.powi(digits)).find(|scale| whole(*scale));
        let product = scale.map(|scale| self.multiples.iter().map(|m| m * scale).product::<f64>());
        match product {
            Some(product) if product <= MAX_MULTIPLE => Ok(()),
            _ => Err(format!(
                "multipleOf: the numbers {:?} are too large, or have too many digits, to be \
                 enforced; their product may be at most {MAX_MULTIPLE}",
                self.multiples
            )),
        }
    }
}

fn check_source(source: &str) -> Result<(), String> {
    limit(source.len(), MAX_SOURCE_BYTES, "bytes in the grammar")?;
    let rules = source.lines().filter(|line| line.contains(':') || line.contains('%')).count();
    limit(rules, MAX_RULES, "rules")
}

/// Intersections, counted in strings too, and the schemas inside the grammar.
fn check_lark(source: &str, limits: &GrammarLimits) -> Result<(), String> {
    limit(source.matches('&').count(), MAX_INTERSECTIONS, "intersections (&)")?;
    let mut size = Size::new(limits);
    for (at, keyword) in source.match_indices("%json") {
        let text = &source[at + keyword.len()..];
        // What does not parse here does not parse there.
        if let Some(Ok(schema)) = serde_json::Deserializer::from_str(text).into_iter().next() {
            size.add(&schema, 0)?;
        }
    }
    size.check()
}
