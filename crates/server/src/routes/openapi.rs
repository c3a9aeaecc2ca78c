//! The description of the paths for programs, and a page that lists it for people.

mod conversations;

use super::Server;
use crate::{FINGERPRINT, RequestLimits};
use axum::Json;
use axum::extract::State;
use axum::response::Html;
use serde_json::{Map, Value, json};
use std::fmt::Write;
use std::sync::Arc;

/// `GET /openapi.json`.
pub(super) async fn document(State(server): State<Arc<Server>>) -> Json<Value> {
    Json(description(&server.config.limits))
}

/// The paths that are described.
#[cfg(test)]
pub(super) fn paths() -> Vec<String> {
    description(&RequestLimits::default())["paths"].as_object().unwrap().keys().cloned().collect()
}

/// `GET /docs`: paths and fields, without a script.
pub(super) async fn page(State(server): State<Arc<Server>>) -> Html<String> {
    let document = description(&server.config.limits);
    let mut html = String::from(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
         <title>Marlin: paths and fields</title><link rel=stylesheet href=page/style.css>\
         <main class=reference><h1>Paths and fields</h1><p>For programs: <a href=openapi.json>openapi.json</a>.</p>",
    );
    let text = |value: &Value| {
        value.as_str().unwrap_or_default().replace('&', "&amp;").replace('<', "&lt;")
    };
    for (path, methods) in document["paths"].as_object().into_iter().flatten() {
        for (method, operation) in methods.as_object().into_iter().flatten() {
            let method = method.to_uppercase();
            let _ = write!(
                html,
                "<h2><code>{method} {path}</code></h2><p>{}</p>",
                text(&operation["summary"])
            );
            let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
            let Some(fields) = schema["properties"].as_object() else { continue };
            html.push_str("<table><tr><th>field<th>meaning</tr>");
            for (name, field) in fields {
                let _ = write!(
                    html,
                    "<tr><td><code>{name}</code><td>{}</tr>",
                    text(&field["description"])
                );
            }
            html.push_str("</table>");
        }
    }
    html.push_str("</main></html>");
    Html(html)
}

fn with(mut schema: Value, description: &str) -> Value {
    schema["description"] = description.into();
    schema
}

/// Null asks for the default everywhere.
fn or_null(mut schema: Value) -> Value {
    match schema.get("type") {
        Some(Value::String(kind)) if schema.get("enum").is_none() => {
            schema["type"] = json!([kind, "null"]);
            schema
        }
        _ => json!({"anyOf": [schema, {"type": "null"}]}),
    }
}

fn string() -> Value {
    json!({"type": "string"})
}

fn number(least: f64, most: f64) -> Value {
    json!({"type": "number", "minimum": least, "maximum": most})
}

fn count(least: u64, most: u64) -> Value {
    json!({"type": "integer", "minimum": least, "maximum": most})
}

fn flag() -> Value {
    json!({"type": "boolean"})
}

fn one_of(words: &[&str]) -> Value {
    json!({"type": "string", "enum": words})
}

fn list(items: Value, most: usize) -> Value {
    json!({"type": "array", "items": items, "maxItems": most})
}

fn token_ids() -> Value {
    list(count(0, u64::from(u32::MAX)), 1 << 20)
}

/// An object of these fields and no others.
fn object(fields: &[(&str, Value)], required: &[&str]) -> Value {
    let optional = |(name, schema): &(&str, Value)| {
        let schema = if required.contains(name) { schema.clone() } else { or_null_with(schema) };
        ((*name).to_owned(), schema)
    };
    let properties: Map<String, Value> = fields.iter().map(optional).collect();
    json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
}

fn or_null_with(schema: &Value) -> Value {
    let mut inner = schema.clone();
    let description = inner.as_object_mut().and_then(|map| map.remove("description"));
    let mut schema = or_null(inner);
    if let Some(description) = description {
        schema["description"] = description;
    }
    schema
}

fn stop(limits: &RequestLimits) -> Value {
    let one = json!({"type": "string", "minLength": 1, "maxLength": limits.stop_bytes});
    json!({"anyOf": [one, list(one.clone(), limits.stops)]})
}

fn content() -> Value {
    let part = object(&[("type", one_of(&["text"])), ("text", string())], &["type", "text"]);
    json!({"anyOf": [string(), list(part, 1024)]})
}

fn message() -> Value {
    let arguments = json!({"type": ["string", "object"]});
    let function = object(&[("name", string()), ("arguments", arguments)], &["name"]);
    let call = object(
        &[("id", string()), ("type", one_of(&["function"])), ("function", function)],
        &["function"],
    );
    let plain = object(
        &[
            ("role", one_of(&["system", "developer", "user"])),
            ("content", content()),
            ("name", string()),
        ],
        &["role", "content"],
    );
    let answer = object(
        &[
            ("role", one_of(&["assistant"])),
            ("content", content()),
            ("reasoning_content", string()),
            ("tool_calls", list(call, 128)),
        ],
        &["role"],
    );
    let result = object(
        &[("role", one_of(&["tool"])), ("content", content()), ("tool_call_id", string())],
        &["role", "content", "tool_call_id"],
    );
    json!({"anyOf": [plain, answer, result]})
}

fn tool() -> Value {
    let name = json!({"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"});
    let fields = [
        ("name", name),
        ("description", string()),
        ("parameters", json!({"type": "object"})),
        ("strict", flag()),
    ];
    let function = object(&fields, &["name"]);
    object(&[("type", one_of(&["function"])), ("function", function)], &["type", "function"])
}

fn grammar() -> Value {
    let fields = [("type", one_of(&["regex", "lark", "gbnf"])), ("value", string())];
    object(&fields, &["type", "value"])
}

/// Fields that chat and completion requests share.
/// Those of our extensions that every protocol has.
fn extensions() -> Vec<(&'static str, Value)> {
    vec![
        (
            "top_k",
            with(
                count(0, u64::from(u32::MAX)),
                "Keep this many of the likeliest tokens; 0 keeps all.",
            ),
        ),
        (
            "min_p",
            with(number(0.0, 1.0), "Keep tokens with this fraction of the best one's probability."),
        ),
        ("repetition_penalty", with(number(0.01, 100.0), "Divides logits of tokens already seen.")),
        (
            "stop_token_ids",
            with(list(count(0, u64::from(u32::MAX)), 64), "Tokens that end an answer."),
        ),
        ("min_tokens", with(count(0, 1 << 32), "Tokens before which the model may not end.")),
        ("ignore_eos", with(flag(), "Goes on where the model would end.")),
        (
            "priority",
            with(
                json!({"type": "integer", "minimum": i32::MIN, "maximum": i32::MAX}),
                "Lower numbers go first.",
            ),
        ),
        (
            "cache_salt",
            with(
                json!({"type": "string", "minLength": 1, "maxLength": 256}),
                "Prompts are computed once for requests of one salt.",
            ),
        ),
        ("timeout", with(number(0.001, 86_400.0), "Seconds after which the request fails.")),
        (
            "truncate_prompt",
            with(
                flag(),
                "Leaves out the beginning of a prompt that is too long, instead of an error.",
            ),
        ),
    ]
}

fn choosing(limits: &RequestLimits) -> Vec<(&'static str, Value)> {
    let mut fields = vec![
        (
            "model",
            with(string(), "Model, by its name in /v1/models; the first if left out or `default`."),
        ),
        ("temperature", with(number(0.0, 100.0), "Divides logits; 0 takes the likeliest token.")),
        (
            "top_p",
            with(number(0.0, 1.0), "Keep the likeliest tokens with this share of the probability."),
        ),
        ("presence_penalty", with(number(-2.0, 2.0), "Taken off logits of tokens in the answer.")),
        (
            "frequency_penalty",
            with(number(-2.0, 2.0), "Taken off logits of tokens in the answer, for each time."),
        ),
        (
            "logit_bias",
            with(
                json!({"type": "object", "maxProperties": limits.biases, "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}),
                "Added to logits, by token id.",
            ),
        ),
        (
            "seed",
            with(
                json!({"type": "integer", "minimum": i64::MIN, "maximum": i64::MAX}),
                "Same seed, same answer.",
            ),
        ),
        (
            "n",
            with(count(1, limits.answers as u64), "Answers to one prompt, which is computed once."),
        ),
        ("stop", with(stop(limits), "Texts that end an answer, which does not hold them.")),
        ("stream", with(flag(), "Sends the answer as it comes.")),
        (
            "stream_options",
            with(
                object(&[("include_usage", flag())], &[]),
                "`include_usage` ends the stream with what it took.",
            ),
        ),
        (
            "grammar",
            with(
                grammar(),
                "What the answer has to look like: a regular expression, Lark, or GBNF.",
            ),
        ),
        ("user", with(string(), "Kept in the log for the operator; changes nothing.")),
        ("safety_identifier", with(string(), "The same by its newer name.")),
        ("prompt_cache_key", with(string(), "Accepted; changes nothing.")),
        (
            "prompt_cache_retention",
            with(one_of(&["in_memory"]), "Prompts are kept in memory as long as there is room."),
        ),
        ("service_tier", with(one_of(&["auto", "default"]), "There is one.")),
        ("verbosity", with(one_of(&["medium"]), "Nothing to choose.")),
        (
            "metadata",
            with(json!({"type": "object"}), "Kept in the log for the operator; changes nothing."),
        ),
    ];
    fields.extend(extensions());
    fields
}

fn chat(limits: &RequestLimits) -> Value {
    let schema = object(
        &[
            ("name", string()),
            ("description", string()),
            ("strict", flag()),
            ("schema", json!({"type": "object"})),
        ],
        &["name"],
    );
    let format = json!({"anyOf": [
        object(&[("type", one_of(&["text", "json_object"]))], &["type"]),
        object(&[("type", one_of(&["json_schema"])), ("json_schema", schema)], &["type", "json_schema"]),
    ]});
    let named = object(
        &[("type", one_of(&["function"])), ("function", object(&[("name", string())], &["name"]))],
        &["type", "function"],
    );
    let mut messages = list(message(), limits.messages);
    messages["minItems"] = 1.into();
    let mut fields = vec![
        ("messages", with(messages, "The conversation.")),
        ("max_tokens", with(count(1, 1 << 32), "Most tokens of an answer.")),
        ("max_completion_tokens", with(count(1, 1 << 32), "The same by its newer name.")),
        ("logprobs", with(flag(), "Says how likely each token was.")),
        (
            "top_logprobs",
            with(count(0, limits.top_logprobs as u64), "And this many of the likeliest."),
        ),
        ("response_format", with(format, "JSON, or JSON of a schema.")),
        ("tools", with(list(tool(), limits.tools), "Functions that the model may call.")),
        (
            "tool_choice",
            with(
                json!({"anyOf": [one_of(&["none", "auto", "required"]), named]}),
                "Whether it may, or must.",
            ),
        ),
        ("parallel_tool_calls", with(flag(), "Whether a required answer may hold several calls.")),
        (
            "reasoning_effort",
            with(
                one_of(&["none", "minimal", "low", "medium", "high", "xhigh", "max"]),
                "For the model's template; none and minimal ask for no reasoning.",
            ),
        ),
        (
            "chat_template_kwargs",
            with(json!({"type": "object"}), "Variables for the model's template."),
        ),
    ];
    fields.extend(choosing(limits));
    object(&fields, &["messages"])
}

fn completion(limits: &RequestLimits) -> Value {
    let prompt = json!({"anyOf": [string(), token_ids(), list(string(), limits.prompts), list(token_ids(), limits.prompts)]});
    let mut fields = vec![
        ("prompt", with(prompt, "Text or token ids to go on from, or several.")),
        ("max_tokens", with(count(1, 1 << 32), "Most tokens of an answer; 16 if left out.")),
        (
            "logprobs",
            with(
                count(0, limits.top_logprobs as u64),
                "Says how likely each token was, and this many of the likeliest.",
            ),
        ),
        ("echo", with(flag(), "Begins the answer with the prompt.")),
        ("best_of", with(count(1, 1 << 20), "Must be n.")),
        ("suffix", with(json!({"type": "string", "maxLength": 0}), "Not supported.")),
    ];
    fields.extend(choosing(limits));
    object(&fields, &["prompt"])
}

/// A body of `schema`, and an answer.
fn operation(summary: &str, schema: Option<Value>, answer: Value) -> Value {
    let error = json!({"$ref": "#/components/schemas/Error"});
    let failed = |description: &str| json!({"description": description, "content": {"application/json": {"schema": error}}});
    let mut operation = json!({"summary": summary, "responses": {
        "200": {"description": "done", "content": answer},
        "4XX": failed("The request is wrong, not allowed, or comes too early."),
        "5XX": failed("The server failed, or is not ready."),
    }});
    if let Some(schema) = schema {
        let body = json!({"required": true, "content": {"application/json": {"schema": schema}}});
        operation["requestBody"] = body;
    }
    operation
}

/// [`operation`] whose errors have Anthropic's shape.
fn of_anthropic(mut operation: Value) -> Value {
    let schema = json!({"$ref": "#/components/schemas/AnthropicError"});
    for status in ["4XX", "5XX"] {
        operation["responses"][status]["content"]["application/json"]["schema"] = schema.clone();
    }
    operation
}

fn as_json(schema: Value) -> Value {
    json!({"application/json": {"schema": schema}})
}

fn as_json_or_stream(schema: Value) -> Value {
    json!({"application/json": {"schema": schema}, "text/event-stream": {"schema": {"type": "string"}}})
}

/// An object with at least these fields.
fn at_least(fields: &[(&str, Value)]) -> Value {
    let properties: Map<String, Value> =
        fields.iter().map(|(name, schema)| ((*name).to_owned(), schema.clone())).collect();
    let required: Vec<&str> = fields.iter().map(|(name, _)| *name).collect();
    json!({"type": "object", "properties": properties, "required": required})
}

fn description(limits: &RequestLimits) -> Value {
    let answers = at_least(&[
        ("id", string()),
        ("object", string()),
        ("created", count(0, 1 << 40)),
        ("model", string()),
        ("choices", json!({"type": "array"})),
        ("usage", json!({"type": "object"})),
    ]);
    let model = ("model", with(string(), "Model, by its name in /v1/models."));
    let texts = json!({"anyOf": [string(), list(string(), limits.inputs), token_ids(), list(token_ids(), limits.inputs)]});
    let embeddings = object(
        &[
            model.clone(),
            ("input", with(texts, "Text or token ids, or several.")),
            ("encoding_format", with(one_of(&["float", "base64"]), "How vectors are written.")),
            (
                "pooling",
                with(
                    one_of(&["mean", "last"]),
                    "The mean of the states, or the last one; the model's own if it says so, else the mean.",
                ),
            ),
            ("dimensions", with(count(1, 1 << 20), "Must be the model's own.")),
            ("user", string()),
        ],
        &["input"],
    );
    let perplexity = object(
        &[
            model.clone(),
            ("text", with(string(), "Text to score.")),
            ("token_ids", with(token_ids(), "Or its token ids.")),
            ("window", with(count(2, 1 << 24), "Tokens per window; the whole text if left out.")),
            ("score_from", with(count(1, 1 << 24), "First scored position of each window.")),
            ("include_token_logprobs", with(flag(), "Also says how likely each token was.")),
        ],
        &[],
    );
    let template = [
        ("messages", with(list(message(), limits.messages), "A conversation.")),
        ("tools", with(list(tool(), limits.tools), "Functions.")),
        ("chat_template_kwargs", with(json!({"type": "object"}), "Variables for the template.")),
        ("add_generation_prompt", with(flag(), "Ends where the model is to answer.")),
    ];
    let mut tokenize = vec![
        model.clone(),
        ("prompt", with(string(), "A text.")),
        ("content", with(string(), "The same by another name.")),
        ("add_special_tokens", with(flag(), "Adds what the model expects around a text.")),
        ("add_special", with(flag(), "The same by another name.")),
        ("parse_special", with(flag(), "Reads special tokens written in the text as tokens.")),
        ("return_token_strs", with(flag(), "Also gives the text of each token.")),
        ("with_pieces", with(flag(), "The same by another name.")),
    ];
    tokenize.extend(template.clone());
    let mut apply = vec![model.clone()];
    apply.extend(template);
    let detokenize = object(&[model, ("tokens", with(token_ids(), "Token ids."))], &["tokens"]);
    let status = as_json(at_least(&[("status", string())]));
    let card = at_least(&[
        ("id", string()),
        ("object", string()),
        ("created", count(0, 1 << 40)),
        ("owned_by", string()),
    ]);
    let cards =
        at_least(&[("object", string()), ("data", json!({"type": "array", "items": card}))]);
    let text = |kind: &str| json!({kind: {"schema": {"type": "string"}}});
    let mut one = operation("One model.", None, as_json(card.clone()));
    one["parameters"] =
        json!([{"name": "id", "in": "path", "required": true, "schema": {"type": "string"}}]);
    let get = |operation: Value| json!({"get": operation});
    let post = |operation: Value| json!({"post": operation});
    json!({
        "openapi": "3.1.0",
        "info": {"title": "Marlin", "version": env!("CARGO_PKG_VERSION"), "description": format!("{FINGERPRINT}: OpenAI-compatible server.")},
        "security": [{}, {"key": []}],
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"AnthropicError": at_least(&[("type", string()), ("error", at_least(&[("type", string()), ("message", string())]))]), "Error": at_least(&[("error", at_least(&[("message", string()), ("type", string()),
                ("param", json!({"type": ["string", "null"]})), ("code", json!({"type": ["string", "null"]}))]))])},
        },
        "paths": {
            "/v1/chat/completions": post(operation("Answers a conversation.", Some(chat(limits)), as_json_or_stream(answers.clone()))),
            "/v1/completions": post(operation("Goes on with a text.", Some(completion(limits)), as_json_or_stream(answers))),
            "/v1/responses": post(operation("OpenAI's responses, text only.", Some(conversations::responses(limits)), as_json_or_stream(at_least(&[("id", string()), ("output", json!({"type": "array"}))])))),
            "/v1/messages": post(of_anthropic(operation("Anthropic's messages, with its errors.", Some(conversations::messages(false, limits)), as_json_or_stream(at_least(&[("id", string()), ("content", json!({"type": "array"}))]))))),
            "/v1/messages/count_tokens": post(of_anthropic(operation("Tokens of such a request.", Some(conversations::messages(true, limits)), as_json(at_least(&[("input_tokens", count(0, 1 << 40))]))))),
            "/v1/embeddings": post(operation("Vectors of texts: pooled hidden states of length 1.", Some(embeddings), as_json(at_least(&[("data", json!({"type": "array"}))])))),
            "/v1/models": get(operation("The models.", None, as_json(cards))),
            "/v1/models/{id}": get(one),
            "/v1/perplexity": post(operation("How well a model predicts a text.", Some(perplexity), as_json(at_least(&[("perplexity", json!({"type": "number"}))])))),
            "/v1/perplexity/stats": get(operation("Statistics of the perplexities asked for.", None, as_json(at_least(&[("samples", count(0, 1 << 40))])))),
            "/tokenize": post(operation("A text, or a conversation in the model's form, to token ids.", Some(object(&tokenize, &[])), as_json(at_least(&[("tokens", json!({"type": "array"}))])))),
            "/detokenize": post(operation("Token ids to text.", Some(detokenize), as_json(at_least(&[("prompt", string())])))),
            "/apply-template": post(operation("A conversation to the text that the model reads.", Some(object(&apply, &["messages"])), as_json(at_least(&[("prompt", string())])))),
            "/metrics": get(operation("Measurements for Prometheus.", None, text("application/openmetrics-text"))),
            "/health": get(operation("Whether the process works.", None, status.clone())),
            "/ready": get(operation("Whether requests are taken.", None, status)),
            "/version": get(operation("Version.", None, as_json(at_least(&[("version", string())])))),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Fields;
    use crate::protocol::messages::MessagesRequest;
    use crate::protocol::responses::ResponsesRequest;
    use crate::protocol::{chat::ChatRequest, completion::CompletionRequest};
    use std::collections::BTreeSet;

    /// Fields that are read only to be refused, or accepted without effect, are not described.
    fn described(path: &str) -> BTreeSet<String> {
        let document = description(&RequestLimits::default());
        let schema = &document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            ["schema"];
        schema["properties"].as_object().unwrap().keys().cloned().collect()
    }

    #[test]
    fn every_described_field_is_read() {
        let mut chat: Map<String, Value> =
            described("/v1/chat/completions").into_iter().map(|k| (k, Value::Null)).collect();
        chat.insert("messages".into(), json!([{"role": "user", "content": "hello"}]));
        assert!(ChatRequest::parse(Fields::of(chat.into(), "").unwrap()).is_ok());
        let mut text: Map<String, Value> =
            described("/v1/completions").into_iter().map(|k| (k, Value::Null)).collect();
        text.insert("prompt".into(), "hello".into());
        assert!(CompletionRequest::parse(Fields::of(text.into(), "").unwrap()).is_ok());
        let nulls = |path: &str| described(path).into_iter().map(|k| (k, Value::Null)).collect();
        let mut responses: Map<String, Value> = nulls("/v1/responses");
        responses.insert("input".into(), "hello".into());
        assert!(ResponsesRequest::parse(Fields::of(responses.into(), "").unwrap()).is_ok());
        let mut messages: Map<String, Value> = nulls("/v1/messages");
        messages.insert("messages".into(), json!([{"role": "user", "content": "hello"}]));
        let counted = messages.clone();
        messages.insert("max_tokens".into(), 5.into());
        assert!(MessagesRequest::parse(Fields::of(messages.into(), "").unwrap()).is_ok());
        assert!(MessagesRequest::parse_for_count(Fields::of(counted.into(), "").unwrap()).is_ok());
    }
}
