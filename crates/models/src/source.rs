//! From the keys of a [`ModelSpec`](crate::ModelSpec) to stored tensors: prefixes that exporters
//! put before the language model, projections stored fused, experts stored stacked, Mixtral's
//! own spellings, GGUF names.

use crate::error::ModelError;
use crate::gguf;
use crate::spec::{FusedRows, LinearSpec, ModelSpec, NormSpec};
use marlin_checkpoint::{Checkpoint, Container, StoredTensor};
use marlin_quant::QuantError;
use marlin_tensor::{HostTensor, Weight};
use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

type Result<T> = std::result::Result<T, ModelError>;

/// Prefix of the language model in Hugging Face files, and what exporters write instead.
const PREFIXES: [(&str, &str); 4] = [
    ("", ""),
    ("model.", "model.language_model."),
    ("model.", "language_model.model."),
    ("lm_head", "language_model.lm_head"),
];

/// Mixtral's names of what other families call something else.
const SPELLINGS: [(&str, &str); 4] = [
    (".mlp.gate", ".block_sparse_moe.gate"),
    (".gate_proj", ".w1"),
    (".up_proj", ".w3"),
    (".down_proj", ".w2"),
];

/// Parts of names of what is not the language model: encoders of multimodal files, adapters between.
const ELSEWHERE: [&str; 5] =
    ["vision_", "visual.", "audio_", "multi_modal_projector", "embed_vision"];

fn is_elsewhere(name: &str) -> bool {
    ELSEWHERE.iter().any(|part| name.contains(part))
}

/// A checkpoint seen through the keys of a specification.
pub struct Source<'a> {
    checkpoint: &'a Checkpoint,
    gguf: bool,
    /// Stored names of what has been loaded: parameters, and the modules of matrices.
    loaded: Mutex<BTreeSet<String>>,
}

impl<'a> Source<'a> {
    /// Looks into `checkpoint`.
    pub fn new(checkpoint: &'a Checkpoint) -> Self {
        let gguf = matches!(checkpoint.container, Container::Gguf { .. });
        Self { checkpoint, gguf, loaded: Mutex::default() }
    }

    /// The checkpoint itself.
    pub fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    fn loaded(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stored_under(&self, key: &str) -> bool {
        ["weight", "trellis", "blocks", "qweight", "weight_packed"]
            .iter()
            .any(|p| self.checkpoint.get(&format!("{key}.{p}")).is_some())
    }

    /// Stored tensors of the language model's `layers` blocks, embedding and head that nothing has
    /// loaded. Rotary tables that exporters left behind say what the configuration says.
    pub fn unused(&self, layers: usize) -> Vec<String> {
        let loaded = self.loaded();
        let unused = self.checkpoint.tensors().map(|t| t.name.as_str()).filter(|name| {
            let (module, parameter) = name.rsplit_once('.').unwrap_or((name, ""));
            let used = loaded.contains(*name) || parameter != "bias" && loaded.contains(module);
            let outside = match self.layer_of(name) {
                Some(layer) => layer >= layers,
                None => is_elsewhere(name),
            };
            !used && !outside && parameter != "inv_freq"
        });
        unused.map(str::to_owned).collect()
    }

    /// Stored tensors of what is not the language model: encoders of images or sound, adapters between.
    pub fn elsewhere(&self) -> Vec<String> {
        let names = self.checkpoint.tensors().map(|t| t.name.as_str());
        names.filter(|name| is_elsewhere(name)).map(str::to_owned).collect()
    }

    fn layer_of(&self, name: &str) -> Option<usize> {
        let marker = if self.gguf { "blk." } else { "layers." };
        let (_, rest) = name.split_once(marker).filter(|_| !is_elsewhere(name))?;
        rest.split_once('.')?.0.parse().ok()
    }

    /// The matrix stored as `name`.
    ///
    /// # Errors
    /// When it is missing, shaped otherwise, or in no known format.
    pub fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Weight> {
        self.loaded().insert(name.to_owned());
        let loaded = marlin_quant::load(self.checkpoint, name, rows, columns);
        loaded.map_err(|source| self.weight_error(name, source))
    }

    /// `weight`, which was stored as `name`, as floats.
    ///
    /// # Errors
    /// When its parts contradict each other.
    pub fn decode(&self, name: &str, weight: &Weight) -> Result<Vec<f32>> {
        marlin_quant::decode(weight).map_err(|source| self.weight_error(name, source))
    }

    fn weight_error(&self, name: &str, source: QuantError) -> ModelError {
        match source {
            QuantError::Checkpoint(error) => error.into(),
            source => {
                let mut parts = self.checkpoint.tensors();
                let part = parts.find(|t| t.name.rsplit_once('.').is_some_and(|(m, _)| m == name));
                let file = part.map_or(self.checkpoint.path.as_path(), |t| &t.file);
                ModelError::Weight { file: file.to_owned(), source }
            }
        }
    }

    /// Names of the key and value halves of `kv_b`, when a GGUF file stores them apart.
    pub fn split_kv_b(&self, kv_b: &LinearSpec) -> Option<(String, String)> {
        let layer = kv_b.key.strip_prefix("model.layers.")?.split_once('.')?.0;
        let (key, value) = (format!("blk.{layer}.attn_k_b"), format!("blk.{layer}.attn_v_b"));
        let split = self.gguf && self.stored_under(&key) && self.stored_under(&value);
        split.then_some((key, value))
    }

    /// Names under which `key` may be stored, most likely first.
    fn candidates(&self, key: &str) -> Vec<String> {
        if self.gguf {
            return gguf::tensor_names(key);
        }
        let mut names: Vec<String> = PREFIXES
            .iter()
            .filter_map(|(ours, theirs)| {
                key.strip_prefix(ours).map(|rest| format!("{theirs}{rest}"))
            })
            .collect();
        if let Some((layer, rest)) = key.split_once(".mlp.") {
            let mut other = format!("{layer}.block_sparse_moe.{rest}");
            for (ours, theirs) in &SPELLINGS[1..] {
                if rest.starts_with("experts.") && other.ends_with(ours) {
                    other = other.replace(ours, theirs);
                }
            }
            names.push(other);
        }
        names
    }

    /// The name under which `key` is stored, if it is.
    pub fn find(&self, key: &str) -> Option<String> {
        self.candidates(key).into_iter().find(|n| self.stored_under(n))
    }

    /// Whether `key` (any parameter, with its suffix) exists.
    pub fn has(&self, key: &str) -> bool {
        self.find(key).is_some()
    }

    /// Whether the multi-token-prediction layer of `spec` is stored, if it has one.
    pub fn has_mtp(&self, spec: &ModelSpec) -> bool {
        spec.mtp.as_ref().is_some_and(|mtp| self.has(&mtp.projection.key))
    }

    /// Loads the matrix of `spec`, cutting it out of a fused or stacked one where needed.
    ///
    /// # Errors
    /// When it is missing, shaped otherwise, or in no known format.
    pub fn linear(&self, spec: &LinearSpec) -> Result<Weight> {
        let (rows, columns) = (spec.out_features, spec.in_features);
        let (name, fused) = self.stored_as(spec);
        let Some(fused) = fused else { return self.matrix(&name, rows, columns) };
        let whole = self.matrix(&name, fused.total, columns)?;
        let part = marlin_quant::slice_rows(&whole, fused.start..fused.start + rows);
        part.map_err(|source| self.weight_error(&name, source))
    }

    /// The name under which the matrix of `spec` is stored, and its rows where that is a larger one.
    fn stored_as<'s>(&self, spec: &'s LinearSpec) -> (String, Option<&'s FusedRows>) {
        if let Some(name) = self.find(&spec.key).filter(|name| !self.is_fused(name, spec)) {
            return (name, None);
        }
        if let Some(fused) = &spec.fused
            && let Some(name) = self.find(&fused.key)
        {
            return (name, Some(fused));
        }
        (self.candidates(&spec.key).swap_remove(0), None)
    }

    /// The tensors that [`linear`](Self::linear) makes the matrix of `spec` from.
    pub fn tensors_of(&self, spec: &LinearSpec) -> &'a [StoredTensor] {
        self.checkpoint.under(&format!("{}.", self.stored_as(spec).0))
    }

    /// Whether `name` holds more than the matrix of `spec`: GGUF calls Phi's gate and up together
    /// what it calls up elsewhere.
    fn is_fused(&self, name: &str, spec: &LinearSpec) -> bool {
        let Some(fused) = &spec.fused else { return false };
        let rows = self.checkpoint.get(&format!("{name}.weight")).and_then(|t| t.shape.first());
        rows == Some(&fused.total) && self.find(&fused.key).as_deref() == Some(name)
    }

    /// The bias of `spec`, when it has one.
    ///
    /// # Errors
    /// When it is declared but missing, or shaped otherwise.
    pub fn bias(&self, spec: &LinearSpec) -> Result<Option<HostTensor>> {
        if !spec.bias {
            return Ok(None);
        }
        let values = match self.optional_vector(&format!("{}.bias", spec.key))? {
            Some(v) => v,
            None => match &spec.fused {
                Some(f) => self.vector(&format!("{}.bias", f.key), f.total)?
                    [f.start..f.start + spec.out_features]
                    .to_vec(),
                None => self.vector(&format!("{}.bias", spec.key), spec.out_features)?,
            },
        };
        // EXL3 stores biases padded like the outputs.
        if values.len() < spec.out_features || values.len() >= spec.out_features + 128 {
            self.vector(&format!("{}.bias", spec.key), spec.out_features)?;
        }
        Ok(Some(HostTensor::from_f32(vec![spec.out_features], &values[..spec.out_features])))
    }

    /// A norm's weight with its offset folded in.
    ///
    /// # Errors
    /// When it is missing or shaped otherwise.
    pub fn norm(&self, spec: &NormSpec) -> Result<Vec<f32>> {
        let mut values = self.vector(&format!("{}.weight", spec.key), spec.size)?;
        values.iter_mut().for_each(|v| *v += spec.offset);
        Ok(values)
    }

    /// A vector of `size` floats; `key` carries its suffix.
    ///
    /// # Errors
    /// When it is missing, shaped otherwise, or not a float type.
    pub fn vector(&self, key: &str, size: usize) -> Result<Vec<f32>> {
        let name = self.parameter_name(key);
        let stored = self.checkpoint.require(&name, &[size])?;
        self.loaded().insert(name.clone());
        let tensor = stored.plain().ok_or_else(|| ModelError::Weight {
            file: stored.file.to_path_buf(),
            source: QuantError::Invalid {
                key: name.clone(),
                reason: "vectors must be stored as plain floats".into(),
            },
        })?;
        tensor.to_f32().map_err(|source| ModelError::Tensor { key: name, source })
    }

    /// A vector of any length, if it exists.
    ///
    /// # Errors
    /// When it is not a float vector.
    pub fn optional_vector(&self, key: &str) -> Result<Option<Vec<f32>>> {
        let name = self.parameter_name(key);
        match self.checkpoint.get(&name) {
            Some(t) => self.vector(key, t.shape.iter().product()).map(Some),
            None => Ok(None),
        }
    }

    /// Stored name of a full parameter name such as `model.norm.weight`.
    pub fn parameter_name(&self, key: &str) -> String {
        let (module, suffix) = key.rsplit_once('.').unwrap_or((key, "weight"));
        let mut names: Vec<String> =
            self.candidates(module).into_iter().map(|n| format!("{n}.{suffix}")).collect();
        if self.gguf {
            names.extend(gguf::parameter_names(key));
        }
        names.push(key.to_owned());
        let first = names[0].clone();
        names.into_iter().find(|n| self.checkpoint.get(n).is_some()).unwrap_or(first)
    }
}
