//! What must hold for any bytes at all: an error, or a matrix that decodes. Used by the fuzz target
//! and by the test that replays what it found.

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
