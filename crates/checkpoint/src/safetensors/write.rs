//! Writer of safetensors files.

use super::{MAX_DIMS, MAX_HEADER_BYTES, MAX_TENSORS, METADATA_KEY};
use crate::error::{Fault, shown};
use crate::source::io_error;
use crate::{CheckpointError, atomic};
use marlin_tensor::HostTensor;
use serde_json::{Map, Value, json};
use std::cmp::Reverse;
use std::path::Path;

/// Writes `tensors` and `metadata` to `path`, replacing the file there only once all is written.
///
/// Tensors are laid out by falling element size, then by name, and the header is padded to a
/// multiple of 8 bytes, so every tensor is aligned to its elements. The data is streamed: nothing
/// but the header is held in memory.
///
/// # Errors
/// When a name appears twice, a limit of the reader is passed, or the file cannot be written.
pub fn write_safetensors<'t>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'t str, &'t HostTensor)>,
    metadata: &[(&str, &str)],
) -> Result<(), CheckpointError> {
    let mut tensors: Vec<_> = tensors.into_iter().collect();
    tensors.sort_by_key(|(name, tensor)| (Reverse(tensor.dtype().size_bytes()), *name));
    let header = header(&tensors, metadata).map_err(|(f, e)| e.at(path, f))?;
    atomic::write(path, |out| {
        let at = |e| io_error(path, e);
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(at)?;
        out.write_all(&header).map_err(at)?;
        tensors.iter().try_for_each(|(_, t)| out.write_all(t.bytes())).map_err(at)
    })
}

fn header(
    tensors: &[(&str, &HostTensor)],
    metadata: &[(&str, &str)],
) -> Result<Vec<u8>, (String, Fault)> {
    let refuse = |field: String, reason: String| Err((field, Fault::Unsupported(reason)));
    if tensors.len() > MAX_TENSORS {
        let reason = format!("{}; at most {MAX_TENSORS} fit in a file", tensors.len());
        return refuse("number of tensors".to_owned(), reason);
    }
    let mut header = Map::new();
    if !metadata.is_empty() {
        let mut strings = Map::new();
        for (key, value) in metadata {
            if strings.insert((*key).to_owned(), Value::from(*value)).is_some() {
                let field = format!("{METADATA_KEY}, {}", shown(key));
                return refuse(field, "key is given twice".to_owned());
            }
        }
        header.insert(METADATA_KEY.to_owned(), strings.into());
    }
    let mut begin = 0;
    for (name, tensor) in tensors {
        let field = || format!("tensor {}", shown(name));
        if *name == METADATA_KEY {
            return refuse(field(), "the name is reserved".to_owned());
        }
        if tensor.shape().len() > MAX_DIMS {
            let reason = format!("{:?} has more than {MAX_DIMS} dimensions", tensor.shape());
            return refuse(field(), reason);
        }
        let end = begin + tensor.bytes().len() as u64;
        let entry = json!({
            "dtype": tensor.dtype().name(),
            "shape": tensor.shape(),
            "data_offsets": [begin, end],
        });
        if header.insert((*name).to_owned(), entry).is_some() {
            return refuse(field(), "the name is given twice".to_owned());
        }
        begin = end;
    }
    let mut bytes = Value::Object(header).to_string().into_bytes();
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    if bytes.len() as u64 > MAX_HEADER_BYTES {
        let reason = format!("{} bytes; at most {MAX_HEADER_BYTES} are allowed", bytes.len());
        return refuse("header".to_owned(), reason);
    }
    Ok(bytes)
}
