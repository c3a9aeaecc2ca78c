//! DeepSeek-V2 and V3: latent attention and grouped mixture-of-experts routing.
//! V2 scores by softmax and never renormalizes; V3 scores by sigmoid, chooses with a correction
//! bias and weighs without it. The latent norms use eps 1e-6 whatever `rms_norm_eps` says.

use super::Architecture;
use super::build::{ClassDefaults, Decoder, layer_flags, linear};
use crate::config::Config;
use crate::error::ModelError;
use crate::spec::{
    BlockSpec, FeedForwardSpec, MixerSpec, MlaQuery, MlaSpec, ModelSpec, MtpSpec, NormSpec,
};
use marlin_tensor::{RopeStyle, Router, Scoring};

pub const V2: Architecture =
    Architecture { model_types: &["deepseek_v2"], name: "DeepSeek-V2", spec: spec_v2 };
pub const V3: Architecture =
    Architecture { model_types: &["deepseek_v3"], name: "DeepSeek-V3, R1", spec: spec_v3 };

/// Defaults of the routing fields, from transformers' configuration classes.
#[derive(Debug, Clone, Copy)]
pub struct MoeDefaults {
    /// `n_group`.
    pub num_groups: usize,
    /// `topk_group`.
    pub top_k_groups: usize,
    /// `first_k_dense_replace`.
    pub first_dense: usize,
    /// `routed_scaling_factor`.
    pub scaling_factor: f64,
    /// `n_shared_experts`.
    pub shared: usize,
}

const MOE_V2: MoeDefaults =
    MoeDefaults { num_groups: 1, top_k_groups: 1, first_dense: 0, scaling_factor: 1.0, shared: 2 };
const MOE_V3: MoeDefaults =
    MoeDefaults { num_groups: 8, top_k_groups: 4, first_dense: 3, scaling_factor: 2.5, shared: 1 };
const CLASS_V3: ClassDefaults =
    ClassDefaults { max_position_embeddings: 4096, ..ClassDefaults::LLAMA };

/// What the norms between the low-rank projections add to the mean square.
const LATENT_EPS: f32 = 1e-6;

fn spec_v2(config: &Config) -> Result<ModelSpec, ModelError> {
    let d = Decoder::read(config, &ClassDefaults::LLAMA)?;
    let grouped = match config.str_or("topk_method", "greedy")? {
        "greedy" => false,
        "group_limited_greedy" => true,
        other => {
            let accepted = ["greedy", "group_limited_greedy"];
            return Err(config.unsupported("topk_method", other, &accepted));
        }
    };
    scoring_is(config, "softmax")?;
    // As transformers: never renormalized, and without grouping there are no groups.
    config.no_effect(&["norm_topk_prob", "n_group", "topk_group"]);
    let router = Router {
        scoring: Scoring::Softmax,
        num_groups: if grouped { config.dim("n_group")? } else { 1 },
        top_k_groups: if grouped { config.dim("topk_group")? } else { 1 },
        group_score_experts: 1,
        normalize: false,
        ..router(config, &MOE_V2)?
    };
    let blocks = blocks(&d, router, &MOE_V2, false)?;
    d.finish(blocks)
}

fn spec_v3(config: &Config) -> Result<ModelSpec, ModelError> {
    noaux_spec(&Decoder::read(config, &CLASS_V3)?, &MOE_V3)
}

/// DeepSeek-V3's rules, shared with GLM-4.7-Flash.
pub fn noaux_spec(d: &Decoder, defaults: &MoeDefaults) -> Result<ModelSpec, ModelError> {
    let config = d.config;
    match config.str_or("topk_method", "noaux_tc")? {
        "noaux_tc" => {}
        other => return Err(config.unsupported("topk_method", other, &["noaux_tc"])),
    }
    scoring_is(config, "sigmoid")?;
    let router = Router {
        scoring: Scoring::Sigmoid,
        num_groups: config.dim_or("n_group", defaults.num_groups)?,
        top_k_groups: config.dim_or("topk_group", defaults.top_k_groups)?,
        group_score_experts: 2,
        normalize: config.bool_or("norm_topk_prob", true)?,
        ..router(config, defaults)?
    };
    let blocks = blocks(d, router, defaults, true)?;
    let mut spec = d.finish(blocks)?;
    spec.mtp = Some(mtp(d, router, defaults)?);
    Ok(spec)
}

fn scoring_is(config: &Config, expected: &str) -> Result<(), ModelError> {
    match config.str_or("scoring_func", expected)? {
        s if s == expected => Ok(()),
        other => Err(config.unsupported("scoring_func", other, &[expected])),
    }
}

/// Fields both versions read alike.
fn router(config: &Config, defaults: &MoeDefaults) -> Result<Router, ModelError> {
    let num_experts = config.dim_any(&["n_routed_experts", "num_experts", "num_local_experts"])?;
    Ok(Router {
        scoring: Scoring::Sigmoid,
        num_experts,
        top_k: config.dim("num_experts_per_tok")?,
        num_groups: 1,
        top_k_groups: 1,
        group_score_experts: 1,
        normalize: false,
        scaling_factor: config.f64_or("routed_scaling_factor", defaults.scaling_factor)? as f32,
    })
}

fn blocks(
    d: &Decoder,
    router: Router,
    defaults: &MoeDefaults,
    bias: bool,
) -> Result<Vec<BlockSpec>, ModelError> {
    let config = d.config;
    let dense = match layer_flags(config, "mlp_layer_types", d.num_layers, "dense", "sparse")? {
        Some(flags) => flags,
        None => {
            let first = config.count_or("first_k_dense_replace", defaults.first_dense)?;
            let every = config.dim_or("moe_layer_freq", 1)?;
            (0..d.num_layers).map(|i| i < first || i % every != 0).collect()
        }
    };
    let blocks = dense.into_iter().enumerate().map(|(i, dense)| {
        let ffn = if dense {
            let width = config.dim("intermediate_size")?;
            FeedForwardSpec::from(d.gated(&format!("model.layers.{i}.mlp"), width))
        } else {
            moe(d, i, router, defaults, bias)?
        };
        Ok(d.block(i, MixerSpec::Mla(mla(d, i)?), ffn))
    });
    blocks.collect()
}

fn moe(
    d: &Decoder,
    layer: usize,
    router: Router,
    defaults: &MoeDefaults,
    bias: bool,
) -> Result<FeedForwardSpec, ModelError> {
    let prefix = format!("model.layers.{layer}.mlp");
    let width = d.config.dim("moe_intermediate_size")?;
    let mut moe = d.moe(&prefix, router, width)?;
    moe.correction_bias = bias.then(|| format!("{prefix}.gate.e_score_correction_bias"));
    let shared = d.config.count_or(
        "n_shared_experts",
        if d.config.has("n_shared_experts") { 0 } else { defaults.shared },
    )?;
    if shared > 0 {
        moe.shared = Some(d.gated(&format!("{prefix}.shared_experts"), width * shared));
    }
    Ok(FeedForwardSpec::from(moe))
}

fn mla(d: &Decoder, layer: usize) -> Result<MlaSpec, ModelError> {
    let (c, prefix) = (d.config, format!("model.layers.{layer}.self_attn"));
    let heads = c.dim("num_attention_heads")?;
    let kv_heads = c.dim_or("num_key_value_heads", heads)?;
    // GGUF files of the absorbed form state one key/value head.
    if kv_heads != heads && !c.is_gguf() {
        let reason =
            format!("latent attention needs {heads} (num_attention_heads), found {kv_heads}");
        return Err(c.error("num_key_value_heads", reason));
    }
    // Old GLM files call the rotary width `head_dim`; new files state the sum as well.
    c.no_effect(&["head_dim", "qk_head_dim"]);
    let (rank, rope_dim) = (c.dim("kv_lora_rank")?, c.dim("qk_rope_head_dim")?);
    let (nope, value) = (c.dim("qk_nope_head_dim")?, c.dim("v_head_dim")?);
    let q_rows = heads * (nope + rope_dim);
    let bias = c.bool_or("attention_bias", false)?;
    let latent_norm = |name: &str, size| NormSpec {
        key: format!("{prefix}.{name}"),
        size,
        eps: LATENT_EPS,
        offset: 0.0,
    };
    let input = |name: &str, out| {
        let mut l =
            linear(format!("{prefix}.{name}"), out, d.hidden_size, format!("{prefix}.input"));
        l.bias = bias && name != "q_proj";
        l
    };
    let query = match c.opt_dim("q_lora_rank")? {
        None => MlaQuery::Full(input("q_proj", q_rows)),
        Some(q_rank) => MlaQuery::LowRank {
            a: input("q_a_proj", q_rank),
            norm: latent_norm("q_a_layernorm", q_rank),
            b: linear(format!("{prefix}.q_b_proj"), q_rows, q_rank, format!("{prefix}.q_b")),
        },
    };
    let style = match c.bool_or("rope_interleave", true)? {
        true => RopeStyle::Interleaved,
        false => RopeStyle::HalfSplit,
    };
    let settings = d.rope_config(None)?;
    let correction = settings.mla_scale_correction()?;
    let mut o =
        linear(format!("{prefix}.o_proj"), d.hidden_size, heads * value, format!("{prefix}.o"));
    o.bias = bias;
    Ok(MlaSpec {
        query,
        kv_a: input("kv_a_proj_with_mqa", rank + rope_dim),
        kv_a_norm: latent_norm("kv_a_layernorm", rank),
        kv_b: linear(
            format!("{prefix}.kv_b_proj"),
            heads * (nope + value),
            rank,
            format!("{prefix}.kv_b"),
        ),
        o,
        rope: settings.resolve(c, &d.rope_defaults(rope_dim, style))?,
        num_heads: heads,
        kv_lora_rank: rank,
        qk_nope_head_dim: nope,
        qk_rope_head_dim: rope_dim,
        v_head_dim: value,
        scale: ((nope + rope_dim) as f32).powf(-0.5) * correction,
    })
}

/// The layer after the last: next-but-one token from the trunk's state and the next token.
fn mtp(d: &Decoder, router: Router, defaults: &MoeDefaults) -> Result<MtpSpec, ModelError> {
    let (layer, hidden) = (d.num_layers, d.hidden_size);
    let prefix = format!("model.layers.{layer}");
    let mixer = MixerSpec::Mla(mla(d, layer)?);
    let feed_forward = moe(d, layer, router, defaults, true)?;
    Ok(MtpSpec {
        embedding_norm: d.norm(format!("{prefix}.enorm"), hidden),
        hidden_norm: d.norm(format!("{prefix}.hnorm"), hidden),
        projection: linear(
            format!("{prefix}.eh_proj"),
            hidden,
            2 * hidden,
            format!("{prefix}.eh_proj"),
        ),
        block: d.block(layer, mixer, feed_forward),
        norm: d.norm(format!("{prefix}.shared_head.norm"), hidden),
    })
}
