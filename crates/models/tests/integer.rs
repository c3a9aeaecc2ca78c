//! Models whose matrices are integers with scales per group, against transformers with the dequantized
//! matrices: `fixtures/integer`, written by `make_integer_models.py` beside it.

use marlin_checkpoint::Checkpoint;
use marlin_cpu::{Activations, CpuBackend, CpuOptions, Level};
use marlin_models::{Model, Source, spec};
use marlin_tensor::{Batch, CacheType};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Largest difference of any logit: inputs in f32, and rounded to eight bits.
const TOLERANCES: [(Activations, f32); 2] = [(Activations::Float, 2e-4), (Activations::Auto, 0.1)];
const BLOCK_SIZE: usize = 16;

/// Folder, and the format of a matrix of the first layer.
const MODELS: [(&str, &str, &str); 5] = [
    ("gptq", "mlp.down_proj", "int4_g128"),
    ("gptq_desc_act", "mlp.down_proj", "int4_g64_ordered"),
    ("awq", "self_attn.q_proj", "int4_g64"),
    ("packed", "self_attn.q_proj", "int8_g128"),
    ("packed_moe", "mlp.experts.3.up_proj", "int4_g32"),
];

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/integer").join(name)
}

fn logits(checkpoint: &Checkpoint, ids: &[u32], options: CpuOptions) -> Vec<f32> {
    let backend = Arc::new(CpuBackend::new(options).unwrap());
    let model = Model::load(checkpoint, spec(checkpoint).unwrap(), backend, &mut |_| {}).unwrap();
    assert!(model.unused_tensors().is_empty(), "{:?}", model.unused_tensors());
    let blocks = ids.len().div_ceil(BLOCK_SIZE);
    let cache = model.cache_spec(blocks, BLOCK_SIZE, CacheType::F32);
    let cache = model.backend().create_cache(&cache).unwrap();
    let table: Vec<u32> = (0..blocks as u32).collect();
    let mut batch = Batch::new(BLOCK_SIZE);
    batch.push(ids, 0, &table, ids.len() as u32, ids.len());
    model.backend().download(&model.forward(&batch, &cache).unwrap()).unwrap()
}

#[test]
fn logits_are_those_of_the_dequantized_model() {
    for (name, _, _) in MODELS {
        let bytes = std::fs::read(path(name).join("ref.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let data = |tensor: &str| file.tensor(tensor).unwrap().data().to_vec();
        let ids = data("input_ids");
        let ids: Vec<u32> =
            ids.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b) as u32).collect();
        let expected = data("logits");
        let expected: Vec<f32> =
            expected.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        let checkpoint = Checkpoint::open(&path(name)).unwrap();
        for (activations, tolerance) in TOLERANCES {
            for level in [Level::Scalar, Level::detect()] {
                let options = CpuOptions { threads: 1, level, activations };
                let found = logits(&checkpoint, &ids, options);
                assert_eq!(found.len(), expected.len(), "{name}");
                let differences = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
                let worst =
                    differences.fold(0.0, |w: f32, d| if d.is_nan() { d } else { w.max(d) });
                println!("{name}, {level}, {activations:?}: largest difference {worst:e}");
                assert!(worst <= tolerance, "{name}, {level}: largest difference {worst:e}");
            }
        }
    }
}

#[test]
fn matrices_are_found_and_held_as_blocks() {
    for (name, key, format) in MODELS {
        let checkpoint = Checkpoint::open(&path(name)).unwrap();
        let spec = spec(&checkpoint).unwrap();
        let key = format!("model.layers.0.{key}");
        let linears = spec.blocks[0].linears();
        let linear = linears.into_iter().find(|l| l.key == key).unwrap();
        assert_eq!(Source::new(&checkpoint).linear(linear).unwrap().format, format, "{name}");
    }
}
