//! One file per architecture: `config.json` fields to a [`ModelSpec`]. A new architecture is a
//! file here and a line in [`ARCHITECTURES`].

mod build;
mod deepseek;
mod gemma3;
mod glm4_moe_lite;
mod llama;
mod mixtral;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3_moe;

use crate::config::Config;
use crate::error::ModelError;
use crate::spec::ModelSpec;

pub use build::linear;

/// A family of models that one function describes.
pub struct Architecture {
    /// Values of `model_type` it serves.
    pub model_types: &'static [&'static str],
    /// What a user calls it.
    pub name: &'static str,
    /// Builds the specification.
    pub spec: fn(&Config) -> Result<ModelSpec, ModelError>,
}

/// Every architecture.
pub const ARCHITECTURES: [Architecture; 10] = [
    llama::ARCHITECTURE,
    qwen2::ARCHITECTURE,
    qwen3::ARCHITECTURE,
    qwen3_moe::ARCHITECTURE,
    mixtral::ARCHITECTURE,
    gemma3::ARCHITECTURE,
    phi3::ARCHITECTURE,
    glm4_moe_lite::ARCHITECTURE,
    deepseek::V2,
    deepseek::V3,
];

/// Describes the model of `config`.
///
/// # Errors
/// When `model_type` is unknown, or a field is missing or unsupported.
pub fn spec(config: &Config) -> Result<ModelSpec, ModelError> {
    let model_type = config
        .opt_str("model_type")?
        .ok_or_else(|| config.error("model_type", "required field is missing"))?;
    let found = ARCHITECTURES.iter().find(|a| a.model_types.contains(&model_type));
    let Some(architecture) = found else {
        let known: Vec<&str> = ARCHITECTURES.iter().flat_map(|a| a.model_types).copied().collect();
        return Err(config.unsupported("model_type", model_type, &known));
    };
    let mut spec = (architecture.spec)(config)?;
    (spec.defaults, spec.unread) = (config.defaults(), config.unread());
    Ok(spec)
}
