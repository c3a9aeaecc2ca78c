//! Real `config.json` files, described without a weight. Parameter counts are transformers' own
//! (5.23.0, meta device, `crates/testkit/fixtures/count_parameters.py`).

use marlin_checkpoint::{Checkpoint, Container};
use marlin_models::{MixerSpec, ModelError, ModelSpec, spec};
use marlin_tensor::CacheType;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

struct Row {
    config: &'static str,
    parameters: u64,
    /// Without the embedding, with the head, chosen experts only.
    active_parameters: u64,
    /// f16.
    cache_bytes_per_token: usize,
    latent: bool,
}

const ROWS: [Row; 7] = [
    Row {
        config: "Meta-Llama-3.1-8B",
        parameters: 8_030_261_248,
        active_parameters: 8_030_261_248 - 525_336_576,
        cache_bytes_per_token: 32 * 2 * 8 * 128 * 2,
        latent: false,
    },
    Row {
        config: "Qwen3-0.6B",
        parameters: 596_049_920,
        active_parameters: 596_049_920,
        cache_bytes_per_token: 28 * 2 * 8 * 128 * 2,
        latent: false,
    },
    Row {
        config: "Qwen3-30B-A3B",
        parameters: 30_532_122_624,
        active_parameters: 30_532_122_624 - 311_164_928 - 48 * 120 * 3 * 2048 * 768,
        cache_bytes_per_token: 48 * 2 * 4 * 128 * 2,
        latent: false,
    },
    Row {
        config: "Mixtral-8x7B-v0.1",
        parameters: 46_702_792_704,
        active_parameters: 46_702_792_704 - 131_072_000 - 32 * 6 * 3 * 4096 * 14_336,
        cache_bytes_per_token: 32 * 2 * 8 * 128 * 2,
        latent: false,
    },
    Row {
        config: "GLM-4.7-Flash",
        parameters: 29_943_393_920,
        active_parameters: 29_943_393_920 - 317_194_240 - 46 * 60 * 3 * 2048 * 1536,
        cache_bytes_per_token: 47 * (512 + 64) * 2,
        latent: true,
    },
    Row {
        config: "DeepSeek-V2-Lite",
        parameters: 15_706_484_224,
        active_parameters: 15_706_484_224 - 209_715_200 - 26 * 58 * 3 * 2048 * 1408,
        cache_bytes_per_token: 27 * (512 + 64) * 2,
        latent: true,
    },
    Row {
        config: "DeepSeek-V3",
        parameters: 671_026_419_200,
        active_parameters: 671_026_419_200 - 926_679_040 - 58 * 248 * 3 * 7168 * 2048,
        cache_bytes_per_token: 61 * (512 + 64) * 2,
        latent: true,
    },
];

#[test]
fn real_configurations_have_the_published_sizes() {
    let folder = fixtures("configs");
    for row in &ROWS {
        let name = row.config;
        let checkpoint = Checkpoint::open(&folder.join(format!("{name}.json"))).unwrap();
        let spec = spec(&checkpoint).unwrap();
        assert_eq!(spec.parameters(), row.parameters, "{name}: parameters");
        assert_eq!(spec.active_parameters(), row.active_parameters, "{name}: active");
        let cache = spec.cache_spec(false, 1, 16, CacheType::F16);
        assert_eq!(cache.bytes_per_token(), row.cache_bytes_per_token, "{name}: cache");
        assert_eq!(spec.unread, BTreeMap::new(), "{name}: fields without effect");
        let latent = matches!(spec.blocks[0].mixer, MixerSpec::Mla(_));
        assert_eq!(latent, row.latent, "{name}: attention");
    }
}

fn fixtures(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/fixtures").join(folder)
}

/// The specification of a tiny model after `edit` of its configuration.
fn edited(
    family: &str,
    edit: impl FnOnce(&mut Map<String, Value>),
) -> Result<ModelSpec, ModelError> {
    let text = std::fs::read(fixtures("llm").join(family).join("config.json")).unwrap();
    let mut config: Map<String, Value> = serde_json::from_slice(&text).unwrap();
    edit(&mut config);
    let config = Value::Object(config);
    let container = Container::HuggingFace { config, generation_config: None };
    spec(&Checkpoint::from_parts("model".into(), container, [], BTreeMap::new()))
}

#[test]
fn every_field_of_the_tiny_models_is_read() {
    let mut unread = Vec::new();
    for entry in std::fs::read_dir(fixtures("llm")).unwrap() {
        for file in ["config.json", "config_legacy.json"] {
            let path = entry.as_ref().unwrap().path().join(file);
            let spec = spec(&Checkpoint::open(&path).unwrap()).unwrap();
            if !spec.unread.is_empty() {
                unread.push((path, spec.unread));
            }
        }
    }
    assert!(unread.is_empty(), "{unread:#?}");
}

#[test]
fn fields_without_effect_are_told() {
    let spec = edited("qwen3", |config| {
        config.insert("attn_logit_softcapping".into(), json!(50.0));
        config.insert("logit_scale".into(), Value::Null);
        config.insert("shared_expert_intermediate_size".into(), json!(0));
        config.insert("torch_dtype".into(), json!("bfloat16"));
        config["rope_parameters"]["magic"] = json!([1, 2]);
    });
    let told = [("attn_logit_softcapping", "50.0"), ("rope_parameters.magic", "[1,2]")];
    assert_eq!(spec.unwrap().unread, told.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
}

#[test]
fn defaults_inside_objects_are_told() {
    let spec = edited("qwen3", |config| {
        config.remove("rms_norm_eps");
    });
    let defaults = spec.unwrap().defaults;
    assert_eq!(defaults["rms_norm_eps"], "1e-6");
    assert_eq!(defaults["rope_parameters.truncate"], "true");
}

#[test]
fn errors_name_file_and_field() {
    type Edit = fn(&mut Map<String, Value>);
    let rows: [(&str, Edit, &str); 7] = [
        ("llama", |c| c["model_type"] = json!("mystery"), "model_type: \"mystery\""),
        ("llama", |c| c["hidden_act"] = json!("mystery"), "hidden_act: \"mystery\""),
        (
            "llama",
            |c| c["rope_parameters"]["rope_type"] = json!("mystery"),
            "rope_parameters.rope_type: \"mystery\"",
        ),
        (
            "llama",
            |c| c["rope_parameters"]["factor"] = json!("x"),
            "rope_parameters.factor: expected a number",
        ),
        (
            "glm4_moe_lite",
            |c| c["mlp_layer_types"][1] = json!("mystery"),
            "mlp_layer_types: \"mystery\"",
        ),
        (
            "glm4_moe_lite",
            |c| drop(c.insert("topk_method".into(), json!("mystery"))),
            "topk_method: \"mystery\"",
        ),
        ("deepseek_v3", |c| c["n_routed_experts"] = json!(1 << 20), "n_routed_experts: 1048576"),
    ];
    for (family, edit, message) in rows {
        let error = edited(family, edit).expect_err(message).to_string();
        assert!(error.starts_with(&format!("model/config.json: {message}")), "{error}");
    }
    let path = fixtures("configs").join("no-model.json");
    let alone = Checkpoint::from_parts(
        path.clone(),
        Container::HuggingFace { config: json!({}), generation_config: None },
        [],
        BTreeMap::new(),
    );
    let error = spec(&alone).unwrap_err().to_string();
    assert_eq!(error, format!("{}: model_type: required field is missing", path.display()));
}
