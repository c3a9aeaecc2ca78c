//! Grammars of calls: what each [`CallFormat`] looks like as Lark, around the schemas of the
//! arguments. What the parsers in [`crate::output`] read is what is forced here, in the form in which
//! the families' templates show it to the model.

use super::{ToolCalls, with_options};
use crate::output::{CallFormat, ReasoningMarkers, deepseek};
use crate::tools::{Tool, Types};
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// Lark of `calls`; `special`: the id of the control token that shows as a text.
pub(super) fn to_lark(calls: &ToolCalls, special: impl Fn(&str) -> Option<u32>) -> String {
    let mut lark = Lark { rules: String::new(), special: &special };
    let names: Vec<String> = (0..calls.tools.len()).map(|i| format!("call_{i}")).collect();
    for (tool, name) in calls.tools.iter().zip(&names) {
        let call = lark.call(calls.format, tool, name);
        let _ = writeln!(lark.rules, "{name}: {call}");
    }
    let any = format!("({})", names.join(" | "));
    let mut start = lark.start(calls, &any);
    if calls.optional {
        start = lark.optional(calls.format, &names, &any, &start);
    }
    format!("start: {start}\n{}", lark.rules)
}

struct Lark<'a> {
    rules: String,
    special: &'a dyn Fn(&str) -> Option<u32>,
}

impl Lark<'_> {
    /// One call or several, with what stands around all of them.
    fn start(&self, calls: &ToolCalls, any: &str) -> String {
        let marker = |text: &str| self.marker(text);
        let several = |separator: &str| match calls.parallel {
            true => format!("{any} ({separator} {any})*"),
            false => any.to_owned(),
        };
        match calls.format {
            CallFormat::Hermes | CallFormat::Glm | CallFormat::QwenCoder => several("\"\\n\"?"),
            CallFormat::DeepSeek => format!(
                "{} {} {}",
                marker(deepseek::CALLS_BEGIN),
                several("\"\\n\"?"),
                marker(deepseek::CALLS_END)
            ),
            CallFormat::Llama3 => several("\"; \""),
            CallFormat::Mistral if self.names_then_arguments() => several(""),
            CallFormat::Mistral => {
                format!("{} \" \"? \"[\" {} \"]\"", marker("[TOOL_CALLS]"), several("\", \""))
            }
        }
    }

    /// Text, or calls as `start` has them after it. Where calls begin with a control token, text cannot spell it; elsewhere text
    /// ends with the opening of the first call, and goes on without any.
    fn optional(&mut self, format: CallFormat, names: &[String], any: &str, start: &str) -> String {
        if format == CallFormat::Llama3 {
            return format!("(/[^{{ \\n\\t](?s:.*)/)? | {start}");
        }
        let opening = format.openings()[0];
        if (self.special)(opening).is_some() {
            // Thoughts may have control tokens around them, too.
            let markers = ReasoningMarkers::ALL.iter().flat_map(|(_, m)| [m.open, m.close]);
            let markers = markers.filter(|marker| (self.special)(marker).is_some());
            let markers: Vec<String> = markers.map(|marker| self.marker(marker)).collect();
            let more = match markers.is_empty() {
                true => String::new(),
                false => format!(" (({}) /(?s:.*)/)*", markers.join(" | ")),
            };
            let _ = writeln!(self.rules, "free: /(?s:.*)/{more}");
            return format!("free ({start})?");
        }
        let openings: Vec<String> = format.openings().iter().map(|text| escape(text)).collect();
        let (first, all) = (&openings[0], openings.join("|"));
        let _ = writeln!(self.rules, "FREE: /(?s:.*)/ & ~/(?s:.*)({all})(?s:.*)/");
        let _ = writeln!(self.rules, "opened[lazy]: /(?s:.*){first}/");
        let opening = literal(opening);
        if let Some(rest) = start.strip_prefix(&opening) {
            return format!("FREE | opened {rest}");
        }
        let mut firsts = Vec::new();
        for name in names {
            let head = format!("{name}: ");
            let call = self.rules.lines().find_map(|line| line.strip_prefix(&head));
            let rest = call.and_then(|call| call.strip_prefix(&opening)).unwrap_or_default();
            let rule = format!("first_{name}: {rest}\n");
            self.rules.push_str(&rule);
            firsts.push(format!("first_{name}"));
        }
        let others = start.strip_prefix(any).unwrap_or_default();
        format!("FREE | opened ({}) {others}", firsts.join(" | "))
    }

    /// Mistral's newer vocabularies have a token between name and arguments.
    fn names_then_arguments(&self) -> bool {
        (self.special)("[ARGS]").is_some()
    }

    fn call(&mut self, format: CallFormat, tool: &Tool, name: &str) -> String {
        let object = |key: &str, arguments: &str| {
            let head = literal(&format!("{{\"name\": {}, \"{key}\": ", Value::from(&*tool.name)));
            format!("{head} {arguments} \"}}\"")
        };
        match format {
            CallFormat::Hermes => {
                let arguments = self.arguments(tool, name);
                let (open, close) = (self.marker("<tool_call>"), self.marker("</tool_call>"));
                format!("{open} \"\\n\" {} \"\\n\" {close}", object("arguments", &arguments))
            }
            CallFormat::Llama3 => {
                let arguments = self.arguments(tool, name);
                object("parameters", &arguments)
            }
            CallFormat::Mistral if self.names_then_arguments() => {
                let arguments = self.arguments(tool, name);
                let (open, between) = (self.marker("[TOOL_CALLS]"), self.marker("[ARGS]"));
                format!("{open} {} {between} {arguments}", literal(&tool.name))
            }
            CallFormat::Mistral => {
                let arguments = self.arguments(tool, name);
                object("arguments", &arguments)
            }
            CallFormat::DeepSeek => {
                let arguments = self.arguments(tool, name);
                let begin = self.marker(deepseek::CALL_BEGIN);
                let separator = self.marker(deepseek::SEPARATOR);
                let end = self.marker(deepseek::CALL_END);
                let fenced = literal(&format!("{}\n```json\n", tool.name));
                format!(
                    "{begin} ({} {separator} {arguments} | \"function\" {separator} {fenced} \
                     {arguments} \"\\n```\") {end}",
                    literal(&tool.name)
                )
            }
            CallFormat::Glm => {
                let arguments = self.text_arguments(
                    tool,
                    name,
                    &|lark, key, value| {
                        let marker = |text: &str| lark.marker(text);
                        format!(
                            "{} {} {} \"\\n\"? {} {value} \"\\n\"?",
                            marker("<arg_key>"),
                            key,
                            marker("</arg_key>"),
                            marker("<arg_value>")
                        )
                    },
                    "</arg_value>",
                    "",
                );
                let (open, close) = (self.marker("<tool_call>"), self.marker("</tool_call>"));
                format!("{open} {} \"\\n\"? {arguments} {close}", literal(&tool.name))
            }
            CallFormat::QwenCoder => {
                let arguments = self.text_arguments(
                    tool,
                    name,
                    &|_, key, value| format!("\"<parameter=\" {key} \">\\n\" {value} \"\\n\""),
                    "</parameter>",
                    "\"\\n\"",
                );
                let (open, close) = (self.marker("<tool_call>"), self.marker("</tool_call>"));
                let head = literal(&format!("\n<function={}>\n", tool.name));
                format!("{open} {head} {arguments} \"</function>\\n\" {close}")
            }
        }
    }

    /// Rule of the arguments as a JSON object.
    fn arguments(&mut self, tool: &Tool, name: &str) -> String {
        let schema = tool.parameters.clone().unwrap_or_else(|| json!({"type": "object"}));
        let rule = format!("{name}_arguments");
        self.json(&rule, schema, true);
        rule
    }

    /// Rule `name`: JSON under `schema`, an object where `object` says so.
    fn json(&mut self, name: &str, mut schema: Value, object: bool) {
        if object && let Value::Object(fields) = &mut schema {
            fields.entry("type").or_insert_with(|| "object".into());
        }
        let _ = writeln!(self.rules, "{name}: %json {}", with_options(&schema, false));
    }

    /// Arguments as text between markers, in the order of the schema; those that are not required
    /// may be left out. Strings are any text: what a schema says of their length or pattern is not
    /// enforced. `before_close`: what stands between other values and `close`.
    fn text_arguments(
        &mut self,
        tool: &Tool,
        name: &str,
        argument: &dyn Fn(&Self, &str, &str) -> String,
        close: &str,
        before_close: &str,
    ) -> String {
        let none = Map::new();
        let schema = tool.parameters.as_ref().and_then(Value::as_object).unwrap_or(&none);
        let Some(properties) = schema.get("properties").and_then(Value::as_object) else {
            // Any arguments, as long as they can be told apart.
            let text = self.text(&format!("{name}_text"), close);
            let argument = argument(self, "/[^<>\\s]{1,64}/", &text);
            return format!("({argument})*");
        };
        let required = schema.get("required").and_then(Value::as_array);
        let required = |key: &str| required.is_some_and(|list| list.iter().any(|name| name == key));
        let mut all = Vec::new();
        for (index, (key, property)) in properties.iter().enumerate() {
            let rule = format!("{name}_{index}");
            let types = Types::of(property, &Value::Object(schema.clone()), 0);
            let limited = property.get("enum").is_some() || property.get("const").is_some();
            let value = if types == Types::STRING && limited {
                let choices = property.get("enum").and_then(Value::as_array);
                let choices =
                    choices.map_or_else(|| vec![&property["const"]], |c| c.iter().collect());
                let choices: Vec<String> =
                    choices.iter().filter_map(|choice| Some(literal(choice.as_str()?))).collect();
                format!("({}) {before_close} {}", choices.join(" | "), self.marker(close))
            } else if types.holds(Types::STRING) {
                self.text(&rule, close)
            } else {
                let mut property = property.clone();
                if let Value::Object(fields) = &mut property {
                    for key in ["$defs", "definitions"] {
                        if let Some(definitions) = schema.get(key) {
                            fields.insert(key.into(), definitions.clone());
                        }
                    }
                }
                self.json(&rule, property, false);
                format!("{rule} {before_close} {}", self.marker(close))
            };
            let argument = argument(self, &literal(key), &value);
            all.push(if required(key) { argument } else { format!("({argument})?") });
        }
        all.join(" ")
    }

    /// Any text up to `close`, which is part of it.
    fn text(&mut self, rule: &str, close: &str) -> String {
        if (self.special)(close).is_some() {
            return format!("/(?s:.*)/ {}", self.marker(close));
        }
        let mut escaped = String::new();
        for c in close.chars() {
            match c {
                '\n' => escaped.push_str("\\n"),
                '/' => escaped.push_str("\\/"),
                other => escaped.push(other),
            }
        }
        let _ = writeln!(self.rules, "{rule}[lazy]: /(?s:.*){escaped}/");
        rule.to_owned()
    }

    /// A marker: the token where it is a control token, which text cannot spell, and text otherwise.
    fn marker(&self, text: &str) -> String {
        match (self.special)(text) {
            Some(id) => format!("<[{id}]>"),
            None => literal(text),
        }
    }
}

/// `text` in a regular expression.
fn escape(text: &str) -> String {
    let special = |c| "[](){}|.*+?^$\\/".contains(c);
    text.chars().flat_map(|c| special(c).then_some('\\').into_iter().chain([c])).collect()
}

/// A string of Lark: one of JSON, without the one control character that JSON lets through.
pub(super) fn literal(text: &str) -> String {
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}
