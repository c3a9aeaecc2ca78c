//! The functions a model may call, as a request names them.

use crate::TextError;
use serde_json::Value;

/// Longest name of a function, bytes. OpenAI allows 64; other protocols put a server's name before it.
pub(crate) const MAX_NAME: usize = 256;

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Not empty, without white space or any of `<>{}[]"`, which belong to the syntaxes of calls.
    pub name: String,
    /// JSON schema of the arguments' object. Without one any object will do.
    pub parameters: Option<Value>,
}

impl Tool {
    /// The tool in `value`: `{"type": "function", "function": {"name", "parameters"}}`, or the
    /// inner object alone.
    ///
    /// # Errors
    /// [`TextError::Tool`] naming the field that is missing or malformed.
    pub fn parse(value: &Value) -> Result<Self, TextError> {
        let function = value.get("function").unwrap_or(value);
        let wrong = |field: &str, reason: &str| TextError::Tool {
            field: field.into(),
            reason: reason.into(),
        };
        let name = function.get("name").and_then(Value::as_str);
        let name = name.ok_or_else(|| wrong("name", "expected a string"))?;
        if !plausible(name) {
            let reason = format!(
                "{name:?} is no name of a function: expected 1 to {MAX_NAME} bytes without white \
                 space, quotes and brackets"
            );
            return Err(wrong("name", &reason));
        }
        let parameters = match function.get("parameters") {
            None | Some(Value::Null) => None,
            Some(schema @ Value::Object(_)) => Some(schema.clone()),
            Some(_) => return Err(wrong("parameters", "expected a JSON schema, an object")),
        };
        Ok(Self { name: name.into(), parameters })
    }
}

/// Whether `name` can be told from the syntax around it.
pub(crate) fn plausible(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_NAME && !name.contains(never_in_name)
}

pub(crate) fn never_in_name(c: char) -> bool {
    c.is_whitespace() || c.is_control() || "<>{}[]\"".contains(c)
}

/// Which calls an answer may hold.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum ToolSet {
    /// None: what looks like a call is text.
    #[default]
    None,
    /// Calls of any function.
    Any,
    /// Calls of these functions; a call of another is text.
    Only(Vec<Tool>),
}

impl ToolSet {
    pub(crate) fn accepts(&self, name: &str) -> bool {
        match self {
            Self::None => false,
            Self::Any => plausible(name),
            Self::Only(tools) => tools.iter().any(|tool| tool.name == name),
        }
    }

    /// The JSON types that argument `key` of function `name` may have.
    pub(crate) fn types(&self, name: &str, key: &str) -> Types {
        let Self::Only(tools) = self else { return Types::ANY };
        let tool = tools.iter().find(|tool| tool.name == name);
        let schema = tool.and_then(|tool| tool.parameters.as_ref());
        let property = schema.and_then(|schema| schema.get("properties")?.get(key));
        match (schema, property) {
            (Some(root), Some(property)) => Types::of(property, root, 0),
            _ => Types::ANY,
        }
    }
}

/// A set of JSON types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Types(u8);

impl Types {
    pub(crate) const STRING: Self = Self(1);
    pub(crate) const NUMBER: Self = Self(2);
    pub(crate) const BOOLEAN: Self = Self(4);
    pub(crate) const NULL: Self = Self(8);
    pub(crate) const OBJECT: Self = Self(16);
    pub(crate) const ARRAY: Self = Self(32);
    pub(crate) const ANY: Self = Self(63);

    pub(crate) fn holds(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(crate) fn of_value(value: &Value) -> Self {
        match value {
            Value::Null => Self::NULL,
            Value::Bool(_) => Self::BOOLEAN,
            Value::Number(_) => Self::NUMBER,
            Value::String(_) => Self::STRING,
            Value::Array(_) => Self::ARRAY,
            Value::Object(_) => Self::OBJECT,
        }
    }

    fn named(name: &str) -> Self {
        match name {
            "string" => Self::STRING,
            "number" | "integer" => Self::NUMBER,
            "boolean" => Self::BOOLEAN,
            "null" => Self::NULL,
            "object" => Self::OBJECT,
            "array" => Self::ARRAY,
            _ => Self::ANY,
        }
    }

    /// What `schema` allows. Keywords that say nothing about the type allow any, and so does what
    /// is nested too deep to look at; the value itself then decides.
    pub(crate) fn of(schema: &Value, root: &Value, depth: usize) -> Self {
        if depth > 8 {
            return Self::ANY;
        }
        let union = |values: &[Value], each: &dyn Fn(&Value) -> Self| {
            values.iter().map(each).reduce(Self::or).unwrap_or(Self::ANY)
        };
        match schema.get("type") {
            Some(Value::String(name)) => return Self::named(name),
            Some(Value::Array(names)) => {
                return union(names, &|name| name.as_str().map_or(Self::ANY, Self::named));
            }
            _ => {}
        }
        if let Some(value) = schema.get("const") {
            return Self::of_value(value);
        }
        if let Some(Value::Array(values)) = schema.get("enum") {
            return union(values, &Self::of_value);
        }
        for keyword in ["anyOf", "oneOf"] {
            if let Some(Value::Array(choices)) = schema.get(keyword) {
                return union(choices, &|choice| Self::of(choice, root, depth + 1));
            }
        }
        let target = schema.get("$ref").and_then(Value::as_str);
        let target = target.and_then(|target| root.pointer(target.strip_prefix('#')?));
        target.map_or(Self::ANY, |target| Self::of(target, root, depth + 1))
    }
}
