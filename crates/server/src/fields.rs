//! A JSON object read field by field: every field is read, refused by name, or unknown by name.

use crate::{ApiError, RequestLimits};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// The fields of a request that have not been read yet.
#[derive(Debug)]
pub struct Fields {
    map: Map<String, Value>,
    /// Path of the object in the request, ending in a dot; empty for the request itself.
    at: String,
    /// How much the request may hold.
    limits: RequestLimits,
    #[cfg(test)]
    pub(crate) asked: std::collections::BTreeSet<String>,
}

impl Fields {
    /// Those of a body.
    ///
    /// # Errors
    /// When it is not the JSON text of an object.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let value: Value = serde_json::from_slice(body).map_err(|e| ApiError {
            param: None,
            ..ApiError::invalid("", format!("the body is not JSON: {e}"))
        })?;
        Self::of(value, "")
    }

    /// Those of `value`, which stands at `path` in the request.
    ///
    /// # Errors
    /// When it is not an object.
    pub fn of(value: Value, path: &str) -> Result<Self, ApiError> {
        let at = if path.is_empty() { String::new() } else { format!("{path}.") };
        match value {
            Value::Object(map) => Ok(Self {
                map,
                at,
                limits: RequestLimits::default(),
                #[cfg(test)]
                asked: Default::default(),
            }),
            other => {
                Err(wrong(if path.is_empty() { "the body" } else { path }, "an object", &other))
            }
        }
    }

    /// The same, which may hold as much as `limits` say.
    pub fn within(self, limits: RequestLimits) -> Self {
        Self { limits, ..self }
    }

    /// How much the request may hold.
    pub fn limits(&self) -> RequestLimits {
        self.limits
    }

    /// Path of field `name`.
    pub fn path(&self, name: &str) -> String {
        format!("{}{name}", self.at)
    }

    /// The value of a field; `None` when it is absent or null.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        #[cfg(test)]
        self.asked.insert(name.to_owned());
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// The value of a field, which is still to be read.
    pub fn peek(&self, name: &str) -> Option<&Value> {
        self.map.get(name)
    }

    /// A field of type `T`, called `expected` in errors.
    ///
    /// # Errors
    /// When it has another type.
    pub fn read<T: DeserializeOwned>(
        &mut self,
        name: &str,
        expected: &str,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match T::deserialize(&value) {
            Ok(read) => Ok(Some(read)),
            Err(_) => Err(wrong(&self.path(name), expected, &value)),
        }
    }

    /// A string.
    ///
    /// # Errors
    /// When it is something else.
    pub fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        self.read(name, "a string")
    }

    /// True or false.
    ///
    /// # Errors
    /// When it is something else.
    pub fn flag(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        self.read(name, "true or false")
    }

    /// A number of `range`.
    ///
    /// # Errors
    /// When it is something else.
    pub fn number(
        &mut self,
        name: &str,
        range: RangeInclusive<f64>,
    ) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64().filter(|v| range.contains(v)) {
            Some(number) => Ok(Some(number as f32)),
            None => {
                let expected = format!("a number from {} to {}", range.start(), range.end());
                Err(wrong(&self.path(name), &expected, &value))
            }
        }
    }

    /// A whole number of `range`.
    ///
    /// # Errors
    /// When it is something else.
    pub fn count(
        &mut self,
        name: &str,
        range: RangeInclusive<u64>,
    ) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match whole(&value).and_then(|v| u64::try_from(v).ok()).filter(|v| range.contains(v)) {
            Some(count) => Ok(Some(count)),
            None => {
                let expected = format!("a whole number from {} to {}", range.start(), range.end());
                Err(wrong(&self.path(name), &expected, &value))
            }
        }
    }

    /// An object.
    ///
    /// # Errors
    /// When it is something else.
    pub fn object(&mut self, name: &str) -> Result<Option<Self>, ApiError> {
        let (path, limits) = (self.path(name), self.limits);
        let of = |value| Ok(Self::of(value, &path)?.within(limits));
        self.take(name).map(of).transpose()
    }

    /// A list, at most `most` long.
    ///
    /// # Errors
    /// When it is something else or longer.
    pub fn list(&mut self, name: &str, most: usize) -> Result<Option<Vec<Value>>, ApiError> {
        let path = self.path(name);
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(list)) if list.len() <= most => Ok(Some(list)),
            Some(Value::Array(list)) => {
                let message =
                    format!("{path}: expected at most {most} entries, found {}", list.len());
                Err(ApiError::invalid(&path, message))
            }
            Some(other) => Err(wrong(&path, "a list", &other)),
        }
    }

    /// Refuses a field that is known and not honoured, unless its value asks for nothing: null, false, empty, or one of `harmless`.
    ///
    /// # Errors
    /// When it asks for something.
    pub fn refuse(&mut self, name: &str, harmless: &[Value], reason: &str) -> Result<(), ApiError> {
        let path = self.path(name);
        match self.take(name) {
            None | Some(Value::Bool(false)) => Ok(()),
            Some(value) if harmless.contains(&value) => Ok(()),
            Some(Value::Array(list)) if list.is_empty() => Ok(()),
            Some(Value::Object(map)) if map.is_empty() => Ok(()),
            Some(_) => {
                Err(ApiError::unsupported(&path, format!("{path} is not supported: {reason}")))
            }
        }
    }

    /// The error of a field that has to be there and is not.
    pub fn missing(&self, name: &str) -> ApiError {
        let path = self.path(name);
        ApiError::invalid(&path, format!("{path} is missing"))
    }

    /// The error of a value that is not `expected`.
    pub fn wrong(&self, name: &str, expected: &str, found: &Value) -> ApiError {
        wrong(&self.path(name), expected, found)
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// When a field is left: it is unknown.
    pub fn finish(self) -> Result<(), ApiError> {
        match self.map.keys().next() {
            None => Ok(()),
            Some(name) => {
                let name: String = name.chars().take(100).collect();
                let path = format!("{}{name}", self.at);
                let message = format!("unknown field {path:?}; the fields are in /openapi.json");
                Err(ApiError {
                    code: Some("unknown_parameter"),
                    ..ApiError::invalid(&path, message)
                })
            }
        }
    }
}

/// A whole number; `64.0` is one, too.
pub fn whole(value: &Value) -> Option<i128> {
    let float = |v: f64| (v.fract() == 0.0 && v.abs() < 9e15).then_some(v as i128);
    let signed = || value.as_i64().map(i128::from);
    value.as_u64().map(i128::from).or_else(signed).or_else(|| value.as_f64().and_then(float))
}

/// Token ids.
pub fn token_ids(list: &[Value]) -> Option<Vec<u32>> {
    list.iter().map(|id| u32::try_from(whole(id)?).ok()).collect()
}

fn wrong(path: &str, expected: &str, found: &Value) -> ApiError {
    let mut text = found.to_string();
    if text.len() > 80 {
        text.truncate(text.floor_char_boundary(80));
        text.push('…');
    }
    ApiError::invalid(path, format!("{path}: expected {expected}, found {text}"))
}
