//! The GGUF reader against files that the `gguf` Python package checked
//! (`fixtures/make_gguf_fixture.py`).

use marlin_checkpoint::{Checkpoint, Container};
use serde_json::Value;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// The fixture lists 64-bit values as strings.
fn same(found: &Value, expected: &Value) -> bool {
    match (found, expected) {
        (Value::Array(f), Value::Array(e)) => {
            f.len() == e.len() && f.iter().zip(e).all(|(f, e)| same(f, e))
        }
        (Value::Number(f), Value::String(e)) => f.to_string() == *e,
        _ => found == expected,
    }
}

#[test]
fn fixtures_read_as_the_python_package_reads_them() {
    let expected = std::fs::read_to_string(fixture("tiny.json")).unwrap();
    let expected: Value = serde_json::from_str(&expected).unwrap();
    for name in ["tiny.gguf", "tiny_v2.gguf"] {
        let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
        let Container::Gguf { metadata } = &checkpoint.container else { panic!("{name}") };
        assert_eq!(metadata["general.architecture"], "test");
        for (key, row) in expected["metadata"].as_object().unwrap() {
            let value = match row["value"].as_f64() {
                Some(v) if row["type"] == "FLOAT32" => f64::from(v as f32).into(),
                _ => row["value"].clone(),
            };
            assert!(same(&metadata[key], &value), "{name}: {key}: {}", metadata[key]);
        }
        let rows = expected["tensors"].as_array().unwrap();
        assert_eq!(checkpoint.tensors().count(), rows.len());
        for row in rows {
            let tensor = checkpoint.get(row["name"].as_str().unwrap()).unwrap();
            assert_eq!(tensor.encoding.to_string(), row["type"]);
            assert_eq!(Value::from(tensor.shape.clone()), row["shape"]);
            assert_eq!(tensor.data.len() as u64, row["bytes"]);
            let sum: u64 = tensor.data.iter().map(|&b| u64::from(b)).sum();
            assert_eq!(sum, row["byte_sum"], "{name}: {}", tensor.name);
        }
    }
}
