//! One answer: tokens in, text out as it comes, with its timings.

use crate::loaded::Session;
use crate::{exit, interrupt};
use anyhow::Result;
use marlin_engine::{Event, FinishReason, Request, SamplingParams};
use marlin_text::{Specials, StreamOptions, TemplateInputs};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The model, or a stop string.
    Stop,
    /// `max_tokens` or the context.
    Length,
    /// Ctrl-C.
    Interrupted,
}

impl Ending {
    /// As the JSON spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Interrupted => "interrupted",
        }
    }
}

/// A finished answer.
#[derive(Debug)]
pub struct Answer {
    /// Text given out.
    pub text: String,
    /// Token ids, without the one that ended the answer.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub ending: Ending,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens the model chose, a final stop token included.
    pub completion_tokens: usize,
    /// From the request to the first token.
    pub prompt_time: Duration,
    /// From the first token to the last.
    pub decode_time: Duration,
}

impl Answer {
    /// Prompt tokens per second.
    pub fn prompt_speed(&self) -> f64 {
        per_second(self.prompt_tokens, self.prompt_time)
    }

    /// Tokens after the first, per second.
    pub fn decode_speed(&self) -> f64 {
        per_second(self.completion_tokens.saturating_sub(1), self.decode_time)
    }

    /// One line for people.
    pub fn stats(&self, device: &str) -> String {
        format!(
            "prompt {} tokens, {:.1} tok/s · answer {} tokens, {:.1} tok/s · first token {:.0} ms · {device}",
            self.prompt_tokens,
            self.prompt_speed(),
            self.completion_tokens,
            self.decode_speed(),
            self.prompt_time.as_secs_f64() * 1e3,
        )
    }

    /// The fields of the JSON contract.
    pub fn json(&self) -> Value {
        json!({
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.ending.name(),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_per_second": self.prompt_speed(),
            "decode_tokens_per_second": self.decode_speed(),
        })
    }
}

fn per_second(tokens: usize, time: Duration) -> f64 {
    let seconds = time.as_secs_f64();
    if tokens == 0 || seconds == 0.0 { 0.0 } else { tokens as f64 / seconds }
}

/// What to continue.
pub struct Prompt {
    /// Token ids.
    pub ids: Vec<u32>,
    /// The answer goes on in the middle of a text.
    pub continues_text: bool,
}

impl Session {
    /// Ids of a raw prompt.
    pub fn raw_prompt(&self, text: &str) -> Result<Prompt> {
        let ids = self.tokenizer.encode(text, Specials::PROMPT)?;
        Ok(Prompt { ids, continues_text: true })
    }

    /// Ids of a conversation; `None` when the model has no chat template.
    pub fn chat_prompt(&self, messages: &[Value]) -> Result<Option<Prompt>> {
        let Some(template) = &self.template else { return Ok(None) };
        let text = template.render(&TemplateInputs::new(messages))?;
        let ids = self.tokenizer.encode(&text, Specials::TEMPLATE)?;
        Ok(Some(Prompt { ids, continues_text: false }))
    }

    /// Generates one answer; `on_text` gets the text as it becomes certain.
    pub fn answer(
        &mut self,
        prompt: &Prompt,
        sampling: SamplingParams,
        max_tokens: Option<usize>,
        stop: &[String],
        on_text: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<Answer> {
        let interrupted = interrupt::begin();
        let answer = self.generate(prompt, sampling, max_tokens, stop, interrupted, on_text);
        interrupt::end();
        answer
    }

    fn generate(
        &mut self,
        prompt: &Prompt,
        sampling: SamplingParams,
        max_tokens: Option<usize>,
        stop: &[String],
        interrupted: &AtomicBool,
        on_text: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<Answer> {
        let mut request = Request::new(prompt.ids.clone(), sampling, self.end_ids.clone());
        request.max_tokens = max_tokens;
        let request = self.engine.limits().validate(request)?;
        let mut stream = self.tokenizer.stream(StreamOptions {
            continues_text: prompt.continues_text,
            stop: stop.to_vec(),
            ..StreamOptions::default()
        });
        let mut answer = Answer {
            text: String::new(),
            tokens: Vec::new(),
            ending: Ending::Stop,
            prompt_tokens: prompt.ids.len(),
            completion_tokens: 0,
            prompt_time: Duration::ZERO,
            decode_time: Duration::ZERO,
        };
        let start = Instant::now();
        let mut first = None;
        let mut stopped = false;
        let id = self.engine.submit(request);
        'steps: loop {
            if interrupted.load(Ordering::SeqCst) {
                self.engine.cancel(id);
            }
            for event in self.engine.step() {
                let now = Instant::now();
                let first = *first.get_or_insert(now);
                answer.prompt_time = first - start;
                answer.decode_time = now - first;
                match event {
                    Event::Token { token, .. } if !stopped => {
                        answer.tokens.push(token);
                        answer.completion_tokens += 1;
                        let emitted = stream.push(token)?;
                        answer.text.push_str(&emitted.text);
                        on_text(&emitted.text)?;
                        if emitted.stopped_by.is_some() {
                            stopped = true;
                            self.engine.cancel(id);
                        }
                    }
                    Event::Token { .. } => {}
                    Event::Finished { reason, usage, .. } => {
                        answer.ending = match reason {
                            _ if stopped => Ending::Stop,
                            FinishReason::Stop(_) | FinishReason::Complete => Ending::Stop,
                            FinishReason::Length => Ending::Length,
                            FinishReason::Cancelled => Ending::Interrupted,
                            FinishReason::Error(error) => return Err(exit::of_engine(&error)),
                        };
                        if !stopped {
                            answer.completion_tokens = usage.completion_tokens;
                        }
                        break 'steps;
                    }
                }
            }
        }
        let rest = stream.finish().text;
        answer.text.push_str(&rest);
        on_text(&rest)?;
        Ok(answer)
    }
}
