//! FP8 with scales against torch.

use marlin_checkpoint::{Checkpoint, Container, Encoding, GgmlType, StoredTensor};
use marlin_quant::{decode, format, load, slice_rows};
use marlin_tensor::{DType, Weight};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const SHAPE: [usize; 2] = [131, 140];

fn fixture() -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/fp8.safetensors")).unwrap()
}

fn floats(file: &SafeTensors, name: &str) -> Vec<f32> {
    let data = file.tensor(name).unwrap().data().to_vec();
    data.as_chunks().0.iter().map(|&c| f32::from_le_bytes(c)).collect()
}

fn stored(name: &str, dtype: DType, shape: &[usize], data: Vec<u8>) -> StoredTensor {
    StoredTensor {
        name: name.to_owned(),
        encoding: Encoding::Plain(dtype),
        shape: shape.to_vec(),
        data: data.into(),
        file: Path::new("model.safetensors").into(),
    }
}

fn checkpoint(config: Value, tensors: Vec<StoredTensor>) -> Checkpoint {
    let container = Container::HuggingFace { config, generation_config: None };
    Checkpoint::from_parts(PathBuf::from("model"), container, tensors, BTreeMap::new())
}

/// The fixture's codes under `scale`.
fn weight(scale: StoredTensor) -> Vec<StoredTensor> {
    let file = fixture();
    let codes = SafeTensors::deserialize(&file).unwrap().tensor("weight").unwrap().data().to_vec();
    vec![stored("layer.weight", DType::F8E4M3, &SHAPE, codes), scale]
}

fn block_scale() -> StoredTensor {
    let file = fixture();
    let data =
        SafeTensors::deserialize(&file).unwrap().tensor("block_scale").unwrap().data().to_vec();
    stored("layer.weight_scale_inv", DType::F32, &[2, 2], data)
}

fn assert_bits(weight: &Weight, expected: &[f32]) {
    let found = decode(weight).unwrap();
    assert!(found.iter().map(|v| v.to_bits()).eq(expected.iter().map(|v| v.to_bits())));
}

#[test]
fn block_scales_decode_as_torch() {
    let file = fixture();
    let expected = floats(&SafeTensors::deserialize(&file).unwrap(), "block_values");
    for config in [json!({}), json!({"quantization_config": {"weight_block_size": [128, 128]}})] {
        let loaded = load(&checkpoint(config, weight(block_scale())), "layer", 131, 140).unwrap();
        assert_eq!(loaded.format, "fp8_block128");
        assert_bits(&loaded, &expected);
        for rows in [0..128, 128..131, 0..131] {
            let slice = slice_rows(&loaded, rows.clone()).unwrap();
            assert_bits(&slice, &expected[rows.start * 140..rows.end * 140]);
        }
        assert!(slice_rows(&loaded, 0..64).is_err());
        assert!(slice_rows(&loaded, 1..131).is_err());
        assert!(slice_rows(&loaded, 128..132).is_err());
    }
}

#[test]
fn row_and_tensor_scales_decode_as_torch() {
    let file = fixture();
    let golden = SafeTensors::deserialize(&file).unwrap();
    let data = golden.tensor("row_scale").unwrap().data().to_vec();
    for shape in [&[131, 1][..], &[131]] {
        let scale = stored("layer.weight_scale", DType::BF16, shape, data.clone());
        let loaded = load(&checkpoint(json!({}), weight(scale)), "layer", 131, 140).unwrap();
        assert_eq!(loaded.format, "fp8");
        assert_bits(&loaded, &floats(&golden, "row_values"));
        let tail = slice_rows(&loaded, 100..131).unwrap();
        assert_bits(&tail, &floats(&golden, "row_values")[100 * 140..]);
    }
    // With a scale of 1 the values are those of the codes.
    let block = floats(&golden, "block_values");
    let block_scale = floats(&golden, "block_scale");
    for shape in [&[][..], &[1], &[1, 1]] {
        let scale = stored("layer.weight_scale", DType::F32, shape, 1f32.to_le_bytes().to_vec());
        let loaded = load(&checkpoint(json!({}), weight(scale)), "layer", 131, 140).unwrap();
        let expected =
            decode(&loaded).unwrap()[0..128].iter().map(|v| v * block_scale[0]).collect::<Vec<_>>();
        assert_eq!(expected, block[..128]);
    }
}

#[test]
fn packing_rounds_as_torch() {
    let file = fixture();
    let golden = SafeTensors::deserialize(&file).unwrap();
    let mut values = floats(&golden, "rounding_input");
    // A scale of exactly 1.
    values[0] = 448.0;
    let mut expected = golden.tensor("rounding_output").unwrap().data().to_vec();
    expected[0] = 0x7E;
    let packed = format("fp8").pack(&values, 1, 4096).unwrap();
    assert_eq!(packed.part("weight").unwrap().bytes(), &expected);
    assert_eq!(packed.part("scale").unwrap().to_f32().unwrap(), [1.0]);

    for id in ["fp8", "fp8_block128"] {
        let values: Vec<f32> = (0..150 * 130).map(|i| (i as f32 * 0.7).sin()).collect();
        let weight = format(id).pack(&values, 150, 130).unwrap();
        for (found, value) in decode(&weight).unwrap().iter().zip(&values) {
            assert!((found - value).abs() <= value.abs() / 15.0 + 1e-5, "{id}: {value} {found}");
        }
        let zeros = format(id).pack(&[0.0; 4], 2, 2).unwrap();
        assert_eq!(decode(&zeros).unwrap(), [0.0; 4]);
    }
}

#[test]
fn bad_scales_are_named() {
    let bytes = |n: usize| vec![0; n * 4];
    let cases = [
        (json!({}), stored("layer.weight_scale_inv", DType::F32, &[3, 2], bytes(6)), "[2, 2]"),
        (json!({}), stored("layer.weight_scale", DType::F32, &[130, 1], bytes(130)), "[131, 1]"),
        (json!({}), stored("layer.weight_scale", DType::F32, &[140], bytes(140)), "[131]"),
        (json!({}), stored("layer.weight_scale", DType::I32, &[1], bytes(1)), "floats"),
        (
            json!({}),
            stored("layer.other", DType::F32, &[1], bytes(1)),
            "stored are: layer.other F32 [1], layer.weight F8_E4M3 [131, 140]",
        ),
        (
            json!({"quantization_config": {"weight_block_size": [64, 128]}}),
            block_scale(),
            "weight_block_size",
        ),
    ];
    for (config, scale, expected) in cases {
        let error = load(&checkpoint(config, weight(scale)), "layer", 131, 140).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    // An encoded scale is no float either.
    let mut scale = stored("layer.weight_scale", DType::U8, &[1], vec![0]);
    scale.encoding = Encoding::Ggml(GgmlType::Q8_0);
    assert!(load(&checkpoint(json!({}), weight(scale)), "layer", 131, 140).is_err());
}
