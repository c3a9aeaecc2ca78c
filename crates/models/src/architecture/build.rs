//! Pieces that most architectures share.

use crate::config::Config;
use crate::error::ModelError;
use crate::rope::{RopeConfig, RopeDefaults};
use crate::spec::{
    BlockSpec, EmbeddingSpec, FeedForwardSpec, FusedRows, GatedSpec, GqaSpec, HeadSpec, LinearSpec,
    MixerSpec, ModelSpec, MoeSpec, NormSpec, RopeSpec,
};
use marlin_tensor::{Activation, AttentionParams, RopeStyle, Router};
use std::collections::BTreeMap;

type Result<T> = std::result::Result<T, ModelError>;

/// More blocks or experts than any real model has; a larger number is a damaged file.
const MAX_LAYERS: usize = 1024;
const MAX_EXPERTS: usize = 4096;

/// Defaults of a model class, from transformers' configuration classes.
#[derive(Debug, Clone, Copy)]
pub struct ClassDefaults {
    /// `rms_norm_eps`.
    pub rms_norm_eps: f64,
    /// `rope_theta`.
    pub rope_theta: f64,
    /// `max_position_embeddings`.
    pub max_position_embeddings: usize,
    /// `tie_word_embeddings`.
    pub tie_word_embeddings: bool,
    /// `num_key_value_heads`; `None` is as many as query heads.
    pub num_key_value_heads: Option<usize>,
    /// `head_dim`; `None` divides the hidden size by the query heads.
    pub head_dim: Option<usize>,
    /// Added to stored norm weights.
    pub norm_offset: f32,
}

impl ClassDefaults {
    /// Llama's, which most classes change only here and there.
    pub const LLAMA: Self = Self {
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        max_position_embeddings: 2048,
        tie_word_embeddings: false,
        num_key_value_heads: None,
        head_dim: None,
        norm_offset: 0.0,
    };
}

/// Fields every decoder has.
pub struct Decoder<'a> {
    /// Configuration.
    pub config: &'a Config,
    /// `hidden_size`.
    pub hidden_size: usize,
    /// `vocab_size`.
    pub vocab_size: usize,
    /// `num_hidden_layers`.
    pub num_layers: usize,
    /// `max_position_embeddings`.
    pub max_position: usize,
    /// `rms_norm_eps`.
    pub eps: f32,
    /// Added to stored norm weights.
    pub norm_offset: f32,
    /// `hidden_act`.
    pub activation: Activation,
    class: ClassDefaults,
    tied: bool,
}

impl<'a> Decoder<'a> {
    /// Reads the common fields.
    ///
    /// # Errors
    /// When one is missing or invalid.
    pub fn read(config: &'a Config, class: &ClassDefaults) -> Result<Self> {
        let num_layers = config.dim("num_hidden_layers")?;
        if num_layers > MAX_LAYERS {
            let reason = format!("{num_layers} is more than {MAX_LAYERS}");
            return Err(config.error("num_hidden_layers", reason));
        }
        Ok(Self {
            config,
            hidden_size: config.dim("hidden_size")?,
            vocab_size: config.dim("vocab_size")?,
            num_layers,
            max_position: config
                .dim_or("max_position_embeddings", class.max_position_embeddings)?,
            eps: config.eps_or("rms_norm_eps", class.rms_norm_eps)?,
            norm_offset: if config.is_gguf() { 0.0 } else { class.norm_offset },
            activation: activation(config)?,
            tied: config.bool_or("tie_word_embeddings", class.tie_word_embeddings)?,
            class: *class,
        })
    }

    /// A norm of the class's epsilon.
    pub fn norm(&self, key: impl Into<String>, size: usize) -> NormSpec {
        NormSpec { key: key.into(), size, eps: self.eps, offset: self.norm_offset }
    }

    /// The rotary settings of a layer kind.
    ///
    /// # Errors
    /// When they are invalid.
    pub fn rope_config(&self, layer_type: Option<&str>) -> Result<RopeConfig> {
        RopeConfig::read(self.config, layer_type, self.class.rope_theta)
    }

    /// Rotary embedding of heads of `head_dim` columns.
    ///
    /// # Errors
    /// When the settings are invalid.
    pub fn rope(&self, head_dim: usize, style: RopeStyle) -> Result<RopeSpec> {
        self.rope_config(None)?.resolve(self.config, &self.rope_defaults(head_dim, style))
    }

    /// What [`RopeConfig::resolve`] wants to know.
    pub fn rope_defaults(&self, head_dim: usize, style: RopeStyle) -> RopeDefaults {
        RopeDefaults { head_dim, style, max_position: self.max_position }
    }

    /// Query heads, key/value heads and head size.
    ///
    /// # Errors
    /// When they do not divide.
    pub fn heads(&self) -> Result<(usize, usize, usize)> {
        let c = self.config;
        let heads = c.dim("num_attention_heads")?;
        let kv_heads =
            c.dim_or("num_key_value_heads", self.class.num_key_value_heads.unwrap_or(heads))?;
        if heads % kv_heads != 0 {
            let reason = format!("{kv_heads} does not divide num_attention_heads {heads}");
            return Err(c.error("num_key_value_heads", reason));
        }
        let head_dim = match (c.opt_dim("head_dim")?, self.class.head_dim) {
            (Some(d), _) => d,
            (None, Some(d)) if !c.is_gguf() => c.dim_or("head_dim", d)?,
            _ if self.hidden_size.is_multiple_of(heads) => self.hidden_size / heads,
            _ => {
                let reason = format!("{heads} does not divide hidden_size {}", self.hidden_size);
                return Err(c.error("num_attention_heads", reason));
            }
        };
        // GGUF states the size of values too.
        if let Some(value) = c.opt_dim("v_head_dim")?.filter(|&v| v != head_dim) {
            let reason = format!("{value} is not supported beside keys of {head_dim}");
            return Err(c.error("v_head_dim", reason));
        }
        Ok((heads, kv_heads, head_dim))
    }

    /// Plain grouped-query attention of layer `layer`; callers adjust what differs.
    ///
    /// # Errors
    /// When head counts are invalid.
    pub fn gqa(&self, layer: usize, rope: Option<RopeSpec>, bias: bool) -> Result<GqaSpec> {
        let (heads, kv_heads, head_dim) = self.heads()?;
        let prefix = format!("model.layers.{layer}.self_attn");
        let (q_rows, kv_rows, hidden) = (heads * head_dim, kv_heads * head_dim, self.hidden_size);
        let fused = |start| {
            let key = format!("{prefix}.qkv_proj");
            Some(FusedRows { key, start, total: q_rows + 2 * kv_rows })
        };
        let project = |name: &str, out, fused| LinearSpec {
            bias,
            fused,
            ..linear(format!("{prefix}.{name}"), out, hidden, format!("{prefix}.qkv"))
        };
        Ok(GqaSpec {
            q: project("q_proj", q_rows, fused(0)),
            k: project("k_proj", kv_rows, fused(q_rows)),
            v: project("v_proj", kv_rows, fused(q_rows + kv_rows)),
            o: linear(format!("{prefix}.o_proj"), hidden, q_rows, format!("{prefix}.o")),
            q_norm: None,
            k_norm: None,
            rope,
            params: AttentionParams {
                num_heads: heads,
                num_kv_heads: kv_heads,
                key_head_dim: head_dim,
                value_head_dim: head_dim,
                scale: (head_dim as f32).powf(-0.5),
                window: None,
                softcap: None,
            },
        })
    }

    /// The same with per-head norms of queries and keys.
    ///
    /// # Errors
    /// When head counts are invalid.
    pub fn gqa_normed(&self, layer: usize, rope: RopeSpec, bias: bool) -> Result<GqaSpec> {
        let mut spec = self.gqa(layer, Some(rope), bias)?;
        let (prefix, dim) = (format!("model.layers.{layer}.self_attn"), spec.params.key_head_dim);
        spec.q_norm = Some(self.norm(format!("{prefix}.q_norm"), dim));
        spec.k_norm = Some(self.norm(format!("{prefix}.k_norm"), dim));
        Ok(spec)
    }

    /// A gated feed-forward under `prefix`.
    pub fn gated(&self, prefix: &str, intermediate: usize) -> GatedSpec {
        let fused = |start| {
            Some(FusedRows {
                key: format!("{prefix}.gate_up_proj"),
                start,
                total: 2 * intermediate,
            })
        };
        let project = |name: &str, fused| LinearSpec {
            fused,
            ..linear(
                format!("{prefix}.{name}"),
                intermediate,
                self.hidden_size,
                format!("{prefix}.gate_up"),
            )
        };
        GatedSpec {
            gate: project("gate_proj", fused(0)),
            up: project("up_proj", fused(intermediate)),
            down: linear(
                format!("{prefix}.down_proj"),
                self.hidden_size,
                intermediate,
                format!("{prefix}.down"),
            ),
            activation: self.activation,
        }
    }

    /// Routed experts under `prefix`.
    ///
    /// # Errors
    /// When the router's numbers contradict each other.
    pub fn moe(&self, prefix: &str, router: Router, intermediate: usize) -> Result<MoeSpec> {
        let c = self.config;
        let n = router.num_experts;
        if n > MAX_EXPERTS || self.num_layers * n > 1 << 18 {
            let spellings = ["n_routed_experts", "num_experts", "num_local_experts"];
            let field = spellings.into_iter().find(|f| c.has(f)).unwrap_or("num_experts");
            return Err(c.error(field, format!("{n} experts in {} layers", self.num_layers)));
        }
        if router.top_k > n {
            let reason = format!("{} is more than the {n} experts", router.top_k);
            return Err(c.error("num_experts_per_tok", reason));
        }
        if !n.is_multiple_of(router.num_groups) || router.top_k_groups > router.num_groups {
            let reason =
                format!("{} of {} groups over {n} experts", router.top_k_groups, router.num_groups);
            return Err(c.error("n_group", reason));
        }
        if router.top_k > router.top_k_groups * (n / router.num_groups) {
            return Err(c.error(
                "topk_group",
                "the chosen groups hold fewer experts than num_experts_per_tok",
            ));
        }
        let expert = |e: usize| {
            let mut spec = self.gated(&format!("{prefix}.experts.{e}"), intermediate);
            // Stacked storage: [experts, rows, columns] under the name without the expert's number.
            for l in [&mut spec.gate, &mut spec.up, &mut spec.down] {
                let name = l.key.rsplit('.').next().unwrap_or_default();
                let key = format!("{prefix}.experts.{name}");
                l.fused =
                    Some(FusedRows { key, start: e * l.out_features, total: n * l.out_features });
            }
            spec
        };
        let gate = linear(format!("{prefix}.gate"), n, self.hidden_size, format!("{prefix}.gate"));
        Ok(MoeSpec {
            router,
            gate,
            correction_bias: None,
            experts: (0..n).map(expert).collect(),
            shared: None,
        })
    }

    /// A pre-norm block.
    pub fn block(
        &self,
        index: usize,
        mixer: MixerSpec,
        feed_forward: FeedForwardSpec,
    ) -> BlockSpec {
        let prefix = format!("model.layers.{index}");
        BlockSpec {
            index,
            input_norm: self.norm(format!("{prefix}.input_layernorm"), self.hidden_size),
            mixer,
            mixer_output_norm: None,
            feed_forward_norm: self
                .norm(format!("{prefix}.post_attention_layernorm"), self.hidden_size),
            feed_forward,
            feed_forward_output_norm: None,
        }
    }

    /// The whole model around `blocks`.
    ///
    /// # Errors
    /// When token ids are malformed.
    pub fn finish(&self, blocks: Vec<BlockSpec>) -> Result<ModelSpec> {
        let c = self.config;
        Ok(ModelSpec {
            model_type: c.opt_str("model_type")?.unwrap_or_default().to_owned(),
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            max_position_embeddings: self.max_position,
            embedding: EmbeddingSpec { key: "model.embed_tokens".into(), scale: 1.0 },
            blocks,
            norm: self.norm("model.norm", self.hidden_size),
            head: HeadSpec {
                linear: linear("lm_head", self.vocab_size, self.hidden_size, "lm_head"),
                tied: self.tied,
                softcap: None,
            },
            mtp: None,
            eos_token_ids: c.token_ids("eos_token_id")?,
            bos_token_id: c.token_ids("bos_token_id")?.first().copied(),
            defaults: BTreeMap::new(),
            unread: BTreeMap::new(),
        })
    }
}

/// A matrix without bias.
pub fn linear(
    key: impl Into<String>,
    out_features: usize,
    in_features: usize,
    label: impl Into<String>,
) -> LinearSpec {
    let (key, label) = (key.into(), label.into());
    LinearSpec { key, out_features, in_features, bias: false, label, fused: None }
}

/// `hidden_act` (Gemma: `hidden_activation`).
fn activation(config: &Config) -> Result<Activation> {
    let field =
        if config.get("hidden_activation").is_some() { "hidden_activation" } else { "hidden_act" };
    let default = match config.opt_str("model_type")? {
        Some("gemma3_text" | "gemma3") => "gelu_pytorch_tanh",
        _ => "silu",
    };
    match config.str_or(field, default)? {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
        "gelu" => Ok(Activation::Gelu),
        other => Err(config.unsupported(field, other, &["silu", "gelu_pytorch_tanh", "gelu"])),
    }
}

/// For each layer whether `field` calls it `yes` or `no`; nothing when the field is absent.
///
/// # Errors
/// When the list has another length or another entry.
pub fn layer_flags(
    config: &Config,
    field: &str,
    layers: usize,
    yes: &str,
    no: &str,
) -> Result<Option<Vec<bool>>> {
    let Some(types) = config.opt_strings(field)? else { return Ok(None) };
    if types.len() != layers {
        let reason = format!("{} entries for {layers} layers", types.len());
        return Err(config.error(field, reason));
    }
    let flag = |name: &&str| match *name {
        name if name == yes => Ok(true),
        name if name == no => Ok(false),
        other => Err(config.unsupported(field, other, &[yes, no])),
    };
    types.iter().map(flag).collect::<Result<_>>().map(Some)
}

/// Whether each layer slides, from `layer_types` or else a rule.
///
/// # Errors
/// When `layer_types` has another length or an unknown entry.
pub fn sliding_layers(
    config: &Config,
    layers: usize,
    rule: impl Fn(usize) -> bool,
) -> Result<Vec<bool>> {
    let (yes, no) = ("sliding_attention", "full_attention");
    let stated = layer_flags(config, "layer_types", layers, yes, no)?;
    Ok(stated.unwrap_or_else(|| (0..layers).map(rule).collect()))
}
