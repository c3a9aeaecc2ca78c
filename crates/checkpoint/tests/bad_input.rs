//! Damaged and lying files: an error that names file and field, or a checkpoint whose tensors lie
//! within the file; never a panic, never slow. Memory is checked in `limits.rs`.

use marlin_checkpoint::{Checkpoint, CheckpointError};
use marlin_testkit::mutate::{bit_flips, truncations};
use marlin_testkit::tiny_model;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Opens `path`; the error, if there is one. Touches every byte that a tensor claims.
fn open(path: &Path) -> Option<String> {
    let started = Instant::now();
    let opened = Checkpoint::open(path);
    assert!(started.elapsed() < Duration::from_secs(2), "{} is slow", path.display());
    match opened {
        Ok(checkpoint) => {
            for tensor in checkpoint.tensors() {
                let expected = tensor.encoding.byte_len(&tensor.shape);
                assert_eq!(expected, Some(tensor.data.len()), "{}", tensor.name);
                std::hint::black_box(tensor.data.iter().fold(0u8, |sum, b| sum ^ b));
            }
            None
        }
        Err(error) => Some(error.to_string()),
    }
}

/// A copy of the model in `from`, of which `name` will be replaced.
fn copy_of(from: &Path, name: &str) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), directory.path().join(entry.file_name())).unwrap();
    }
    let path = directory.path().join(name);
    assert!(path.exists());
    (directory, path)
}

/// Damages the file `name` of the model in `from`; `target` opens it. Every truncation must be
/// noticed unless only `spare` bytes are cut; a flipped bit may lie in the weights.
fn damage(from: &Path, name: &str, spare: usize, whole_directory: bool) {
    let (directory, path) = copy_of(from, name);
    let target = if whole_directory { directory.path() } else { &path };
    let good = fs::read(&path).unwrap();
    assert_eq!(open(target), None);
    for (length, copy) in truncations(&good) {
        fs::write(&path, copy).unwrap();
        match open(target) {
            Some(error) => assert!(error.contains(name), "cut to {length}: {error}"),
            None => assert!(length + spare >= good.len(), "{name} cut to {length} was accepted"),
        }
    }
    for (bit, copy) in bit_flips(&good) {
        fs::write(&path, copy).unwrap();
        if let Some(error) = open(target) {
            let named = error.contains(name) || error.contains(directory.path().to_str().unwrap());
            assert!(named, "bit {bit}: {error}");
        }
    }
}

#[test]
fn damaged_safetensors() {
    damage(&tiny_model("llama"), "model.safetensors", 0, true);
}

#[test]
fn damaged_config() {
    damage(&tiny_model("llama"), "config.json", 1, true);
}

#[test]
fn damaged_index() {
    damage(&tiny_model("llama_sharded"), "model.safetensors.index.json", 1, true);
}

#[test]
fn damaged_gguf() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    // What is cut off may be the padding behind the last tensor.
    damage(&fixtures, "tiny.gguf", 31, false);
    damage(&fixtures, "tiny_v2.gguf", 63, false);
}

/// It was neither a model nor damaged: the exit code was that of any failure.
#[test]
fn a_gguf_file_of_one_byte_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in [("one.gguf", &b"G"[..]), ("none.GGUF", b""), ("text.gguf", b"# notes\n")]
    {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let error = Checkpoint::open(&path).unwrap_err();
        assert!(matches!(error, CheckpointError::Corrupt { .. }), "{name}: {error}");
        assert!(error.to_string().contains(name), "{error}");
    }
}

/// Header length, header, and `data` zeros.
fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.resize(out.len() + data, 0);
    out
}

#[test]
fn lying_safetensors() {
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"w":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let lengths = |length: u64| [&length.to_le_bytes()[..], b"{}"].concat();
    let good = r#"{"dtype":"U8","shape":[4],"data_offsets":[0,4]}"#;
    let next = r#"{"dtype":"U8","shape":[4],"data_offsets":[4,8]}"#;
    let two63 = "9223372036854775808";
    let rows: Vec<(&str, Vec<u8>)> = vec![
        ("header length: file has 0 bytes", vec![]),
        ("header length: file has 7 bytes", vec![0; 7]),
        ("header length: 9223372036854775808 bytes", lengths(1 << 63)),
        ("header length: 18446744073709551615 bytes", lengths(u64::MAX)),
        ("header length: 100000001 bytes", lengths(100_000_001)),
        ("header length: 3 bytes, but the file has 10", lengths(3)),
        ("header: EOF", safetensors("", 0)),
        ("header: invalid type: sequence", safetensors("[]", 0)),
        ("header: trailing characters", safetensors("{} {}", 0)),
        ("header: ", [&4u64.to_le_bytes()[..], b"{\"\xff\""].concat()),
        ("tensor w: name appears twice", safetensors(&format!(r#"{{"w":{good},"w":{next}}}"#), 8)),
        ("tensor w, data_offsets: data begins at 0, expected 4: overlaps", {
            safetensors(&format!(r#"{{"v":{good},"w":{good}}}"#), 4)
        }),
        ("tensor w, data_offsets: data begins at 4, expected 0: leaves a gap", {
            safetensors(&format!(r#"{{"w":{next}}}"#), 8)
        }),
        ("data length: tensors end at byte 4 of 5", safetensors(&format!(r#"{{"w":{good}}}"#), 5)),
        ("tensor w, data_offsets: [0, 4] does not lie in the 3", {
            safetensors(&format!(r#"{{"w":{good}}}"#), 3)
        }),
        ("data_offsets: [4, 0]", safetensors(&entry(r#""U8""#, "[4]", "[4,0]"), 4)),
        ("tensor w, data_offsets: [0, 9223372036854775808]", {
            safetensors(&entry(r#""U8""#, &format!("[{two63}]"), &format!("[0,{two63}]")), 4)
        }),
        ("data_offsets: invalid value", safetensors(&entry(r#""U8""#, "[4]", "[-4,0]"), 4)),
        ("data_offsets: invalid type", safetensors(&entry(r#""U8""#, "[4]", "[0,4.0]"), 4)),
        ("data_offsets: invalid length 3", safetensors(&entry(r#""U8""#, "[4]", "[0,4,4]"), 4)),
        ("data_offsets: expected 2", safetensors(&entry(r#""U8""#, "[4]", "[0]"), 4)),
        ("tensor w, shape: number of bytes overflows", {
            safetensors(&entry(r#""F64""#, "[4294967296,4294967296]", "[0,4]"), 4)
        }),
        ("tensor w, shape: [3] of U8 needs 3", safetensors(&entry(r#""U8""#, "[3]", "[0,4]"), 4)),
        ("shape: invalid value", safetensors(&entry(r#""U8""#, "[-4]", "[0,4]"), 4)),
        ("shape: invalid length 9", {
            safetensors(&entry(r#""U8""#, "[1,1,1,1,1,1,1,1,4]", "[0,4]"), 4)
        }),
        ("tensor w, dtype: element type `F4`", safetensors(&entry(r#""F4""#, "[8]", "[0,4]"), 4)),
        ("tensor w, dtype: invalid type", safetensors(&entry("3", "[4]", "[0,4]"), 4)),
        ("tensor w, dtype: is missing", safetensors(r#"{"w":{}}"#, 0)),
        ("tensor w, shape: is missing", safetensors(r#"{"w":{"dtype":"U8"}}"#, 0)),
        ("tensor w, data_offsets: is missing", {
            safetensors(r#"{"w":{"dtype":"U8","shape":[]}}"#, 0)
        }),
        ("tensor w, dtype: appears twice", {
            safetensors(r#"{"w":{"dtype":"U8","dtype":"I8"}}"#, 0)
        }),
        ("tensor w: invalid type", safetensors(r#"{"w":[]}"#, 0)),
        ("header: invalid type: integer", safetensors(r#"{"__metadata__":{"k":1}}"#, 0)),
        ("__metadata__, k: key", safetensors(r#"{"__metadata__":{"k":"","k":""}}"#, 0)),
        ("header: `__metadata__`", safetensors(r#"{"__metadata__":{},"__metadata__":{}}"#, 0)),
        ("tensor w: EOF", safetensors(&format!(r#"{{"w":{{"x":{}"#, "[".repeat(1 << 20)), 0)),
    ];
    let (directory, path) = copy_of(&tiny_model("llama"), "model.safetensors");
    for (part, bytes) in rows {
        fs::write(&path, bytes).unwrap();
        let error = open(directory.path()).expect(part);
        assert!(error.contains("model.safetensors: "), "{error}");
        assert!(error.contains(part), "expected {part}, found {error}");
    }
}

/// A GGUF file written field by field.
#[derive(Clone)]
struct Raw(Vec<u8>);

impl Raw {
    fn new(version: u32, tensors: u64, keys: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(version).u64(tensors).u64(keys)
    }
    fn u32(mut self, v: u32) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn u64(mut self, v: u64) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn bytes(mut self, v: &[u8]) -> Self {
        self.0.extend(v);
        self
    }
    fn str(self, v: &str) -> Self {
        self.u64(v.len() as u64).bytes(v.as_bytes())
    }
    /// A tensor info with the name `w`.
    fn tensor(self, dims: &[u64], kind: u32, offset: u64) -> Self {
        let out = self.str("w").u32(dims.len() as u32);
        dims.iter().fold(out, |out, &d| out.u64(d)).u32(kind).u64(offset)
    }
    /// Padding to 32 bytes and `count` zeros.
    fn data(mut self, count: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(32) + count, 0);
        self
    }
}

#[test]
fn lying_gguf() {
    const F32: u32 = 0;
    const STRING: u32 = 8;
    const ARRAY: u32 = 9;
    let key = |kind: u32| Raw::new(3, 0, 1).str("key").u32(kind);
    let align = |n: u32| Raw::new(3, 0, 1).str("general.alignment").u32(4).u32(n);
    let one = |dims: &[u64], kind, offset| Raw::new(3, 1, 0).tensor(dims, kind, offset).data(64);
    let nested = (0..9).fold(key(ARRAY), |out, _| out.u32(ARRAY).u64(1)).u32(0).u64(0);
    let two63 = 1 << 63;
    let rows = [
        ("magic number: is not that of", Raw(b"GGUX".to_vec())),
        ("version: needs 4 bytes", Raw(b"GGUF".to_vec())),
        ("version: version 1", Raw::new(1, 0, 0)),
        ("version: version 4", Raw::new(4, 0, 0)),
        ("version: big-endian file (version 3)", Raw::new(3 << 24, 0, 0)),
        ("tensor count: 9223372036854775808", Raw::new(3, two63, 0)),
        ("tensor count: 5000000", Raw::new(3, 5_000_000, 0)),
        ("tensor count: 100000 need at least", Raw::new(3, 100_000, 0)),
        ("metadata count: 9223372036854775808", Raw::new(3, 0, two63)),
        ("metadata count: 60000 need at least", Raw::new(3, 0, 60_000)),
        ("metadata key 0: length 9223372036854775808", Raw::new(3, 0, 1).u64(two63).data(64)),
        ("metadata key 0: string: invalid utf-8", {
            Raw::new(3, 0, 1).u64(1).bytes(b"\xff").u32(0).u32(0)
        }),
        ("metadata key: needs 9223372036854775808 bytes", key(STRING).u64(two63).data(64)),
        ("metadata key: string: invalid utf-8", key(STRING).u64(1).bytes(b"\xff")),
        ("metadata key: array of 9223372036854775808", key(ARRAY).u32(0).u64(two63).data(64)),
        ("metadata key: array of 1000 elements", key(ARRAY).u32(ARRAY).u64(1000).data(64)),
        ("metadata key: arrays nested deeper than 8", nested),
        ("metadata key: unknown value type 13", key(13).u64(0)),
        ("metadata key: unknown value type 77", key(ARRAY).u32(77).u64(0)),
        ("metadata key: 2 is not a bool", key(7).bytes(&[2])),
        ("metadata key: key appears twice", {
            Raw::new(3, 0, 2).str("key").u32(0).bytes(&[1]).str("key").u32(0).bytes(&[1])
        }),
        ("metadata general.alignment: 0 is not a power of two", align(0)),
        ("metadata general.alignment: 24 is not a power of two", align(24)),
        ("metadata general.alignment: 2147483648 is not", align(1 << 31)),
        ("metadata general.alignment: expected a u32", {
            Raw::new(3, 0, 1).str("general.alignment").u32(10).u64(32)
        }),
        ("name of tensor 0: length 9223372036854775808", Raw::new(3, 1, 0).u64(two63).data(64)),
        ("tensor w, number of dimensions: 5", one(&[1; 5], F32, 0)),
        ("tensor w, number of dimensions: 4294967295", {
            Raw::new(3, 1, 0).str("w").u32(u32::MAX).data(64)
        }),
        ("tensor w, dimensions: [9223372036854775808, 9223372036854775808]", {
            one(&[two63, two63], F32, 0)
        }),
        ("tensor w, dimensions: ", one(&[two63], F32, 0)),
        ("tensor w, dimensions: [33] of Q4_0", one(&[33], 2, 0)),
        ("tensor w, type: tensor type 4 is not known", one(&[1], 4, 0)),
        ("tensor w, type: tensor type 4294967295", one(&[1], u32::MAX, 0)),
        ("tensor w, offset: 1 is not a multiple", one(&[1], F32, 1)),
        ("tensor w, offset: 64 bytes at offset 32 do not lie in the 64", one(&[16], F32, 32)),
        ("tensor w, offset: 4 bytes at offset 9223372036854775808", one(&[1], F32, two63)),
        ("tensor w, offset: offset 0 lies inside the tensor before", {
            Raw::new(3, 2, 0).tensor(&[1], F32, 0).tensor(&[16], F32, 0).data(64)
        }),
        ("tensor w: name appears twice", {
            Raw::new(3, 2, 0).tensor(&[1], F32, 0).tensor(&[1], F32, 32).data(64)
        }),
        ("tensor w, offset: needs 8 bytes", Raw::new(3, 1, 0).str("w").u32(1).u64(1).u32(0)),
        ("split.count: 65535 parts", Raw::new(3, 0, 1).str("split.count").u32(2).bytes(&[255; 2])),
        (
            "split.count: expected a whole number",
            Raw::new(3, 0, 1).str("split.count").u32(8).u64(0),
        ),
    ];
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.gguf");
    for (part, Raw(bytes)) in rows {
        fs::write(&path, bytes).unwrap();
        let error = open(&path).expect(part);
        assert!(error.contains("m.gguf: "), "{error}");
        assert!(error.contains(part), "expected {part}, found {error}");
    }
    // The same fields with honest values are accepted.
    for (label, Raw(bytes)) in [
        ("empty", Raw::new(3, 0, 0)),
        ("alignment", align(64)),
        ("scalar", one(&[], F32, 0)),
        ("no elements", one(&[0, 7], F32, 32)),
        ("two tensors", {
            Raw::new(3, 2, 0).tensor(&[8], F32, 32).str("v").u32(0).u32(F32).u64(0).data(64)
        }),
    ] {
        fs::write(&path, bytes).unwrap();
        assert_eq!(open(&path), None, "{label}");
    }
}
