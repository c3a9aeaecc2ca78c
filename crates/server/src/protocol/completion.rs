//! OpenAI's completions: text goes on.

use super::chat::{Wants, grammar, harmless};
use super::{Encoder, Spent, event, finish_reason, new_id, now, token_text};
use crate::ApiError;
use crate::answer::{Delta, Finish, Piece, TokenChance, Whole};
use crate::fields::{Fields, token_ids};
use crate::generate::{Choosing, Generate, Prompt};
use crate::models::Served;
use marlin_text::ToolSet;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// A parsed request.
pub struct CompletionRequest {
    /// Model named.
    pub model: Option<String>,
    /// One for every prompt.
    pub generate: Vec<Generate>,
    /// Answers to every prompt.
    pub n: usize,
    /// Answers begin with their prompt.
    pub echo: bool,
    /// Tokens are reported with how likely they were.
    pub logprobs: bool,
    /// Beside the answer.
    pub wants: Wants,
}

impl CompletionRequest {
    /// Reads a body.
    ///
    /// # Errors
    /// Names the first field that is wrong, unknown, or not supported.
    pub fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        let model = fields.string("model")?;
        let prompts = prompts(&mut fields)?;
        let stream = fields.flag("stream")?.unwrap_or(false);
        let mut usage = false;
        if let Some(mut options) = fields.object("stream_options")? {
            if !stream {
                let message = "stream_options: only with stream: true";
                return Err(ApiError::invalid("stream_options", message));
            }
            usage = options.flag("include_usage")?.unwrap_or(false);
            options.refuse("include_obfuscation", &[], "chunks have no padding")?;
            options.finish()?;
        }
        let mut choosing = Choosing::read(&mut fields)?;
        // OpenAI's default.
        choosing.max_tokens = Some(fields.count("max_tokens", 1..=1 << 32)?.unwrap_or(16) as usize);
        let most = fields.limits().top_logprobs as u64;
        choosing.logprobs = fields.count("logprobs", 0..=most)?.map(|top| top as usize);
        let echo = fields.flag("echo")?.unwrap_or(false);
        if echo && choosing.logprobs.is_some() {
            let message =
                "echo with logprobs is not supported: prompts are not scored; use /v1/perplexity";
            return Err(ApiError::unsupported("echo", message));
        }
        if let Some(best_of) = fields.count("best_of", 1..=1 << 20)?
            && best_of as usize != choosing.n
        {
            let message = "best_of other than n is not supported";
            return Err(ApiError::unsupported("best_of", message));
        }
        fields.refuse("suffix", &[json!("")], "text goes on at its end only")?;
        let shape = grammar(&mut fields)?;
        harmless(&mut fields)?;
        fields.finish()?;
        let (n, logprobs) = (choosing.n, choosing.logprobs.is_some());
        let generate = prompts.into_iter().map(|prompt| Generate {
            prompt,
            choosing: choosing.clone(),
            tools: ToolSet::None,
            shape: shape.clone(),
            prompt_field: "prompt",
            schema_field: "response_format",
            stream,
            one_call: false,
        });
        let wants = Wants { stream, usage };
        Ok(Self { model, generate: generate.collect(), n, echo, logprobs, wants })
    }
}

fn prompts(fields: &mut Fields) -> Result<Vec<Prompt>, ApiError> {
    let missing = || ApiError::invalid("prompt", "prompt is missing");
    let value = fields.take("prompt").ok_or_else(missing)?;
    let most = fields.limits().prompts;
    let expected = format!("a string, token ids, or a list of up to {most} of either");
    let wrong = || fields.wrong("prompt", &expected, &value);
    let list = match &value {
        Value::String(text) => return Ok(vec![Prompt::Text(text.clone())]),
        Value::Array(list) if !list.is_empty() => list,
        _ => return Err(wrong()),
    };
    if let Some(ids) = token_ids(list) {
        return Ok(vec![Prompt::Tokens(ids)]);
    }
    if list.len() > most {
        return Err(wrong());
    }
    let prompt = |value: &Value| match value {
        Value::String(text) => Ok(Prompt::Text(text.clone())),
        Value::Array(ids) => token_ids(ids).map(Prompt::Tokens).ok_or_else(wrong),
        _ => Err(wrong()),
    };
    list.iter().map(prompt).collect()
}

fn logprobs(served: &Served, chances: &[TokenChance], offset: &mut usize) -> Value {
    let (mut texts, mut own, mut top, mut offsets) = (vec![], vec![], vec![], vec![]);
    for chance in chances {
        let text = token_text(&served.tokenizer, chance.token, chance.logprob);
        let likeliest = chance.top.iter().map(|&(token, logprob)| {
            let text = token_text(&served.tokenizer, token, logprob);
            (text.token, text.logprob.into())
        });
        top.push(likeliest.collect::<Map<String, Value>>());
        offsets.push(*offset);
        *offset += text.token.chars().count();
        own.push(text.logprob);
        texts.push(text.token);
    }
    json!({"tokens": texts, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets})
}

/// The response to a request whose answers are whole; `echoes` are the prompts, where they are wanted.
pub fn response(served: &Served, answers: &[(String, Vec<Whole>)], with_logprobs: bool) -> Value {
    let mut total = Spent::default();
    let mut choices = Vec::new();
    for (echo, answers) in answers {
        let mut spent = Spent::default();
        for answer in answers {
            let text = format!("{echo}{}", answer.content);
            let mut reason = None;
            if let Some((finish, usage)) = &answer.finish {
                spent.add(usage);
                reason = Some(finish_reason(finish));
            }
            let mut offset = echo.chars().count();
            let chances = with_logprobs.then(|| logprobs(served, &answer.chances, &mut offset));
            choices.push(json!({"index": choices.len(), "text": text, "logprobs": chances,
                "finish_reason": reason}));
        }
        total.prompt += spent.prompt;
        total.cached += spent.cached;
        total.completion += spent.completion;
    }
    json!({
        "id": new_id("cmpl-"),
        "object": "text_completion",
        "created": now(),
        "model": served.id,
        "choices": choices,
        "usage": total.json(),
        "system_fingerprint": crate::FINGERPRINT,
    })
}

/// Writes a stream of chunks.
pub struct Stream {
    id: String,
    created: u64,
    served: Arc<Served>,
    usage: bool,
    logprobs: bool,
    /// What each answer begins with, and where its next token stands.
    answers: Vec<(String, usize)>,
    spent: Spent,
}

impl Stream {
    /// Of `n` answers to one prompt, which each of them repeats if `echo` is not empty.
    pub fn new(served: Arc<Served>, n: usize, echo: String, usage: bool, logprobs: bool) -> Self {
        let (id, created) = (new_id("cmpl-"), now());
        let offset = echo.chars().count();
        let answers = vec![(echo, offset); n];
        Self { id, created, served, usage, logprobs, answers, spent: Spent::default() }
    }

    fn chunk(&self, choices: Value, usage: Option<Value>, out: &mut Vec<u8>) {
        let mut chunk = json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.served.id,
            "system_fingerprint": crate::FINGERPRINT,
            "choices": choices,
        });
        if self.usage {
            chunk["usage"] = usage.unwrap_or_default();
        }
        event(out, &chunk);
    }
}

impl Encoder for Stream {
    fn begin(&mut self, _: &mut Vec<u8>) {}

    fn piece(&mut self, piece: Piece, out: &mut Vec<u8>) {
        let index = piece.choice;
        let mut text = std::mem::take(&mut self.answers[index].0);
        for delta in piece.deltas {
            if let Delta::Content(more) = delta {
                text.push_str(&more);
            }
        }
        let chances = (self.logprobs && !piece.chances.is_empty()).then(|| {
            let offset = &mut self.answers[index].1;
            logprobs(&self.served, &piece.chances, offset)
        });
        let mut reason = None;
        match piece.finish {
            None => {}
            Some((Finish::Failed(error), _)) => return event(out, &json!({"error": error.body()})),
            Some((finish, usage)) => {
                self.spent.add(&usage);
                reason = Some(finish_reason(&finish));
            }
        }
        if !text.is_empty() || chances.is_some() || reason.is_some() {
            let choice = json!([{"index": index, "text": text, "logprobs": chances, "finish_reason": reason}]);
            self.chunk(choice, None, out);
        }
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        if self.usage {
            self.chunk(json!([]), Some(self.spent.json()), out);
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }
}
