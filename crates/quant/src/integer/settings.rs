//! `quantization_config` of `config.json`, or the file of its own that older exporters wrote: what the
//! tensors leave open. A value with a meaning that is not implemented is an error.

use crate::QuantError;
use marlin_checkpoint::{Checkpoint, CheckpointError, Container};
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::path::PathBuf;

/// Files of AutoGPTQ and AutoAWQ, and whose they are.
const FILES: [(&str, &str); 2] = [("quantize_config.json", "gptq"), ("quant_config.json", "awq")];

/// The fields, and where they stand.
pub(super) struct Settings<'a> {
    file: PathBuf,
    /// What precedes the name of a field in messages.
    prefix: &'static str,
    fields: Cow<'a, Map<String, Value>>,
    /// The method that the name of the file says.
    of_file: Option<&'static str>,
}

impl<'a> Settings<'a> {
    /// Those of `checkpoint`, where it has some.
    pub(super) fn of(checkpoint: &'a Checkpoint) -> Result<Option<Self>, QuantError> {
        let Container::HuggingFace { config, .. } = &checkpoint.container else { return Ok(None) };
        let nested = &config["text_config"]["quantization_config"];
        let found = [&config["quantization_config"], nested, &config["compression_config"]];
        if let Some(value) = found.into_iter().find(|v| !v.is_null()) {
            let file = checkpoint.path.join("config.json");
            return Self::new(file, "quantization_config.", Cow::Borrowed(value), None).map(Some);
        }
        for (name, method) in FILES {
            let Some(bytes) = checkpoint.sidecar(name) else { continue };
            let file = checkpoint.path.join(name);
            let value = serde_json::from_slice(bytes).map_err(|e| CheckpointError::Corrupt {
                path: file.clone(),
                field: "(root)".to_owned(),
                reason: e.to_string(),
            })?;
            return Self::new(file, "", Cow::Owned(value), Some(method)).map(Some);
        }
        Ok(None)
    }

    fn new(
        file: PathBuf,
        prefix: &'static str,
        value: Cow<'a, Value>,
        of_file: Option<&'static str>,
    ) -> Result<Self, QuantError> {
        let fields = match value {
            Cow::Borrowed(Value::Object(fields)) => Cow::Borrowed(fields),
            Cow::Owned(Value::Object(fields)) => Cow::Owned(fields),
            other => {
                return Err(CheckpointError::Unsupported {
                    path: file,
                    field: format!("{prefix}(root)"),
                    reason: format!("expected an object, found {}", *other),
                }
                .into());
            }
        };
        Ok(Self { file, prefix, fields, of_file })
    }

    /// That there are none, though they would have to say `what`.
    pub(super) fn missing(checkpoint: &Checkpoint, what: &str) -> QuantError {
        CheckpointError::Unsupported {
            path: checkpoint.path.join("config.json"),
            field: "quantization_config".to_owned(),
            reason: format!("is missing; nothing else says {what}"),
        }
        .into()
    }

    /// `quant_method`, in lower case, or what the name of the file says.
    pub(super) fn method(&self) -> Result<Option<&str>, QuantError> {
        Ok(self.text("quant_method")?.or(self.of_file))
    }

    /// The error that `field` cannot be as it is.
    pub(super) fn unsupported(&self, field: &str, reason: impl Into<String>) -> QuantError {
        CheckpointError::Unsupported {
            path: self.file.clone(),
            field: format!("{}{field}", self.prefix),
            reason: reason.into(),
        }
        .into()
    }

    /// A field that is there and not null.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|v| !v.is_null())
    }

    /// A string.
    pub(super) fn text(&self, field: &str) -> Result<Option<&str>, QuantError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let text = value.as_str().map(Some);
        text.ok_or_else(|| self.unsupported(field, format!("expected a string, found {value}")))
    }

    /// A whole number under the first of several spellings.
    pub(super) fn number(
        &self,
        fields: &[&'static str],
    ) -> Result<Option<(&'static str, i64)>, QuantError> {
        let Some((field, value)) = fields.iter().find_map(|f| Some((*f, self.get(f)?))) else {
            return Ok(None);
        };
        let number = value.as_i64().map(|n| Some((field, n)));
        number.ok_or_else(|| self.unsupported(field, format!("expected a number, found {value}")))
    }

    /// A flag.
    pub(super) fn flag(&self, field: &str) -> Result<Option<bool>, QuantError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let flag = value.as_bool().map(Some);
        flag.ok_or_else(|| {
            self.unsupported(field, format!("expected true or false, found {value}"))
        })
    }

    /// Checks that a string, where there is one, is one of these in any case.
    pub(super) fn one_of(&self, field: &str, known: &[&str]) -> Result<Option<String>, QuantError> {
        let Some(text) = self.text(field)? else { return Ok(None) };
        let text = text.to_lowercase();
        match known.contains(&text.as_str()) {
            true => Ok(Some(text)),
            false => {
                Err(self.unsupported(field, format!("{text}; {} is read", known.join(" or "))))
            }
        }
    }

    /// Checks that these fields, which would change what the weights mean, ask for nothing.
    pub(super) fn off(&self, fields: &[&str]) -> Result<(), QuantError> {
        let off = |value: &Value| match value {
            Value::Bool(on) => !on,
            Value::Object(fields) => fields.is_empty(),
            Value::Array(list) => list.is_empty(),
            _ => false,
        };
        match fields.iter().find_map(|f| self.get(f).filter(|v| !off(v)).map(|_| f)) {
            Some(field) => Err(self.unsupported(field, "is not supported")),
            None => Ok(()),
        }
    }

    /// The size of a group where inputs are in order: `None` for all of them.
    pub(super) fn group_size(
        &self,
        fields: &[&'static str],
    ) -> Result<Option<Option<usize>>, QuantError> {
        match self.number(fields)? {
            None => Ok(None),
            Some((_, -1)) => Ok(Some(None)),
            Some((field, size)) => match usize::try_from(size) {
                Ok(size) if size > 0 => Ok(Some(Some(size))),
                _ => Err(self.unsupported(field, format!("{size}; -1 or more than 0 is read"))),
            },
        }
    }
}
