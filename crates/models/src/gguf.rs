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
const FIELDS: [(&str, &str); 27] = [
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
    ("rope.dimension_count", "qk_rope_head_dim"),
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

/// The configuration that a GGUF's metadata describes.
///
/// # Errors
/// When the architecture is unknown or a field is missing.
pub fn config(
    file: &Path,
    metadata: &Map<String, Value>,
    has_output: bool,
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
    config.insert("tie_word_embeddings".into(), json!(!has_output));
    if let Some(tokens) = metadata.get("tokenizer.ggml.tokens").and_then(Value::as_array) {
        config.insert("vocab_size".into(), json!(tokens.len()));
    }
    for (theirs, ours) in [("eos_token_id", "eos_token_id"), ("bos_token_id", "bos_token_id")] {
        if let Some(value) = metadata.get(&format!("tokenizer.ggml.{theirs}")) {
            config.insert(ours.into(), value.clone());
        }
    }
    rope(arch, metadata, &mut config).map_err(|(f, r)| error(&f, r))?;
    if arch == "qwen2" {
        config.insert("attention_bias".into(), json!(true));
    }
    if arch == "gemma3" {
        let global = config.get("rope_theta").cloned().unwrap_or(json!(1e6));
        config.insert("rope_theta".into(), global);
        config.entry("rope_local_base_freq").or_insert(json!(10000.0));
    }
    if arch == "deepseek2" {
        mla(metadata, &mut config).map_err(|(f, r)| error(&f, r))?;
    }
    Ok(Value::Object(config))
}

type FieldError = (String, String);

/// `rope.scaling.*` to `rope_scaling`.
fn rope(
    arch: &str,
    metadata: &Map<String, Value>,
    config: &mut Map<String, Value>,
) -> Result<(), FieldError> {
    let field = |name: &str| metadata.get(&format!("{arch}.rope.scaling.{name}"));
    let Some(kind) = field("type").and_then(Value::as_str) else { return Ok(()) };
    let mut scaling = Map::new();
    match kind {
        // LongRoPE's divisors are tensors in GGUF.
        "none" | "longrope" => return Ok(()),
        "linear" | "yarn" => scaling.insert("rope_type".into(), json!(kind)),
        other => {
            let name = format!("{arch}.rope.scaling.type");
            return Err((
                name,
                format!("{other:?} is not supported; supported: none, linear, yarn, longrope"),
            ));
        }
    };
    for (theirs, ours) in [
        ("factor", "factor"),
        ("original_context_length", "original_max_position_embeddings"),
        ("attn_factor", "attention_factor"),
    ] {
        if let Some(value) = field(theirs) {
            scaling.insert(ours.into(), value.clone());
        }
    }
    // The multiplier is 0.1 * mscale_all_dim in DeepSeek's files.
    if let Some(m) = field("yarn_log_multiplier").and_then(Value::as_f64) {
        scaling.insert("mscale".into(), json!(m * 10.0));
        scaling.insert("mscale_all_dim".into(), json!(m * 10.0));
    }
    config.insert("rope_scaling".into(), Value::Object(scaling));
    Ok(())
}

/// DeepSeek's and GLM's latent attention, whose head sizes GGUF states in its own way.
fn mla(metadata: &Map<String, Value>, config: &mut Map<String, Value>) -> Result<(), FieldError> {
    let number = |name: &str| metadata.get(&format!("deepseek2.{name}")).and_then(Value::as_u64);
    let need = |name: &str| {
        number(name)
            .ok_or_else(|| (format!("deepseek2.{name}"), "required field is missing".to_owned()))
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
            "deepseek2.attention.key_length".into(),
            format!("{key} is not larger than rope.dimension_count {rope}"),
        ));
    };
    config.insert("qk_nope_head_dim".into(), json!(nope));
    config.insert("v_head_dim".into(), json!(value));
    config.remove("head_dim");
    let heads = config.get("num_attention_heads").cloned().unwrap_or(Value::Null);
    config.insert("num_key_value_heads".into(), heads);
    // 1 = softmax (DeepSeek-V2), 2 = sigmoid (DeepSeek-V3, GLM).
    match number("expert_gating_func").unwrap_or(1) {
        1 => {
            config.insert("model_type".into(), json!("deepseek_v2"));
            config.insert("topk_method".into(), json!("greedy"));
        }
        2 => {}
        other => {
            let reason = format!("{other} is not supported; supported: 1 (softmax), 2 (sigmoid)");
            return Err(("deepseek2.expert_gating_func".into(), reason));
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
