//! What must hold for any bytes at all: an error, or a matrix that decodes. Used by the fuzz targets
//! and by the test that replays what they found.

use bytes::Bytes;
use marlin_checkpoint::Checkpoint;

/// `data` as the safetensors file of a model in EXL3: loads what its tensor names promise, at the
/// largest and at a smaller width that the stored padding allows.
pub fn exl3(data: &[u8]) {
    let files = [
        ("config.json", Bytes::from_static(b"{}")),
        ("model.safetensors", Bytes::copy_from_slice(data)),
    ];
    let Ok(checkpoint) = Checkpoint::from_memory("fuzz", &files) else { return };
    for tensor in checkpoint.tensors() {
        let Some(key) = tensor.name.strip_suffix(".trellis") else { continue };
        let (outputs, inputs) = match tensor.shape[..] {
            [k, n, _] => (n.saturating_mul(16), k.saturating_mul(16)),
            [vocab, words] => (vocab, words.div_ceil(17).saturating_mul(256)),
            _ => (128, 128),
        };
        for less in [0, 27] {
            let (rows, columns) = (outputs.saturating_sub(less), inputs.saturating_sub(less));
            match marlin_quant::load(&checkpoint, key, rows, columns) {
                // What decodes is bounded by what is stored: at least one bit a weight.
                Ok(weight) if tensor.data.len() < 1 << 16 => {
                    if let Ok(values) = marlin_quant::decode(&weight) {
                        assert_eq!(values.len(), rows * columns);
                    }
                    let _ = marlin_quant::slice_rows(&weight, 0..rows.min(128));
                }
                Ok(_) => {}
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        }
    }
}

/// `data` as the safetensors file of a model in GPTQ, AWQ and compressed-tensors: loads what its tensor names
/// promise, at the sizes that their shapes do and at others.
pub fn integer(data: &[u8]) {
    for settings in [
        r#"{"quant_method": "gptq", "group_size": 32}"#,
        r#"{"quant_method": "gptq", "checkpoint_format": "gptq_v2", "desc_act": true}"#,
        r#"{"quant_method": "awq", "version": "gemm"}"#,
        r#"{"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 4}},
            "b": {"weights": {"num_bits": 6, "symmetric": false}}}}"#,
    ] {
        let config = format!(r#"{{"quantization_config": {settings}}}"#);
        let files = [
            ("config.json", Bytes::from(config)),
            ("model.safetensors", Bytes::copy_from_slice(data)),
        ];
        let Ok(checkpoint) = Checkpoint::from_memory("fuzz", &files) else { return };
        for tensor in checkpoint.tensors() {
            let Some((key, part)) = tensor.name.rsplit_once('.') else { continue };
            let &[a, b] = &tensor.shape[..] else { continue };
            let sizes = match part {
                "qweight" => [(b, 8 * a), (b, 4 * a), (8 * b, a), (b, 16 * a)],
                "weight_packed" => [(a, 8 * b), (a, 16 * b / 3), (a, 4 * b), (a, 32 * b)],
                _ => continue,
            };
            for (rows, columns) in sizes {
                match marlin_quant::load(&checkpoint, key, rows, columns) {
                    // What decodes is bounded by what is stored: at least a bit a weight.
                    Ok(weight) if tensor.data.len() < 1 << 16 => {
                        let values = marlin_quant::decode(&weight).expect("what was loaded");
                        assert_eq!(values.len(), rows * columns);
                        let _ = marlin_quant::slice_rows(&weight, 0..rows.min(3));
                    }
                    Ok(_) => {}
                    Err(error) => assert!(!error.to_string().is_empty()),
                }
            }
        }
    }
}
