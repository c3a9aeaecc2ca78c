//! Typed access to the `tokenizer.*` keys of GGUF metadata.

use crate::TextError;
use serde_json::{Map, Value};
use std::path::Path;

/// Metadata and the file it came from.
#[derive(Clone, Copy)]
pub(super) struct Metadata<'a> {
    pub path: &'a Path,
    pub map: &'a Map<String, Value>,
}

impl<'a> Metadata<'a> {
    pub(super) fn corrupt(&self, key: &str, reason: impl Into<String>) -> TextError {
        TextError::Corrupt { path: self.path.into(), field: key.into(), reason: reason.into() }
    }

    pub(super) fn unsupported(&self, key: &str, reason: impl Into<String>) -> TextError {
        TextError::Unsupported { path: self.path.into(), field: key.into(), reason: reason.into() }
    }

    pub(super) fn missing(&self, key: &str) -> TextError {
        TextError::Missing {
            path: self.path.into(),
            field: key.into(),
            hint: "convert the model again, with its tokenizer".into(),
        }
    }

    fn typed<T>(
        &self,
        key: &str,
        what: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, TextError> {
        match self.map.get(key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(value) => Ok(Some(value)),
                None => Err(self.corrupt(key, format!("expected {what}"))),
            },
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, TextError> {
        self.typed(key, "a string", Value::as_str)
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, TextError> {
        self.typed(key, "a boolean", Value::as_bool)
    }

    pub(super) fn list(&self, key: &str) -> Result<Option<&'a [Value]>, TextError> {
        self.typed(key, "an array", |value| value.as_array().map(Vec::as_slice))
    }

    /// A token id, checked against the vocabulary. The largest value of 32 bits means "none", as
    /// converters write it.
    pub(super) fn id(&self, key: &str, vocab_size: usize) -> Result<Option<u32>, TextError> {
        let Some(id) = self.typed(key, "a token id", Value::as_u64)? else { return Ok(None) };
        if id == u64::from(u32::MAX) {
            return Ok(None);
        }
        if id >= vocab_size as u64 {
            let reason = format!("{id} is outside the vocabulary of {vocab_size} tokens");
            return Err(self.corrupt(key, reason));
        }
        Ok(Some(id as u32))
    }

    /// A list of strings.
    pub(super) fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>, TextError> {
        let Some(list) = self.list(key)? else { return Ok(None) };
        let texts = list.iter().enumerate().map(|(index, value)| {
            value
                .as_str()
                .ok_or_else(|| self.corrupt(&format!("{key}[{index}]"), "expected a string"))
        });
        texts.collect::<Result<_, _>>().map(Some)
    }

    /// One finite number for each of `count` tokens.
    pub(super) fn numbers(&self, key: &str, count: usize) -> Result<Option<Vec<f32>>, TextError> {
        let Some(list) = self.list(key)? else { return Ok(None) };
        if list.len() != count {
            let reason = format!("{} values for {count} tokens", list.len());
            return Err(self.corrupt(key, reason));
        }
        let numbers = list.iter().enumerate().map(|(index, value)| {
            let number = value.as_f64().map(|number| number as f32).filter(|n| n.is_finite());
            number
                .ok_or_else(|| self.corrupt(&format!("{key}[{index}]"), "expected a finite number"))
        });
        numbers.collect::<Result<_, _>>().map(Some)
    }
}
