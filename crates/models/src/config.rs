//! Reading `config.json` fields: typed, bounded, and remembered. A field that is absent takes the
//! default the caller states, and the choice is recorded so that `inspect` can print it.

use crate::ModelError;
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Largest size of any dimension: far above real models, small enough that products of two fit.
const MAX_DIMENSION: u64 = 1 << 24;

/// The configuration of one model, whatever container it came in.
pub struct Config {
    file: PathBuf,
    fields: Map<String, Value>,
    gguf: bool,
    defaults: RefCell<BTreeMap<String, String>>,
}

type Result<T> = std::result::Result<T, ModelError>;

impl Config {
    /// Wraps a parsed object. `gguf` says that weights follow ggml's conventions (permuted
    /// q and k, norm offsets folded in).
    ///
    /// # Errors
    /// When the value is not an object.
    pub fn new(file: &Path, value: &Value, gguf: bool) -> Result<Self> {
        let Value::Object(object) = value else {
            return Err(ModelError::Config {
                file: file.to_owned(),
                field: "(root)".into(),
                reason: "expected a JSON object".into(),
            });
        };
        let mut fields = object.clone();
        // Multimodal files nest the language model; what it does not repeat stays at the top.
        if let Some(Value::Object(text)) = object.get("text_config") {
            for (k, v) in text {
                fields.insert(k.clone(), v.clone());
            }
        }
        Ok(Self { file: file.to_owned(), fields, gguf, defaults: RefCell::default() })
    }

    /// Whether the weights follow ggml's conventions.
    pub fn is_gguf(&self) -> bool {
        self.gguf
    }

    /// Fields that were absent and the default each took.
    pub fn defaults(&self) -> BTreeMap<String, String> {
        self.defaults.borrow().clone()
    }

    /// An error about `field`.
    pub fn error(&self, field: &str, reason: impl Into<String>) -> ModelError {
        ModelError::Config {
            file: self.file.clone(),
            field: field.to_owned(),
            reason: reason.into(),
        }
    }

    /// An error about a value nobody implements.
    pub fn unsupported(&self, field: &str, value: &str, accepted: &[&str]) -> ModelError {
        let accepted = accepted.join(", ");
        self.error(field, format!("{value:?} is not supported; supported: {accepted}"))
    }

    /// The raw value of `field`; `null` counts as absent.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|v| !v.is_null())
    }

    /// Whether `field` is written at all, `null` included.
    pub fn has(&self, field: &str) -> bool {
        self.fields.contains_key(field)
    }

    fn default_taken<T>(&self, field: &str, default: T) -> T
    where
        T: std::fmt::Debug,
    {
        self.defaults.borrow_mut().insert(field.to_owned(), format!("{default:?}"));
        default
    }

    fn integer(&self, field: &str, value: &Value) -> Result<u64> {
        let n = value.as_u64().or_else(|| {
            // Some exporters write 1e6 or 2048.0.
            value.as_f64().filter(|f| f.fract() == 0.0 && (0.0..9e15).contains(f)).map(|f| f as u64)
        });
        n.ok_or_else(|| self.error(field, format!("expected a whole number, found {value}")))
    }

    /// A non-negative integer, or nothing.
    ///
    /// # Errors
    /// When present and not a non-negative integer.
    pub fn opt_u64(&self, field: &str) -> Result<Option<u64>> {
        self.get(field).map(|v| self.integer(field, v)).transpose()
    }

    /// A dimension (1 … 2²⁴), or nothing.
    ///
    /// # Errors
    /// When present and out of range.
    pub fn opt_dim(&self, field: &str) -> Result<Option<usize>> {
        match self.opt_u64(field)? {
            Some(n) if (1..=MAX_DIMENSION).contains(&n) => Ok(Some(n as usize)),
            Some(n) => Err(self.error(field, format!("{n} is not in 1 ..= {MAX_DIMENSION}"))),
            None => Ok(None),
        }
    }

    /// A required dimension.
    ///
    /// # Errors
    /// When absent or out of range.
    pub fn dim(&self, field: &str) -> Result<usize> {
        self.opt_dim(field)?.ok_or_else(|| self.error(field, "required field is missing"))
    }

    /// A required dimension under any of several spellings.
    ///
    /// # Errors
    /// When absent under all of them, or out of range.
    pub fn dim_any(&self, fields: &[&str]) -> Result<usize> {
        for field in fields {
            if let Some(n) = self.opt_dim(field)? {
                return Ok(n);
            }
        }
        Err(self.error(&fields.join(" or "), "required field is missing"))
    }

    /// A dimension with the model class's default.
    ///
    /// # Errors
    /// When present and out of range.
    pub fn dim_or(&self, field: &str, default: usize) -> Result<usize> {
        Ok(self.opt_dim(field)?.unwrap_or_else(|| self.default_taken(field, default)))
    }

    /// A dimension that `null` switches off and absence leaves at the class's default.
    ///
    /// # Errors
    /// When present and out of range.
    pub fn dim_unless_null(&self, field: &str, default: usize) -> Result<Option<usize>> {
        match self.has(field) {
            true => self.opt_dim(field),
            false => self.dim_or(field, default).map(Some),
        }
    }

    /// A small count that may be zero (dense layers, shared experts).
    ///
    /// # Errors
    /// When present and out of range.
    pub fn count_or(&self, field: &str, default: usize) -> Result<usize> {
        match self.opt_u64(field)? {
            Some(n) if n <= MAX_DIMENSION => Ok(n as usize),
            Some(n) => Err(self.error(field, format!("{n} is not in 0 ..= {MAX_DIMENSION}"))),
            None => Ok(self.default_taken(field, default)),
        }
    }

    /// A finite number, or nothing.
    ///
    /// # Errors
    /// When present and not a number.
    pub fn opt_f64(&self, field: &str) -> Result<Option<f64>> {
        self.get(field)
            .map(|v| {
                v.as_f64()
                    .filter(|f| f.is_finite())
                    .ok_or_else(|| self.error(field, format!("expected a number, found {v}")))
            })
            .transpose()
    }

    /// A finite number with the model class's default.
    ///
    /// # Errors
    /// When present and not a number.
    pub fn f64_or(&self, field: &str, default: f64) -> Result<f64> {
        Ok(self.opt_f64(field)?.unwrap_or_else(|| self.default_taken(field, default)))
    }

    /// A norm epsilon: positive and below 1.
    ///
    /// # Errors
    /// When present and out of range.
    pub fn eps_or(&self, field: &str, default: f64) -> Result<f32> {
        let eps = self.f64_or(field, default)?;
        if eps > 0.0 && eps < 1.0 {
            Ok(eps as f32)
        } else {
            Err(self.error(field, format!("{eps} is not between 0 and 1")))
        }
    }

    /// A flag with the model class's default.
    ///
    /// # Errors
    /// When present and not a boolean.
    pub fn bool_or(&self, field: &str, default: bool) -> Result<bool> {
        match self.get(field) {
            Some(Value::Bool(b)) => Ok(*b),
            Some(v) => Err(self.error(field, format!("expected true or false, found {v}"))),
            None => Ok(self.default_taken(field, default)),
        }
    }

    /// A string, or nothing.
    ///
    /// # Errors
    /// When present and not a string.
    pub fn opt_str(&self, field: &str) -> Result<Option<&str>> {
        match self.get(field) {
            Some(Value::String(s)) => Ok(Some(s)),
            Some(v) => Err(self.error(field, format!("expected a string, found {v}"))),
            None => Ok(None),
        }
    }

    /// A string with the model class's default.
    ///
    /// # Errors
    /// When present and not a string.
    pub fn str_or<'a>(&'a self, field: &str, default: &'a str) -> Result<&'a str> {
        Ok(self.opt_str(field)?.unwrap_or_else(|| self.default_taken(field, default)))
    }

    /// A list of strings, or nothing.
    ///
    /// # Errors
    /// When present and anything else.
    pub fn opt_strings(&self, field: &str) -> Result<Option<Vec<&str>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let list = value.as_array().and_then(|a| a.iter().map(Value::as_str).collect());
        list.map(Some).ok_or_else(|| self.error(field, "expected a list of strings"))
    }

    /// One token id or a list of them; absent is empty.
    ///
    /// # Errors
    /// When present and anything else.
    pub fn token_ids(&self, field: &str) -> Result<Vec<u32>> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = match self.get(field) {
            None => Some(Vec::new()),
            Some(Value::Array(a)) => a.iter().map(id).collect(),
            Some(v) => id(v).map(|n| vec![n]),
        };
        ids.ok_or_else(|| self.error(field, "expected a token id or a list of them"))
    }

    /// A sub-object as a configuration of its own, its fields named `field.x` in errors.
    ///
    /// # Errors
    /// When present and not an object.
    pub fn object(&self, field: &str) -> Result<Option<Config>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(Config {
                file: self.file.join(field),
                fields: fields.clone(),
                gguf: self.gguf,
                defaults: RefCell::default(),
            })),
            Some(v) => Err(self.error(field, format!("expected an object, found {v}"))),
        }
    }

    /// A list of numbers, or nothing.
    ///
    /// # Errors
    /// When present and anything else.
    pub fn opt_numbers(&self, field: &str) -> Result<Option<Vec<f64>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let list = value.as_array().and_then(|a| a.iter().map(Value::as_f64).collect());
        list.map(Some).ok_or_else(|| self.error(field, "expected a list of numbers"))
    }
}
