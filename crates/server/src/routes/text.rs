//! Requests about texts that are not answered: tokens, vectors, perplexity.

use super::Server;
use super::body::blocking;
use crate::generate::render;
use crate::{ApiError, Fields, trace};
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use marlin_engine::EngineError;
use marlin_engine::evaluate::{Pooling, embed, for_each_logprob};
use marlin_text::Specials;
use serde_json::{Map, Value, json};
use std::sync::Arc;

fn token_ids(fields: &Fields, name: &str, value: &Value) -> Result<Vec<u32>, ApiError> {
    let ids = value.as_array().and_then(|list| crate::fields::token_ids(list));
    ids.ok_or_else(|| fields.wrong(name, "token ids", value))
}

/// A text or its token ids.
enum Input {
    Text(String),
    Tokens(Vec<u32>),
}

/// A request for vectors.
struct Embeddings {
    model: Option<String>,
    inputs: Vec<Input>,
    base64: bool,
    pooling: Option<Pooling>,
    dimensions: Option<u64>,
}

impl Embeddings {
    fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        let model = fields.string("model")?;
        let most = fields.limits().inputs;
        let expected = format!("a string, token ids, or a list of up to {most} of either");
        let missing = || ApiError::invalid("input", "input is missing");
        let value = fields.take("input").ok_or_else(missing)?;
        let one = |value: &Value| match value {
            Value::String(text) => Ok(Input::Text(text.clone())),
            Value::Array(list) if !list.is_empty() => {
                Ok(Input::Tokens(token_ids(&fields, "input", value)?))
            }
            _ => Err(fields.wrong("input", &expected, value)),
        };
        let inputs = match &value {
            Value::Array(list)
                if list.len() <= most && !list.is_empty() && !list[0].is_number() =>
            {
                list.iter().map(one).collect::<Result<Vec<_>, _>>()?
            }
            _ => vec![one(&value)?],
        };
        let base64 = match fields.string("encoding_format")?.as_deref() {
            None | Some("float") => false,
            Some("base64") => true,
            Some(other) => {
                return Err(fields.wrong("encoding_format", "float or base64", &json!(other)));
            }
        };
        let pooling = match fields.string("pooling")?.as_deref() {
            None => None,
            Some("mean") => Some(Pooling::Mean),
            Some("last") => Some(Pooling::Last),
            Some(other) => return Err(fields.wrong("pooling", "mean or last", &json!(other))),
        };
        let dimensions = fields.count("dimensions", 1..=1 << 20)?;
        fields.string("user")?;
        fields.finish()?;
        Ok(Self { model, inputs, base64, pooling, dimensions })
    }
}

/// A request for a perplexity.
struct Perplexity {
    model: Option<String>,
    text: Option<String>,
    tokens: Option<Vec<u32>>,
    window: Option<usize>,
    score_from: Option<usize>,
    with_logprobs: bool,
}

impl Perplexity {
    fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        let model = fields.string("model")?;
        let text = fields.string("text")?;
        let tokens = match fields.take("token_ids") {
            None => None,
            Some(value) => Some(token_ids(&fields, "token_ids", &value)?),
        };
        let window = fields.count("window", 2..=1 << 24)?.map(|n| n as usize);
        let score_from = fields.count("score_from", 1..=1 << 24)?.map(|n| n as usize);
        let with_logprobs = fields.flag("include_token_logprobs")?.unwrap_or(false);
        fields.finish()?;
        Ok(Self { model, text, tokens, window, score_from, with_logprobs })
    }
}

/// A request for token ids.
struct Tokenize {
    model: Option<String>,
    text: Option<String>,
    special: Option<bool>,
    parse: Option<bool>,
    with_texts: bool,
    messages: Option<Messages>,
}

impl Tokenize {
    fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        let model = fields.string("model")?;
        let text = fields.string("prompt")?.or(fields.string("content")?);
        let special = fields.flag("add_special_tokens")?.or(fields.flag("add_special")?);
        let parse = fields.flag("parse_special")?;
        let with_texts =
            fields.flag("return_token_strs")?.or(fields.flag("with_pieces")?).unwrap_or(false);
        let messages = messages(&mut fields)?;
        fields.finish()?;
        Ok(Self { model, text, special, parse, with_texts, messages })
    }
}

fn parse_detokenize(mut fields: Fields) -> Result<(Option<String>, Vec<u32>), ApiError> {
    let model = fields.string("model")?;
    let tokens = fields.take("tokens").ok_or_else(|| fields.missing("tokens"))?;
    let tokens = token_ids(&fields, "tokens", &tokens)?;
    fields.finish()?;
    Ok((model, tokens))
}

fn parse_template(mut fields: Fields) -> Result<(Option<String>, Messages), ApiError> {
    let model = fields.string("model")?;
    let messages = messages(&mut fields)?.ok_or_else(|| fields.missing("messages"))?;
    fields.finish()?;
    Ok((model, messages))
}

/// Reads the fields of a request to one of these paths and forgets them; `None` for another path.
pub(crate) fn read_fields(path: &str, fields: Fields) -> Option<Result<(), ApiError>> {
    Some(match path {
        "/v1/embeddings" => Embeddings::parse(fields).map(drop),
        "/v1/perplexity" => Perplexity::parse(fields).map(drop),
        "/tokenize" => Tokenize::parse(fields).map(drop),
        "/detokenize" => parse_detokenize(fields).map(drop),
        "/apply-template" => parse_template(fields).map(drop),
        _ => return None,
    })
}

/// `POST /v1/embeddings`.
pub(super) async fn embeddings(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let request = Embeddings::parse(server.fields(&headers, body).await?)?;
    let Embeddings { model, inputs, base64, pooling, dimensions } = request;
    let served = server.models.get(model.as_deref()).await?;
    let id = served.id.clone();
    let pooling = served.pooling.choose(pooling);
    let pooling = pooling.map_err(|error| ApiError::of_engine(&error, "pooling"))?;
    let read = server.readers.read(move |go_on| {
        let (mut data, mut tokens) = (Vec::new(), 0);
        for (index, input) in inputs.into_iter().enumerate() {
            go_on()?;
            let ids = match input {
                Input::Text(text) => served.encode(&text, Specials::PROMPT, "input", false)?,
                Input::Tokens(ids) => ids,
            };
            // The cache of a text is its own, and as large as an answer's at most.
            let max_context = served.runtime.limits().max_context;
            if ids.len() > max_context {
                let error = EngineError::TextTooLong { tokens: ids.len(), max_context };
                return Err(ApiError::of_engine(&error, "input"));
            }
            tokens += ids.len();
            let model = served.runtime.model();
            let vector = embed(model.as_ref(), &ids, pooling, &|| go_on().is_ok());
            let vector = vector.map_err(|error| ApiError::of_engine(&error, "input"))?;
            if dimensions.is_some_and(|wanted| wanted as usize != vector.len()) {
                let message = format!("dimensions: this model's vectors have {}", vector.len());
                return Err(ApiError::unsupported("dimensions", message));
            }
            let embedding = match base64 {
                false => json!(vector),
                true => json!(to_base64(&vector)),
            };
            data.push(json!({"object": "embedding", "index": index, "embedding": embedding}));
        }
        Ok((data, tokens))
    });
    let (data, tokens) = read.await?;
    if let Some(span) = trace::current() {
        span.read(&id, tokens);
    }
    let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    Ok(Json(json!({"object": "list", "data": data, "model": id, "usage": usage})))
}

/// Little-endian floats in base 64 (RFC 4648), as OpenAI's clients read them.
fn to_base64(vector: &[f32]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = vector.iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let word = three.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte))
            << (8 * (3 - three.len()));
        for i in 0..4 {
            match i <= three.len() {
                true => text.push(char::from(DIGITS[(word >> (18 - 6 * i)) as usize & 63])),
                false => text.push('='),
            }
        }
    }
    text
}

/// `POST /v1/perplexity`.
pub(super) async fn perplexity(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let request = Perplexity::parse(server.fields(&headers, body).await?)?;
    let Perplexity { model, text, tokens, window, score_from, with_logprobs } = request;
    let served = server.models.get(model.as_deref()).await?;
    let read = server.readers.read(move |go_on| {
        let tokens = match (text, tokens) {
            (Some(text), None) => served.encode(&text, Specials::NONE, "text", false)?,
            (None, Some(tokens)) => tokens,
            _ => return Err(ApiError::invalid("text", "give text or token_ids, one of them")),
        };
        let context = served.runtime.limits().max_context;
        // One window by default: the whole text.
        let window = window.unwrap_or(tokens.len());
        let from = score_from.unwrap_or(1);
        if tokens.len() < 2 {
            let message = format!("a text of {} tokens has nothing to score; two are needed", tokens.len());
            return Err(ApiError::invalid("text", message));
        }
        if window > context || tokens.len() > 64 * context {
            let message = format!(
                "the text has {} tokens, the window {window}, the context holds {context}; give a smaller window or text",
                tokens.len()
            );
            return Err(ApiError {
                code: Some("context_length_exceeded"),
                ..ApiError::invalid("window", message)
            });
        }
        if from >= window || window > tokens.len() {
            let message = format!(
                "expected score_from < window <= the text's tokens, found {from}, {window}, {}",
                tokens.len()
            );
            return Err(ApiError::invalid("window", message));
        }
        let windows = tokens.len() / window;
        let mut logprobs = Vec::new();
        for tokens in tokens.chunks_exact(window) {
            go_on()?;
            let mut each = |logprob: f64| logprobs.push(logprob);
            let model = served.runtime.model().as_ref();
            for_each_logprob(model, tokens, from, &mut each, &|| go_on().is_ok())
                .map_err(|error| ApiError::of_engine(&error, "text"))?;
        }
        let nll = -logprobs.iter().sum::<f64>() / logprobs.len() as f64;
        let perplexity = nll.exp();
        let scored = logprobs.len() as u64;
        let mut body = json!({
            "perplexity": perplexity, "nll": nll, "tokens": scored, "windows": windows,
            "model": served.id,
        });
        if with_logprobs {
            body["token_logprobs"] = json!(logprobs);
        }
        Ok((body, perplexity, scored))
    });
    let (body, perplexity, scored) = read.await?;
    server.metrics.scored(perplexity, scored);
    if let Some(span) = trace::current() {
        span.read(body["model"].as_str().unwrap_or_default(), scored as usize);
    }
    Ok(Json(body))
}

/// `GET /v1/perplexity/stats`.
pub(super) async fn perplexity_stats(State(server): State<Arc<Server>>) -> Json<Value> {
    Json(json!(server.metrics.perplexity_stats()))
}

/// `POST /tokenize`: a text, or messages in the model's form, to ids.
pub(super) async fn tokenize(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let request = Tokenize::parse(server.fields(&headers, body).await?)?;
    let Tokenize { model, text, special, parse, with_texts, messages } = request;
    let served = server.models.get(model.as_deref()).await?;
    let body = blocking(move || {
        let ids = match (text, messages) {
            (Some(text), None) => {
                let specials =
                    Specials { add: special.unwrap_or(true), parse: parse.unwrap_or(true) };
                served.encode(&text, specials, "prompt", false)?
            }
            (None, Some((messages, tools, extra))) => {
                let text = render(&served, &messages, &tools, &extra)?;
                served.encode(&text, Specials::TEMPLATE, "messages", false)?
            }
            _ => return Err(ApiError::invalid("prompt", "give prompt or messages, one of them")),
        };
        let context = served.runtime.limits().max_context;
        let mut body = json!({"count": ids.len(), "max_model_len": context, "tokens": ids});
        if with_texts {
            let text = |id: &u32| crate::protocol::token_text(&served.tokenizer, *id, 0.0).token;
            body["token_strs"] = ids.iter().map(text).collect();
        }
        Ok(body)
    });
    Ok(Json(body.await?))
}

/// Messages, tools and further variables of a template.
type Messages = (Vec<Value>, Vec<Value>, Map<String, Value>);

fn messages(fields: &mut Fields) -> Result<Option<Messages>, ApiError> {
    let tools = fields.list("tools", fields.limits().tools)?.unwrap_or_default();
    let mut extra = match fields.take("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(fields.wrong("chat_template_kwargs", "an object", &other)),
    };
    if let Some(prompt) = fields.flag("add_generation_prompt")? {
        extra.insert("add_generation_prompt".into(), prompt.into());
    }
    let Some(list) = fields.list("messages", fields.limits().messages)? else { return Ok(None) };
    if list.is_empty() {
        return Err(ApiError::invalid("messages", "messages: expected at least one"));
    }
    let message = |(i, value)| crate::protocol::chat::message(value, &format!("messages[{i}]"));
    let list = list.into_iter().enumerate().map(message).collect::<Result<_, _>>()?;
    crate::protocol::tools::parse_tools(&tools, fields.limits())?;
    Ok(Some((list, tools, extra)))
}

/// `POST /detokenize`: ids to text.
pub(super) async fn detokenize(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let (model, tokens) = parse_detokenize(server.fields(&headers, body).await?)?;
    let served = server.models.get(model.as_deref()).await?;
    let text = blocking(move || crate::protocol::detokenize(&served.tokenizer, &tokens)).await?;
    Ok(Json(json!({"prompt": text, "content": text})))
}

/// `POST /apply-template`: messages to the text that the model reads.
pub(super) async fn apply_template(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let (model, (messages, tools, extra)) = parse_template(server.fields(&headers, body).await?)?;
    let served = server.models.get(model.as_deref()).await?;
    let prompt = blocking(move || render(&served, &messages, &tools, &extra)).await?;
    Ok(Json(json!({"prompt": prompt})))
}

#[cfg(test)]
mod tests {
    #[test]
    fn vectors_in_base_64() {
        assert_eq!(super::to_base64(&[]), "");
        // Python: base64.b64encode(struct.pack("<1f", 1.0)), and of 1.0, -2.5, 1e-3.
        assert_eq!(super::to_base64(&[1.0]), "AACAPw==");
        assert_eq!(super::to_base64(&[1.0, -2.5, 1e-3]), "AACAPwAAIMBvEoM6");
    }
}
