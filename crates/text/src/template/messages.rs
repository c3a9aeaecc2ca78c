//! Messages of an API to messages that templates can read.
//!
//! What clients send and what templates expect differ in three places. **Arguments of calls** arrive
//! as a string of JSON. Most families (Qwen, GLM, Llama 3, Mistral) iterate over them or print them with
//! `tojson`, so they need an object, and a string would come out quoted twice; DeepSeek's templates
//! append them to a string, so they need the string. Which it is cannot be read off the source with any
//! certainty, so it is tried out: the template is rendered with an object once, and if that fails or
//! prints Python's notation, with a string. **Content** that is missing or null beside calls becomes
//! an empty string, because templates print or append it. **Parts** that are all text become one string,
//! joined by line breaks, since many templates know strings only; other parts stay.

use super::{ChatTemplate, TemplateInputs};
use serde_json::{Map, Value, json};
use std::sync::OnceLock;

/// What a template wants the arguments of calls to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arguments {
    Object,
    Text,
}

/// What was tried out for each template.
#[derive(Debug, Default)]
pub(super) struct Probed(Vec<OnceLock<Arguments>>);

impl Probed {
    pub(super) fn new(templates: usize) -> Self {
        Self(std::iter::repeat_with(OnceLock::new).take(templates).collect())
    }
}

impl ChatTemplate {
    /// `messages` as an API takes them, made fit for the template that `inputs` would select with the
    /// same `tools` and `template`: arguments of calls, content beside calls, and parts that are text.
    /// Everything else passes through, `reasoning_content` included, which
    /// [`ChatTemplate::render`] offers under every name that templates read.
    pub fn prepare(
        &self,
        messages: &[Value],
        tools: Option<&[Value]>,
        template: Option<&str>,
    ) -> Vec<Value> {
        let calls = messages.iter().any(|message| message.get("tool_calls").is_some());
        let form = if calls { self.arguments(tools, template) } else { Arguments::Object };
        messages.iter().map(|message| prepare(message, form)).collect()
    }

    fn arguments(&self, tools: Option<&[Value]>, template: Option<&str>) -> Arguments {
        let name = self.select(template, tools.is_some());
        let index = self.names.iter().position(|other| other == name);
        let known = index.and_then(|index| self.probed.0.get(index));
        known.map_or(Arguments::Object, |known| *known.get_or_init(|| self.probe(name)))
    }

    fn probe(&self, name: &str) -> Arguments {
        let tools = [json!({"type": "function", "function": {
            "name": "probe", "description": "", "parameters": {"type": "object", "properties": {}},
        }})];
        let renders = |arguments: Value| {
            let messages = [
                json!({"role": "user", "content": "x"}),
                // Mistral's templates want nine letters or digits.
                json!({"role": "assistant", "content": "", "tool_calls": [{
                    "id": "abcdefghi", "type": "function",
                    "function": {"name": "probe", "arguments": arguments},
                }]}),
                json!({"role": "tool", "name": "probe", "tool_call_id": "abcdefghi", "content": "x"}),
            ];
            let inputs = TemplateInputs {
                tools: Some(&tools),
                template: Some(name),
                ..TemplateInputs::new(&messages)
            };
            let text = self.render(&inputs).ok()?;
            let at = text.find("argument_probe")?;
            // Python would write `True`.
            text[at..].contains("true").then_some(())
        };
        let object = json!({"argument_probe": true});
        if renders(object.clone()).is_none() && renders(dumps(&object).into()).is_some() {
            Arguments::Text
        } else {
            Arguments::Object
        }
    }
}

fn prepare(message: &Value, form: Arguments) -> Value {
    let mut message = message.clone();
    let Value::Object(fields) = &mut message else { return message };
    if let Some(text) = fields.get("content").and_then(joined) {
        fields.insert("content".into(), text.into());
    }
    match fields.get_mut("tool_calls") {
        // Templates ask whether the key is there.
        Some(Value::Null) => {
            fields.shift_remove("tool_calls");
        }
        Some(Value::Array(calls)) => {
            for call in calls {
                prepare_call(call, form);
            }
            if fields.get("content").is_none_or(Value::is_null) {
                fields.insert("content".into(), "".into());
            }
        }
        _ => {}
    }
    message
}

fn prepare_call(call: &mut Value, form: Arguments) {
    let function = match call.get_mut("function") {
        Some(Value::Object(function)) => function,
        _ => match call {
            Value::Object(call) => call,
            _ => return,
        },
    };
    let arguments = function.get("arguments").unwrap_or(&Value::Null);
    let prepared = match (form, arguments) {
        (Arguments::Object, Value::Null) => Value::Object(Map::new()),
        (Arguments::Object, Value::String(text)) if text.trim().is_empty() => {
            Value::Object(Map::new())
        }
        (Arguments::Object, Value::String(text)) => match serde_json::from_str(text) {
            Ok(object @ Value::Object(_)) => object,
            // The model wrote it, so it is shown as it was.
            _ => return,
        },
        (Arguments::Text, Value::Null) => "{}".into(),
        (Arguments::Text, other @ (Value::Object(_) | Value::Array(_))) => dumps(other).into(),
        _ => return,
    };
    function.insert("arguments".into(), prepared);
}

/// Parts of content as one text, where all of them are text.
fn joined(content: &Value) -> Option<String> {
    let parts = content.as_array()?;
    let texts: Option<Vec<&str>> = parts
        .iter()
        .map(|part| match part.get("type")?.as_str()? {
            "text" | "input_text" | "output_text" => part.get("text")?.as_str(),
            _ => None,
        })
        .collect();
    texts.map(|texts| texts.join("\n"))
}

/// JSON with the spaces that Python puts, which models saw in training.
fn dumps(value: &Value) -> String {
    match value {
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(dumps).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Object(fields) => {
            let field = |(key, value): (&String, &Value)| {
                format!("{}: {}", Value::from(key.as_str()), dumps(value))
            };
            let fields: Vec<String> = fields.iter().map(field).collect();
            format!("{{{}}}", fields.join(", "))
        }
        scalar => scalar.to_string(),
    }
}
