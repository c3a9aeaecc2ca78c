//! OpenAI's responses, text only.
//!
//! Nothing is stored: a conversation is sent whole, so `previous_response_id` and its like are refused, and so is an explicit
//! `store: true`; where `store` is absent the response says `store: false`. Thoughts are given out as they are
//! (`reasoning_text`), never as summaries, and are taken back in the same form.

mod stream;
#[cfg(test)]
mod tests;

pub use stream::Stream;

use super::chat::{content, effort, grammar, retention, template_variables};
use super::tools::{
    NamedSchema, ToolChoice, arguments, named_schema, offered, strict, tools_and_choice, with_calls,
};
use super::turns::Turns;
use super::{Spent, chat_logprobs, new_id, now};
use crate::ApiError;
use crate::answer::{Finish, TokenChance, Whole};
use crate::constraint::Shape;
use crate::fields::Fields;
use crate::generate::{Choosing, Generate, Prompt};
use crate::models::Served;
use axum::http::StatusCode;
use marlin_text::Tokenizer;
use serde_json::{Map, Value, json};

/// Most entries of `metadata`, characters of a name and of a value.
const METADATA: (usize, usize, usize) = (16, 64, 512);

/// A parsed request.
pub struct ResponsesRequest {
    /// Model named.
    pub model: Option<String>,
    /// What to put to the model.
    pub generate: Generate,
    /// The answer as it comes.
    pub stream: bool,
    /// What the response repeats.
    pub echo: Echo,
}

/// What a response repeats of its request, and what was asked of its output.
#[derive(Debug, Clone, Default)]
pub struct Echo {
    fields: Map<String, Value>,
    /// At most one call is given out.
    one_call: bool,
    /// Tokens of messages are given out.
    logprobs: bool,
}

impl ResponsesRequest {
    /// Reads a body.
    ///
    /// # Errors
    /// Names the first field that is wrong, unknown, or not supported.
    pub fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        let model = fields.string("model")?;
        let instructions = fields.string("instructions")?;
        let messages = messages(&mut fields, instructions.as_deref())?;
        let stream = stream(&mut fields)?;
        let choosing = Choosing::read_extensions(&mut fields)?;
        let temperature = fields.number("temperature", 0.0..=100.0)?;
        let top_p = fields.number("top_p", 0.0..=1.0)?;
        let mut choosing = choosing.with(temperature, top_p, Vec::new());
        choosing.max_tokens = fields.count("max_output_tokens", 1..=1 << 32)?.map(|n| n as usize);
        choosing.logprobs = logprobs(&mut fields)?;
        let truncation = truncation(&mut fields)?;
        choosing.truncate_prompt |= truncation == "auto";

        let given = fields.list("tools", fields.limits().tools)?.unwrap_or_default();
        let tool = |(i, value): (usize, &Value)| tool(value.clone(), &format!("tools[{i}]"));
        let tools = given.iter().enumerate().map(tool).collect::<Result<_, _>>()?;
        let (tools, choice) = tools_and_choice(&mut fields, tools)?;
        let (set, tools) = offered(&choice, tools, fields.limits())?;
        let parallel = fields.flag("parallel_tool_calls")?.unwrap_or(true);
        // Only a server's own tools count.
        let most_calls = fields.count("max_tool_calls", 1..=1 << 32)?;

        let mut extra = template_variables(&mut fields)?;
        let reasoning = reasoning(&mut fields, &mut extra)?;
        let (text, mut shape) = text(&mut fields)?;
        if let Some(grammar) = grammar(&mut fields)?
            && shape.replace(grammar).is_some()
        {
            return Err(ApiError::invalid("grammar", "grammar: only without text.format"));
        }
        let tool_choice = match &choice {
            ToolChoice::None => json!("none"),
            ToolChoice::Auto => json!("auto"),
            ToolChoice::Calls(None) => json!("required"),
            ToolChoice::Calls(Some(name)) => json!({"type": "function", "name": name}),
        };
        let shape = with_calls(choice, shape, strict(&given), parallel, "text.format")?;
        let mut echo = json!({
            "instructions": instructions,
            "max_output_tokens": choosing.max_tokens,
            "max_tool_calls": most_calls,
            "metadata": metadata(&mut fields)?,
            "parallel_tool_calls": parallel,
            "reasoning": reasoning,
            "temperature": temperature.map(decimal),
            "text": text,
            "tool_choice": tool_choice,
            "tools": given,
            "top_logprobs": choosing.logprobs.unwrap_or(0),
            "top_p": top_p.map(decimal),
            "truncation": truncation,
        });
        // What agents say of themselves.
        if let Some(metadata) = fields.take("client_metadata")
            && !metadata.is_object()
        {
            return Err(fields.wrong("client_metadata", "an object", &metadata));
        }
        for name in ["user", "safety_identifier", "prompt_cache_key"] {
            // Names for the operator's logs and for routing; answers do not depend on them.
            echo[name] = fields.string(name)?.into();
        }
        unsupported(&mut fields)?;
        fields.finish()?;
        let fields = match echo {
            Value::Object(map) => map,
            _ => Map::new(),
        };
        let echo = Echo { fields, one_call: !parallel, logprobs: choosing.logprobs.is_some() };
        let prompt = Prompt::Chat { messages, tools, extra };
        let generate = Generate {
            prompt,
            choosing,
            tools: set,
            shape,
            prompt_field: "input",
            schema_field: "text.format",
            stream,
            one_call: false,
        };
        Ok(Self { model, generate, stream, echo })
    }
}

/// Fields that this server cannot honour, unless their values ask for nothing.
fn unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    let whole = "nothing is stored; send the whole conversation as input";
    fields.refuse("previous_response_id", &[], whole)?;
    fields.refuse("conversation", &[], whole)?;
    fields.refuse("store", &[], "nothing is stored; send store: false")?;
    fields.refuse("background", &[], "nothing is stored; wait for the answer or stream it")?;
    fields.refuse("background_options", &[], "there are no background answers")?;
    fields.refuse("prompt", &[], "no prompts are stored; send their text")?;
    fields.refuse("context_management", &[], "edit the input you send")?;
    let tiers = ["auto", "default"].map(Value::from);
    fields.refuse("service_tier", &tiers, "there is one tier")?;
    retention(fields)?;
    let implicit = [json!({"mode": "implicit"})];
    fields.refuse(
        "prompt_cache_options",
        &implicit,
        "prefixes are kept as long as there is room",
    )?;
    fields.refuse("moderation", &[], "there is no moderation")?;
    fields.refuse("image", &[], "input is text")?;
    fields.refuse("access_programs", &[], "there are none")
}

fn required(fields: &mut Fields, name: &str) -> Result<String, ApiError> {
    fields.string(name)?.ok_or_else(|| fields.missing(name))
}

/// The number that was sent; its nearest `f32` has other digits as an `f64`.
fn decimal(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}

fn stream(fields: &mut Fields) -> Result<bool, ApiError> {
    let stream = fields.flag("stream")?.unwrap_or(false);
    if let Some(mut options) = fields.object("stream_options")? {
        if !stream {
            let message = "stream_options: only with stream: true";
            return Err(ApiError::invalid("stream_options", message));
        }
        options.refuse("include_obfuscation", &[], "events have no padding")?;
        options.finish()?;
    }
    Ok(stream)
}

fn logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let mut wanted = false;
    for (i, entry) in fields.list("include", 32)?.unwrap_or_default().iter().enumerate() {
        match entry.as_str() {
            Some("message.output_text.logprobs") => wanted = true,
            // Wanted so as to send thoughts back, which are plain text here.
            Some("reasoning.encrypted_content") => {}
            _ => {
                let path = format!("include[{i}]");
                let expected = "message.output_text.logprobs or reasoning.encrypted_content";
                return Err(fields.wrong(&path, expected, entry));
            }
        }
    }
    let most = fields.limits().top_logprobs as u64;
    match (wanted, fields.count("top_logprobs", 0..=most)?) {
        (false, Some(1..)) => {
            let message = "top_logprobs: only with include: [\"message.output_text.logprobs\"]";
            Err(ApiError::invalid("top_logprobs", message))
        }
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0) as usize)),
    }
}

fn truncation(fields: &mut Fields) -> Result<&'static str, ApiError> {
    match fields.string("truncation")?.as_deref() {
        None | Some("disabled") => Ok("disabled"),
        Some("auto") => Ok("auto"),
        Some(other) => Err(fields.wrong("truncation", "auto or disabled", &json!(other))),
    }
}

fn metadata(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let (entries, name, value) = METADATA;
    let Some(given) = fields.take("metadata") else { return Ok(Map::new()) };
    let fits = |map: &Map<String, Value>| {
        let short = |text: &str, most| text.chars().nth(most).is_none();
        let entry = |(key, text): (&String, &Value)| {
            short(key, name) && text.as_str().is_some_and(|text| short(text, value))
        };
        map.len() <= entries && map.iter().all(entry)
    };
    match given {
        Value::Object(map) if fits(&map) => Ok(map),
        other => {
            let expected =
                format!("up to {entries} strings of {value} characters, with names of {name}");
            Err(fields.wrong("metadata", &expected, &other))
        }
    }
}

/// What to think, as the response repeats it.
fn reasoning(fields: &mut Fields, extra: &mut Map<String, Value>) -> Result<Value, ApiError> {
    let mut echo = json!({"effort": null, "summary": null});
    let Some(mut reasoning) = fields.object("reasoning")? else { return Ok(echo) };
    echo["effort"] = effort(&mut reasoning, "effort", extra)?.into();
    for name in ["summary", "generate_summary"] {
        // Thoughts are given out whole, which is more than a summary.
        if let Some(summary) = reasoning.string(name)?
            && !["auto", "concise", "detailed"].contains(&summary.as_str())
        {
            return Err(reasoning.wrong(name, "auto, concise or detailed", &json!(summary)));
        }
    }
    let context = ["auto", "all_turns"].map(Value::from);
    reasoning.refuse("context", &context, "all thoughts in the input go to the template")?;
    reasoning.refuse("mode", &[json!("standard")], "there is one mode")?;
    reasoning.finish()?;
    Ok(echo)
}

/// What text has to look like, as the response repeats it and as the answer is held to it.
fn text(fields: &mut Fields) -> Result<(Value, Option<Shape>), ApiError> {
    let plain = json!({"format": {"type": "text"}});
    let Some(given) = fields.take("text") else { return Ok((plain, None)) };
    let mut text = Fields::of(given.clone(), "text")?.within(fields.limits());
    text.refuse("verbosity", &[json!("medium")], "say it in the instructions")?;
    let format = text.object("format")?;
    text.finish()?;
    let Some(mut format) = format else { return Ok((plain, None)) };
    let shape = match required(&mut format, "type")?.as_str() {
        "text" => None,
        "json_object" => Some(Shape::JsonObject),
        "json_schema" => {
            let NamedSchema { name, schema, strict } = named_schema(&mut format)?;
            name.ok_or_else(|| format.missing("name"))?;
            let schema = schema.ok_or_else(|| format.missing("schema"))?;
            Some(Shape::JsonSchema { schema, strict })
        }
        other => {
            let expected = "text, json_object or json_schema";
            return Err(format.wrong("type", expected, &json!(other)));
        }
    };
    format.finish()?;
    Ok((json!({"format": given["format"]}), shape))
}

/// A tool in the form that templates read.
fn tool(value: Value, path: &str) -> Result<Value, ApiError> {
    let mut fields = Fields::of(value, path)?;
    let kind = required(&mut fields, "type")?;
    if kind != "function" {
        let kind: String = kind.chars().take(40).collect();
        let message = format!("{path}: tools of type {kind:?} are not supported, only functions");
        return Err(ApiError::unsupported(path, message));
    }
    let mut function = Map::new();
    function.insert("name".to_owned(), required(&mut fields, "name")?.into());
    if let Some(description) = fields.string("description")? {
        function.insert("description".to_owned(), description.into());
    }
    if let Some(parameters) = fields.take("parameters") {
        function.insert("parameters".to_owned(), parameters);
    }
    // Read from the request as a whole.
    fields.flag("strict")?;
    fields.refuse("defer_loading", &[], "the model is told of every function")?;
    fields.refuse("allowed_callers", &[json!(["direct"])], "calls are the model's own")?;
    fields.refuse("output_schema", &[], "say it in the description")?;
    fields.refuse("async", &[], "calls are answered in the next request")?;
    fields.finish()?;
    Ok(json!({"type": "function", "function": function}))
}

fn messages(fields: &mut Fields, instructions: Option<&str>) -> Result<Vec<Value>, ApiError> {
    let mut turns = Turns::default();
    if let Some(text) = instructions {
        turns.say("system", text);
    }
    let most = fields.limits().messages;
    match fields.take("input").ok_or_else(|| fields.missing("input"))? {
        Value::String(text) => turns.say("user", &text),
        Value::Array(items) if (1..=most).contains(&items.len()) => {
            for (i, value) in items.into_iter().enumerate() {
                item(value, &format!("input[{i}]"), &mut turns)?;
            }
        }
        other => {
            let expected = format!("a string or a list of 1 to {most} items");
            return Err(fields.wrong("input", &expected, &other));
        }
    }
    Ok(turns.into_messages())
}

fn item(value: Value, path: &str, turns: &mut Turns) -> Result<(), ApiError> {
    let mut fields = Fields::of(value, path)?;
    let kind = fields.string("type")?;
    // Those of an earlier response.
    fields.string("id")?;
    fields.string("status")?;
    match kind.as_deref() {
        None | Some("message") => {
            let role = required(&mut fields, "role")?;
            let role = match role.as_str() {
                "developer" | "system" => "system",
                "user" | "assistant" => role.as_str(),
                _ => {
                    let expected = "user, assistant, system or developer";
                    return Err(fields.wrong("role", expected, &json!(role)));
                }
            };
            let text = content(&mut fields, "content")?.ok_or_else(|| fields.missing("content"))?;
            fields.string("phase")?;
            turns.say(role, &text);
        }
        Some("function_call") => {
            let id = required(&mut fields, "call_id")?;
            let name = required(&mut fields, "name")?;
            let arguments = arguments(&mut fields)?;
            fields.refuse("caller", &[json!({"type": "direct"})], "calls are the model's own")?;
            fields.refuse("namespace", &[], "functions have no namespaces")?;
            fields.refuse("async", &[], "calls are answered in the next request")?;
            turns.call(&id, &name, arguments);
        }
        Some("function_call_output") => {
            let id = required(&mut fields, "call_id")?;
            let text = content(&mut fields, "output")?.ok_or_else(|| fields.missing("output"))?;
            fields.string("name")?;
            fields.refuse("caller", &[json!({"type": "direct"})], "calls are the model's own")?;
            fields.refuse("namespace", &[], "functions have no namespaces")?;
            turns.result(&fields.path("call_id"), &id, &text)?;
        }
        Some("reasoning") => {
            let thoughts = texts(&mut fields, "content", "reasoning_text")?;
            let summary = texts(&mut fields, "summary", "summary_text")?;
            let unreadable = "only its author can read it; leave the item out";
            fields.refuse("encrypted_content", &[json!("")], unreadable)?;
            turns.open("assistant");
            let texts = if thoughts.is_empty() { summary } else { thoughts };
            if !texts.is_empty() {
                turns.think(&texts.join("\n"));
            }
        }
        Some("item_reference") => {
            let message = format!("{path}: nothing is stored; send the item itself");
            return Err(ApiError::unsupported(path, message));
        }
        Some(kind) => {
            let kind: String = kind.chars().take(40).collect();
            let message = format!("{path}: items of type {kind:?} are not supported");
            return Err(ApiError::unsupported(path, message));
        }
    }
    fields.finish()
}

/// Most parts of a text.
const MAX_PARTS: usize = 4096;

/// Texts of parts of type `kind`.
fn texts(fields: &mut Fields, name: &str, kind: &str) -> Result<Vec<String>, ApiError> {
    let path = fields.path(name);
    let parts = fields.list(name, MAX_PARTS)?.unwrap_or_default();
    let text = |(i, value)| {
        let mut part = Fields::of(value, &format!("{path}[{i}]"))?;
        let found = required(&mut part, "type")?;
        if found != kind {
            return Err(part.wrong("type", kind, &json!(found)));
        }
        let text = required(&mut part, "text")?;
        part.finish()?;
        Ok(text)
    };
    parts.into_iter().enumerate().map(text).collect()
}

/// The response to a request whose answer is whole.
pub fn response(served: &Served, echo: Echo, answer: &Whole) -> Value {
    response_of(&served.id, &served.tokenizer, echo, answer)
}

fn response_of(model: &str, tokenizer: &Tokenizer, echo: Echo, answer: &Whole) -> Value {
    let head = Head::new(model, echo);
    let mut items = Vec::new();
    if !answer.reasoning.is_empty() {
        items.push(Item::new(Kind::Reasoning, answer.reasoning.clone()));
    }
    if !answer.content.is_empty() {
        let mut item = Item::new(Kind::Message, answer.content.clone());
        if head.echo.logprobs {
            item.logprobs = tokens(tokenizer, &answer.tally.content);
        }
        items.push(item);
    }
    for (index, (name, arguments)) in answer.calls.iter().enumerate() {
        if head.gives_out(index) {
            items.push(Item::new(Kind::call(index, name), arguments.clone()));
        }
    }
    let cut = matches!(answer.finish, Some((Finish::Length, _)));
    let last = items.len().saturating_sub(1);
    let status = |i| if cut && i == last { "incomplete" } else { "completed" };
    let output = items.iter().enumerate().map(|(i, item)| item.json(status(i))).collect();
    let spent = answer.finish.as_ref().map(|(_, usage)| {
        let mut spent = Spent { reasoning: answer.tally.reasoning, ..Spent::default() };
        spent.add(usage);
        spent
    });
    head.json(answer.finish.as_ref().map(|(finish, _)| finish), output, spent)
}

/// Tokens of a message as its `logprobs`.
fn tokens(tokenizer: &Tokenizer, chances: &[TokenChance]) -> Vec<Value> {
    match chat_logprobs(tokenizer, chances)["content"].take() {
        Value::Array(tokens) => tokens,
        _ => Vec::new(),
    }
}

/// What stays the same while a response is made.
struct Head {
    id: String,
    created: u64,
    model: String,
    echo: Echo,
}

impl Head {
    fn new(model: &str, echo: Echo) -> Self {
        Self { id: new_id("resp_"), created: now(), model: model.to_owned(), echo }
    }

    /// Whether call `index` is given out.
    fn gives_out(&self, index: usize) -> bool {
        index == 0 || !self.echo.one_call
    }

    /// The response, under way or ended by `finish`.
    fn json(&self, finish: Option<&Finish>, output: Vec<Value>, spent: Option<Spent>) -> Value {
        let status = match finish {
            None => "in_progress",
            Some(Finish::Stop { .. } | Finish::ToolCalls) => "completed",
            Some(Finish::Length) => "incomplete",
            Some(Finish::Failed(_)) => "failed",
        };
        let error = match finish {
            Some(Finish::Failed(error)) => {
                json!({"code": error_code(error), "message": error.message})
            }
            _ => Value::Null,
        };
        let incomplete = (status == "incomplete").then(|| json!({"reason": "max_output_tokens"}));
        let usage = spent.map(|spent| {
            json!({
                "input_tokens": spent.prompt,
                "input_tokens_details": {"cached_tokens": spent.cached, "cache_write_tokens": 0},
                "output_tokens": spent.completion,
                "output_tokens_details": {"reasoning_tokens": spent.reasoning},
                "total_tokens": spent.prompt + spent.completion,
            })
        });
        let mut response = json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": (status == "completed").then(now),
            "status": status,
            "background": false,
            "error": error,
            "incomplete_details": incomplete,
            "model": self.model,
            "output": output,
            "previous_response_id": null,
            "store": false,
            "usage": usage,
        });
        if let Value::Object(response) = &mut response {
            response.extend(self.echo.fields.clone());
        }
        response
    }
}

/// OpenAI's word for what went wrong with a response.
fn error_code(error: &ApiError) -> &'static str {
    match error.status {
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_exceeded",
        status if status.is_client_error() => "invalid_prompt",
        _ => "server_error",
    }
}

/// A part of the output.
struct Item {
    id: String,
    kind: Kind,
    /// Thoughts, text or arguments.
    text: String,
    logprobs: Vec<Value>,
}

#[derive(Debug, PartialEq)]
enum Kind {
    Reasoning,
    Message,
    Call { index: usize, id: String, name: String },
}

impl Kind {
    fn call(index: usize, name: &str) -> Self {
        Self::Call { index, id: new_id("call_"), name: name.to_owned() }
    }
}

impl Item {
    fn new(kind: Kind, text: String) -> Self {
        let prefix = match kind {
            Kind::Reasoning => "rs_",
            Kind::Message => "msg_",
            Kind::Call { .. } => "fc_",
        };
        Self { id: new_id(prefix), kind, text, logprobs: Vec::new() }
    }

    /// Its part of content; calls have none.
    fn part(&self) -> Option<Value> {
        match self.kind {
            Kind::Reasoning => Some(json!({"type": "reasoning_text", "text": self.text})),
            Kind::Message => Some(json!({
                "type": "output_text", "text": self.text, "annotations": [],
                "logprobs": self.logprobs,
            })),
            Kind::Call { .. } => None,
        }
    }

    fn json(&self, status: &str) -> Value {
        // An item begins without its part, which is an event of its own.
        let begins = status == "in_progress";
        let content: Vec<_> = self.part().filter(|_| !begins).into_iter().collect();
        match &self.kind {
            Kind::Reasoning => json!({
                "id": self.id, "type": "reasoning", "status": status, "summary": [],
                "content": content, "encrypted_content": null,
            }),
            Kind::Message => json!({
                "id": self.id, "type": "message", "status": status, "role": "assistant",
                "content": content,
            }),
            Kind::Call { id, name, .. } => json!({
                "id": self.id, "type": "function_call", "status": status, "call_id": id,
                "name": name, "arguments": self.text,
            }),
        }
    }
}
