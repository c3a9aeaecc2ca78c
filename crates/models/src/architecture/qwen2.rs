//! Qwen2 and Qwen2.5: Llama with biases on q, k and v, and optionally a sliding window in the
//! layers from `max_window_layers` on.

use super::Architecture;
use super::build::{ClassDefaults, Decoder, sliding_layers};
use crate::config::Config;
use crate::error::ModelError;
use crate::spec::{FeedForwardSpec, MixerSpec, ModelSpec};
use marlin_tensor::RopeStyle;

pub const ARCHITECTURE: Architecture =
    Architecture { model_types: &["qwen2"], name: "Qwen2, Qwen2.5", spec };

const CLASS: ClassDefaults = ClassDefaults {
    max_position_embeddings: 32_768,
    num_key_value_heads: Some(32),
    ..ClassDefaults::LLAMA
};

/// The window of each layer in Qwen2's and Qwen3's convention.
pub fn windows(config: &Config, layers: usize) -> Result<Vec<Option<u32>>, ModelError> {
    let used = config.bool_or("use_sliding_window", false)?;
    let window = config.opt_dim("sliding_window")?;
    let window = window.filter(|_| used);
    let first = config.count_or("max_window_layers", 28)?;
    let sliding = sliding_layers(config, layers, |i| window.is_some() && i >= first)?;
    sliding
        .into_iter()
        .map(|slides| match (slides, window) {
            (false, _) => Ok(None),
            (true, Some(w)) => Ok(Some(w as u32)),
            (true, None) => {
                Err(config.error("sliding_window", "missing, but layer_types asks for it"))
            }
        })
        .collect()
}

fn spec(config: &Config) -> Result<ModelSpec, ModelError> {
    let d = Decoder::read(config, &CLASS)?;
    let (_, _, head_dim) = d.heads()?;
    let rope = d.rope(head_dim, RopeStyle::HalfSplit)?;
    let windows = windows(config, d.num_layers)?;
    // GGUF: stated for other architectures.
    config.no_effect(&["attention_bias"]);
    let intermediate = config.dim("intermediate_size")?;
    let blocks = windows.iter().enumerate().map(|(i, &window)| {
        let mut gqa = d.gqa(i, Some(rope.clone()), true)?;
        gqa.params.window = window;
        let ffn = d.gated(&format!("model.layers.{i}.mlp"), intermediate);
        Ok(d.block(i, MixerSpec::Gqa(gqa), FeedForwardSpec::from(ffn)))
    });
    d.finish(blocks.collect::<Result<_, ModelError>>()?)
}
