//! GGUF: metadata to the configuration fields of Hugging Face, and tensor names.
//!
//! GGUF names its fields `ARCH.field`; this table gives each the `config.json` spelling, so one
//! function per architecture builds the specification of both containers. Source: the `gguf`
//! package's constants and llama.cpp's conversion scripts (facts).

use crate::error::ModelError;
use serde_json::{Map, Value, json};
use std::path::Path;

/// GGUF architectures that are read, each with the Hugging Face `model_type` it becomes.
pub const ARCHITECTURES: [(&str, &str); 7] = [
    ("llama", "llama"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("qwen3moe", "qwen3_moe"),
    ("gemma3", "gemma3_text"),
    ("phi3", "phi3"),
    ("deepseek2", "deepseek_v3"),
];

/// Metadata field (after `ARCH.`), configuration field.
const FIELDS: [(&str, &str); 29] = [
    ("embedding_length", "hidden_size"),
    ("block_count", "num_hidden_layers"),
    ("feed_forward_length", "intermediate_size"),
    ("expert_feed_forward_length", "moe_intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("attention.sliding_window", "sliding_window"),
    ("context_length", "max_position_embeddings"),
    ("vocab_size", "vocab_size"),
    ("rope.freq_base", "rope_theta"),
    ("attention.sliding_window_pattern", "sliding_window_pattern"),
    ("rope.freq_base_swa", "rope_local_base_freq"),
    ("rope.dimension_count", "rotary_dim"),
    ("rope.scaling.original_context_length", "original_max_position_embeddings"),
    ("expert_count", "num_experts"),
    ("expert_used_count", "num_experts_per_tok"),
    ("expert_shared_count", "n_shared_experts"),
    ("expert_weights_scale", "routed_scaling_factor"),
    ("expert_weights_norm", "norm_topk_prob"),
    ("expert_group_count", "n_group"),
    ("expert_group_used_count", "topk_group"),
    ("leading_dense_block_count", "first_k_dense_replace"),
    ("attention.q_lora_rank", "q_lora_rank"),
    ("attention.kv_lora_rank", "kv_lora_rank"),
    ("attention.value_length", "v_head_dim"),
    ("final_logit_softcapping", "final_logit_softcapping"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
];

/// Further metadata fields that are read, or that do not change what is computed.
const OTHER_FIELDS: [&str; 14] = [
    "attention.key_length_mla",
    "attention.value_length_mla",
    "expert_gating_func",
    "nextn_predict_layers",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
];

/// LongRoPE's divisors of the rotary frequencies: for long contexts, for short ones.
pub const LONG_FACTORS: [&str; 2] = ["rope_factors_long.weight", "rope_factors_short.weight"];

/// The configuration that a GGUF's metadata describes. `has` says whether a tensor is stored:
/// biases, LongRoPE and an untied head show by their tensors alone.
///
/// # Errors
/// When the architecture is unknown or a field is missing.
pub fn config(
    file: &Path,
    metadata: &Map<String, Value>,
    has: &dyn Fn(&str) -> bool,
) -> Result<Value, ModelError> {
    let error = |field: &str, reason: String| ModelError::Config {
        file: file.to_owned(),
        field: field.to_owned(),
        reason,
    };
    let arch = metadata
        .get("general.architecture")
        .and_then(Value::as_str)
        .ok_or_else(|| error("general.architecture", "required field is missing".into()))?;
    let Some((_, mut model_type)) = ARCHITECTURES.iter().find(|(a, _)| *a == arch).copied() else {
        let known: Vec<&str> = ARCHITECTURES.iter().map(|a| a.0).collect();
        let reason = format!("{arch:?} is not supported; supported: {}", known.join(", "));
        return Err(error("general.architecture", reason));
    };
    let field = |name: &str| metadata.get(&format!("{arch}.{name}"));
    let mut config = Map::new();
    for (theirs, ours) in FIELDS {
        if let Some(value) = field(theirs) {
            config.insert(ours.into(), value.clone());
        }
    }
    if arch == "llama" && field("expert_count").and_then(Value::as_u64).unwrap_or(0) > 0 {
        model_type = "mixtral";
    }
    config.insert("model_type".into(), json!(model_type));
    config.insert("tie_word_embeddings".into(), json!(!has("output.weight")));
    if let Some(tokens) = metadata.get("tokenizer.ggml.tokens").and_then(Value::as_array) {
        config.insert("vocab_size".into(), json!(tokens.len()));
    }
    for (theirs, ours) in [("eos_token_id", "eos_token_id"), ("bos_token_id", "bos_token_id")] {
        if let Some(value) = metadata.get(&format!("tokenizer.ggml.{theirs}")) {
            config.insert(ours.into(), value.clone());
        }
    }
    // Prediction layers are counted as blocks; they are not part of the trunk.
    if let Some(ahead) = field("nextn_predict_layers").and_then(Value::as_u64) {
        let blocks = field("block_count").and_then(Value::as_u64).unwrap_or(0);
        config.insert("num_hidden_layers".into(), json!(blocks.saturating_sub(ahead)));
    }
    rope(arch, metadata, has, &mut config).map_err(|(f, r)| error(&f, r))?;
    config.insert("attention_bias".into(), json!(has("blk.0.attn_q.bias")));
    config.insert("mlp_bias".into(), json!(has("blk.0.ffn_gate.bias")));
    if arch == "gemma3" {
        // Not stated: the 27B model, told by its depth, divides by the hidden size per head.
        let number = |name: &str| field(name).and_then(Value::as_f64);
        if let (Some(62.0), Some(hidden), Some(heads)) =
            (number("block_count"), number("embedding_length"), number("attention.head_count"))
        {
            config.insert("query_pre_attn_scalar".into(), json!(hidden / heads));
        }
    }
    if arch == "deepseek2" {
        mla(metadata, &mut config).map_err(|(f, r)| error(&f, r))?;
    }
    // What nothing here stands for goes on under its own name, to be reported as unread.
    for (key, value) in metadata {
        let Some((_, name)) = key.split_once('.').filter(|(first, _)| *first == arch) else {
            continue;
        };
        if !FIELDS.iter().any(|(theirs, _)| *theirs == name) && !OTHER_FIELDS.contains(&name) {
            config.insert(key.clone(), value.clone());
        }
    }
    Ok(Value::Object(config))
}

type FieldError = (String, String);

/// `rope.scaling.*` and LongRoPE's tensors to `rope_scaling`.
fn rope(
    arch: &str,
    metadata: &Map<String, Value>,
    has: &dyn Fn(&str) -> bool,
    config: &mut Map<String, Value>,
) -> Result<(), FieldError> {
    let name = |field: &str| format!("{arch}.rope.{field}");
    let field = |field: &str| metadata.get(&name(field));
    // Multipliers whose meaning differs between writers.
    let multipliers = ["scale_linear", "scaling.yarn_attn_factor", "scaling.yarn_ext_factor"];
    for multiplier in multipliers {
        if let Some(value) = field(multiplier).filter(|v| v.as_f64() != Some(1.0)) {
            return Err((name(multiplier), format!("{value} is not supported; supported: 1")));
        }
    }
    let kind = field("scaling.type").and_then(Value::as_str).unwrap_or("none");
    let long = LONG_FACTORS.iter().all(|t| has(t));
    let mut scaling = Map::new();
    match kind {
        "none" | "longrope" if long => {
            // Converters leave the type out; the factors themselves are tensors.
            scaling.insert("rope_type".into(), json!("longrope"));
            let factor = field("scaling.attn_factor").cloned().unwrap_or(json!(1.0));
            scaling.insert("attention_factor".into(), factor);
        }
        "none" => return Ok(()),
        "linear" | "yarn" if !long => {
            scaling.insert("rope_type".into(), json!(kind));
            if let Some(value) = field("scaling.attn_factor").filter(|v| v.as_f64() != Some(1.0)) {
                let reason = format!("{value} with {kind} is not supported; supported: 1");
                return Err((name("scaling.attn_factor"), reason));
            }
        }
        "linear" | "yarn" | "longrope" => {
            let reason = format!("{kind:?}, and {} stored: {long}", LONG_FACTORS[0]);
            return Err((name("scaling.type"), reason));
        }
        other => {
            let supported = "none, linear, yarn, longrope";
            let reason = format!("{other:?} is not supported; supported: {supported}");
            return Err((name("scaling.type"), reason));
        }
    }
    for (theirs, ours) in [
        ("factor", "factor"),
        ("original_context_length", "original_max_position_embeddings"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ] {
        if let Some(value) = field(&format!("scaling.{theirs}")) {
            scaling.insert(ours.into(), value.clone());
        }
    }
    if arch == "deepseek2" && kind == "yarn" {
        // 0.1 * mscale_all_dim; files cannot state another mscale.
        let Some(m) = field("scaling.yarn_log_multiplier").and_then(Value::as_f64) else {
            let reason = "required field is missing; convert the model anew";
            return Err((name("scaling.yarn_log_multiplier"), reason.into()));
        };
        scaling.insert("mscale".into(), json!(m * 10.0));
        scaling.insert("mscale_all_dim".into(), json!(m * 10.0));
    }
    config.insert("rope_scaling".into(), Value::Object(scaling));
    Ok(())
}

/// DeepSeek's and GLM's latent attention, whose head sizes GGUF states in its own way, and routing,
/// whose absent fields mean "off" instead of the model class's default.
fn mla(metadata: &Map<String, Value>, config: &mut Map<String, Value>) -> Result<(), FieldError> {
    let name = |field: &str| format!("deepseek2.{field}");
    let number = |field: &str| metadata.get(&name(field)).and_then(Value::as_u64);
    let need = |field: &str| {
        number(field).ok_or_else(|| (name(field), "required field is missing".to_owned()))
    };
    let rope = need("rope.dimension_count")?;
    let key = match number("attention.key_length_mla") {
        Some(n) => n,
        None => need("attention.key_length")?,
    };
    let value = match number("attention.value_length_mla") {
        Some(n) => n,
        None => need("attention.value_length")?,
    };
    let Some(nope) = key.checked_sub(rope).filter(|&n| n > 0) else {
        return Err((
            name("attention.key_length"),
            format!("{key} is not larger than rope.dimension_count {rope}"),
        ));
    };
    config.insert("qk_nope_head_dim".into(), json!(nope));
    config.insert("qk_rope_head_dim".into(), json!(rope));
    config.insert("v_head_dim".into(), json!(value));
    config.remove("head_dim");
    let heads = config.get("num_attention_heads").cloned().unwrap_or(Value::Null);
    config.insert("num_key_value_heads".into(), heads);
    for (field, off) in [
        ("n_shared_experts", json!(0)),
        ("first_k_dense_replace", json!(0)),
        ("routed_scaling_factor", json!(1.0)),
        ("norm_topk_prob", json!(false)),
    ] {
        config.entry(field).or_insert(off);
    }
    // 1 = softmax (DeepSeek-V2), 2 = sigmoid (DeepSeek-V3, GLM).
    match number("expert_gating_func").unwrap_or(1) {
        1 => {
            for (field, other) in [("expert_group_count", 2..), ("expert_weights_norm", 1..)] {
                let value = metadata.get(&name(field));
                let value = value.and_then(|v| v.as_u64().or(v.as_bool().map(u64::from)));
                if value.is_some_and(|v| other.contains(&v)) {
                    let reason = "not supported with softmax scores (expert_gating_func 1)";
                    return Err((name(field), reason.into()));
                }
            }
            config.insert("model_type".into(), json!("deepseek_v2"));
            config.insert("topk_method".into(), json!("greedy"));
        }
        2 => {
            // Files from before these fields exist for grouped and ungrouped models alike.
            need("expert_group_count")?;
            need("expert_group_used_count")?;
        }
        other => {
            let reason = format!("{other} is not supported; supported: 1 (softmax), 2 (sigmoid)");
            return Err((name("expert_gating_func"), reason));
        }
    }
    Ok(())
}

/// Hugging Face module inside a layer, GGUF names it may have.
const LAYER_NAMES: [(&str, &[&str]); 29] = [
    ("input_layernorm", &["attn_norm"]),
    ("self_attn.q_proj", &["attn_q"]),
    ("self_attn.k_proj", &["attn_k"]),
    ("self_attn.v_proj", &["attn_v"]),
    ("self_attn.o_proj", &["attn_output"]),
    ("self_attn.qkv_proj", &["attn_qkv"]),
    ("self_attn.q_norm", &["attn_q_norm"]),
    ("self_attn.k_norm", &["attn_k_norm"]),
    ("self_attn.q_a_proj", &["attn_q_a"]),
    ("self_attn.q_a_layernorm", &["attn_q_a_norm"]),
    ("self_attn.q_b_proj", &["attn_q_b"]),
    ("self_attn.kv_a_proj_with_mqa", &["attn_kv_a_mqa"]),
    ("self_attn.kv_a_layernorm", &["attn_kv_a_norm"]),
    ("self_attn.kv_b_proj", &["attn_kv_b"]),
    ("post_attention_layernorm", &["post_attention_norm", "ffn_norm"]),
    ("pre_feedforward_layernorm", &["ffn_norm"]),
    ("post_feedforward_layernorm", &["post_ffw_norm"]),
    ("mlp.gate_proj", &["ffn_gate"]),
    ("mlp.up_proj", &["ffn_up"]),
    ("mlp.down_proj", &["ffn_down"]),
    ("mlp.gate_up_proj", &["ffn_up"]),
    ("mlp.gate", &["ffn_gate_inp"]),
    ("mlp.gate.e_score_correction_bias", &["exp_probs_b"]),
    ("mlp.experts.gate_proj", &["ffn_gate_exps"]),
    ("mlp.experts.up_proj", &["ffn_up_exps"]),
    ("mlp.experts.down_proj", &["ffn_down_exps"]),
    ("mlp.shared_experts.gate_proj", &["ffn_gate_shexp"]),
    ("mlp.shared_experts.up_proj", &["ffn_up_shexp"]),
    ("mlp.shared_experts.down_proj", &["ffn_down_shexp"]),
];

/// GGUF names (without `.weight`) that the module `key` may have; never empty.
pub fn tensor_names(key: &str) -> Vec<String> {
    let whole = match key {
        "model.embed_tokens" => Some("token_embd"),
        "model.norm" => Some("output_norm"),
        "lm_head" => Some("output"),
        _ => None,
    };
    if let Some(name) = whole {
        return vec![name.to_owned()];
    }
    let mapped = key.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')).and_then(
        |(layer, module)| {
            let (_, names) = LAYER_NAMES.iter().find(|(ours, _)| *ours == module)?;
            Some(names.iter().map(|n| format!("blk.{layer}.{n}")).collect())
        },
    );
    mapped.unwrap_or_else(|| vec![key.to_owned()])
}

/// Full GGUF names of parameters that are not `MODULE.weight`.
pub fn parameter_names(key: &str) -> Vec<String> {
    match key.strip_suffix(".e_score_correction_bias") {
        Some(_) => tensor_names(key).into_iter().map(|n| format!("{n}.bias")).collect(),
        None => Vec::new(),
    }
}
