//! What a model is and how it runs.
//!
//! * [`ModelSpec`]: pure data, computed from `config.json` or GGUF metadata without touching a
//!   weight ([`spec`]); one file per architecture under `architecture/`.
//! * [`Model`]: the weights of a specification placed on a backend, and the forward pass, composed
//!   of the shared layers under `layers/`.

mod architecture;
mod config;
mod error;
mod gguf;
mod layers;
mod model;
mod rope;
mod source;
mod spec;

pub use architecture::{ARCHITECTURES, Architecture};
pub use error::ModelError;
pub use gguf::ARCHITECTURES as GGUF_ARCHITECTURES;
pub use model::Model;
pub use source::Source;
pub use spec::{
    BlockSpec, EmbeddingSpec, FeedForwardSpec, FusedRows, GatedSpec, GqaSpec, HeadSpec, LinearSpec,
    MixerSpec, MlaQuery, MlaSpec, ModelSpec, MoeSpec, MtpSpec, NormSpec, RopeSpec,
};

use config::Config;
use marlin_checkpoint::{Checkpoint, Container};

/// Describes the model of a checkpoint.
///
/// # Errors
/// When the architecture is unknown, or a field is missing or unsupported.
pub fn spec(checkpoint: &Checkpoint) -> Result<ModelSpec, ModelError> {
    match &checkpoint.container {
        Container::HuggingFace { config, .. } => {
            let file = checkpoint.path.join("config.json");
            architecture::spec(&Config::new(&file, config, false)?)
        }
        Container::Gguf { metadata } => {
            let has = |name: &str| checkpoint.get(name).is_some();
            let config = gguf::config(&checkpoint.path, metadata, &has)?;
            architecture::spec(&Config::new(&checkpoint.path, &config, true)?)
        }
    }
}
