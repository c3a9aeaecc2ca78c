//! The ggml block formats against the `gguf` Python package and against themselves.

use marlin_checkpoint::{
    Checkpoint, Container, Encoding, GgmlType, GgufTensor, GgufValue, StoredTensor, write_gguf,
};
use marlin_quant::{QuantError, decode, format, formats, load, slice_rows};
use marlin_tensor::{DType, HostTensor, Weight};
use proptest::prelude::*;
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Identifier, type, bytes and weights of a block, whether it packs.
const TYPES: [(&str, GgmlType, usize, usize, bool); 23] = [
    ("q4_0", GgmlType::Q4_0, 18, 32, true),
    ("q4_1", GgmlType::Q4_1, 20, 32, true),
    ("q5_0", GgmlType::Q5_0, 22, 32, true),
    ("q5_1", GgmlType::Q5_1, 24, 32, true),
    ("q8_0", GgmlType::Q8_0, 34, 32, true),
    ("q2_k", GgmlType::Q2K, 84, 256, true),
    ("q3_k", GgmlType::Q3K, 110, 256, true),
    ("q4_k", GgmlType::Q4K, 144, 256, true),
    ("q5_k", GgmlType::Q5K, 176, 256, true),
    ("q6_k", GgmlType::Q6K, 210, 256, true),
    ("iq1_s", GgmlType::Iq1S, 50, 256, false),
    ("iq1_m", GgmlType::Iq1M, 56, 256, false),
    ("iq2_xxs", GgmlType::Iq2Xxs, 66, 256, false),
    ("iq2_xs", GgmlType::Iq2Xs, 74, 256, false),
    ("iq2_s", GgmlType::Iq2S, 82, 256, false),
    ("iq3_xxs", GgmlType::Iq3Xxs, 98, 256, false),
    ("iq3_s", GgmlType::Iq3S, 110, 256, false),
    ("iq4_nl", GgmlType::Iq4Nl, 18, 32, false),
    ("iq4_xs", GgmlType::Iq4Xs, 136, 256, false),
    ("tq1_0", GgmlType::Tq1_0, 54, 256, true),
    ("tq2_0", GgmlType::Tq2_0, 66, 256, true),
    ("mxfp4", GgmlType::Mxfp4, 17, 32, true),
    ("nvfp4", GgmlType::Nvfp4, 36, 64, false),
];

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)).unwrap()
}

fn stored(name: &str, encoding: Encoding, shape: Vec<usize>, data: Vec<u8>) -> StoredTensor {
    let file: std::sync::Arc<Path> = Path::new("model.gguf").into();
    StoredTensor { name: name.to_owned(), encoding, shape, data: data.into(), file }
}

fn checkpoint_of(tensors: impl IntoIterator<Item = StoredTensor>) -> Checkpoint {
    let container = Container::Gguf { metadata: Default::default() };
    Checkpoint::from_parts(PathBuf::from("model.gguf"), container, tensors, BTreeMap::new())
}

fn checkpoint(encoding: Encoding, shape: Vec<usize>, data: Vec<u8>) -> Checkpoint {
    checkpoint_of([stored("layer.weight", encoding, shape, data)])
}

fn weight(
    id: &'static str,
    rows: usize,
    columns: usize,
    row_bytes: usize,
    data: Vec<u8>,
) -> Weight {
    let blocks = HostTensor::new(DType::U8, vec![rows, row_bytes], data.into()).unwrap();
    Weight { format: id, out_features: rows, in_features: columns, parts: vec![("blocks", blocks)] }
}

#[test]
fn every_type_decodes_as_the_gguf_package() {
    let file = fixture("ggml.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    for (id, ggml_type, bytes, values, _) in TYPES {
        let name = id.to_uppercase();
        let blocks = golden.tensor(&format!("{name}.blocks")).unwrap();
        let expected = golden.tensor(&format!("{name}.values")).unwrap();
        let [rows, columns] = expected.shape()[..] else { panic!("{name}: not a matrix") };
        assert_eq!(blocks.shape(), [rows, columns / values * bytes], "{name}");

        let stored =
            checkpoint(Encoding::Ggml(ggml_type), vec![rows, columns], blocks.data().to_vec());
        let weight = load(&stored, "layer", rows, columns).unwrap();
        assert_eq!(weight.format, id);
        let found = decode(&weight).unwrap();
        let expected = expected.data().as_chunks().0.iter().map(|&c| f32::from_le_bytes(c));
        for (i, (found, expected)) in found.into_iter().zip(expected).enumerate() {
            assert_eq!(found.to_bits(), expected.to_bits(), "{name} {i}: {found} {expected}");
        }
    }
}

#[test]
fn golden_file_has_no_other_type() {
    let file = fixture("ggml.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    for name in golden.names() {
        let id = name.split('.').next().unwrap().to_lowercase();
        assert!(formats().iter().any(|f| f.id() == id), "{name} has no format");
    }
}

#[test]
fn packers_round_as_the_gguf_package() {
    let file = fixture("ggml_pack.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let values = golden.tensor("values").unwrap();
    let [rows, columns] = values.shape()[..] else { panic!("not a matrix") };
    let values: Vec<f32> =
        values.data().as_chunks().0.iter().map(|&c| f32::from_le_bytes(c)).collect();
    for (name, expected) in golden.iter().filter(|(name, _)| *name != "values") {
        let format = format(formats().iter().find(|f| f.id() == name.to_lowercase()).unwrap().id());
        let weight = format.pack(&values, rows, columns).unwrap();
        let row_bytes = expected.shape()[1];
        let packed = weight.parts[0].1.bytes().chunks_exact(row_bytes);
        for (row, (found, expected)) in
            packed.zip(expected.data().chunks_exact(row_bytes)).enumerate()
        {
            assert_eq!(found, expected, "{name}, row {row}");
        }
    }
}

/// Root mean square of the error over that of the values, for normal weights.
fn relative_error(id: &str) -> f64 {
    use rand::{RngExt, SeedableRng};
    let mut rng = rand::rngs::StdRng::seed_from_u64(5);
    // Sums of uniforms are close enough to normal.
    let values: Vec<f32> =
        (0..16 * 512).map(|_| (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0).collect();
    let found = decode(&format(id).pack(&values, 16, 512).unwrap()).unwrap();
    let square = |v: f32| f64::from(v) * f64::from(v);
    let error: f64 = found.iter().zip(&values).map(|(a, b)| square(a - b)).sum();
    (error / values.iter().map(|&v| square(v)).sum::<f64>()).sqrt()
}

#[test]
fn packers_lose_what_their_bits_allow() {
    let bounds = [
        ("f16", 0.00023),
        ("bf16", 0.0018),
        ("q8_0", 0.0056),
        ("q6_k", 0.018),
        ("q5_k", 0.038),
        ("q5_1", 0.04),
        ("q5_0", 0.045),
        ("q4_k", 0.074),
        ("q4_1", 0.08),
        ("q4_0", 0.09),
        ("mxfp4", 0.12),
        ("q3_k", 0.15),
        ("q2_k", 0.28),
    ];
    for (id, bound) in bounds {
        let error = relative_error(id);
        assert!(error < bound && error > 0.85 * bound, "{id}: relative error {error}");
    }
}

#[test]
fn packers_refuse_what_they_cannot_hold() {
    for (id, _, _, block, packs) in TYPES {
        let values = vec![1.0; 2 * block];
        let packed = format(id).pack(&values, 2, block);
        if !packs {
            assert!(matches!(packed, Err(QuantError::NoPacker { .. })), "{id}");
            continue;
        }
        assert_eq!(decode(&packed.unwrap()).unwrap().len(), 2 * block, "{id}");
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = values.clone();
            values[block + 3] = bad;
            let error = format(id).pack(&values, 2, block).unwrap_err().to_string();
            assert!(error.contains("row 1, column 3"), "{id}: {error}");
        }
        assert!(format(id).pack(&values, 1, block).is_err(), "{id}: too many values");
        assert!(format(id).pack(&values[1..], 1, 2 * block - 1).is_err(), "{id}: part of a block");
        if id != "mxfp4" {
            let error = format(id).pack(&vec![1e30; block], 1, block).unwrap_err().to_string();
            assert!(error.contains("too large"), "{id}: {error}");
        }
    }
}

#[test]
fn packed_weights_survive_a_gguf_file() {
    let (rows, columns) = (5, 512);
    let values: Vec<f32> = (0..rows * columns).map(|i| (i as f32 * 0.37).sin()).collect();
    let packed: Vec<(String, GgmlType, Weight)> = TYPES
        .into_iter()
        .filter(|t| t.4)
        .map(|t| {
            (format!("{}.weight", t.0), t.1, format(t.0).pack(&values, rows, columns).unwrap())
        })
        .collect();
    let shape = [rows, columns];
    let tensors: Vec<GgufTensor> = packed
        .iter()
        .map(|(name, ggml_type, weight)| GgufTensor {
            name,
            encoding: Encoding::Ggml(*ggml_type),
            shape: &shape,
            data: weight.parts[0].1.bytes(),
        })
        .collect();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("packed.gguf");
    let architecture = GgufValue::String("llama".to_owned());
    write_gguf(&path, &[("general.architecture", architecture)], &tensors).unwrap();
    let opened = Checkpoint::open(&path).unwrap();
    for (_, _, weight) in &packed {
        let read = load(&opened, weight.format, rows, columns).unwrap();
        assert_eq!(read.format, weight.format);
        assert_eq!(decode(&read).unwrap(), decode(weight).unwrap(), "{}", weight.format);
    }
}

#[test]
fn load_refuses_other_shapes() {
    for (id, ggml_type, bytes, values, _) in TYPES {
        let shape = vec![3, 2 * values];
        let good = checkpoint(Encoding::Ggml(ggml_type), shape.clone(), vec![0; 6 * bytes]);
        assert!(load(&good, "layer", 3, 2 * values).is_ok(), "{id}");
        assert!(load(&good, "layer", 2 * values, 3).is_err(), "{id}: transposed");
        assert!(load(&good, "layer", 4, 2 * values).is_err(), "{id}: more rows");
        let error = load(&good, "other", 3, 2 * values).unwrap_err().to_string();
        assert!(error.contains("other.weight is missing"), "{id}: {error}");
        let short = checkpoint(Encoding::Ggml(ggml_type), shape, vec![0; 6 * bytes - 1]);
        assert!(load(&short, "layer", 3, 2 * values).is_err(), "{id}: truncated");
        let columns = values + values / 2;
        let ragged = checkpoint(Encoding::Ggml(ggml_type), vec![2, columns], vec![0; 3 * bytes]);
        let error = load(&ragged, "layer", 2, columns).unwrap_err().to_string();
        assert!(error.contains("layer.weight") && error.contains("whole"), "{id}: {error}");
    }
}

#[test]
fn stacked_matrices_load_as_rows() {
    let stored = checkpoint(Encoding::Ggml(GgmlType::Q8_0), vec![4, 3, 32], vec![7; 4 * 3 * 34]);
    let weight = load(&stored, "layer", 12, 32).unwrap();
    assert_eq!(slice_rows(&weight, 3..6).unwrap().parts[0].1.shape(), [3, 34]);
}

#[test]
fn a_scale_beside_the_blocks_multiplies_or_is_refused() {
    let (rows, columns) = (4, 256);
    for (id, ggml_type, bytes, values, _) in TYPES {
        let data: Vec<u8> =
            (0..rows * columns / values * bytes).map(|i| (i * 7 % 60) as u8).collect();
        let blocks =
            || stored("layer.weight", Encoding::Ggml(ggml_type), vec![rows, columns], data.clone());
        let scale = |name: &str, scales: &[f32]| {
            let bytes = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
            stored(name, Encoding::Plain(DType::F32), vec![scales.len()], bytes)
        };
        let with = |scale| load(&checkpoint_of([blocks(), scale]), "layer", rows, columns);
        if !["nvfp4", "tq1_0", "tq2_0"].contains(&id) {
            let error = with(scale("layer.scale", &[2.0])).unwrap_err().to_string();
            assert!(error.contains("layer.scale"), "{id}: {error}");
            continue;
        }
        let plain =
            decode(&load(&checkpoint_of([blocks()]), "layer", rows, columns).unwrap()).unwrap();
        for name in ["layer.scale", "layer.weight.scale"] {
            let weight = with(scale(name, &[3.0, -0.5])).unwrap();
            assert_eq!(weight.format, format!("{id}_scaled"));
            let factor = |i: usize| if i / columns < 2 { 3.0 } else { -0.5 };
            let expected: Vec<f32> = plain.iter().enumerate().map(|(i, v)| v * factor(i)).collect();
            assert_eq!(decode(&weight).unwrap(), expected, "{id}");
            let tail = decode(&slice_rows(&weight, 1..4).unwrap()).unwrap();
            assert_eq!(tail, expected[columns..], "{id}");
        }
        assert!(with(scale("layer.scale", &[1.0; 3])).is_err(), "{id}: three experts in four rows");
        assert!(with(scale("layer.scale", &[])).is_err(), "{id}: no scale");
        let mut half = scale("layer.scale", &[1.0]);
        half.encoding = Encoding::Plain(DType::U32);
        assert!(with(half).is_err(), "{id}: integer scale");
    }
}

#[test]
fn decode_refuses_parts_that_do_not_fit() {
    for (id, _, bytes, values, _) in TYPES {
        let mut out = vec![0.0; values];
        let mut decode = |weight: &Weight, rows| format(id).decode_rows(weight, rows, &mut out);
        let good = weight(id, 2, values, bytes, vec![0; 2 * bytes]);
        assert!(decode(&good, 1..2).is_ok(), "{id}");
        assert!(decode(&good, 2..3).is_err(), "{id}: row out of range");
        assert!(decode(&good, 0..2).is_err(), "{id}: output too short");
        let narrow = weight(id, 2, values, bytes - 1, vec![0; 2 * bytes - 2]);
        assert!(decode(&narrow, 0..1).is_err(), "{id}: truncated rows");
        let few = Weight { out_features: 3, ..good.clone() };
        assert!(decode(&few, 2..3).is_err(), "{id}: missing row");
        let none = Weight { parts: vec![], ..good };
        assert!(decode(&none, 0..1).is_err(), "{id}: no part");
    }
}

proptest! {
    #[test]
    fn any_bytes_decode_and_rows_are_independent(
        index in 0..TYPES.len(),
        rows in 1usize..4,
        blocks in 1usize..4,
        cut in 0usize..4,
        bytes in prop::collection::vec(any::<u8>(), 3 * 3 * 210),
    ) {
        let (id, _, block_bytes, block_values, _) = TYPES[index];
        let (row_bytes, columns) = (blocks * block_bytes, blocks * block_values);
        let weight = weight(id, rows, columns, row_bytes, bytes[..rows * row_bytes].to_vec());
        let whole = decode(&weight).unwrap();
        let start = cut % rows;
        let slice = decode(&slice_rows(&weight, start..rows).unwrap()).unwrap();
        let same = slice.iter().zip(&whole[start * columns..]).all(|(a, b)| a.to_bits() == b.to_bits());
        prop_assert!(same && slice.len() == (rows - start) * columns);
        let mut last = vec![0.0; columns];
        format(id).decode_rows(&weight, rows - 1..rows, &mut last).unwrap();
        let same = last.iter().zip(&whole[(rows - 1) * columns..]).all(|(a, b)| a.to_bits() == b.to_bits());
        prop_assert!(same);
    }
}
