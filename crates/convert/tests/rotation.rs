//! EXL3's basis changes nothing but what is rounded: a model whose every matrix is multiplied in that basis, without a
//! trellis, says what the plain one says.

mod common;

use common::calibration;
use marlin_checkpoint::Checkpoint;
use marlin_convert::exl3::basis::{ScaleRule, Scales};
use marlin_convert::matrix::Matrix;
use marlin_convert::origin::{Named, view};
use marlin_convert::stream::{batch, cache};
use marlin_convert::{Origin, Plan};
use marlin_cpu::{Activations, CpuBackend, CpuOptions, Level};
use marlin_models::{Model, Step};
use marlin_quant::exl3::hadamard::rotate;
use marlin_tensor::{Backend, HostTensor};
use marlin_testkit::tiny_model;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Largest difference of a logit, as a share of the largest logit, that f32 sums in another order may make.
const TOLERANCE: f32 = 1e-5;

/// What `x: [rows, in_features]` times the matrix is, as a reader of EXL3 computes it: inputs scaled and rotated,
/// multiplied with the rotated weight, outputs rotated and scaled.
fn rotated_product(x: &Matrix, w: &Matrix, seed: u64, rotates_inputs: bool) -> Matrix {
    let (n, k) = (w.rows.next_multiple_of(128), w.columns.next_multiple_of(128));
    let padded = w.padded(n, k);
    let visit = |each: &mut dyn FnMut(usize, &Matrix)| {
        each(0, &padded);
        Ok(())
    };
    let rule = ScaleRule { exponent: 1.0, hessian_exponent: 0.0 };
    let scales = Scales::choose([n, k], &visit, None, rule, 1.0, (seed, seed + 1)).unwrap();
    let mut x = x.padded(x.rows, k);
    for row in x.data.chunks_exact_mut(k) {
        row.iter_mut().zip(&scales.suh).for_each(|(v, s)| *v *= s);
        if rotates_inputs {
            rotate(row);
        }
    }
    let mut y = x.times(&transposed(&scales.rotate(&padded)));
    for row in y.data.chunks_exact_mut(n) {
        rotate(row);
        row.iter_mut().zip(&scales.svh).for_each(|(v, s)| *v *= s);
    }
    let rows = y.data.chunks_exact(n).flat_map(|row| row[..w.rows].to_vec()).collect();
    Matrix::new(y.rows, w.rows, rows)
}

fn transposed(m: &Matrix) -> Matrix {
    let column = |j: usize| (0..m.rows).map(move |i| m.row(i)[j]);
    Matrix::new(m.columns, m.rows, (0..m.columns).flat_map(column).collect())
}

/// What every unit input gives through the rotated product: the matrix that it stands for.
fn seen_through(w: &Matrix, seed: u64, rotates_inputs: bool) -> Matrix {
    let mut unit = Matrix::zeros(w.columns, w.columns);
    (0..w.columns).for_each(|i| unit.row_mut(i)[i] = 1.0);
    transposed(&rotated_product(&unit, w, seed, rotates_inputs))
}

/// Logits of all positions of a text, every tensor in f32 and the matrices of the plan as `change` has them.
fn logits(
    checkpoint: &Checkpoint,
    tokens: &[u32],
    change: &dyn Fn(Matrix, u64) -> Matrix,
) -> Vec<f32> {
    let origin = Origin::open(checkpoint).unwrap();
    let mut tensors: BTreeMap<String, HostTensor> = BTreeMap::new();
    for stored in checkpoint.tensors() {
        let values = stored.plain().unwrap().to_f32().unwrap();
        let f32 = HostTensor::from_f32(stored.shape.clone(), &values);
        tensors.insert(stored.name.clone(), f32);
    }
    let plan = Plan::new(&origin.output, origin.mtp);
    for (seed, target) in plan.targets.iter().enumerate() {
        let w = change(origin.matrix(&target.spec).unwrap(), seed as u64);
        let name = format!("{}.weight", origin.output_key(&target.spec));
        tensors.insert(name, HostTensor::from_f32(vec![w.rows, w.columns], &w.data));
    }
    // The output projection is a matrix of its own, as in what a job makes.
    let mut config = origin.config.clone();
    config["tie_word_embeddings"] = false.into();
    let tensors: Vec<Named> = tensors.into_iter().collect();
    let view = view(&checkpoint.path, &config, tensors);
    // The scalar kernels: nothing is rounded to fewer bits than f32 has.
    let options = CpuOptions { level: Level::Scalar, activations: Activations::Float, threads: 1 };
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(options).unwrap());
    let spec = marlin_models::spec(&view).unwrap();
    let model = Model::load(&view, spec, backend.clone(), &mut |_| {}).unwrap();
    let batch = batch(tokens, tokens.len());
    let mut x = model.embed(&batch).unwrap();
    for (layer, block) in origin.output.blocks.iter().enumerate() {
        let cache = cache(backend.as_ref(), block, tokens.len()).unwrap();
        let step = Step { backend: backend.as_ref(), batch: &batch, cache: &cache };
        x = model.block(layer).forward(&step, 0, x, &mut None).unwrap();
    }
    let rows: Vec<u32> = (0..tokens.len() as u32).collect();
    backend.download(&model.logits_of(&x, &rows).unwrap()).unwrap()
}

/// Dense, routed, and latent attention with shared experts.
#[test]
fn rotated_and_plain_weights_give_the_same_logits_in_f32() {
    for family in ["llama", "qwen3_moe", "glm4_moe_lite"] {
        let source = Checkpoint::open(&tiny_model(family)).unwrap();
        let tokens = calibration(family).rows.swap_remove(0);
        let plain = logits(&source, &tokens, &|w, _| w);
        let largest = plain.iter().fold(0f32, |m, v| m.max(v.abs()));
        let difference = |other: &[f32]| {
            assert_eq!(other.len(), plain.len(), "{family}");
            plain.iter().zip(other).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / largest
        };
        let same = difference(&logits(&source, &tokens, &|w, seed| seen_through(&w, seed, true)));
        println!("{family}: {same:e} of the largest logit {largest}");
        assert!(same < TOLERANCE, "{family}: {same}");
        // It is the rotations that cancel: without that of the inputs it is another model.
        let other = difference(&logits(&source, &tokens, &|w, seed| seen_through(&w, seed, false)));
        assert!(other > 0.1, "{family}: {other}");
    }
}
