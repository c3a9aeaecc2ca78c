//! Phi-3 and Phi-4 (dense): Llama with q, k, v and gate, up stored fused, optionally LongRoPE and
//! a partial rotary embedding.

use super::Architecture;
use super::build::{ClassDefaults, Decoder};
use crate::config::Config;
use crate::error::ModelError;
use crate::spec::{FeedForwardSpec, MixerSpec, ModelSpec};
use marlin_tensor::RopeStyle;

pub const ARCHITECTURE: Architecture =
    Architecture { model_types: &["phi3"], name: "Phi-3, Phi-4", spec };

const CLASS: ClassDefaults =
    ClassDefaults { rms_norm_eps: 1e-5, max_position_embeddings: 4096, ..ClassDefaults::LLAMA };

fn spec(config: &Config) -> Result<ModelSpec, ModelError> {
    let d = Decoder::read(config, &CLASS)?;
    let (_, _, head_dim) = d.heads()?;
    let rope = d.rope(head_dim, RopeStyle::HalfSplit)?;
    let window = config.opt_dim("sliding_window")?.map(|w| w as u32);
    let intermediate = config.dim("intermediate_size")?;
    let blocks = (0..d.num_layers).map(|i| {
        let mut gqa = d.gqa(i, Some(rope.clone()), config.bool_or("attention_bias", false)?)?;
        gqa.params.window = window;
        let ffn = d.gated(&format!("model.layers.{i}.mlp"), intermediate);
        Ok(d.block(i, MixerSpec::Gqa(gqa), FeedForwardSpec::from(ffn)))
    });
    d.finish(blocks.collect::<Result<_, ModelError>>()?)
}
