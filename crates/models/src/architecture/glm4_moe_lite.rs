//! GLM-4.7-Flash: DeepSeek-V3's latent attention and routing under GLM's defaults.

use super::Architecture;
use super::build::{ClassDefaults, Decoder};
use super::deepseek::noaux_spec;
use crate::config::Config;
use crate::error::ModelError;
use crate::spec::ModelSpec;

pub const ARCHITECTURE: Architecture =
    Architecture { model_types: &["glm4_moe_lite"], name: "GLM-4.7-Flash", spec };

const CLASS: ClassDefaults = ClassDefaults {
    rms_norm_eps: 1e-5,
    rope_theta: 10_000.0,
    max_position_embeddings: 202_752,
    tie_word_embeddings: false,
    norm_offset: 0.0,
};

fn spec(config: &Config) -> Result<ModelSpec, ModelError> {
    noaux_spec(&Decoder::read(config, &CLASS)?)
}
