//! Functions that answers may call, and schemas, as the requests of all protocols have them.

use crate::constraint::Shape;
use crate::fields::Fields;
use crate::{ApiError, RequestLimits};
use marlin_text::{Tool, ToolSet};
use serde_json::{Map, Value};

/// The arguments of a call: the JSON text of an object, or the object.
///
/// # Errors
/// When they are something else.
pub(super) fn arguments(fields: &mut Fields) -> Result<Value, ApiError> {
    match fields.take("arguments") {
        None => Ok(Value::Object(Map::new())),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(Value::Object(Map::new())),
        Some(Value::String(text)) => match serde_json::from_str::<Value>(&text) {
            Ok(arguments @ Value::Object(_)) => Ok(arguments),
            _ => Err(fields.wrong("arguments", "the JSON text of an object", &text.into())),
        },
        Some(arguments @ Value::Object(_)) => Ok(arguments),
        Some(other) => Err(fields.wrong("arguments", "the JSON text of an object", &other)),
    }
}

/// Which calls a request wants.
pub(super) enum ToolChoice {
    /// None.
    None,
    /// As the model likes.
    Auto,
    /// Of this function, or of any.
    Calls(Option<String>),
}

/// The tools, and which calls of them are wanted.
///
/// # Errors
/// When it is malformed, or of a function that there is not.
pub(super) fn tools_and_choice(
    fields: &mut Fields,
    tools: Vec<Value>,
) -> Result<(Vec<Value>, ToolChoice), ApiError> {
    let expected = "none, auto, required, or {\"type\": \"function\", \"function\": {\"name\": …}}";
    let choice = match fields.take("tool_choice") {
        None => ToolChoice::Auto,
        Some(value) => {
            match (value.as_str(), value.pointer("/function/name").or(value.get("name"))) {
                (Some("none"), _) => ToolChoice::None,
                (Some("auto"), _) => ToolChoice::Auto,
                (Some("required"), _) => ToolChoice::Calls(None),
                (None, Some(Value::String(name))) => ToolChoice::Calls(Some(name.clone())),
                _ => return Err(fields.wrong("tool_choice", expected, &value)),
            }
        }
    };
    check_choice(&choice, &tools)?;
    Ok((tools, choice))
}

/// Refuses calls of functions that there are not.
///
/// # Errors
/// When one is wanted.
pub(super) fn check_choice(choice: &ToolChoice, tools: &[Value]) -> Result<(), ApiError> {
    let ToolChoice::Calls(name) = choice else { return Ok(()) };
    let named = |tool: &Value| {
        let function = tool.get("function").unwrap_or(tool).get("name");
        name.is_none() || function.and_then(Value::as_str) == name.as_deref()
    };
    match tools.iter().any(named) {
        true => Ok(()),
        false => Err(ApiError::invalid("tool_choice", "tool_choice: tools has no such function")),
    }
}

/// What an answer has to look like where `choice` may ask for calls and `shape` for a text; `format` is the protocol's field
/// for schemas.
///
/// # Errors
/// When both do: an answer that has to call has no text.
pub(super) fn with_calls(
    choice: ToolChoice,
    shape: Option<Shape>,
    strict: Vec<String>,
    parallel: bool,
    format: &str,
) -> Result<Option<Shape>, ApiError> {
    match (choice, shape) {
        (ToolChoice::Calls(_), Some(_)) => {
            let message = format!(
                "tool_choice: an answer that has to call a function has no text; leave out {format} and grammar, or let \
                 tool_choice be auto"
            );
            Err(ApiError::invalid("tool_choice", message))
        }
        (ToolChoice::Calls(name), None) => Ok(Some(Shape::Calls { name, parallel })),
        // Nothing but the shape can be written, calls neither.
        (_, Some(shape)) => Ok(Some(shape)),
        (ToolChoice::Auto, None) if !strict.is_empty() => {
            Ok(Some(Shape::Strict { names: strict, parallel }))
        }
        (_, None) => Ok(None),
    }
}

/// Names of the functions of a request whose arguments are to be held to their schema.
pub(super) fn strict(tools: &[Value]) -> Vec<String> {
    let name = |tool: &Value| {
        let function = tool.get("function").unwrap_or(tool);
        let strict = function.get("strict") == Some(&Value::Bool(true));
        strict.then(|| function.get("name")?.as_str().map(str::to_owned))?
    };
    tools.iter().filter_map(name).collect()
}

/// The functions that an answer may call, and those that the model is told of.
///
/// # Errors
/// When one of them is malformed.
pub(super) fn offered(
    choice: &ToolChoice,
    tools: Vec<Value>,
    limits: RequestLimits,
) -> Result<(ToolSet, Vec<Value>), ApiError> {
    match choice {
        _ if tools.is_empty() => Ok((ToolSet::None, tools)),
        ToolChoice::None => Ok((ToolSet::None, Vec::new())),
        _ => Ok((ToolSet::Only(parse_tools(&tools, limits)?), tools)),
    }
}

/// The functions of `tools`.
///
/// # Errors
/// When one of them is malformed.
pub fn parse_tools(tools: &[Value], limits: RequestLimits) -> Result<Vec<Tool>, ApiError> {
    let tool = |(i, value): (usize, &Value)| {
        let path = format!("tools[{i}]");
        let kind = value.get("type").and_then(Value::as_str);
        if kind.is_some_and(|kind| kind != "function") {
            let message = format!("{path}.type: only functions are supported");
            return Err(ApiError::unsupported(&path, message));
        }
        check_schema(value, &path, limits)?;
        let mut outer = Fields::of(value.clone(), &path)?;
        outer.take("type");
        let mut function = outer.object("function")?;
        let inner = function.as_mut().unwrap_or(&mut outer);
        for name in ["name", "parameters"] {
            inner.take(name);
        }
        inner.string("description")?;
        // Where calls are required, arguments are held to their schema, strict or not.
        inner.flag("strict")?;
        function.map_or(Ok(()), Fields::finish)?;
        outer.finish()?;
        Tool::parse(value).map_err(|error| ApiError::invalid(&path, format!("{path}: {error}")))
    };
    tools.iter().enumerate().map(tool).collect()
}

/// Bounds the depth and size of a schema.
///
/// # Errors
/// When it is deeper or larger.
pub(super) fn check_schema(
    schema: &Value,
    path: &str,
    limits: RequestLimits,
) -> Result<(), ApiError> {
    fn nodes(value: &Value, depth: usize) -> Option<usize> {
        let add = |sum: usize, value: &Value| Some(sum + nodes(value, depth.checked_sub(1)?)?);
        match value {
            Value::Array(list) => list.iter().try_fold(1, add),
            Value::Object(map) => map.values().try_fold(1, add),
            _ => Some(1),
        }
    }
    let RequestLimits { schema_depth: depth, schema_values: count, .. } = limits;
    match nodes(schema, depth) {
        Some(found) if found <= count => Ok(()),
        _ => {
            let message = format!("{path}: a schema may be {depth} deep and have {count} values");
            Err(ApiError::invalid(path, message))
        }
    }
}

/// A format that is a schema.
pub(super) struct NamedSchema {
    /// Name.
    pub name: Option<String>,
    /// Schema.
    pub schema: Option<Value>,
    /// What cannot be enforced is refused.
    pub strict: bool,
}

/// The name and schema of a format.
///
/// # Errors
/// When they are malformed.
pub(super) fn named_schema(fields: &mut Fields) -> Result<NamedSchema, ApiError> {
    let name = fields.string("name")?;
    fields.string("description")?;
    let strict = fields.flag("strict")?.unwrap_or(false);
    let schema = fields.take("schema");
    if let Some(schema) = &schema {
        if !schema.is_object() && !schema.is_boolean() {
            return Err(fields.wrong("schema", "a JSON schema", schema));
        }
        check_schema(schema, &fields.path("schema"), fields.limits())?;
    }
    Ok(NamedSchema { name, schema, strict })
}
