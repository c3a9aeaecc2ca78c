//! GLM-4.7-Flash: DeepSeek-V3's latent attention and routing under GLM's defaults.

use super::Architecture;
use super::build::{ClassDefaults, Decoder};
use super::deepseek::{MoeDefaults, noaux_spec};
use crate::config::Config;
use crate::error::ModelError;
use crate::spec::ModelSpec;

pub const ARCHITECTURE: Architecture =
    Architecture { model_types: &["glm4_moe_lite"], name: "GLM-4.7-Flash", spec };

const CLASS: ClassDefaults =
    ClassDefaults { rms_norm_eps: 1e-5, max_position_embeddings: 202_752, ..ClassDefaults::LLAMA };

const MOE: MoeDefaults =
    MoeDefaults { num_groups: 1, top_k_groups: 1, first_dense: 1, scaling_factor: 1.8, shared: 1 };

fn spec(config: &Config) -> Result<ModelSpec, ModelError> {
    noaux_spec(&Decoder::read(config, &CLASS)?, &MOE)
}
