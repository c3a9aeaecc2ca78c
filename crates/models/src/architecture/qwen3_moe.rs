//! Qwen3 mixture of experts: Qwen3's attention, softmax routing, no shared expert.

use super::Architecture;
use super::build::{ClassDefaults, Decoder};
use super::qwen3::attention;
use crate::config::Config;
use crate::error::ModelError;
use crate::spec::{FeedForwardSpec, MixerSpec, ModelSpec};
use marlin_tensor::{Router, Scoring};

pub const ARCHITECTURE: Architecture =
    Architecture { model_types: &["qwen3_moe"], name: "Qwen3 MoE", spec };

const CLASS: ClassDefaults = ClassDefaults {
    max_position_embeddings: 32_768,
    num_key_value_heads: Some(4),
    ..ClassDefaults::LLAMA
};

fn spec(config: &Config) -> Result<ModelSpec, ModelError> {
    let d = Decoder::read(config, &CLASS)?;
    let router = Router {
        scoring: Scoring::Softmax,
        num_experts: config.dim_any(&["num_experts", "num_local_experts"])?,
        top_k: config.dim_or("num_experts_per_tok", 8)?,
        num_groups: 1,
        top_k_groups: 1,
        group_score_experts: 1,
        // GGUF does not state it; every release renormalizes.
        normalize: config.is_gguf() || config.bool_or("norm_topk_prob", false)?,
        scaling_factor: 1.0,
    };
    let step = config.dim_or("decoder_sparse_step", 1)?;
    let dense_layers = config.opt_numbers("mlp_only_layers")?.unwrap_or_default();
    let expert_width = config.dim("moe_intermediate_size")?;
    // The width is written whether or not there is a dense layer, and the norms are always there.
    config.no_effect(&["intermediate_size", "use_qk_norm"]);
    let blocks = attention(&d)?.into_iter().enumerate().map(|(i, gqa)| {
        let prefix = format!("model.layers.{i}.mlp");
        let dense = dense_layers.contains(&(i as f64)) || (i + 1) % step != 0;
        let ffn = if dense {
            FeedForwardSpec::from(d.gated(&prefix, config.dim("intermediate_size")?))
        } else {
            FeedForwardSpec::from(d.moe(&prefix, router, expert_width)?)
        };
        Ok(d.block(i, MixerSpec::Gqa(gqa), ffn))
    });
    d.finish(blocks.collect::<Result<_, ModelError>>()?)
}
