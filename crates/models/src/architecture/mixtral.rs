//! Mixtral: Mistral's attention, softmax routing over few large experts, always renormalized.

use super::Architecture;
use super::build::{ClassDefaults, Decoder};
use crate::config::Config;
use crate::error::ModelError;
use crate::spec::{FeedForwardSpec, MixerSpec, ModelSpec};
use marlin_tensor::{RopeStyle, Router, Scoring};

pub const ARCHITECTURE: Architecture =
    Architecture { model_types: &["mixtral"], name: "Mixtral", spec };

const CLASS: ClassDefaults = ClassDefaults {
    rms_norm_eps: 1e-5,
    rope_theta: 1e6,
    max_position_embeddings: 131_072,
    num_key_value_heads: Some(8),
    ..ClassDefaults::LLAMA
};

fn spec(config: &Config) -> Result<ModelSpec, ModelError> {
    let d = Decoder::read(config, &CLASS)?;
    let style = if config.is_gguf() { RopeStyle::Interleaved } else { RopeStyle::HalfSplit };
    let (_, _, head_dim) = d.heads()?;
    let mut rope = d.rope(head_dim, style)?;
    if config.is_gguf() {
        rope.divisors = Some("rope_freqs.weight".into());
    }
    let window = config.opt_dim("sliding_window")?.map(|w| w as u32);
    let router = Router {
        scoring: Scoring::Softmax,
        num_experts: config.dim_any(&["num_local_experts", "num_experts"])?,
        top_k: config.dim_or("num_experts_per_tok", 2)?,
        num_groups: 1,
        top_k_groups: 1,
        group_score_experts: 1,
        normalize: true,
        scaling_factor: 1.0,
    };
    let intermediate = config.dim("intermediate_size")?;
    let blocks = (0..d.num_layers).map(|i| {
        let mut gqa = d.gqa(i, Some(rope.clone()), false)?;
        gqa.params.window = window;
        let moe = d.moe(&format!("model.layers.{i}.mlp"), router, intermediate)?;
        Ok(d.block(i, MixerSpec::Gqa(gqa), FeedForwardSpec::from(moe)))
    });
    d.finish(blocks.collect::<Result<_, ModelError>>()?)
}
