//! Messages of a request on their way to the form that templates read.
//!
//! Anthropic's protocol puts calls and their results into blocks of messages, OpenAI's responses into items beside them;
//! templates want one turn per answer, with its thoughts and calls in it, and a message per result. Neighbours of one role
//! become one turn: Anthropic promises it, and the templates of many models refuse anything else.

use crate::ApiError;
use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// The turns of a conversation.
#[derive(Debug, Default)]
pub(super) struct Turns {
    turns: Vec<Map<String, Value>>,
    /// Functions by the ids of their calls.
    calls: HashMap<String, String>,
}

impl Turns {
    /// The turn of `role` that is under way, or a new one.
    pub fn open(&mut self, role: &str) -> &mut Map<String, Value> {
        if self.role() != Some(role) {
            let content = ("content".to_owned(), "".into());
            self.turns.push(Map::from_iter([("role".to_owned(), role.into()), content]));
        }
        let last = self.turns.len() - 1;
        &mut self.turns[last]
    }

    /// Who spoke last.
    pub fn role(&self) -> Option<&str> {
        self.turns.last()?.get("role")?.as_str()
    }

    /// `role` says `text`.
    pub fn say(&mut self, role: &str, text: &str) {
        append(self.open(role), "content", text);
    }

    /// The model thought `text`.
    pub fn think(&mut self, text: &str) {
        append(self.open("assistant"), "reasoning_content", text);
    }

    /// The model called a function.
    pub fn call(&mut self, id: &str, name: &str, arguments: Value) {
        self.calls.insert(id.to_owned(), name.to_owned());
        let function = json!({"name": name, "arguments": arguments});
        let call = json!({"id": id, "type": "function", "function": function});
        let turn = self.open("assistant");
        match turn.get_mut("tool_calls") {
            Some(Value::Array(calls)) => calls.push(call),
            _ => {
                turn.insert("tool_calls".to_owned(), vec![call].into());
            }
        }
    }

    /// What came of call `id`, which stands at `path` in the request.
    ///
    /// # Errors
    /// When there was no such call.
    pub fn result(&mut self, path: &str, id: &str, text: &str) -> Result<(), ApiError> {
        let Some(name) = self.calls.get(id) else {
            let id: String = id.chars().take(100).collect();
            let message = format!("{path}: nothing before it is a call with id {id:?}");
            return Err(ApiError::invalid(path, message));
        };
        // Some templates write the name of the function, some the id.
        let result = json!({"role": "tool", "content": text, "tool_call_id": id, "name": name});
        if let Value::Object(result) = result {
            self.turns.push(result);
        }
        Ok(())
    }

    /// The messages.
    pub fn into_messages(self) -> Vec<Value> {
        self.turns.into_iter().map(Value::Object).collect()
    }
}

/// Texts that become one are paragraphs.
fn append(turn: &mut Map<String, Value>, key: &str, text: &str) {
    match turn.get_mut(key) {
        Some(Value::String(all)) if !all.is_empty() => {
            all.push('\n');
            all.push_str(text);
        }
        _ => {
            turn.insert(key.to_owned(), text.into());
        }
    }
}
