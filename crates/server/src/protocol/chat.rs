//! OpenAI's chat completions.

#[cfg(test)]
mod tests;

use super::tools::{
    NamedSchema, arguments, named_schema, offered, strict, tools_and_choice, with_calls,
};
use super::{Encoder, Spent, chat_logprobs, event, finish_reason, new_id, now};
use crate::ApiError;
use crate::answer::{Delta, Finish, Piece, Tally, Whole};
use crate::constraint::Shape;
use crate::fields::Fields;
use crate::generate::{Choosing, Generate, Prompt};
use crate::models::Served;
use marlin_text::Tokenizer;
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Most calls of a message.
const MAX_CALLS: usize = 128;

/// What a request wants beside the answer.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wants {
    /// Answers as they come.
    pub stream: bool,
    /// Usage at the end of a stream.
    pub usage: bool,
}

/// A parsed request.
pub struct ChatRequest {
    /// Model named.
    pub model: Option<String>,
    /// What to put to the model.
    pub generate: Generate,
    /// Beside the answer.
    pub wants: Wants,
}

impl ChatRequest {
    /// Reads a body.
    ///
    /// # Errors
    /// Names the first field that is wrong, unknown, or not supported.
    pub fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        let model = fields.string("model")?;
        let messages = fields.list("messages", fields.limits().messages)?;
        let messages =
            messages.ok_or_else(|| ApiError::invalid("messages", "messages is missing"))?;
        if messages.is_empty() {
            return Err(ApiError::invalid("messages", "messages: expected at least one"));
        }
        let message = |(i, value)| message(value, &format!("messages[{i}]"));
        let messages = messages.into_iter().enumerate().map(message).collect::<Result<_, _>>()?;
        let stream = fields.flag("stream")?.unwrap_or(false);
        let usage = stream_options(&mut fields, stream)?;
        let mut choosing = Choosing::read(&mut fields)?;
        choosing.logprobs = logprobs(&mut fields)?;
        let older = fields.count("max_tokens", 1..=1 << 32)?;
        let newer = fields.count("max_completion_tokens", 1..=1 << 32)?;
        choosing.max_tokens = newer.or(older).map(|n| n as usize);

        let tools = fields.list("tools", fields.limits().tools)?.unwrap_or_default();
        let strict = strict(&tools);
        let (tools, choice) = tools_and_choice(&mut fields, tools)?;
        let mut shape = response_format(&mut fields)?;
        if let Some(grammar) = grammar(&mut fields)?
            && shape.replace(grammar).is_some()
        {
            return Err(ApiError::invalid("grammar", "grammar: only without response_format"));
        }
        let (set, tools) = offered(&choice, tools, fields.limits())?;
        let parallel = fields.flag("parallel_tool_calls")?.unwrap_or(true);
        let shape = with_calls(choice, shape, strict, parallel, "response_format")?;
        let mut extra = template_variables(&mut fields)?;
        effort(&mut fields, "reasoning_effort", &mut extra)?;
        harmless(&mut fields)?;
        fields.finish()?;
        let prompt = Prompt::Chat { messages, tools, extra };
        let generate = Generate {
            prompt,
            choosing,
            tools: set,
            shape,
            prompt_field: "messages",
            schema_field: "response_format",
            stream,
            one_call: !parallel,
        };
        Ok(Self { model, generate, wants: Wants { stream, usage } })
    }
}

fn stream_options(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(mut options) = fields.object("stream_options")? else { return Ok(false) };
    if !stream {
        return Err(ApiError::invalid("stream_options", "stream_options: only with stream: true"));
    }
    let usage = options.flag("include_usage")?.unwrap_or(false);
    options.refuse("include_obfuscation", &[], "chunks have no padding")?;
    options.finish()?;
    Ok(usage)
}

fn logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let wanted = fields.flag("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs", 0..=fields.limits().top_logprobs as u64)?;
    match (wanted, top) {
        (false, Some(1..)) => {
            Err(ApiError::invalid("top_logprobs", "top_logprobs: only with logprobs: true"))
        }
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0) as usize)),
    }
}

/// Our extension `chat_template_kwargs`: variables of the template, without those that the server sets itself.
///
/// # Errors
/// When it is no object, or sets one of those.
pub(super) fn template_variables(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let extra = match fields.take("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(fields.wrong("chat_template_kwargs", "an object", &other)),
    };
    let names = ["messages", "tools", "add_generation_prompt", "strftime_now", "raise_exception"];
    match extra.keys().find(|key| names.contains(&key.as_str())) {
        None => Ok(extra),
        Some(name) => {
            let path = format!("chat_template_kwargs.{name}");
            Err(ApiError::invalid(&path, format!("{path}: set by the server")))
        }
    }
}

/// How much to think, in field `name`, as templates are told.
///
/// # Errors
/// When it is none of OpenAI's words.
pub(super) fn effort(
    fields: &mut Fields,
    name: &str,
    extra: &mut Map<String, Value>,
) -> Result<Option<String>, ApiError> {
    let Some(effort) = fields.string(name)? else { return Ok(None) };
    match effort.as_str() {
        "none" | "minimal" | "low" | "medium" | "high" | "xhigh" | "max" => {
            let thinks = !matches!(effort.as_str(), "none" | "minimal");
            extra.entry("enable_thinking").or_insert(thinks.into());
            extra.entry("reasoning_effort").or_insert(effort.clone().into());
            Ok(Some(effort))
        }
        _ => {
            let expected = "none, minimal, low, medium, high, xhigh or max";
            Err(fields.wrong(name, expected, &json!(effort)))
        }
    }
}

/// Fields whose usual values ask for nothing, or that this server cannot honour.
pub fn harmless(fields: &mut Fields) -> Result<(), ApiError> {
    for name in ["user", "safety_identifier", "prompt_cache_key"] {
        // Names for the operator's logs and for routing; answers do not depend on them.
        fields.string(name)?;
    }
    retention(fields)?;
    if let Some(metadata) = fields.take("metadata")
        && !metadata.is_object()
    {
        return Err(fields.wrong("metadata", "an object", &metadata));
    }
    fields.refuse("store", &[], "nothing is stored")?;
    let tiers = ["auto", "default", "standard_only"].map(Value::from);
    fields.refuse("service_tier", &tiers, "there is one tier")?;
    fields.refuse("modalities", &[json!(["text"])], "answers are text")?;
    fields.refuse("verbosity", &[json!("medium")], "say it in the messages")?;
    fields.refuse("audio", &[], "answers are text")?;
    fields.refuse("prediction", &[], "there are no predicted outputs")?;
    fields.refuse("web_search_options", &[], "there is no web search")?;
    fields.refuse("functions", &[], "use tools")?;
    fields.refuse("function_call", &[json!("none"), json!("auto")], "use tool_choice")?;
    Ok(())
}

/// How long a computed prompt is kept: as long as there is room in memory, and not for a time.
///
/// # Errors
/// When more is asked for.
pub(super) fn retention(fields: &mut Fields) -> Result<(), ApiError> {
    let in_memory = ["in_memory", "in-memory"].map(Value::from);
    let reason = "prefixes are kept in memory as long as there is room";
    fields.refuse("prompt_cache_retention", &in_memory, reason)
}

/// A message as templates read it; `path` is where it stands in the request.
///
/// # Errors
/// Names the field that is wrong.
pub fn message(value: Value, path: &str) -> Result<Value, ApiError> {
    let mut fields = Fields::of(value, path)?;
    let role = fields.string("role")?;
    let role = role.ok_or_else(|| {
        ApiError::invalid(&fields.path("role"), format!("{path}.role is missing"))
    })?;
    let role = match role.as_str() {
        "developer" | "system" => "system",
        "user" | "assistant" | "tool" => role.as_str(),
        _ => {
            let expected = "system, developer, user, assistant or tool";
            return Err(fields.wrong("role", expected, &json!(role)));
        }
    };
    let content = content(&mut fields, "content")?;
    let calls = fields.list("tool_calls", MAX_CALLS)?;
    let mut out = Map::new();
    out.insert("role".into(), role.into());
    if content.is_none() && role != "assistant" {
        let path = fields.path("content");
        return Err(ApiError::invalid(&path, format!("{path} is missing")));
    }
    out.insert("content".into(), content.unwrap_or_default().into());
    let reasoning = fields.string("reasoning_content")?.or(fields.string("reasoning")?);
    if let Some(text) = fields.string("name")? {
        out.insert("name".into(), text.into());
    }
    match role {
        "assistant" => {
            if let Some(reasoning) = reasoning {
                out.insert("reasoning_content".into(), reasoning.into());
            }
            if let Some(calls) = calls.filter(|calls| !calls.is_empty()) {
                let call = |(i, value)| call(value, &format!("{path}.tool_calls[{i}]"));
                let calls =
                    calls.into_iter().enumerate().map(call).collect::<Result<Vec<_>, _>>()?;
                out.insert("tool_calls".into(), calls.into());
            }
            fields.string("refusal")?;
            fields.take("annotations");
            fields.refuse("audio", &[], "messages are text")?;
            fields.refuse("function_call", &[], "use tool_calls")?;
        }
        "tool" => {
            let id = fields.string("tool_call_id")?;
            let id = id.ok_or_else(|| {
                let path = fields.path("tool_call_id");
                ApiError::invalid(&path, format!("{path} is missing"))
            })?;
            out.insert("tool_call_id".into(), id.into());
        }
        _ => {}
    }
    fields.finish()?;
    Ok(Value::Object(out))
}

/// Field `name`: text, or the text of parts.
///
/// # Errors
/// When it is something else.
pub(super) fn content(fields: &mut Fields, name: &str) -> Result<Option<String>, ApiError> {
    let path = fields.path(name);
    let parts = match fields.take(name) {
        None => return Ok(None),
        Some(Value::String(text)) => return Ok(Some(text)),
        Some(Value::Array(parts)) => parts,
        Some(other) => return Err(fields.wrong(name, "a string or a list of parts", &other)),
    };
    let mut all = String::new();
    for (i, part) in parts.into_iter().enumerate() {
        let path = format!("{path}[{i}]");
        let mut part = Fields::of(part, &path)?;
        let kind = part.string("type")?.unwrap_or_default();
        let text = match kind.as_str() {
            "text" | "input_text" | "output_text" => part.string("text")?,
            "refusal" => part.string("refusal")?,
            other => {
                let other: String = other.chars().take(40).collect();
                let message =
                    format!("{path}: parts of type {other:?} are not supported, only text");
                return Err(ApiError::unsupported(&path, message));
            }
        };
        // What earlier answers had, and marks of prefixes, which are kept without.
        for name in ["annotations", "logprobs", "cache_control", "prompt_cache_breakpoint"] {
            part.take(name);
        }
        let missing = || ApiError::invalid(&path, format!("{path}.text is missing"));
        all.push_str(&text.ok_or_else(missing)?);
        part.finish()?;
    }
    Ok(Some(all))
}

/// A call of an earlier answer; templates read arguments as an object.
fn call(value: Value, path: &str) -> Result<Value, ApiError> {
    let mut fields = Fields::of(value, path)?;
    let id = fields.string("id")?.unwrap_or_default();
    if let Some(kind) = fields.string("type")?
        && kind != "function"
    {
        return Err(fields.wrong("type", "function", &json!(kind)));
    }
    fields.count("index", 0..=u64::from(u32::MAX))?;
    let missing = |name: &str| {
        let path = format!("{path}.{name}");
        ApiError::invalid(&path, format!("{path} is missing"))
    };
    let mut function = fields.object("function")?.ok_or_else(|| missing("function"))?;
    let name = function.string("name")?.ok_or_else(|| missing("function.name"))?;
    let arguments = arguments(&mut function)?;
    function.finish()?;
    fields.finish()?;
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}

fn response_format(fields: &mut Fields) -> Result<Option<Shape>, ApiError> {
    let Some(mut format) = fields.object("response_format")? else { return Ok(None) };
    let shape = match format.string("type")?.as_deref() {
        Some("text") => None,
        Some("json_object") => Some(Shape::JsonObject),
        Some("json_schema") => {
            let missing = || {
                let path = "response_format.json_schema";
                ApiError::invalid(path, format!("{path} is missing"))
            };
            let mut schema = format.object("json_schema")?.ok_or_else(missing)?;
            let NamedSchema { schema: value, strict, .. } = named_schema(&mut schema)?;
            schema.finish()?;
            let value = value.unwrap_or_else(|| json!({"type": "object"}));
            Some(Shape::JsonSchema { schema: value, strict })
        }
        other => {
            let expected = "text, json_object or json_schema";
            return Err(format.wrong("type", expected, &json!(other)));
        }
    };
    format.finish()?;
    Ok(shape)
}

/// Our extension `grammar`: `{"type": "regex" | "lark" | "gbnf", "value": …}`.
///
/// # Errors
/// When it is something else.
pub fn grammar(fields: &mut Fields) -> Result<Option<Shape>, ApiError> {
    let Some(mut grammar) = fields.object("grammar")? else { return Ok(None) };
    let kind = grammar.string("type")?;
    let missing = || ApiError::invalid("grammar.value", "grammar.value is missing");
    let value = grammar.string("value")?.ok_or_else(missing)?;
    let shape = match kind.as_deref() {
        Some("regex") => Shape::Regex(value),
        Some("lark") => Shape::Lark(value),
        Some("gbnf") => Shape::Gbnf(value),
        other => return Err(grammar.wrong("type", "regex, lark or gbnf", &json!(other))),
    };
    grammar.finish()?;
    Ok(Some(shape))
}

/// The response to a request whose answers are whole.
pub fn response(served: &Served, answers: &[Whole], logprobs: bool) -> Value {
    response_of(&served.id, logprobs.then_some(&*served.tokenizer), answers)
}

/// [`response`] of a model, with tokens where there is a tokenizer.
fn response_of(model: &str, tokenizer: Option<&Tokenizer>, answers: &[Whole]) -> Value {
    let mut spent = Spent::default();
    let choice = |(index, answer): (usize, &Whole)| {
        if let Some((_, usage)) = &answer.finish {
            spent.add(usage);
            spent.reasoning += answer.tally.reasoning;
        }
        let mut message = Map::new();
        message.insert("role".into(), "assistant".into());
        let only_calls = answer.content.is_empty() && !answer.calls.is_empty();
        let content = if only_calls { Value::Null } else { answer.content.clone().into() };
        message.insert("content".into(), content);
        message.insert("refusal".into(), Value::Null);
        if !answer.reasoning.is_empty() {
            message.insert("reasoning_content".into(), answer.reasoning.clone().into());
        }
        if !answer.calls.is_empty() {
            let call = |(name, arguments): &(String, String)| {
                json!({"id": new_id("call_"), "type": "function",
                    "function": {"name": name, "arguments": arguments}})
            };
            message.insert("tool_calls".into(), answer.calls.iter().map(call).collect());
        }
        let reason = answer.finish.as_ref().map(|(finish, _)| finish_reason(finish));
        let chances = tokenizer.map(|tokenizer| chat_logprobs(tokenizer, &answer.chances));
        json!({"index": index, "message": message, "logprobs": chances, "finish_reason": reason})
    };
    let choices: Vec<Value> = answers.iter().enumerate().map(choice).collect();
    json!({
        "id": new_id("chatcmpl-"),
        "object": "chat.completion",
        "created": now(),
        "model": model,
        "choices": choices,
        "usage": spent.json(),
        "system_fingerprint": crate::FINGERPRINT,
    })
}

/// Writes a stream of chunks.
pub struct Stream {
    id: String,
    created: u64,
    model: String,
    /// Present when tokens are given out.
    tokenizer: Option<Arc<Tokenizer>>,
    usage: bool,
    begun: Vec<bool>,
    tallies: Vec<Tally>,
    spent: Spent,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'static str,
    choices: [ChunkChoice; 1],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Value>,
}

#[derive(Serialize)]
struct ChunkChoice {
    index: usize,
    delta: ChunkDelta,
    logprobs: Option<Value>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize, Default)]
struct ChunkDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[Value; 1]>,
}

impl Stream {
    /// Of `n` answers.
    pub fn new(served: &Served, n: usize, usage: bool, logprobs: bool) -> Self {
        Self::of(&served.id, logprobs.then(|| served.tokenizer.clone()), n, usage)
    }

    fn of(model: &str, tokenizer: Option<Arc<Tokenizer>>, n: usize, usage: bool) -> Self {
        let (id, created, begun) = (new_id("chatcmpl-"), now(), vec![false; n]);
        let tallies = (0..n).map(|_| Tally::default()).collect();
        let (model, spent) = (model.to_owned(), Spent::default());
        Self { id, created, model, tokenizer, usage, begun, tallies, spent }
    }

    fn chunk(
        &self,
        index: usize,
        delta: ChunkDelta,
        logprobs: Option<Value>,
        end: Option<&'static str>,
        out: &mut Vec<u8>,
    ) {
        let choice = ChunkChoice { index, delta, logprobs, finish_reason: end };
        // Every chunk has the field where the last one will.
        let usage = self.usage.then_some(Value::Null);
        event(
            out,
            &Chunk {
                id: &self.id,
                object: "chat.completion.chunk",
                created: self.created,
                model: &self.model,
                system_fingerprint: crate::FINGERPRINT,
                choices: [choice],
                usage,
            },
        );
    }

    fn delta(delta: Delta) -> ChunkDelta {
        match delta {
            Delta::Content(text) => ChunkDelta { content: Some(text), ..ChunkDelta::default() },
            Delta::Reasoning(text) => {
                ChunkDelta { reasoning_content: Some(text), ..ChunkDelta::default() }
            }
            Delta::Call { index, name } => {
                let call = json!({"index": index, "id": new_id("call_"), "type": "function",
                    "function": {"name": name, "arguments": ""}});
                ChunkDelta { tool_calls: Some([call]), ..ChunkDelta::default() }
            }
            Delta::Arguments { index, text } => {
                let call = json!({"index": index, "function": {"arguments": text}});
                ChunkDelta { tool_calls: Some([call]), ..ChunkDelta::default() }
            }
        }
    }
}

impl Encoder for Stream {
    fn begin(&mut self, _: &mut Vec<u8>) {}

    fn piece(&mut self, piece: Piece, out: &mut Vec<u8>) {
        let index = piece.choice;
        self.tallies[index].take(&piece);
        if !std::mem::replace(&mut self.begun[index], true) {
            let delta = ChunkDelta {
                role: Some("assistant"),
                content: Some(String::new()),
                ..ChunkDelta::default()
            };
            self.chunk(index, delta, None, None, out);
        }
        let tokenizer = self.tokenizer.as_ref().filter(|_| !piece.chances.is_empty());
        let mut chances = tokenizer.map(|tokenizer| chat_logprobs(tokenizer, &piece.chances));
        for delta in piece.deltas {
            self.chunk(index, Self::delta(delta), chances.take(), None, out);
        }
        if chances.is_some() {
            self.chunk(index, ChunkDelta::default(), chances, None, out);
        }
        match piece.finish {
            None => {}
            Some((Finish::Failed(error), _)) => event(out, &json!({"error": error.body()})),
            Some((finish, usage)) => {
                self.spent.add(&usage);
                self.spent.reasoning += self.tallies[index].reasoning;
                let reason = Some(finish_reason(&finish));
                self.chunk(index, ChunkDelta::default(), None, reason, out);
            }
        }
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        if self.usage {
            event(
                out,
                &json!({
                    "id": self.id,
                    "object": "chat.completion.chunk",
                    "created": self.created,
                    "model": self.model,
                    "system_fingerprint": crate::FINGERPRINT,
                    "choices": [],
                    "usage": self.spent.json(),
                }),
            );
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }
}
