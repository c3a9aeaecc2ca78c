//! The protocols: each reads its requests and writes its answers, whole or streamed.

pub mod chat;
pub mod completion;
pub mod messages;
pub mod responses;
#[cfg(test)]
mod tests;
pub mod tools;
mod turns;

use crate::ApiError;
use crate::answer::{Answers, Finish, TokenChance};
use marlin_engine::Usage;
use marlin_text::{StreamOptions, Tokenizer};
use serde::Serialize;
use serde_json::{Value, json};
use std::time::{SystemTime, UNIX_EPOCH};

/// A new name such as `chatcmpl-` and 24 random digits.
pub fn new_id(prefix: &str) -> String {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut id = String::with_capacity(prefix.len() + 24);
    id.push_str(prefix);
    let mut random: u128 = rand::random();
    for _ in 0..24 {
        id.push(char::from(DIGITS[(random % 36) as usize]));
        random /= 36;
    }
    id
}

/// Unix seconds.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// What OpenAI's protocols say of a prompt and its answers.
#[derive(Debug, Clone, Copy, Default)]
pub struct Spent {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Those of it that had been computed before.
    pub cached: usize,
    /// Tokens of all answers.
    pub completion: usize,
    /// Tokens of reasoning among them.
    pub reasoning: usize,
}

impl Spent {
    /// Adds what an answer took.
    pub fn add(&mut self, usage: &Usage) {
        self.prompt = self.prompt.max(usage.prompt_tokens);
        self.cached = self.cached.max(usage.cached_tokens);
        self.completion += usage.completion_tokens;
    }

    /// OpenAI's `usage`.
    pub fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning, "audio_tokens": 0,
                "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0,
            },
        })
    }
}

/// OpenAI's word for why an answer ended.
pub fn finish_reason(finish: &Finish) -> &'static str {
    match finish {
        Finish::Stop { .. } => "stop",
        Finish::Length => "length",
        Finish::ToolCalls => "tool_calls",
        Finish::Failed(_) => "error",
    }
}

/// A token as text and bytes.
#[derive(Debug, Clone, Serialize)]
pub struct TokenText {
    /// Text; bytes that are no character are replaced.
    pub token: String,
    /// Logarithm of its probability.
    pub logprob: f32,
    /// Bytes.
    pub bytes: Vec<u8>,
}

/// The text of `token`, special ones included.
pub fn token_text(tokenizer: &Tokenizer, token: u32, logprob: f32) -> TokenText {
    let bytes = tokenizer.token_bytes(token).unwrap_or_default().to_vec();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    // JSON has no infinity.
    TokenText { token: text, logprob: logprob.max(-9999.0), bytes }
}

/// OpenAI's `logprobs` of a chat answer.
pub fn chat_logprobs(tokenizer: &Tokenizer, chances: &[TokenChance]) -> Value {
    let entry = |chance: &TokenChance| {
        let top = chance.top.iter().map(|&(token, logprob)| token_text(tokenizer, token, logprob));
        let mut entry = json!(token_text(tokenizer, chance.token, chance.logprob));
        entry["top_logprobs"] = json!(top.collect::<Vec<_>>());
        entry
    };
    json!({"content": chances.iter().map(entry).collect::<Vec<_>>(), "refusal": null})
}

/// Text of tokens, special ones included.
pub fn detokenize(tokenizer: &Tokenizer, tokens: &[u32]) -> Result<String, ApiError> {
    let options =
        StreamOptions { show_special: true, continues_text: true, ..StreamOptions::default() };
    tokenizer.decode_with(tokens, options).map_err(|e| ApiError::invalid("tokens", e.to_string()))
}

/// How a protocol writes a stream: pieces of answers to server-sent events.
pub trait Encoder: Send + 'static {
    /// What comes before everything else.
    fn begin(&mut self, out: &mut Vec<u8>);
    /// A piece.
    fn piece(&mut self, piece: crate::answer::Piece, out: &mut Vec<u8>);
    /// What comes after everything else.
    fn end(&mut self, out: &mut Vec<u8>);
}

/// Answers and how they are written.
pub struct Streaming {
    /// The answers.
    pub answers: Answers,
    /// How.
    pub encoder: Box<dyn Encoder>,
}

/// Appends an event with `data`.
pub fn event(out: &mut Vec<u8>, data: &impl Serialize) {
    out.extend_from_slice(b"data: ");
    // Writing to memory what serializes does not fail.
    let _ = serde_json::to_writer(&mut *out, data);
    out.extend_from_slice(b"\n\n");
}

/// Appends a named event with `data`.
pub fn named_event(out: &mut Vec<u8>, name: &str, data: &impl Serialize) {
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(name.as_bytes());
    out.push(b'\n');
    event(out, data);
}

/// Reads the body of a request to `path` and forgets it: what clients may send, without a server.
///
/// # Errors
/// When it is refused.
pub fn read_body(path: &str, body: &[u8]) -> Result<(), ApiError> {
    let fields = crate::Fields::parse(body)?;
    match path {
        "/v1/chat/completions" => chat::ChatRequest::parse(fields).map(drop),
        "/v1/completions" => completion::CompletionRequest::parse(fields).map(drop),
        "/v1/responses" => responses::ResponsesRequest::parse(fields).map(drop),
        "/v1/messages" => messages::MessagesRequest::parse(fields).map(drop),
        "/v1/messages/count_tokens" => messages::MessagesRequest::parse_for_count(fields).map(drop),
        _ => crate::routes::read_fields(path, fields)
            .unwrap_or_else(|| Err(ApiError::not_found("no such path"))),
    }
}
