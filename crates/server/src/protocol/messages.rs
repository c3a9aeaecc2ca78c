//! Anthropic's messages.
//!
//! Where the protocol says more than a local model can do: `thinking.budget_tokens` is checked and not enforced, since
//! `max_tokens` bounds thoughts and answer together; thoughts carry an empty signature, and those that come back are taken
//! as they are; without `thinking` it is the model's template that decides whether to think.

#[cfg(test)]
mod tests;

use super::chat::{grammar, template_variables};
use super::tools::{ToolChoice, check_choice, check_schema, offered, strict, with_calls};
use super::turns::Turns;
use super::{Encoder, named_event, new_id};
use crate::ApiError;
use crate::answer::{Delta, Finish, Piece, Whole};
use crate::constraint::Shape;
use crate::fields::Fields;
use crate::generate::{Choosing, Generate, Prompt, stop};
use crate::models::Served;
use axum::http::StatusCode;
use marlin_engine::Usage;
use serde_json::{Map, Value, json};

/// A parsed request.
pub struct MessagesRequest {
    /// Model named.
    pub model: Option<String>,
    /// What to put to the model.
    pub generate: Generate,
    /// The answer as it comes.
    pub stream: bool,
    /// At most one call is given out.
    pub one_call: bool,
}

impl MessagesRequest {
    /// Reads a body.
    ///
    /// # Errors
    /// Names the first field that is wrong, unknown, or not supported.
    pub fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        let most = max_tokens(&mut fields)?.ok_or_else(|| fields.missing("max_tokens"))?;
        Self::read(fields, Some(most))
    }

    /// Reads the body of a request for the number of its tokens, which needs no `max_tokens`.
    ///
    /// # Errors
    /// Names the first field that is wrong, unknown, or not supported.
    pub fn parse_for_count(mut fields: Fields) -> Result<Self, ApiError> {
        let most = max_tokens(&mut fields)?;
        Self::read(fields, most)
    }

    fn read(mut fields: Fields, max_tokens: Option<usize>) -> Result<Self, ApiError> {
        let model = fields.string("model")?;
        let messages = messages(&mut fields)?;
        let stream = fields.flag("stream")?.unwrap_or(false);
        let choosing = Choosing::read_extensions(&mut fields)?;
        let temperature = fields.number("temperature", 0.0..=1.0)?;
        let top_p = fields.number("top_p", 0.0..=1.0)?;
        let mut choosing = choosing.with(temperature, top_p, stop(&mut fields, "stop_sequences")?);
        choosing.max_tokens = max_tokens;

        let tools = fields.list("tools", fields.limits().tools)?.unwrap_or_default();
        let strict = strict(&tools);
        let tool = |(i, value)| tool(value, &format!("tools[{i}]"));
        let tools: Vec<_> = tools.into_iter().enumerate().map(tool).collect::<Result<_, _>>()?;
        let (choice, one_call) = tool_choice(&mut fields)?;
        check_choice(&choice, &tools)?;
        let (set, tools) = offered(&choice, tools, fields.limits())?;

        let mut extra = template_variables(&mut fields)?;
        thinking(&mut fields, max_tokens, &mut extra)?;
        let mut shape = output_config(&mut fields, &mut extra)?;
        if let Some(grammar) = grammar(&mut fields)?
            && shape.replace(grammar).is_some()
        {
            let message = "grammar: only without output_config.format";
            return Err(ApiError::invalid("grammar", message));
        }
        let shape = with_calls(choice, shape, strict, !one_call, "output_config.format")?;
        harmless(&mut fields)?;
        fields.finish()?;
        let prompt = Prompt::Chat { messages, tools, extra };
        let generate = Generate {
            prompt,
            choosing,
            tools: set,
            shape,
            prompt_field: "messages",
            schema_field: "output_config.format",
            stream,
            one_call,
        };
        Ok(Self { model, generate, stream, one_call })
    }
}

fn max_tokens(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    Ok(fields.count("max_tokens", 1..=1 << 32)?.map(|n| n as usize))
}

/// Fields whose usual values ask for nothing, or that this server cannot honour.
fn harmless(fields: &mut Fields) -> Result<(), ApiError> {
    // Prefixes are kept without being asked to.
    fields.take("cache_control");
    if let Some(mut metadata) = fields.object("metadata")? {
        metadata.string("user_id")?;
        metadata.finish()?;
    }
    let tiers = ["auto", "standard_only"].map(Value::from);
    fields.refuse("service_tier", &tiers, "there is one tier")?;
    fields.refuse("speed", &[json!("standard")], "there is one speed")?;
    // Says that all thoughts are kept, and so they are.
    let keep = json!({"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]});
    let nothing = json!({"edits": []});
    fields.refuse("context_management", &[keep, nothing], "edit the messages you send")?;
    fields.refuse("container", &[], "there are no containers")?;
    fields.refuse(
        "mcp_servers",
        &[],
        "the server calls no tools; send their definitions as tools",
    )?;
    fields.refuse("inference_geo", &[], "the model runs where this server does")?;
    fields.refuse("diagnostics", &[], "see /metrics")
}

fn messages(fields: &mut Fields) -> Result<Vec<Value>, ApiError> {
    let mut turns = Turns::default();
    if let Some(system) = text(fields, "system")? {
        turns.say("system", &system);
    }
    let messages = fields.list("messages", fields.limits().messages)?;
    let messages = messages.ok_or_else(|| fields.missing("messages"))?;
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages: expected at least one"));
    }
    for (i, value) in messages.into_iter().enumerate() {
        message(value, &format!("messages[{i}]"), &mut turns)?;
    }
    if turns.role() == Some("assistant") {
        let message = "messages: the last one is the assistant's; an answer that goes on from it is \
                       not supported, end with a message of the user";
        return Err(ApiError::unsupported("messages", message));
    }
    Ok(turns.into_messages())
}

fn message(value: Value, path: &str, turns: &mut Turns) -> Result<(), ApiError> {
    let mut fields = Fields::of(value, path)?;
    let role = required(&mut fields, "role")?;
    if !["user", "assistant", "system"].contains(&role.as_str()) {
        return Err(fields.wrong("role", "user, assistant or system", &json!(role)));
    }
    let content = fields.take("content").ok_or_else(|| fields.missing("content"))?;
    match content {
        Value::String(text) => turns.say(&role, &text),
        Value::Array(blocks) => {
            // An answer may have been empty.
            if blocks.is_empty() {
                turns.open(&role);
            }
            for (i, value) in blocks.into_iter().enumerate() {
                block(value, &role, &format!("{path}.content[{i}]"), turns)?;
            }
        }
        other => return Err(fields.wrong("content", "a string or a list of blocks", &other)),
    }
    fields.finish()
}

fn block(value: Value, role: &str, path: &str, turns: &mut Turns) -> Result<(), ApiError> {
    let mut fields = Fields::of(value, path)?;
    let kind = required(&mut fields, "type")?;
    fields.take("cache_control");
    match (role, kind.as_str()) {
        (_, "text") => {
            let text = required(&mut fields, "text")?;
            // Where other models had it from.
            fields.take("citations");
            turns.say(role, &text);
        }
        ("assistant", "thinking") => {
            let text = required(&mut fields, "thinking")?;
            fields.string("signature")?;
            turns.think(&text);
        }
        ("assistant", "redacted_thinking") => {
            // Only its author can read it.
            required(&mut fields, "data")?;
            turns.open(role);
        }
        ("assistant", "tool_use") => {
            let id = required(&mut fields, "id")?;
            let name = required(&mut fields, "name")?;
            let input = fields.take("input").ok_or_else(|| fields.missing("input"))?;
            if !input.is_object() {
                return Err(fields.wrong("input", "an object", &input));
            }
            fields.refuse("caller", &[json!({"type": "direct"})], "calls are the model's own")?;
            fields.refuse("toolset_name", &[], "there are no sets of tools")?;
            turns.call(&id, &name, input);
        }
        ("user", "tool_result") => {
            let id = required(&mut fields, "tool_use_id")?;
            let mut text = text(&mut fields, "content")?.unwrap_or_default();
            // Templates have no field for it, so the text has to say it.
            let says_so = text.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("error"));
            if fields.flag("is_error")?.unwrap_or(false) && !says_so {
                text.insert_str(0, "Error: ");
            }
            fields.refuse("toolset_name", &[], "there are no sets of tools")?;
            turns.result(&fields.path("tool_use_id"), &id, &text)?;
        }
        (_, kind) => {
            let message = format!(
                "{path}: blocks of type {:?} are not supported in messages of role {role}",
                short(kind)
            );
            return Err(ApiError::unsupported(path, message));
        }
    }
    fields.finish()
}

/// Text, or the text of blocks.
fn text(fields: &mut Fields, name: &str) -> Result<Option<String>, ApiError> {
    let path = fields.path(name);
    let blocks = match fields.take(name) {
        None => return Ok(None),
        Some(Value::String(text)) => return Ok(Some(text)),
        Some(Value::Array(blocks)) => blocks,
        Some(other) => return Err(fields.wrong(name, "a string or a list of text blocks", &other)),
    };
    let text = |(i, value): (usize, Value)| {
        let path = format!("{path}[{i}]");
        let mut block = Fields::of(value, &path)?;
        let kind = required(&mut block, "type")?;
        if kind != "text" {
            let kind = short(&kind);
            let message = format!("{path}: blocks of type {kind:?} are not supported, only text");
            return Err(ApiError::unsupported(&path, message));
        }
        let text = required(&mut block, "text")?;
        block.take("cache_control");
        block.take("citations");
        block.finish()?;
        Ok(text)
    };
    let texts = blocks.into_iter().enumerate().map(text).collect::<Result<Vec<_>, _>>()?;
    Ok(Some(texts.join("\n")))
}

fn required(fields: &mut Fields, name: &str) -> Result<String, ApiError> {
    fields.string(name)?.ok_or_else(|| fields.missing(name))
}

fn short(text: &str) -> String {
    text.chars().take(40).collect()
}

/// A tool in the form that templates read.
fn tool(value: Value, path: &str) -> Result<Value, ApiError> {
    let mut fields = Fields::of(value, path)?;
    if let Some(kind) = fields.string("type")?.filter(|kind| kind != "custom") {
        let path = fields.path("type");
        let kind = short(&kind);
        let message = format!("{path}: tools of type {kind:?} are not supported, only custom ones");
        return Err(ApiError::unsupported(&path, message));
    }
    fields.take("cache_control");
    let mut function = Map::new();
    function.insert("name".to_owned(), required(&mut fields, "name")?.into());
    if let Some(description) = fields.string("description")? {
        function.insert("description".to_owned(), description.into());
    }
    let schema = fields.take("input_schema").ok_or_else(|| fields.missing("input_schema"))?;
    if !schema.is_object() {
        return Err(fields.wrong("input_schema", "a JSON schema, an object", &schema));
    }
    function.insert("parameters".to_owned(), schema);
    // The first is read from the request as a whole; inputs come as they are made in any case.
    fields.flag("strict")?;
    fields.flag("eager_input_streaming")?;
    fields.refuse("defer_loading", &[], "the model is told of every tool")?;
    fields.refuse("allowed_callers", &[json!(["direct"])], "calls are the model's own")?;
    fields.refuse("input_examples", &[], "say it in the description")?;
    fields.finish()?;
    Ok(json!({"type": "function", "function": function}))
}

/// Which calls are wanted, and whether one at most.
fn tool_choice(fields: &mut Fields) -> Result<(ToolChoice, bool), ApiError> {
    let Some(mut choice) = fields.object("tool_choice")? else {
        return Ok((ToolChoice::Auto, false));
    };
    let kind = required(&mut choice, "type")?;
    let wanted = match kind.as_str() {
        "auto" => ToolChoice::Auto,
        "any" => ToolChoice::Calls(None),
        "tool" => ToolChoice::Calls(Some(required(&mut choice, "name")?)),
        "none" => ToolChoice::None,
        _ => return Err(choice.wrong("type", "auto, any, tool or none", &json!(kind))),
    };
    let one_call = choice.flag("disable_parallel_tool_use")?.unwrap_or(false);
    choice.finish()?;
    Ok((wanted, one_call))
}

fn thinking(
    fields: &mut Fields,
    max_tokens: Option<usize>,
    extra: &mut Map<String, Value>,
) -> Result<(), ApiError> {
    let Some(mut thinking) = fields.object("thinking")? else { return Ok(()) };
    let kind = required(&mut thinking, "type")?;
    let thinks = match kind.as_str() {
        "enabled" => {
            let budget = thinking.count("budget_tokens", 1..=1 << 32)?;
            let budget = budget.ok_or_else(|| thinking.missing("budget_tokens"))?;
            if max_tokens.is_some_and(|most| budget >= most as u64) {
                let path = thinking.path("budget_tokens");
                let message = format!("{path}: expected less than max_tokens, found {budget}");
                return Err(ApiError::invalid(&path, message));
            }
            true
        }
        "adaptive" => true,
        "disabled" => false,
        _ => return Err(thinking.wrong("type", "enabled, adaptive or disabled", &json!(kind))),
    };
    let shown = [json!("summarized")];
    thinking.refuse("display", &shown, "thoughts are shown; disable them to have none")?;
    thinking.finish()?;
    extra.entry("enable_thinking").or_insert(thinks.into());
    Ok(())
}

fn output_config(
    fields: &mut Fields,
    extra: &mut Map<String, Value>,
) -> Result<Option<Shape>, ApiError> {
    let Some(mut config) = fields.object("output_config")? else { return Ok(None) };
    if let Some(effort) = config.string("effort")? {
        if !["low", "medium", "high", "xhigh", "max"].contains(&effort.as_str()) {
            let expected = "low, medium, high, xhigh or max";
            return Err(config.wrong("effort", expected, &json!(effort)));
        }
        extra.entry("reasoning_effort").or_insert(effort.into());
    }
    let format = config.object("format")?;
    config.finish()?;
    let Some(mut format) = format else { return Ok(None) };
    let kind = required(&mut format, "type")?;
    if kind != "json_schema" {
        return Err(format.wrong("type", "json_schema", &json!(kind)));
    }
    let schema = format.take("schema").ok_or_else(|| format.missing("schema"))?;
    if !schema.is_object() {
        return Err(format.wrong("schema", "a JSON schema, an object", &schema));
    }
    check_schema(&schema, &format.path("schema"), format.limits())?;
    format.finish()?;
    Ok(Some(Shape::JsonSchema { schema, strict: true }))
}

/// The response to a request for the number of its tokens.
pub fn count_response(tokens: usize) -> Value {
    json!({"input_tokens": tokens})
}

/// Anthropic's word for why an answer ended, and the text that ended it.
fn stop_reason(finish: &Finish) -> (&'static str, Option<&str>) {
    match finish {
        Finish::Stop { by: None } => ("end_turn", None),
        Finish::Stop { by: Some(text) } => ("stop_sequence", Some(text)),
        Finish::Length => ("max_tokens", None),
        Finish::ToolCalls => ("tool_use", None),
        Finish::Failed(_) => ("error", None),
    }
}

/// Anthropic counts the tokens of a prompt that had been computed before beside the others.
fn usage(usage: &Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens.saturating_sub(usage.cached_tokens),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    })
}

/// The arguments of a call. Text that is no object is given out as Anthropic's documentation
/// advises to send it back.
fn input(arguments: &str) -> Value {
    match serde_json::from_str(arguments) {
        Ok(input @ Value::Object(_)) => input,
        _ if arguments.is_empty() => json!({}),
        _ => json!({"INVALID_JSON": arguments}),
    }
}

/// The response to a request whose answer is whole, with one of its calls or all.
pub fn response(served: &Served, answer: &Whole, one_call: bool) -> Value {
    message_of(&served.id, answer, one_call)
}

fn message_of(model: &str, answer: &Whole, one_call: bool) -> Value {
    let mut content = Vec::new();
    if !answer.reasoning.is_empty() {
        content.push(json!({"type": "thinking", "thinking": answer.reasoning, "signature": ""}));
    }
    if !answer.content.is_empty() {
        content.push(json!({"type": "text", "text": answer.content}));
    }
    let most = if one_call { 1 } else { usize::MAX };
    for (name, arguments) in answer.calls.iter().take(most) {
        let input = input(arguments);
        content.push(
            json!({"type": "tool_use", "id": new_id("toolu_"), "name": name, "input": input}),
        );
    }
    let finish = answer.finish.as_ref();
    let (reason, stop) = finish.map(|(finish, _)| stop_reason(finish)).unzip();
    json!({
        "id": new_id("msg_"),
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": stop.flatten(),
        "usage": usage(&finish.map(|(_, usage)| *usage).unwrap_or_default()),
    })
}

/// Anthropic's shape of an error.
pub fn error_body(error: &ApiError) -> Value {
    let kind = match error.status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
        StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => "timeout_error",
        status if status.is_client_error() => "invalid_request_error",
        _ => "api_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": error.message}})
}

/// The block that is being written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Thinking,
    Text,
    Call(usize),
}

/// Writes a stream of events.
pub struct Stream {
    model: String,
    prompt_tokens: usize,
    one_call: bool,
    open: Option<Block>,
    /// Blocks begun.
    blocks: usize,
    failed: bool,
}

impl Stream {
    /// Of the answer to a prompt of `prompt_tokens`, with one of its calls or all.
    pub fn new(served: &Served, prompt_tokens: usize, one_call: bool) -> Self {
        Self::of(&served.id, prompt_tokens, one_call)
    }

    fn of(model: &str, prompt_tokens: usize, one_call: bool) -> Self {
        let (model, open) = (model.to_owned(), None);
        Self { model, prompt_tokens, one_call, open, blocks: 0, failed: false }
    }

    fn delta(&mut self, delta: Delta, out: &mut Vec<u8>) {
        let (block, delta) = match delta {
            Delta::Reasoning(text) => {
                self.begin_block(
                    Block::Thinking,
                    || json!({"type": "thinking", "thinking": "", "signature": ""}),
                    out,
                );
                (Block::Thinking, json!({"type": "thinking_delta", "thinking": text}))
            }
            Delta::Content(text) => {
                self.begin_block(Block::Text, || json!({"type": "text", "text": ""}), out);
                (Block::Text, json!({"type": "text_delta", "text": text}))
            }
            Delta::Call { index, .. } | Delta::Arguments { index, .. }
                if self.one_call && index > 0 =>
            {
                return;
            }
            Delta::Call { index, name } => {
                let start = || json!({"type": "tool_use", "id": new_id("toolu_"), "name": name, "input": {}});
                return self.begin_block(Block::Call(index), start, out);
            }
            Delta::Arguments { index, text } => {
                (Block::Call(index), json!({"type": "input_json_delta", "partial_json": text}))
            }
        };
        // What belongs to a block that has ended cannot be written any more.
        if self.open == Some(block) {
            let index = self.blocks - 1;
            let data = json!({"type": "content_block_delta", "index": index, "delta": delta});
            named_event(out, "content_block_delta", &data);
        }
    }

    fn begin_block(&mut self, block: Block, start: impl FnOnce() -> Value, out: &mut Vec<u8>) {
        if self.open == Some(block) {
            return;
        }
        self.end_block(out);
        let data =
            json!({"type": "content_block_start", "index": self.blocks, "content_block": start()});
        named_event(out, "content_block_start", &data);
        self.open = Some(block);
        self.blocks += 1;
    }

    fn end_block(&mut self, out: &mut Vec<u8>) {
        if self.open.take().is_some() {
            let data = json!({"type": "content_block_stop", "index": self.blocks - 1});
            named_event(out, "content_block_stop", &data);
        }
    }
}

impl Encoder for Stream {
    fn begin(&mut self, out: &mut Vec<u8>) {
        // How much of the prompt was there already is known at the end, which says it again.
        let usage = usage(&Usage { prompt_tokens: self.prompt_tokens, ..Usage::default() });
        let message = json!({
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": null,
            "stop_sequence": null,
            "usage": usage,
        });
        named_event(out, "message_start", &json!({"type": "message_start", "message": message}));
    }

    fn piece(&mut self, piece: Piece, out: &mut Vec<u8>) {
        for delta in piece.deltas {
            self.delta(delta, out);
        }
        match piece.finish {
            None => {}
            Some((Finish::Failed(error), _)) => {
                self.failed = true;
                named_event(out, "error", &error_body(&error));
            }
            Some((finish, spent)) => {
                self.end_block(out);
                let (reason, stop) = stop_reason(&finish);
                let delta = json!({"stop_reason": reason, "stop_sequence": stop});
                let data = json!({"type": "message_delta", "delta": delta, "usage": usage(&spent)});
                named_event(out, "message_delta", &data);
            }
        }
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        if !self.failed {
            named_event(out, "message_stop", &json!({"type": "message_stop"}));
        }
    }
}
