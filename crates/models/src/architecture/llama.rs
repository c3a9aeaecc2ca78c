//! Llama 1 – 3.x, SmolLM2, Mistral: pre-norm, grouped-query attention, SwiGLU.
//! GGUF files permute the rows of q and k so that rotary pairs are neighbours.

use super::Architecture;
use super::build::{ClassDefaults, Decoder};
use crate::config::Config;
use crate::error::ModelError;
use crate::spec::{FeedForwardSpec, MixerSpec, ModelSpec};
use marlin_tensor::RopeStyle;

pub const ARCHITECTURE: Architecture =
    Architecture { model_types: &["llama", "mistral"], name: "Llama, SmolLM2, Mistral", spec };

const MISTRAL: ClassDefaults = ClassDefaults {
    max_position_embeddings: 131_072,
    num_key_value_heads: Some(8),
    ..ClassDefaults::LLAMA
};

fn spec(config: &Config) -> Result<ModelSpec, ModelError> {
    let mistral = config.opt_str("model_type")? == Some("mistral");
    let d = Decoder::read(config, if mistral { &MISTRAL } else { &ClassDefaults::LLAMA })?;
    let style = if config.is_gguf() { RopeStyle::Interleaved } else { RopeStyle::HalfSplit };
    let (_, _, head_dim) = d.heads()?;
    let mut rope = d.rope(head_dim, style)?;
    if config.is_gguf() {
        rope.divisors = Some("rope_freqs.weight".into());
    }
    let bias = !mistral && config.bool_or("attention_bias", false)?;
    let mlp_bias = !mistral && config.bool_or("mlp_bias", false)?;
    let window = match mistral {
        true => config.dim_unless_null("sliding_window", 4096)?.map(|w| w as u32),
        false => None,
    };
    let intermediate = config.dim("intermediate_size")?;
    let blocks = (0..d.num_layers).map(|i| {
        let mut gqa = d.gqa(i, Some(rope.clone()), bias)?;
        gqa.o.bias = bias;
        gqa.params.window = window;
        let mut ffn = d.gated(&format!("model.layers.{i}.mlp"), intermediate);
        for l in [&mut ffn.gate, &mut ffn.up, &mut ffn.down] {
            l.bias = mlp_bias;
        }
        Ok(d.block(i, MixerSpec::Gqa(gqa), FeedForwardSpec::from(ffn)))
    });
    d.finish(blocks.collect::<Result<_, ModelError>>()?)
}
