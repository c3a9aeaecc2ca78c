//! Writer of GGUF files, version 3, little-endian.

use super::{
    ALIGNMENT_KEY, DEFAULT_ALIGNMENT, GgufType, GgufValue, MAGIC, MAX_DEPTH, MAX_DIMS, MAX_KEYS,
    MAX_NAME_BYTES, MAX_TENSORS, MAX_VALUES, valid_alignment,
};
use crate::checkpoint::{Encoding, StoredTensor};
use crate::error::{Fault, shown};
use crate::source::io_error;
use crate::{CheckpointError, atomic};
use std::collections::HashSet;
use std::io::{self, Write};
use std::path::Path;

/// Version of the files written.
const VERSION: u32 = 3;

/// A tensor to write.
#[derive(Debug, Clone, Copy)]
pub struct GgufTensor<'t> {
    /// Name, at most 64 bytes if ggml is to read it.
    pub name: &'t str,
    /// Element layout, one that GGUF can store.
    pub encoding: Encoding,
    /// Dimensions, slowest first, at most four.
    pub shape: &'t [usize],
    /// Exactly the bytes that `shape` and `encoding` need.
    pub data: &'t [u8],
}

impl<'t> From<&'t StoredTensor> for GgufTensor<'t> {
    fn from(t: &'t StoredTensor) -> Self {
        Self { name: &t.name, encoding: t.encoding, shape: &t.shape, data: &t.data }
    }
}

/// Writes `metadata` and `tensors`, in this order, to `path`, replacing the file there only once
/// all is written. Data is aligned to `general.alignment` if the metadata has it, else to 32
/// bytes. The data is streamed: nothing but the header is held in memory.
///
/// # Errors
/// When a key or name appears twice, a value or tensor cannot be stored in GGUF, a limit of the
/// reader is passed, or the file cannot be written.
pub fn write_gguf(
    path: &Path,
    metadata: &[(&str, GgufValue)],
    tensors: &[GgufTensor],
) -> Result<(), CheckpointError> {
    let alignment = alignment(metadata).map_err(|e| e.at(path, ALIGNMENT_KEY))?;
    let mut header = header(metadata, tensors, alignment).map_err(|(f, e)| e.at(path, f))?;
    header.resize(header.len().next_multiple_of(alignment), 0);
    atomic::write(path, |out| {
        let at = |e| io_error(path, e);
        out.write_all(&header).map_err(at)?;
        tensors.iter().try_for_each(|t| write_padded(out, t.data, alignment)).map_err(at)
    })
}

fn write_padded(out: &mut dyn Write, data: &[u8], alignment: usize) -> io::Result<()> {
    out.write_all(data)?;
    let padding = data.len().next_multiple_of(alignment) - data.len();
    out.write_all(&vec![0; padding])
}

fn alignment(metadata: &[(&str, GgufValue)]) -> Result<usize, Fault> {
    match metadata.iter().find(|(key, _)| *key == ALIGNMENT_KEY) {
        None => Ok(DEFAULT_ALIGNMENT as usize),
        Some((_, GgufValue::U32(n))) if valid_alignment(u64::from(*n)) => Ok(*n as usize),
        Some((_, other)) => {
            let reason = format!("{other:?} is not a u32 power of two from 8 to 65536");
            Err(Fault::unsupported(reason))
        }
    }
}

fn header(
    metadata: &[(&str, GgufValue)],
    tensors: &[GgufTensor],
    alignment: usize,
) -> Result<Vec<u8>, (String, Fault)> {
    let values = metadata.iter().map(|(_, value)| count_values(value)).sum();
    for (what, count, most) in [
        ("number of tensors", tensors.len(), MAX_TENSORS),
        ("number of metadata keys", metadata.len(), MAX_KEYS),
        ("number of metadata values", values, MAX_VALUES as u64),
    ] {
        if count as u64 > most {
            let reason = format!("{count}; at most {most} fit in a file");
            return Err((what.to_owned(), Fault::unsupported(reason)));
        }
    }
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());

    let mut seen = HashSet::new();
    for (key, value) in metadata {
        let at_key = |e: Fault| (format!("metadata {}", shown(key)), e);
        check_name(key, &mut seen).map_err(at_key)?;
        put_string(&mut out, key);
        out.extend((value.kind() as u32).to_le_bytes());
        put_value(&mut out, value, 0).map_err(at_key)?;
    }

    seen.clear();
    let mut offset = 0;
    for tensor in tensors {
        let at_tensor = |e: Fault| (format!("tensor {}", shown(tensor.name)), e);
        check_name(tensor.name, &mut seen).map_err(at_tensor)?;
        let number = checked_number(tensor).map_err(at_tensor)?;
        put_string(&mut out, tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        for &dim in tensor.shape.iter().rev() {
            out.extend((dim as u64).to_le_bytes());
        }
        out.extend(number.to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        offset += tensor.data.len().next_multiple_of(alignment);
    }
    Ok(out)
}

/// Values in `value`, itself included.
fn count_values(value: &GgufValue) -> usize {
    match value {
        GgufValue::Array(_, values) => 1 + values.iter().map(count_values).sum::<usize>(),
        _ => 1,
    }
}

fn check_name<'n>(name: &'n str, seen: &mut HashSet<&'n str>) -> Result<(), Fault> {
    if name.len() as u64 > MAX_NAME_BYTES {
        return Err(Fault::unsupported(format!("name longer than {MAX_NAME_BYTES} bytes")));
    }
    match seen.insert(name) {
        true => Ok(()),
        false => Err(Fault::unsupported("name is given twice")),
    }
}

/// Number of the tensor's type, once its parts agree.
fn checked_number(tensor: &GgufTensor) -> Result<u32, Fault> {
    let GgufTensor { encoding, shape, data, .. } = tensor;
    let number = encoding.ggml_number();
    let number = number.ok_or_else(|| {
        Fault::unsupported(format!("GGUF cannot store elements of type {encoding}"))
    })?;
    if shape.len() > MAX_DIMS {
        let reason = format!("{shape:?} has more than {MAX_DIMS} dimensions");
        return Err(Fault::unsupported(reason));
    }
    if encoding.byte_len(shape) != Some(data.len()) {
        let reason = format!("{shape:?} of {encoding} does not take {} bytes", data.len());
        return Err(Fault::unsupported(reason));
    }
    Ok(number)
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &GgufValue, depth: usize) -> Result<(), Fault> {
    match value {
        GgufValue::U8(v) => out.extend(v.to_le_bytes()),
        GgufValue::I8(v) => out.extend(v.to_le_bytes()),
        GgufValue::U16(v) => out.extend(v.to_le_bytes()),
        GgufValue::I16(v) => out.extend(v.to_le_bytes()),
        GgufValue::U32(v) => out.extend(v.to_le_bytes()),
        GgufValue::I32(v) => out.extend(v.to_le_bytes()),
        GgufValue::F32(v) => out.extend(v.to_le_bytes()),
        GgufValue::Bool(v) => out.push(u8::from(*v)),
        GgufValue::String(v) => put_string(out, v),
        GgufValue::Array(kind, values) => return put_array(out, *kind, values, depth + 1),
        GgufValue::U64(v) => out.extend(v.to_le_bytes()),
        GgufValue::I64(v) => out.extend(v.to_le_bytes()),
        GgufValue::F64(v) => out.extend(v.to_le_bytes()),
    }
    Ok(())
}

fn put_array(
    out: &mut Vec<u8>,
    kind: GgufType,
    values: &[GgufValue],
    depth: usize,
) -> Result<(), Fault> {
    if depth > MAX_DEPTH {
        return Err(Fault::unsupported(format!("arrays nested deeper than {MAX_DEPTH}")));
    }
    out.extend((kind as u32).to_le_bytes());
    out.extend((values.len() as u64).to_le_bytes());
    for value in values {
        if value.kind() != kind {
            let reason = format!("array of {kind:?} holds a {:?}", value.kind());
            return Err(Fault::unsupported(reason));
        }
        put_value(out, value, depth)?;
    }
    Ok(())
}
