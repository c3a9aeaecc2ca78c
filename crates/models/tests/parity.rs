//! Every architecture against transformers 5.23: tiny seeded checkpoints under
//! `crates/testkit/fixtures/llm` (written by `make_llm_fixtures.py` there) hold 64 tokens, the
//! logits of all positions, the experts each token was sent to, and for GLM the logits of the
//! multi-token-prediction layer.

use marlin_checkpoint::{Checkpoint, Container, Encoding, StoredTensor};
use marlin_cpu::{Activations, CpuBackend, CpuOptions, Level};
use marlin_models::{Model, spec};
use marlin_tensor::{Batch, Cache, CacheType, DType, Tensor};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Largest difference of any logit, f32 throughout.
const TOLERANCE: f32 = 2e-4;
const BLOCK_SIZE: usize = 8;
const CHUNKS: [usize; 4] = [1, 7, 16, 64];

/// Family, mixture-of-experts layers, has a prediction layer.
const FAMILIES: [(&str, bool, bool); 15] = [
    ("llama", false, false),
    ("llama_bias", false, false),
    ("llama_sharded", false, false),
    ("mistral", false, false),
    ("mixtral", true, false),
    ("qwen2", false, false),
    ("qwen3", false, false),
    ("qwen3_moe", true, false),
    ("gemma3", false, false),
    ("phi3", false, false),
    ("phi3_short", false, false),
    ("glm4_moe_lite", true, true),
    ("deepseek_v2", true, false),
    ("deepseek_v2_grouped", true, false),
    ("deepseek_v3", true, false),
];

struct Reference {
    ids: Vec<u32>,
    logits: Vec<f32>,
    mtp_logits: Option<Vec<f32>>,
    /// Per mixture-of-experts layer in order: sorted expert ids, `[tokens, k]`.
    experts: Vec<Vec<u32>>,
}

fn folder(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/fixtures/llm").join(family)
}

fn floats(file: &SafeTensors, name: &str) -> Option<Vec<f32>> {
    let view = file.tensor(name).ok()?;
    Some(view.data().as_chunks().0.iter().map(|&c| f32::from_le_bytes(c)).collect())
}

fn integers(file: &SafeTensors, name: &str) -> Option<Vec<u32>> {
    let view = file.tensor(name).ok()?;
    Some(view.data().as_chunks().0.iter().map(|&c| i64::from_le_bytes(c) as u32).collect())
}

fn reference(family: &str) -> Reference {
    let bytes = std::fs::read(folder(family).join("ref.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let experts = (0..16).filter_map(|layer| integers(&file, &format!("experts.{layer}")));
    Reference {
        ids: integers(&file, "input_ids").unwrap(),
        logits: floats(&file, "logits").unwrap(),
        mtp_logits: floats(&file, "mtp_logits"),
        experts: experts.collect(),
    }
}

fn load(checkpoint: &Checkpoint) -> Model {
    let options = CpuOptions { threads: 1, level: Level::Scalar, activations: Activations::Float };
    let backend = Arc::new(CpuBackend::new(options).unwrap());
    Model::load(checkpoint, spec(checkpoint).unwrap(), backend, &mut |_| {}).unwrap()
}

/// Blocks in descending order, so that logical and physical order differ.
fn cache(model: &Model, tokens: usize) -> (Cache, Vec<u32>) {
    let blocks = tokens.div_ceil(BLOCK_SIZE);
    let spec = model.cache_spec(blocks + 1, BLOCK_SIZE, CacheType::F32);
    (model.backend().create_cache(&spec).unwrap(), (1..=blocks as u32).rev().collect())
}

/// Feeds `ids` in chunks; calls `each` with the first row and the normed hidden states.
fn run(
    model: &Model,
    ids: &[u32],
    chunk: usize,
    mut each: impl FnMut(usize, Batch, &Cache, Tensor, Vec<Vec<u32>>),
) {
    let (cache, table) = cache(model, ids.len());
    for (i, tokens) in ids.chunks(chunk).enumerate() {
        let mut batch = Batch::new(BLOCK_SIZE);
        batch.push(tokens, i * chunk, &table, ids.len() as u32, tokens.len());
        let (hidden, routings) = model.hidden_states(&batch, &cache).unwrap();
        let chosen = routings.iter().map(|r| {
            let mut ids = model.backend().download_routing(r).unwrap().0;
            ids.chunks_mut(r.top_k).for_each(<[u32]>::sort_unstable);
            ids
        });
        let chosen = chosen.collect();
        each(i * chunk, batch, &cache, hidden, chosen);
    }
}

fn logits(model: &Model, hidden: &Tensor) -> Vec<f32> {
    model.backend().download(&model.logits(hidden).unwrap()).unwrap()
}

fn assert_close(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}: number of logits");
    let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= TOLERANCE, "{what}: largest difference {worst:e}");
    assert!(got.iter().all(|v| v.is_finite()), "{what}: not finite");
}

fn check(family: &str, checkpoint: &Checkpoint, moe: bool, layout: &str) {
    let want = reference(family);
    let model = load(checkpoint);
    let vocab = model.spec().vocab_size;
    assert_eq!(moe, !want.experts.is_empty(), "{family}: fixture");
    for chunk in CHUNKS {
        let what = format!("{family} ({layout}), chunks of {chunk}");
        let mut got = Vec::new();
        run(&model, &want.ids, chunk, |row, batch, _, hidden, experts| {
            got.extend(logits(&model, &hidden));
            assert_eq!(experts.len(), want.experts.len(), "{what}: mixture-of-experts layers");
            for (layer, (ours, theirs)) in experts.iter().zip(&want.experts).enumerate() {
                let k = theirs.len() / want.ids.len();
                let rows = &theirs[row * k..(row + batch.rows()) * k];
                assert_eq!(ours, rows, "{what}: experts of layer {layer} from token {row}");
            }
        });
        assert_eq!(got.len(), want.ids.len() * vocab);
        assert_close(&what, &got, &want.logits);
    }
}

#[test]
fn logits_and_experts_equal_transformers() {
    for (family, moe, mtp) in FAMILIES {
        let checkpoint = Checkpoint::open(&folder(family)).unwrap();
        check(family, &checkpoint, moe, "rope_parameters");
        let model = load(&checkpoint);
        assert_eq!(model.has_mtp(), mtp, "{family}: prediction layer");
        assert!(model.unused_tensors().is_empty(), "{family}: {:?}", model.unused_tensors());
    }
}

#[test]
fn old_configuration_layout_means_the_same() {
    for (family, moe, _) in FAMILIES {
        let file = folder(family).join("config_legacy.json");
        let Ok(text) = std::fs::read_to_string(&file) else {
            panic!("{}: missing", file.display());
        };
        let mut checkpoint = Checkpoint::open(&folder(family)).unwrap();
        let config = serde_json::from_str(&text).unwrap();
        checkpoint.container = Container::HuggingFace { config, generation_config: None };
        check(family, &checkpoint, moe, "rope_scaling");
    }
}

#[test]
fn prediction_layer_equals_reference() {
    let family = "glm4_moe_lite";
    let want = reference(family);
    let expected = want.mtp_logits.expect("fixture holds mtp_logits");
    let model = load(&Checkpoint::open(&folder(family)).unwrap());
    let vocab = model.spec().vocab_size;
    let predictions = expected.len() / vocab;
    for chunk in CHUNKS {
        let mut got = Vec::new();
        run(&model, &want.ids, chunk, |row, batch, cache, hidden, _| {
            // Row i of the prediction layer sees token i + 1; the last token has no successor.
            let rows = batch.rows().min(predictions.saturating_sub(row));
            if rows == 0 {
                return;
            }
            let keep: Vec<u32> = (0..rows as u32).collect();
            let hidden = model.backend().gather_rows(&hidden, &keep).unwrap();
            let table = &batch.sequences[0].block_table;
            let mut next = Batch::new(BLOCK_SIZE);
            next.push(&want.ids[row + 1..row + 1 + rows], row, table, want.ids.len() as u32, rows);
            let ahead = model.predict_ahead(&next, &hidden, cache).unwrap().expect("has_mtp");
            got.extend(logits(&model, &ahead));
        });
        assert_close(&format!("{family}: prediction layer, chunks of {chunk}"), &got, &expected);
    }
}

#[test]
fn tensors_without_a_place_are_told() {
    let checkpoint = Checkpoint::open(&folder("qwen3")).unwrap();
    let one = checkpoint.get("model.layers.1.self_attn.q_norm.weight").unwrap().clone();
    let named = |name: &str| StoredTensor { name: name.into(), ..one.clone() };
    let more = [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.sinks",
        "model.layers.3.enorm.weight",
        "model.layers.0.mlp.gate_proj.weight_scale_2",
        "model.layers.0.mlp.sub_norm.weight",
        "model.vision_tower.layers.0.norm.weight",
        "score.weight",
    ];
    let tensors: Vec<_> = checkpoint.tensors().cloned().chain(more.map(named)).collect();
    let (path, container) = (checkpoint.path.clone(), checkpoint.container.clone());
    let model = load(&Checkpoint::from_parts(path, container, tensors, BTreeMap::new()));
    let told = [
        "model.layers.0.mlp.sub_norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.sinks",
        "score.weight",
    ];
    assert_eq!(model.unused_tensors(), told);
}

#[test]
fn errors_about_weights_name_the_file() {
    let checkpoint = Checkpoint::open(&folder("qwen3")).unwrap();
    let name = "model.layers.1.self_attn.q_proj.weight";
    let mut tensors: Vec<_> = checkpoint.tensors().cloned().collect();
    let tensor = tensors.iter_mut().find(|t| t.name == name).unwrap();
    tensor.encoding = Encoding::Plain(DType::I16);
    let (path, container) = (checkpoint.path.clone(), checkpoint.container.clone());
    let checkpoint = Checkpoint::from_parts(path, container, tensors, BTreeMap::new());
    let options = CpuOptions { threads: 1, level: Level::Scalar, activations: Activations::Float };
    let backend = Arc::new(CpuBackend::new(options).unwrap());
    let loaded = Model::load(&checkpoint, spec(&checkpoint).unwrap(), backend, &mut |_| {});
    let Err(error) = loaded else { panic!("integers were taken for weights") };
    let file = folder("qwen3").join("model.safetensors");
    let start = format!("{}: model.layers.1.self_attn.q_proj", file.display());
    assert!(error.to_string().starts_with(&start), "{error}");
}
