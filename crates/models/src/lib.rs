//! What a model is and how it runs.
//!
//! * [`ModelSpec`]: pure data, computed from `config.json` or GGUF metadata without touching a
//!   weight ([`spec`]); one file per architecture under `architecture/`.
//! * [`Model`]: the weights of a specification placed on a backend, and the forward pass, composed
//!   of the shared layers under `layers/`.
//! * [`weight_memory`], [`scratch_bytes`]: what that will take.

mod architecture;
mod block;
mod config;
mod error;
mod gguf;
mod layers;
mod memory;
mod model;
mod rope;
mod source;
mod spec;

pub use architecture::{ARCHITECTURES, Architecture};
pub use block::{Block, Mtp};
pub use error::ModelError;
pub use gguf::ARCHITECTURES as GGUF_ARCHITECTURES;
pub use layers::{Loader, Norm, Step};
pub use memory::{WeightMemory, scratch_bytes, weight_memory};
pub use model::Model;
pub use source::Source;
pub use spec::{
    BlockSpec, EmbeddingSpec, FeedForwardSpec, FusedRows, GatedSpec, GqaSpec, HeadSpec, LinearSpec,
    MixerSpec, MlaQuery, MlaSpec, ModelSpec, MoeSpec, MtpSpec, NormSpec, RopeSpec,
};

use config::Config;
use marlin_checkpoint::{Checkpoint, Container};

/// The `config.json` of a checkpoint; a GGUF's metadata in the same spelling.
///
/// # Errors
/// When a GGUF's architecture is unknown, or a field is missing or unsupported.
pub fn config(checkpoint: &Checkpoint) -> Result<serde_json::Value, ModelError> {
    match &checkpoint.container {
        Container::HuggingFace { config, .. } => Ok(config.clone()),
        Container::Gguf { metadata } => {
            gguf::config(&checkpoint.path, metadata, &|name| checkpoint.get(name).is_some())
        }
    }
}

/// Describes the model of a checkpoint.
///
/// # Errors
/// When the architecture is unknown, or a field is missing or unsupported.
pub fn spec(checkpoint: &Checkpoint) -> Result<ModelSpec, ModelError> {
    match &checkpoint.container {
        Container::HuggingFace { config, .. } => {
            // A configuration may have been opened by itself.
            let file = match checkpoint.path.extension() {
                Some(extension) if extension == "json" => checkpoint.path.clone(),
                _ => checkpoint.path.join("config.json"),
            };
            architecture::spec(&Config::new(&file, config, false)?)
        }
        Container::Gguf { .. } => {
            architecture::spec(&Config::new(&checkpoint.path, &config(checkpoint)?, true)?)
        }
    }
}
