//! Gemma 3 (text): scaled embedding, four norms a block with `1 + w`, per-head norms, local layers
//! with their own rotary base between global ones, GELU gate, tied head.

use super::Architecture;
use super::build::{ClassDefaults, Decoder, sliding_layers};
use crate::config::Config;
use crate::error::ModelError;
use crate::rope::RopeConfig;
use crate::spec::{FeedForwardSpec, MixerSpec, ModelSpec, RopeSpec};
use marlin_tensor::RopeStyle;

pub const ARCHITECTURE: Architecture =
    Architecture { model_types: &["gemma3_text", "gemma3"], name: "Gemma 3 (text)", spec };

const CLASS: ClassDefaults = ClassDefaults {
    rope_theta: 1e6,
    max_position_embeddings: 131_072,
    tie_word_embeddings: true,
    num_key_value_heads: Some(4),
    head_dim: Some(256),
    norm_offset: 1.0,
    ..ClassDefaults::LLAMA
};

fn spec(config: &Config) -> Result<ModelSpec, ModelError> {
    let d = Decoder::read(config, &CLASS)?;
    let (_, _, head_dim) = d.heads()?;
    // New files state the pattern under this name beside `layer_types`, which follows it.
    config.no_effect(&["_sliding_window_pattern"]);
    let pattern = config.dim_or("sliding_window_pattern", 6)?;
    let sliding = sliding_layers(config, d.num_layers, |i| (i + 1) % pattern != 0)?;
    let window = config.dim_or("sliding_window", 4096)? as u32;
    let scalar = config
        .f64_or("query_pre_attn_scalar", if config.is_gguf() { head_dim as f64 } else { 256.0 })?;
    if scalar <= 0.0 {
        return Err(config.error("query_pre_attn_scalar", format!("{scalar} is not positive")));
    }
    let softcap = |field: &str| Ok::<_, ModelError>(config.opt_f64(field)?.map(|c| c as f32));
    let (attention_softcap, final_softcap) =
        (softcap("attn_logit_softcapping")?, softcap("final_logit_softcapping")?);
    let (local, global) = ropes(config, &d, head_dim)?;
    let intermediate = config.dim("intermediate_size")?;
    let blocks = sliding.into_iter().enumerate().map(|(i, slides)| {
        let rope = if slides { local.clone() } else { global.clone() };
        let mut gqa = d.gqa_normed(i, rope, config.bool_or("attention_bias", false)?)?;
        gqa.o.bias = gqa.q.bias;
        gqa.params.scale = scalar.powf(-0.5) as f32;
        gqa.params.window = slides.then_some(window);
        gqa.params.softcap = attention_softcap;
        let prefix = format!("model.layers.{i}");
        let ffn = d.gated(&format!("{prefix}.mlp"), intermediate);
        let mut block = d.block(i, MixerSpec::Gqa(gqa), FeedForwardSpec::from(ffn));
        block.mixer_output_norm = Some(block.feed_forward_norm);
        block.feed_forward_norm =
            d.norm(format!("{prefix}.pre_feedforward_layernorm"), d.hidden_size);
        block.feed_forward_output_norm =
            Some(d.norm(format!("{prefix}.post_feedforward_layernorm"), d.hidden_size));
        Ok(block)
    });
    let mut spec = d.finish(blocks.collect::<Result<_, ModelError>>()?)?;
    spec.embedding.scale = (d.hidden_size as f32).sqrt();
    spec.head.softcap = final_softcap;
    Ok(spec)
}

/// Rotary embeddings of local and global layers. The old layout has one `rope_scaling`, for the
/// global layers, and `rope_local_base_freq`; the new one nests an object per layer kind.
fn ropes(
    config: &Config,
    d: &Decoder,
    head_dim: usize,
) -> Result<(RopeSpec, RopeSpec), ModelError> {
    let defaults = d.rope_defaults(head_dim, RopeStyle::HalfSplit);
    let nested =
        config.object("rope_parameters")?.is_some_and(|p| p.get("sliding_attention").is_some());
    let (local, global) = if nested {
        (d.rope_config(Some("sliding_attention"))?, d.rope_config(Some("full_attention"))?)
    } else {
        let local = config.f64_or("rope_local_base_freq", 10_000.0)?;
        (RopeConfig::unscaled(local), d.rope_config(None)?)
    };
    Ok((local.resolve(config, &defaults)?, global.resolve(config, &defaults)?))
}
