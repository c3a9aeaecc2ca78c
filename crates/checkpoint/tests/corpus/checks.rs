//! What must hold for any bytes at all: a reader returns an error, or tensors that lie within the
//! file. Used by the fuzz targets and by the test that replays what they found.

use bytes::Bytes;
use marlin_checkpoint::Checkpoint;

fn open(files: &[(&str, Bytes)]) {
    match Checkpoint::from_memory("fuzz", files) {
        Ok(checkpoint) => {
            for tensor in checkpoint.tensors() {
                assert_eq!(tensor.encoding.byte_len(&tensor.shape), Some(tensor.data.len()));
                std::hint::black_box(tensor.data.iter().fold(0u8, |sum, b| sum ^ b));
                assert!(checkpoint.get(&tensor.name).is_some());
            }
        }
        Err(error) => assert!(error.to_string().starts_with("fuzz")),
    }
}

/// `data` as a safetensors file.
pub fn safetensors(data: &[u8]) {
    open(&[
        ("config.json", Bytes::from_static(b"{}")),
        ("model.safetensors", Bytes::copy_from_slice(data)),
    ]);
}

/// `data` as a GGUF file.
pub fn gguf(data: &[u8]) {
    open(&[("model.gguf", Bytes::copy_from_slice(data))]);
}

/// `data` as `config.json` and `generation_config.json`.
pub fn config(data: &[u8]) {
    let data = Bytes::copy_from_slice(data);
    open(&[("config.json", data.clone()), ("generation_config.json", data)]);
}

/// `data` as the index of a model with the tensors `a` and `b` in two files.
pub fn index(data: &[u8]) {
    let shard = |name: u8| {
        let mut header = br#"{"?":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}"#.to_vec();
        header[2] = name;
        [&(header.len() as u64).to_le_bytes()[..], &header, &[0]].concat().into()
    };
    open(&[
        ("config.json", Bytes::from_static(b"{}")),
        ("model.safetensors.index.json", Bytes::copy_from_slice(data)),
        ("a.safetensors", shard(b'a')),
        ("b.safetensors", shard(b'b')),
    ]);
}
