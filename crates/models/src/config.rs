//! Reading `config.json` fields: typed, bounded, and remembered. A field that is absent takes the
//! default the caller states, and one that nobody asks for has no effect; both are recorded, so
//! that nothing happens in silence.

use crate::ModelError;
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Largest size of any dimension: far above real models, small enough that products of two fit.
const MAX_DIMENSION: u64 = 1 << 24;

/// Fields that say nothing about what the language model computes: where it came from, how it was
/// trained, what surrounds it, how its tokens are chosen (`generation_config.json` is read for that),
/// how it is stored (formats are told by the tensors themselves).
const NO_EFFECT: [&str; 71] = [
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "audio_config",
    "auto_map",
    "aux_loss_alpha",
    "bad_words_ids",
    "boi_token_index",
    "bos_token_id",
    "chunk_size_feed_forward",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "embd_pdrop",
    "encoder_no_repeat_ngram_size",
    "eoi_token_index",
    "eos_token_id",
    "ep_size",
    "expert_dropout",
    "hidden_dropout",
    "id2label",
    "ignore_index",
    "image_token_id",
    "image_token_index",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "media_placeholder_token_id",
    "min_length",
    "mm_tokens_per_image",
    "model_type",
    "mtp_mlp_layer_types",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_mtp_layers",
    "num_nextn_predict_layers",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "quantization_config",
    "repetition_penalty",
    "resid_pdrop",
    "return_dict",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "seq_aux",
    "temperature",
    "text_config",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
    "use_unified_vision_chunk",
    "video_placeholder",
    "video_token_id",
    "vision_config",
];

/// Whether a value asks for nothing.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) | Value::String(_) => false,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

/// The configuration of one model, whatever container it came in.
pub struct Config {
    file: PathBuf,
    fields: Map<String, Value>,
    gguf: bool,
    /// Names of the objects this one lies in, each with a dot behind it.
    prefix: String,
    /// Shared by all objects of a file; fields are called by their full names.
    notes: Rc<RefCell<Notes>>,
}

#[derive(Default)]
struct Notes {
    defaults: BTreeMap<String, String>,
    read: BTreeSet<String>,
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
        let (prefix, notes) = (String::new(), Rc::default());
        Ok(Self { file: file.to_owned(), fields, gguf, prefix, notes })
    }

    /// Whether the weights follow ggml's conventions.
    pub fn is_gguf(&self) -> bool {
        self.gguf
    }

    /// Fields that were absent and the default each took.
    pub fn defaults(&self) -> BTreeMap<String, String> {
        self.notes.borrow().defaults.clone()
    }

    /// Fields that are written but that nobody has read, with their values, without those known to
    /// have no effect. To be asked when everything that matters has been read.
    pub fn unread(&self) -> BTreeMap<String, String> {
        let notes = self.notes.borrow();
        let mut unread = BTreeMap::new();
        let mut open = vec![(self.prefix.clone(), &self.fields)];
        while let Some((prefix, fields)) = open.pop() {
            for (key, value) in fields {
                let name = format!("{prefix}{key}");
                match (value, notes.read.contains(&name)) {
                    (Value::Object(inner), true) => open.push((format!("{name}."), inner)),
                    (_, true) => {}
                    (_, false) if is_off(value) || NO_EFFECT.contains(&name.as_str()) => {}
                    (_, false) => {
                        unread.insert(name, value.to_string());
                    }
                }
            }
        }
        unread
    }

    /// Marks fields of this architecture's files that do not change what it computes.
    pub fn no_effect(&self, fields: &[&str]) {
        fields.iter().for_each(|field| self.mark_read(field));
    }

    fn mark_read(&self, field: &str) {
        self.notes.borrow_mut().read.insert(format!("{}{field}", self.prefix));
    }

    /// An error about `field`.
    pub fn error(&self, field: &str, reason: impl Into<String>) -> ModelError {
        ModelError::Config {
            file: self.file.clone(),
            field: format!("{}{field}", self.prefix),
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
        self.mark_read(field);
        self.fields.get(field).filter(|v| !v.is_null())
    }

    /// Whether `field` is written at all, `null` included.
    pub fn has(&self, field: &str) -> bool {
        self.mark_read(field);
        self.fields.contains_key(field)
    }

    fn default_taken<T>(&self, field: &str, default: T) -> T
    where
        T: std::fmt::Debug,
    {
        let name = format!("{}{field}", self.prefix);
        self.notes.borrow_mut().defaults.insert(name, format!("{default:?}"));
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
                file: self.file.clone(),
                fields: fields.clone(),
                gguf: self.gguf,
                prefix: format!("{}{field}.", self.prefix),
                notes: Rc::clone(&self.notes),
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
