//! Integers with scales per group against the programs that own the containers.

use marlin_checkpoint::{Checkpoint, Container, Encoding, StoredTensor};
use marlin_quant::{decode, format, load, slice_rows};
use marlin_tensor::{DType, Weight};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)).unwrap()
}

/// One case of the fixtures.
struct Case {
    name: String,
    settings: Value,
    /// The format that holds the matrix.
    held: String,
    tensors: Vec<StoredTensor>,
    shape: [usize; 2],
    values: Vec<f32>,
}

fn cases() -> Vec<Case> {
    let file = fixture("integer.safetensors");
    let file = SafeTensors::deserialize(&file).unwrap();
    let listed: Map<String, Value> = serde_json::from_slice(&fixture("integer.json")).unwrap();
    let case = |(name, facts): (String, Value)| {
        let prefix = format!("{name}.layer.");
        let stored = file.tensors().into_iter().filter_map(|(full, t)| {
            Some(StoredTensor {
                name: format!("layer.{}", full.strip_prefix(&prefix)?),
                encoding: Encoding::Plain(DType::from_name(&t.dtype().to_string()).unwrap()),
                shape: t.shape().to_vec(),
                data: t.data().to_vec().into(),
                file: Path::new("model.safetensors").into(),
            })
        });
        let tensors = stored.collect();
        let values = file.tensor(&format!("{name}.values")).unwrap();
        let shape = [values.shape()[0], values.shape()[1]];
        let data = values.data().as_chunks().0;
        Case {
            settings: facts["quantization_config"].clone(),
            held: facts["held"].as_str().unwrap().to_owned(),
            tensors,
            shape,
            values: data.iter().map(|&c| f32::from_le_bytes(c)).collect(),
            name,
        }
    };
    listed.into_iter().map(case).collect()
}

fn case(name: &str) -> Case {
    cases().into_iter().find(|c| c.name == name).unwrap()
}

impl Case {
    fn load(&self) -> Result<Weight, String> {
        self.load_as(self.shape, BTreeMap::new())
    }

    fn load_as(
        &self,
        [rows, columns]: [usize; 2],
        sidecars: BTreeMap<String, bytes::Bytes>,
    ) -> Result<Weight, String> {
        let config = match &self.settings {
            Value::Null => json!({}),
            settings => json!({ "quantization_config": settings }),
        };
        let container = Container::HuggingFace { config, generation_config: None };
        let tensors = self.tensors.iter().cloned();
        let checkpoint =
            Checkpoint::from_parts(PathBuf::from("model"), container, tensors, sidecars);
        load(&checkpoint, "layer", rows, columns).map_err(|e| e.to_string())
    }

    fn tensor(&mut self, part: &str) -> &mut StoredTensor {
        let name = format!("layer.{part}");
        self.tensors.iter_mut().find(|t| t.name == name).unwrap()
    }

    fn without(mut self, part: &str) -> Self {
        self.tensors.retain(|t| t.name != format!("layer.{part}"));
        self
    }

    /// With a field of the configuration set; `field` is a JSON pointer.
    fn with(mut self, field: &str, value: Value) -> Self {
        let (parent, name) = field.rsplit_once('/').unwrap();
        self.settings.pointer_mut(parent).unwrap()[name] = value;
        self
    }
}

fn assert_bits(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        // A weight of zero has the sign of its scale or of a sum.
        assert!(f.to_bits() == e.to_bits() || *f == 0.0 && *e == 0.0, "{what}: [{i}] {f} for {e}");
    }
}

#[test]
fn containers_decode_as_their_programs() {
    for case in cases() {
        let weight = case.load().unwrap_or_else(|e| panic!("{}: {e}", case.name));
        assert_eq!(weight.format, case.held, "{}", case.name);
        assert_bits(&case.name, &decode(&weight).unwrap(), &case.values);
        let [rows, columns] = case.shape;
        let cut = slice_rows(&weight, 3..rows - 1).unwrap();
        let expected = &case.values[3 * columns..(rows - 1) * columns];
        assert_bits(&case.name, &decode(&cut).unwrap(), expected);
        let mut row = vec![0.0; columns];
        format(weight.format).decode_row(&weight, 5, &mut row).unwrap();
        assert_bits(&case.name, &row, &case.values[5 * columns..6 * columns]);
    }
}

#[test]
fn older_exporters_keep_the_settings_in_a_file_of_their_own() {
    for (name, file, fields) in [
        ("gptq_asymmetric", "quantize_config.json", json!({"bits": 4, "group_size": 64})),
        (
            "awq",
            "quant_config.json",
            json!({"w_bit": 4, "q_group_size": 128, "zero_point": true, "version": "GEMM"}),
        ),
    ] {
        let mut case = case(name);
        case.settings = Value::Null;
        let sidecar = fields.to_string().into_bytes().into();
        let loaded = case.load_as(case.shape, BTreeMap::from([(file.to_owned(), sidecar)]));
        assert_bits(name, &decode(&loaded.unwrap()).unwrap(), &case.values);
        let sidecar = b"{".to_vec().into();
        let broken = case.load_as(case.shape, BTreeMap::from([(file.to_owned(), sidecar)]));
        assert!(broken.unwrap_err().contains(file));
    }
}

#[test]
fn what_the_tensors_say_needs_no_settings() {
    let mut packed = case("packed_asymmetric");
    packed.settings = Value::Null;
    assert_bits("packed", &decode(&packed.load().unwrap()).unwrap(), &packed.values);
    // An order that nothing was found for.
    let mut unset = case("packed_g_idx");
    unset.tensor("weight_g_idx").data = (-1i32).to_le_bytes().repeat(256).into();
    assert_eq!(unset.load().unwrap().format, "int4_g128");
    // Zero points one a byte.
    let mut plain = case("packed_asymmetric");
    let zeros = plain.tensor("weight_zero_point");
    (zeros.encoding, zeros.shape) = (Encoding::Plain(DType::I8), vec![13, 2]);
    zeros.data = vec![0xF8; 26].into();
    let zero = decode(&plain.load().unwrap()).unwrap();
    assert!(zero.iter().all(|w| *w >= 0.0), "codes are above the lowest zero point");
    // One scale for a matrix.
    let mut whole = case("packed_8");
    let scale = whole.tensor("weight_scale");
    (scale.shape, scale.data) = (vec![1], scale.data.slice(..2));
    assert_eq!(whole.load().unwrap().format, "int8_g128");
}

#[test]
fn unknown_settings_are_named() {
    let rows: [(&str, &str, Value, &str); 23] = [
        (
            "gptq",
            "/bits",
            json!(3),
            "quantization_config.bits: 3, but layer.qweight has shape [32, 24]: 4 bits",
        ),
        ("gptq", "/bits", json!("four"), "quantization_config.bits: expected a number"),
        (
            "gptq",
            "/checkpoint_format",
            json!("marlin"),
            "checkpoint_format: marlin; gptq or gptq_v2",
        ),
        ("gptq", "/checkpoint_format", json!("gptq_p"), "checkpoint_format: gptq_p"),
        ("gptq", "/format", json!("gptq_v2"), "format: gptq_v2, but checkpoint_format is gptq"),
        ("gptq", "/pack_dtype", json!("int16"), "pack_dtype: int16; int32 is read"),
        ("gptq", "/quant_method", json!("aqlm"), "quant_method: aqlm beside layer.qweight"),
        ("gptq", "/quant_method", json!(4), "quant_method: expected a string"),
        ("gptq", "/is_marlin_format", json!(true), "is_marlin_format"),
        ("gptq", "/adapter", json!({"rank": 8}), "adapter"),
        (
            "gptq_v2",
            "/group_size",
            json!(64),
            "layer.scales: 4 groups for 128 inputs in groups of 64",
        ),
        ("gptq_v2", "/group_size", json!(0), "group_size: 0"),
        ("awq", "/version", json!("gemv"), "version: gemv; gemm is read"),
        ("awq", "/bits", json!(8), "bits: 8; 4 is read"),
        ("awq", "/zero_point", json!(false), "zero_point: false"),
        ("awq", "/group_size", json!(64), "2 groups for 256 inputs in groups of 64"),
        ("packed", "/quant_method", json!("gptq"), "quant_method: gptq beside weight_packed"),
        ("packed", "/format", json!("nvfp4-pack-quantized"), "format: nvfp4-pack-quantized"),
        (
            "packed",
            "/config_groups/group_0/weights/num_bits",
            json!(9),
            "weights.num_bits: 9; 1 to 8",
        ),
        ("packed", "/config_groups/group_0/weights/type", json!("float"), "weights.type"),
        ("packed", "/config_groups/group_0/weights/strategy", json!("block"), "weights.strategy"),
        ("packed", "/transform_config", json!({"u": {}}), "transform_config"),
        ("packed", "/sparsity_config", json!({"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
    ];
    for (name, field, value, expected) in rows {
        let error = case(name).with(field, value).load().unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    // What AWQ wants it does not find in GPTQ's shapes.
    let other = case("gptq").with("/quant_method", json!("awq"));
    let error = other.with("/checkpoint_format", Value::Null).load().unwrap_err();
    assert!(error.contains("layer.qweight: expected shape [256, 3]"), "{error}");
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let mut nameless = case("gptq");
    nameless.settings = Value::Null;
    let error = nameless.load().unwrap_err();
    assert!(error.contains("quantization_config: is missing"), "{error}");

    for (name, part) in [
        ("gptq", "scales"),
        ("gptq", "qzeros"),
        ("gptq_desc_act", "g_idx"),
        ("awq", "scales"),
        ("awq", "qzeros"),
        ("packed", "weight_scale"),
        ("packed_asymmetric", "weight_zero_point"),
    ] {
        let error = case(name).without(part).load().unwrap_err();
        assert!(error.contains(&format!("tensor layer.{part} is missing")), "{name}: {error}");
    }
    // Another layer than the model asks for.
    for case in cases() {
        for shape in [[case.shape[0] + 8, case.shape[1]], [case.shape[0], case.shape[1] + 32]] {
            let error = case.load_as(shape, BTreeMap::new()).unwrap_err();
            assert!(error.contains("layer."), "{}: {error}", case.name);
        }
    }
    let reject =
        |mut case: Case, part: &str, change: &dyn Fn(&mut StoredTensor), expected: &str| {
            change(case.tensor(part));
            let error = case.load().unwrap_err();
            assert!(error.contains(expected), "{error}");
        };
    reject(
        case("gptq_desc_act"),
        "g_idx",
        &|t| t.data = [9i32.to_le_bytes()].concat().repeat(256).into(),
        "layer.g_idx: input 0 is in group 9 of 2",
    );
    reject(
        case("packed"),
        "weight_shape",
        &|t| t.data = [11i64, 255].map(i64::to_le_bytes).concat().into(),
        "layer.weight_shape: [11, 255], but the layer is [11, 256]",
    );
    let float = |t: &mut StoredTensor| t.encoding = Encoding::Plain(DType::F32);
    reject(case("gptq"), "qweight", &float, "layer.qweight: packed codes must be stored as I32");
    let whole = |t: &mut StoredTensor| t.encoding = Encoding::Plain(DType::I16);
    reject(case("awq"), "scales", &whole, "layer.scales: scales must be stored as floats");
}

#[test]
fn packing_rounds_to_the_nearest_code() {
    for id in ["int4_g128", "int4_g64", "int4_g32", "int8_g128", "int8_g32", "int"] {
        for id in [id.to_owned(), format!("{id}_ordered")] {
            if id == "int_ordered" {
                continue;
            }
            let values: Vec<f32> = (0..6 * 256).map(|i| (i as f32 * 0.7).sin()).collect();
            let weight = format(&id).pack(&values, 6, 256).unwrap();
            let most = if id.starts_with("int8") { 255.0 } else { 15.0 };
            for (found, value) in decode(&weight).unwrap().iter().zip(&values) {
                assert!((found - value).abs() <= 2.04 / most, "{id}: {value} {found}");
            }
            let zeros = format(&id).pack(&[0.0; 256], 2, 128).unwrap();
            assert_eq!(decode(&zeros).unwrap(), [0.0; 256]);
            assert!(format(&id).pack(&[f32::NAN; 128], 1, 128).is_err());
        }
    }
    let error = format("int4_g128").pack(&[0.0; 70], 1, 70).unwrap_err().to_string();
    assert_eq!(error, "int4_g128: 70 columns are not whole blocks of 128");
    let large = decode(&format("int8_g32").pack(&[1e30; 32], 1, 32).unwrap()).unwrap();
    assert!(large.iter().all(|w| (w / 1e30 - 1.0).abs() < 1e-4));
    assert_eq!(decode(&format("int").pack(&[0.9375; 70], 1, 70).unwrap()).unwrap(), [0.9375; 70]);
}

#[test]
fn parts_that_contradict_each_other_are_refused() {
    let damage = |id: &str, part: usize, byte: usize, value: u8| {
        let values: Vec<f32> = (0..256).map(|i| i as f32).collect();
        let mut weight = format(id).pack(&values, 2, 128).unwrap();
        let tensor = &weight.parts[part].1;
        let mut data = tensor.bytes().to_vec();
        data[byte] = value;
        let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
        weight.parts[part].1 = marlin_tensor::HostTensor::new(dtype, shape, data.into()).unwrap();
        decode(&weight).unwrap_err().to_string()
    };
    assert!(damage("int4_g128_ordered", 1, 0, 126).contains("no permutation of 128 inputs"));
    assert!(damage("int4_g128_ordered", 1, 3, 200).contains("no permutation"));
    assert!(damage("int", 3, 0, 1).contains("part groups: 1 is no group of 1"));
}

fn any_case() -> impl Strategy<Value = usize> {
    0..cases().len()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever shapes, types, sizes and bytes say: an error, or a matrix that decodes.
    #[test]
    fn nothing_panics(
        which in any_case(),
        part in 0usize..5,
        dimension in 0usize..2,
        size in prop_oneof![0usize..300, Just(usize::MAX)],
        dtype in prop_oneof![Just(DType::I32), Just(DType::I64), Just(DType::F16), Just(DType::U8)],
        change in 0u8..4,
        noise in any::<u64>(),
        rows in 0usize..70,
        columns in 0usize..300,
        exact in any::<bool>(),
    ) {
        let mut case = cases().swap_remove(which);
        let count = case.tensors.len();
        let tensor = &mut case.tensors[part % count];
        match change {
            0 => if let Some(d) = tensor.shape.get_mut(dimension) { *d = size },
            1 => tensor.encoding = Encoding::Plain(dtype),
            2 => { case.tensors.remove(part % count); }
            _ => {
                let mut data = tensor.data.to_vec();
                let at = noise as usize % data.len();
                data[at] ^= (noise >> 56) as u8 | 1;
                tensor.data = data.into();
            }
        }
        // Readers give tensors as many bytes as their shape and type need.
        for t in &mut case.tensors {
            let Encoding::Plain(dtype) = t.encoding else { continue };
            let bytes = t.shape.iter().try_fold(dtype.size_bytes(), |n, &d| n.checked_mul(d));
            let Some(bytes) = bytes.filter(|&n| n < 1 << 22) else { return Ok(()) };
            let mut data = t.data.to_vec();
            data.resize(bytes, noise as u8);
            t.data = data.into();
        }
        let shape = if exact { case.shape } else { [rows, columns] };
        if let Ok(weight) = case.load_as(shape, BTreeMap::new()) {
            let values = decode(&weight).unwrap();
            prop_assert_eq!(values.len(), shape[0] * shape[1]);
        }
    }
}
