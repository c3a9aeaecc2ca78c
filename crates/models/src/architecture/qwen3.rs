//! Qwen3 dense: per-head norms of queries and keys, no biases, explicit `head_dim`.

use super::Architecture;
use super::build::{ClassDefaults, Decoder};
use super::qwen2::windows;
use crate::config::Config;
use crate::error::ModelError;
use crate::spec::{FeedForwardSpec, GqaSpec, MixerSpec, ModelSpec};
use marlin_tensor::RopeStyle;

pub const ARCHITECTURE: Architecture =
    Architecture { model_types: &["qwen3"], name: "Qwen3", spec };

const CLASS: ClassDefaults = ClassDefaults {
    max_position_embeddings: 32_768,
    num_key_value_heads: Some(32),
    head_dim: Some(128),
    ..ClassDefaults::LLAMA
};

/// Attention of every layer, shared with the mixture-of-experts variant.
pub fn attention(d: &Decoder) -> Result<Vec<GqaSpec>, ModelError> {
    let (_, _, head_dim) = d.heads()?;
    let rope = d.rope(head_dim, RopeStyle::HalfSplit)?;
    let bias = d.config.bool_or("attention_bias", false)?;
    let windows = windows(d.config, d.num_layers)?;
    let layers = windows.iter().enumerate().map(|(i, &window)| {
        let mut gqa = d.gqa_normed(i, rope.clone(), bias)?;
        gqa.o.bias = bias;
        gqa.params.window = window;
        Ok(gqa)
    });
    layers.collect()
}

fn spec(config: &Config) -> Result<ModelSpec, ModelError> {
    let d = Decoder::read(config, &CLASS)?;
    let intermediate = config.dim("intermediate_size")?;
    let blocks = attention(&d)?.into_iter().enumerate().map(|(i, gqa)| {
        let ffn = d.gated(&format!("model.layers.{i}.mlp"), intermediate);
        d.block(i, MixerSpec::Gqa(gqa), FeedForwardSpec::from(ffn))
    });
    d.finish(blocks.collect())
}
