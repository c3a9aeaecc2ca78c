//! One request's answer: what its events say, when they came, and whether any is lost or out of order.

use serde::Deserialize;
use serde_json::Value;
use std::fmt;
use std::time::{Duration, Instant};

/// Bytes kept of a message about a failure.
const LONGEST_MESSAGE: usize = 240;

/// Why a request counts as failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault(pub String);

impl<E: std::error::Error> From<E> for Fault {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn fault(text: impl Into<String>) -> Fault {
    Fault(text.into())
}

/// What the server counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Usage {
    /// Tokens read.
    #[serde(default)]
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
}

/// An event of a stream, or an answer that is none; of both endpoints.
#[derive(Debug, Deserialize)]
struct Wire {
    id: Option<String>,
    choices: Option<Vec<Choice>>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    #[serde(default)]
    index: u64,
    delta: Option<Message>,
    message: Option<Message>,
    text: Option<String>,
    finish_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Message {
    content: Option<String>,
    /// Some servers call it `reasoning`.
    #[serde(alias = "reasoning")]
    reasoning_content: Option<String>,
}

/// What came of a request.
#[derive(Debug)]
pub struct Answer {
    sent: Instant,
    last: Option<Instant>,
    id: Option<String>,
    /// From sending to the first text.
    pub ttft: Option<Duration>,
    /// Between events with text.
    pub gaps: Vec<Duration>,
    /// From sending to the end.
    pub total: Option<Duration>,
    /// Events, and those with text.
    pub events: u64,
    /// Events with text.
    pub text_events: u64,
    /// All text, reasoning included.
    pub text: String,
    /// The last that was told.
    pub usage: Option<Usage>,
    /// Why the answer ended.
    pub finish_reason: Option<String>,
    done: bool,
    /// Why it counts as failed.
    pub fault: Option<Fault>,
}

impl Answer {
    /// To a request that is sent now.
    pub fn new(sent: Instant) -> Self {
        Self {
            sent,
            last: None,
            id: None,
            ttft: None,
            gaps: Vec::new(),
            total: None,
            events: 0,
            text_events: 0,
            text: String::new(),
            usage: None,
            finish_reason: None,
            done: false,
            fault: None,
        }
    }

    /// Tokens generated: as the server says, else as many as there were events with text.
    pub fn tokens(&self) -> u64 {
        self.usage.map_or(self.text_events, |usage| usage.completion_tokens)
    }

    /// Time per token after the first.
    pub fn tpot(&self) -> Option<Duration> {
        let later = u32::try_from(self.tokens()).ok()?.checked_sub(1).filter(|&n| n > 0)?;
        let span = self.last?.checked_duration_since(self.sent)?.checked_sub(self.ttft?)?;
        Some(span / later)
    }

    /// An event of the stream, come at `now`.
    ///
    /// # Errors
    /// One that the server calls an error, or that cannot stand here.
    pub fn event(&mut self, data: &[u8], now: Instant) -> Result<(), Fault> {
        self.events += 1;
        if self.done {
            return Err(fault("an event after [DONE]"));
        }
        if data == b"[DONE]" {
            self.done = true;
            return Ok(());
        }
        self.wire(data, now, false)
    }

    /// The body of an answer that was not streamed.
    ///
    /// # Errors
    /// One that is no answer.
    pub fn whole(&mut self, body: &[u8], now: Instant) -> Result<(), Fault> {
        self.done = true;
        self.wire(body, now, true)
    }

    fn wire(&mut self, data: &[u8], now: Instant, whole: bool) -> Result<(), Fault> {
        let wire: Wire = serde_json::from_slice(data)
            .map_err(|error| fault(format!("{error} in {}", shortened(data))))?;
        if let Some(error) = wire.error {
            return Err(fault(message(&error)));
        }
        if let Some(id) = wire.id {
            match &self.id {
                Some(own) if *own != id => {
                    return Err(fault(
                        "an event of another answer: its id is not that of the first",
                    ));
                }
                Some(_) => {}
                None => self.id = Some(id),
            }
        }
        self.usage = wire.usage.or(self.usage);
        let choices = wire.choices.unwrap_or_default();
        let mut with_text = false;
        for choice in choices {
            if choice.index != 0 {
                return Err(fault(format!(
                    "choice {}, though only one was asked for",
                    choice.index
                )));
            }
            let (reasoning, content) = match if whole { choice.message } else { choice.delta } {
                Some(message) => (message.reasoning_content, message.content),
                None => (None, choice.text),
            };
            for text in [reasoning, content].into_iter().flatten().filter(|text| !text.is_empty()) {
                if self.finish_reason.is_some() {
                    return Err(fault("text after finish_reason"));
                }
                self.text.push_str(&text);
                with_text = true;
            }
            if let Some(reason) = choice.finish_reason
                && let Some(earlier) = self.finish_reason.replace(reason)
            {
                return Err(fault(format!("a second finish_reason, after {earlier}")));
            }
        }
        if with_text {
            self.text_events += 1;
            match self.last {
                None => self.ttft = Some(now - self.sent),
                Some(last) => self.gaps.push(now - last),
            }
            self.last = Some(now);
        }
        Ok(())
    }

    /// The response is whole.
    ///
    /// # Errors
    /// An answer that has no text, no reason to end or no `[DONE]`.
    pub fn end(&mut self, now: Instant) -> Result<(), Fault> {
        self.total = Some(now - self.sent);
        let missing = [
            (self.text_events == 0, "text"),
            (self.finish_reason.is_none(), "a finish_reason"),
            (!self.done, "[DONE]"),
        ];
        match missing.iter().find(|(missing, _)| *missing) {
            Some((_, what)) => Err(fault(format!("the answer ended without {what}"))),
            None => Ok(()),
        }
    }
}

/// What an error response says: OpenAI's shape, or the text.
pub fn refusal(status: u16, body: &[u8]) -> Fault {
    let parsed: Option<Value> = serde_json::from_slice(body).ok();
    let said = parsed.as_ref().map(|body| message(body.get("error").unwrap_or(body)));
    fault(format!("HTTP {status}: {}", said.unwrap_or_else(|| shortened(body))))
}

fn message(error: &Value) -> String {
    let text = error.get("message").unwrap_or(error);
    shortened(text.as_str().map_or_else(|| text.to_string(), str::to_owned).as_bytes())
}

fn shortened(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(LONGEST_MESSAGE)]).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of these events, and the end after them.
    fn answer(events: &[&str]) -> Result<Answer, Fault> {
        let mut answer = Answer::new(Instant::now());
        for event in events {
            answer.event(event.as_bytes(), Instant::now())?;
        }
        answer.end(Instant::now())?;
        Ok(answer)
    }

    const ROLE: &str = r#"{"id":"a","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#;
    const TEXT: &str = r#"{"id":"a","choices":[{"index":0,"delta":{"content":"x"}}]}"#;
    const THOUGHT: &str =
        r#"{"id":"a","choices":[{"index":0,"delta":{"reasoning_content":"t","content":null}}]}"#;
    const END: &str = r#"{"id":"a","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#;
    const USAGE: &str = r#"{"id":"a","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}"#;
    const DONE: &str = "[DONE]";

    #[test]
    fn a_whole_stream_is_counted() {
        let found = answer(&[ROLE, THOUGHT, TEXT, END, USAGE, DONE]).unwrap();
        assert_eq!(
            (found.text.as_str(), found.events, found.text_events, found.tokens()),
            ("tx", 6, 2, 2)
        );
        assert_eq!((found.gaps.len(), found.finish_reason.as_deref()), (1, Some("stop")));
        assert_eq!(found.usage, Some(Usage { prompt_tokens: 3, completion_tokens: 2 }));
        assert!(found.tpot().unwrap() <= found.total.unwrap());
        let completion = r#"{"choices":[{"text":"y","index":0,"finish_reason":"length"}]}"#;
        assert_eq!(answer(&[completion, DONE]).unwrap().text, "y");
    }

    #[test]
    fn what_is_lost_or_out_of_order_is_told() {
        let other = TEXT.replace(r#""a""#, r#""b""#);
        let second = TEXT.replace(r#""index":0"#, r#""index":2"#);
        let rows: &[(&[&str], &str)] = &[
            (&[ROLE, TEXT, END], "without [DONE]"),
            (&[ROLE, TEXT, DONE], "without a finish_reason"),
            (&[ROLE, END, DONE], "without text"),
            (&[ROLE, TEXT, END, TEXT, DONE], "text after finish_reason"),
            (&[ROLE, TEXT, END, END, DONE], "second finish_reason, after stop"),
            (&[ROLE, TEXT, END, DONE, USAGE], "after [DONE]"),
            (&[ROLE, TEXT, &other, END, DONE], "another answer"),
            (&[ROLE, TEXT, &second, END, DONE], "choice 2"),
            (&[ROLE, r#"{"choices": ["#], "EOF"),
            (&[ROLE, r#"{"error": {"message": "out of blocks", "code": 500}}"#], "out of blocks"),
        ];
        for (events, words) in rows {
            let said = answer(events).unwrap_err().0;
            assert!(said.contains(words), "{words}: {said}");
        }
    }

    #[test]
    fn refusals_are_told_in_the_servers_words() {
        let said = |body: &str| refusal(429, body.as_bytes()).0;
        assert_eq!(
            said(r#"{"error":{"message":"queue is full","type":"x"}}"#),
            "HTTP 429: queue is full"
        );
        assert_eq!(said(r#"{"detail":"no"}"#), r#"HTTP 429: {"detail":"no"}"#);
        assert_eq!(said(" <html>\n"), "HTTP 429: <html>");
    }
}
