//! A response as a stream of events.

use super::super::{Encoder, Spent, named_event};
use super::{Echo, Head, Item, Kind, error_code, tokens};
use crate::answer::{Delta, Finish, Piece, Tally};
use crate::models::Served;
use marlin_text::Tokenizer;
use serde_json::{Value, json};
use std::sync::Arc;

/// Writes a stream of events.
pub struct Stream {
    head: Head,
    /// Present when tokens are given out.
    tokenizer: Option<Arc<Tokenizer>>,
    sequence: u64,
    open: Option<Item>,
    /// Items that have ended.
    output: Vec<Value>,
    tally: Tally,
}

impl Stream {
    /// Of the answer to the request that `echo` is from.
    pub fn new(served: &Served, echo: Echo) -> Self {
        let tokenizer = echo.logprobs.then(|| served.tokenizer.clone());
        Self::of(&served.id, tokenizer, echo)
    }

    pub(super) fn of(model: &str, tokenizer: Option<Arc<Tokenizer>>, echo: Echo) -> Self {
        let (output, tally) = Default::default();
        Self { head: Head::new(model, echo), tokenizer, sequence: 0, open: None, output, tally }
    }

    fn event(&mut self, name: &str, mut data: Value, out: &mut Vec<u8>) {
        data["type"] = name.into();
        data["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        named_event(out, name, &data);
    }

    fn delta(&mut self, delta: Delta, logprobs: Vec<Value>, out: &mut Vec<u8>) {
        match delta {
            Delta::Reasoning(text) => {
                self.begin_item(Kind::Reasoning, out);
                self.append(
                    text,
                    "response.reasoning_text.delta",
                    json!({"content_index": 0}),
                    out,
                );
            }
            Delta::Content(text) => {
                self.begin_item(Kind::Message, out);
                let data = json!({"content_index": 0, "logprobs": logprobs});
                if let Some(item) = &mut self.open {
                    item.logprobs.extend(logprobs);
                }
                self.append(text, "response.output_text.delta", data, out);
            }
            Delta::Call { index, .. } | Delta::Arguments { index, .. }
                if !self.head.gives_out(index) => {}
            Delta::Call { index, name } => self.begin_item(Kind::call(index, &name), out),
            Delta::Arguments { index, text } => {
                // What belongs to a call that has ended cannot be written any more.
                if matches!(&self.open, Some(Item { kind: Kind::Call { index: open, .. }, .. }) if *open == index)
                {
                    self.append(text, "response.function_call_arguments.delta", json!({}), out);
                }
            }
        }
    }

    /// Adds `text` to the item that is open.
    fn append(&mut self, text: String, name: &str, mut data: Value, out: &mut Vec<u8>) {
        let Some(item) = &mut self.open else { return };
        item.text.push_str(&text);
        data["item_id"] = item.id.as_str().into();
        data["output_index"] = self.output.len().into();
        data["delta"] = text.into();
        self.event(name, data, out);
    }

    fn begin_item(&mut self, kind: Kind, out: &mut Vec<u8>) {
        if self.open.as_ref().is_some_and(|item| item.kind == kind) {
            return;
        }
        self.end_item("completed", out);
        let item = Item::new(kind, String::new());
        let index = self.output.len();
        let data = json!({"output_index": index, "item": item.json("in_progress")});
        self.event("response.output_item.added", data, out);
        if let Some(part) = item.part() {
            let data = json!({
                "item_id": item.id, "output_index": index, "content_index": 0, "part": part,
            });
            self.event("response.content_part.added", data, out);
        }
        self.open = Some(item);
    }

    fn end_item(&mut self, status: &str, out: &mut Vec<u8>) {
        let Some(item) = self.open.take() else { return };
        let index = self.output.len();
        let mut done = json!({"item_id": item.id, "output_index": index});
        let name = match &item.kind {
            Kind::Reasoning => {
                done["text"] = item.text.as_str().into();
                "response.reasoning_text.done"
            }
            Kind::Message => {
                done["text"] = item.text.as_str().into();
                done["logprobs"] = item.logprobs.clone().into();
                "response.output_text.done"
            }
            Kind::Call { name, .. } => {
                done["name"] = name.as_str().into();
                done["arguments"] = item.text.as_str().into();
                "response.function_call_arguments.done"
            }
        };
        let part = item.part();
        if part.is_some() {
            done["content_index"] = 0.into();
        }
        self.event(name, done, out);
        if let Some(part) = part {
            let data = json!({
                "item_id": item.id, "output_index": index, "content_index": 0, "part": part,
            });
            self.event("response.content_part.done", data, out);
        }
        let item = item.json(status);
        let data = json!({"output_index": index, "item": item});
        self.output.push(item);
        self.event("response.output_item.done", data, out);
    }
}

impl Encoder for Stream {
    fn begin(&mut self, out: &mut Vec<u8>) {
        for name in ["response.created", "response.in_progress"] {
            let response = self.head.json(None, Vec::new(), None);
            self.event(name, json!({"response": response}), out);
        }
    }

    fn piece(&mut self, piece: Piece, out: &mut Vec<u8>) {
        self.tally.take(&piece);
        let mut logprobs = Vec::new();
        if let Some(tokenizer) = &self.tokenizer
            && piece.deltas.iter().any(|delta| matches!(delta, Delta::Content(_)))
        {
            logprobs = tokens(tokenizer, &std::mem::take(&mut self.tally.content));
        }
        for delta in piece.deltas {
            let logprobs = match delta {
                Delta::Content(_) => std::mem::take(&mut logprobs),
                _ => Vec::new(),
            };
            self.delta(delta, logprobs, out);
        }
        let Some((finish, usage)) = piece.finish else { return };
        let (status, name) = match &finish {
            Finish::Stop { .. } | Finish::ToolCalls => ("completed", "response.completed"),
            Finish::Length => ("incomplete", "response.incomplete"),
            Finish::Failed(_) => ("incomplete", "response.failed"),
        };
        self.end_item(status, out);
        if let Finish::Failed(error) = &finish {
            // OpenAI's libraries raise what has an `error`; others read the fields beside it.
            let data = json!({
                "code": error_code(error), "message": error.message, "param": error.param,
                "error": error.body(),
            });
            self.event("error", data, out);
        }
        let spent = (name != "response.failed").then(|| {
            let mut spent = Spent { reasoning: self.tally.reasoning, ..Spent::default() };
            spent.add(&usage);
            spent
        });
        let output = std::mem::take(&mut self.output);
        let response = self.head.json(Some(&finish), output, spent);
        self.event(name, json!({"response": response}), out);
    }

    fn end(&mut self, _: &mut Vec<u8>) {}
}
