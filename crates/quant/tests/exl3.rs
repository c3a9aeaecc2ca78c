//! Damaged EXL3 directories: an error that names file or tensor, or finite-time decoding of
//! whatever the bits now say; never a panic.

use half::f16;
use marlin_checkpoint::Checkpoint;
use marlin_testkit::mutate::{bit_flips, truncations};
use safetensors::tensor::{Dtype, TensorView};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

const OUTPUTS: usize = 120;
const INPUTS: usize = 100;
const VOCAB: usize = 4;

/// One linear layer (codebook mul1, K = 2), one with packed signs (3inst, K = 1), one quantized
/// embedding table (K = 1), all of noise.
fn model() -> Vec<u8> {
    let mut state = 7u32;
    let mut noise = |n: usize| -> Vec<u8> {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..n).map(|_| next()).collect()
    };
    let ones = |n: usize| f16::ONE.to_le_bytes().repeat(n);
    let mut table = noise(VOCAB * 17 * 2);
    table.chunks_exact_mut(34).for_each(|row| row[..2].copy_from_slice(&f16::ONE.to_le_bytes()));
    let tensors: Vec<(&str, Dtype, Vec<usize>, Vec<u8>)> = vec![
        ("l.trellis", Dtype::I16, vec![8, 8, 32], noise(8 * 8 * 64)),
        ("l.suh", Dtype::F16, vec![128], ones(128)),
        ("l.svh", Dtype::F16, vec![128], ones(128)),
        ("l.mul1", Dtype::I32, vec![], 0x83dc_d12d_u32.to_le_bytes().to_vec()),
        ("p.trellis", Dtype::I16, vec![8, 8, 16], noise(8 * 8 * 32)),
        ("p.su", Dtype::I16, vec![8], noise(16)),
        ("p.sv", Dtype::I16, vec![8], noise(16)),
        ("e.trellis", Dtype::I16, vec![VOCAB, 17], table),
        ("e.signs", Dtype::F16, vec![1, 256], ones(256)),
    ];
    let view = |(name, dtype, shape, data)| (name, TensorView::new(dtype, shape, data).unwrap());
    let views = tensors.iter().map(|(n, t, s, d)| view((*n, *t, s.clone(), &d[..])));
    safetensors::serialize(views, None).unwrap()
}

/// Opens the directory and decodes everything; what went wrong, if anything did.
fn decode_all(directory: &Path) -> Result<(), String> {
    let checkpoint = Checkpoint::open(directory).map_err(|e| e.to_string())?;
    for (key, rows, columns) in
        [("l", OUTPUTS, INPUTS), ("p", OUTPUTS, INPUTS), ("e", VOCAB, 2 * INPUTS)]
    {
        let weight = marlin_quant::load(&checkpoint, key, rows, columns).map_err(|e| {
            let error = e.to_string();
            assert!(error.contains(key), "{key} is not in {error:?}");
            error
        })?;
        marlin_quant::decode(&weight).map_err(|e| e.to_string())?;
    }
    Ok(())
}

fn check(directory: &Path, what: &str) -> Result<(), String> {
    let started = Instant::now();
    let result = decode_all(directory);
    assert!(started.elapsed() < Duration::from_secs(2), "{what} is slow");
    result
}

#[test]
fn damaged_directories_never_panic() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let good = model();
    fs::write(directory.path().join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    fs::write(&path, &good).unwrap();
    check(directory.path(), "the model").unwrap();
    for (length, copy) in truncations(&good) {
        fs::write(&path, copy).unwrap();
        let error = check(directory.path(), "a truncation").unwrap_err();
        assert!(error.contains("model.safetensors"), "cut to {length}: {error}");
    }
    let mut noticed = 0;
    for (bit, copy) in bit_flips(&good) {
        fs::write(&path, copy).unwrap();
        noticed += usize::from(check(directory.path(), &format!("bit {bit}")).is_err());
    }
    assert!(noticed > 10, "{noticed} flips noticed");
}
