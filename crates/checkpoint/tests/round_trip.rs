//! What the writers write, the readers read.

use bytes::Bytes;
use marlin_checkpoint::{
    Checkpoint, Container, Encoding, GgmlType, GgufTensor, GgufType, GgufValue, read_safetensors,
    write_gguf, write_safetensors,
};
use marlin_tensor::{DType, HostTensor};
use proptest::prelude::*;
use proptest::{collection, sample};
use std::collections::BTreeMap;

const DTYPES: [DType; 16] = [
    DType::Bool,
    DType::U8,
    DType::I8,
    DType::U16,
    DType::I16,
    DType::U32,
    DType::I32,
    DType::U64,
    DType::I64,
    DType::F8E4M3,
    DType::F8E5M2,
    DType::F8E8M0,
    DType::F16,
    DType::BF16,
    DType::F32,
    DType::F64,
];

/// Bytes that tell tensors and offsets apart.
fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 31 + seed * 17) as u8).collect()
}

fn plain() -> impl Strategy<Value = (DType, Vec<usize>)> {
    (sample::select(&DTYPES[..]), collection::vec(0..6usize, 0..5))
}

/// An encoding GGUF can store and a shape that it divides.
fn ggml() -> impl Strategy<Value = (Encoding, Vec<usize>)> {
    let plain = DTYPES.map(Encoding::Plain).into_iter().filter(|e| e.ggml_number().is_some());
    let encodings: Vec<_> = plain.chain(GgmlType::all().map(Encoding::Ggml)).collect();
    (sample::select(encodings), collection::vec(0..4usize, 0..5)).prop_map(
        |(encoding, mut shape)| {
            match shape.last_mut() {
                Some(columns) => *columns *= encoding.block_elements(),
                None => shape.push(encoding.block_elements()),
            }
            (encoding, shape)
        },
    )
}

fn value() -> impl Strategy<Value = GgufValue> {
    let leaf = prop_oneof![
        any::<u8>().prop_map(GgufValue::U8),
        any::<i8>().prop_map(GgufValue::I8),
        any::<u16>().prop_map(GgufValue::U16),
        any::<i16>().prop_map(GgufValue::I16),
        any::<u32>().prop_map(GgufValue::U32),
        any::<i32>().prop_map(GgufValue::I32),
        any::<f32>().prop_map(GgufValue::F32),
        sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.1])
            .prop_map(GgufValue::F32),
        any::<bool>().prop_map(GgufValue::Bool),
        any::<String>().prop_map(GgufValue::String),
        any::<u64>().prop_map(GgufValue::U64),
        any::<i64>().prop_map(GgufValue::I64),
        any::<f64>().prop_map(GgufValue::F64),
    ];
    leaf.prop_recursive(4, 32, 5, |inner| {
        // An array holds one type: copies of the first, and the others that match it.
        (inner.clone(), collection::vec(inner, 0..5)).prop_map(|(first, mut rest)| {
            rest.retain(|v| v.kind() == first.kind());
            GgufValue::Array(first.kind(), rest)
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn safetensors(
        rows in collection::btree_map(any::<String>(), plain(), 0..8),
        metadata in collection::btree_map(any::<String>(), any::<String>(), 0..4),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.safetensors");
        let tensors: BTreeMap<String, HostTensor> = rows
            .into_iter()
            .enumerate()
            .map(|(i, (name, (dtype, shape)))| {
                let length = Encoding::Plain(dtype).byte_len(&shape).unwrap();
                let data = Bytes::from(pattern(length, i));
                (name, HostTensor::new(dtype, shape, data).unwrap())
            })
            .collect();
        let strings: Vec<_> = metadata.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let named = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        write_safetensors(&path, named, &strings).unwrap();

        let found = read_safetensors(&path).unwrap();
        prop_assert!(found.metadata.iter().map(|(k, v)| (k, v)).eq(metadata.iter()));
        prop_assert_eq!(found.tensors.len(), tensors.len());
        for stored in &found.tensors {
            let (tensor, found) = (&tensors[&stored.name], stored.plain().unwrap());
            prop_assert_eq!(found.dtype(), tensor.dtype());
            prop_assert_eq!(found.shape(), tensor.shape());
            prop_assert_eq!(found.bytes(), tensor.bytes());
            // Whoever reads elements in place needs them aligned.
            let address = stored.data.as_ptr() as usize;
            prop_assert!(stored.data.is_empty() || address.is_multiple_of(tensor.dtype().size_bytes()));
        }
    }

    #[test]
    fn gguf(
        rows in collection::btree_map(any::<String>(), ggml(), 0..8),
        metadata in collection::btree_map(any::<String>(), value(), 0..8),
        alignment in sample::select(vec![None, Some(8), Some(64), Some(4096)]),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.gguf");
        let data: Vec<_> = rows
            .values()
            .enumerate()
            .map(|(i, (encoding, shape))| pattern(encoding.byte_len(shape).unwrap(), i))
            .collect();
        let tensors: Vec<_> = rows
            .iter()
            .zip(&data)
            .map(|((name, (encoding, shape)), data)| GgufTensor {
                name,
                encoding: *encoding,
                shape,
                data,
            })
            .collect();
        let mut values: Vec<_> = metadata.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
        values.extend(alignment.map(|n| ("general.alignment", GgufValue::U32(n))));
        write_gguf(&path, &values, &tensors).unwrap();

        let found = Checkpoint::open(&path).unwrap();
        let Container::Gguf { metadata: read } = &found.container else { panic!() };
        prop_assert_eq!(read.len(), values.len());
        for ((key, value), (read_key, read_value)) in values.iter().zip(read) {
            prop_assert_eq!(key, read_key);
            prop_assert_eq!(&value.to_json(), read_value);
        }
        prop_assert_eq!(found.tensors().count(), tensors.len());
        for tensor in &tensors {
            let stored = found.get(tensor.name).unwrap();
            prop_assert_eq!(stored.encoding, tensor.encoding);
            prop_assert_eq!(&stored.shape, tensor.shape);
            prop_assert_eq!(&stored.data[..], tensor.data);
        }
    }
}

#[test]
fn real_tensors_survive_a_change_of_container() {
    let model = Checkpoint::open(&marlin_testkit::tiny_model("glm4_moe_lite")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let tensors: Vec<_> = model.tensors().map(GgufTensor::from).collect();
    let value = GgufValue::Array(GgufType::U64, vec![GgufValue::U64(u64::MAX)]);
    write_gguf(&path, &[("large", value)], &tensors).unwrap();
    let written = Checkpoint::open(&path).unwrap();
    for (a, b) in model.tensors().zip(written.tensors()) {
        assert_eq!((&a.name, &a.shape, &a.data), (&b.name, &b.shape, &b.data));
    }
    let Container::Gguf { metadata } = &written.container else { panic!() };
    assert_eq!(metadata["large"][0].as_u64(), Some(u64::MAX));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn writers_refuse_what_readers_would() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a");
    let one = HostTensor::from_f32(vec![1], &[1.0]);
    let deep = HostTensor::from_f32(vec![1; 9], &[1.0]);
    let f32s = Encoding::Plain(DType::F32);
    let tensor = |name, shape, encoding| GgufTensor { name, encoding, shape, data: &[0; 4] };
    let w = tensor("w", &[1], f32s);
    let mixed = GgufValue::Array(GgufType::U8, vec![GgufValue::U8(1), GgufValue::I8(1)]);
    let odd = GgufValue::U32(24);
    let long_name = "n".repeat(70_000);
    let rows = [
        ("twice", write_safetensors(&path, [("w", &one), ("w", &one)], &[])),
        ("reserved", write_safetensors(&path, [("__metadata__", &one)], &[])),
        ("more than 8 dimensions", write_safetensors(&path, [("w", &deep)], &[])),
        ("twice", write_safetensors(&path, [], &[("k", "1"), ("k", "2")])),
        ("twice", write_gguf(&path, &[], &[w, w])),
        ("twice", write_gguf(&path, &[("k", odd.clone()), ("k", odd.clone())], &[])),
        ("does not take 4 bytes", write_gguf(&path, &[], &[tensor("w", &[2], f32s)])),
        ("dimensions", write_gguf(&path, &[], &[tensor("w", &[1; 5], f32s)])),
        ("U16", write_gguf(&path, &[], &[tensor("w", &[2], Encoding::Plain(DType::U16))])),
        ("longer than", write_gguf(&path, &[], &[tensor(&long_name, &[1], f32s)])),
        ("array of U8 holds a I8", write_gguf(&path, &[("k", mixed)], &[])),
        ("power of two", write_gguf(&path, &[("general.alignment", odd)], &[])),
    ];
    for (part, result) in rows {
        let error = result.expect_err(part).to_string();
        assert!(error.contains(part), "{part}: {error}");
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}
