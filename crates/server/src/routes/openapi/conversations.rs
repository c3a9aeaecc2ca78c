//! Fields of OpenAI's responses and of Anthropic's messages.

use super::{count, flag, grammar, list, number, object, one_of, stop, string, with};
use crate::RequestLimits;
use serde_json::{Value, json};

fn any_object() -> Value {
    json!({"type": "object"})
}

/// Our extensions.
fn extensions() -> Vec<(&'static str, Value)> {
    let mut fields = super::extensions();
    fields.extend([
        ("grammar", with(grammar(), "What the answer has to look like; only without a format.")),
        ("chat_template_kwargs", with(any_object(), "Variables for the model's template.")),
    ]);
    fields
}

/// `POST /v1/responses`.
pub(super) fn responses(limits: &RequestLimits) -> Value {
    let input = json!({"anyOf": [string(), list(any_object(), limits.messages)]});
    let include = one_of(&["message.output_text.logprobs", "reasoning.encrypted_content"]);
    let metadata = json!({"type": "object", "maxProperties": 16, "propertyNames": {"maxLength": 64},
        "additionalProperties": {"type": "string", "maxLength": 512}});
    let efforts = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];
    let reasoning = object(
        &[("effort", one_of(&efforts)), ("summary", one_of(&["auto", "concise", "detailed"]))],
        &[],
    );
    let choice = json!({"anyOf": [one_of(&["none", "auto", "required"]), any_object()]});
    let mut fields = vec![
        ("model", with(string(), "Model, by its name in /v1/models.")),
        (
            "input",
            with(input, "Text, or the conversation: messages, calls and their results, thoughts."),
        ),
        ("instructions", with(string(), "What the model is told before everything else.")),
        ("max_output_tokens", with(count(1, 1 << 32), "Most tokens of the answer.")),
        ("temperature", with(number(0.0, 100.0), "Divides logits; 0 takes the likeliest token.")),
        (
            "top_p",
            with(number(0.0, 1.0), "Keep the likeliest tokens with this share of the probability."),
        ),
        ("include", with(list(include, 32), "Whether to say how likely each token was.")),
        (
            "top_logprobs",
            with(count(0, limits.top_logprobs as u64), "And this many of the likeliest."),
        ),
        ("text", with(any_object(), "`format`: text, json_object or json_schema.")),
        ("tools", with(list(any_object(), limits.tools), "Functions that the model may call.")),
        ("tool_choice", with(choice, "Whether it may, or must.")),
        ("parallel_tool_calls", with(flag(), "Whether an answer may hold several calls.")),
        (
            "max_tool_calls",
            with(count(1, 1 << 32), "Calls of a server's own tools, of which there are none."),
        ),
        ("reasoning", with(reasoning, "How much to think.")),
        ("truncation", with(one_of(&["auto", "disabled"]), "`auto` is truncate_prompt.")),
        ("stream", with(flag(), "Sends the answer as it comes.")),
        (
            "stream_options",
            with(
                object(&[("include_obfuscation", json!({"const": false}))], &[]),
                "Nothing to choose.",
            ),
        ),
        ("metadata", with(metadata, "Kept in the log, and repeated.")),
        ("user", with(string(), "Kept in the log, and repeated.")),
        ("safety_identifier", with(string(), "The same by its newer name.")),
        ("prompt_cache_key", with(string(), "Repeated; changes nothing.")),
    ];
    fields.extend(extensions());
    object(&fields, &["input"])
}

/// `POST /v1/messages`, and for the number of tokens where `max_tokens` may be left out.
pub(super) fn messages(counts: bool, limits: &RequestLimits) -> Value {
    let mut turns = list(any_object(), limits.messages);
    turns["minItems"] = 1.into();
    let system = json!({"anyOf": [string(), list(any_object(), 4096)]});
    let mut fields = vec![
        ("model", with(string(), "Model, by its name in /v1/models.")),
        (
            "messages",
            with(
                turns,
                "The conversation, which ends with the user: text, thoughts, calls and their results.",
            ),
        ),
        ("system", with(system, "What the model is told before everything else.")),
        ("max_tokens", with(count(1, 1 << 32), "Most tokens of the answer.")),
        ("temperature", with(number(0.0, 1.0), "Divides logits; 0 takes the likeliest token.")),
        (
            "top_p",
            with(number(0.0, 1.0), "Keep the likeliest tokens with this share of the probability."),
        ),
        (
            "stop_sequences",
            with(stop(limits), "Texts that end an answer, which does not hold them."),
        ),
        ("tools", with(list(any_object(), limits.tools), "Tools that the model may use.")),
        ("tool_choice", with(any_object(), "`auto`, `any`, `tool` with its name, or `none`.")),
        ("thinking", with(any_object(), "Whether to think.")),
        ("output_config", with(any_object(), "`format`: JSON of a schema; `effort`.")),
        ("stream", with(flag(), "Sends the answer as it comes.")),
        ("metadata", with(object(&[("user_id", string())], &[]), "Kept in the log.")),
    ];
    fields.extend(extensions());
    let required: &[&str] = if counts { &["messages"] } else { &["messages", "max_tokens"] };
    object(&fields, required)
}
