//! Reader of one GGUF file.
//!
//! Every count and length is compared with the bytes that are left before anything is allocated
//! for it. On top there are limits on keys, tensors and metadata values, because a value takes up
//! to 80 times more memory as JSON than in the file.

use super::value::float_to_json;
use super::{
    ALIGNMENT_KEY, DEFAULT_ALIGNMENT, GgufType, MAGIC, MAX_DEPTH, MAX_DIMS, MAX_KEYS,
    MAX_NAME_BYTES, MAX_TENSORS, MAX_VALUES,
};
use crate::CheckpointError;
use crate::checkpoint::{Encoding, StoredTensor};
use crate::error::{Fault, shown};
use crate::source::FileBytes;
use serde_json::{Map, Value};
use std::path::Path;

/// Bytes of the shortest tensor info: empty name, no dimensions.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 4 + 8;
/// Bytes of the shortest metadata entry: empty key, one byte of value.
const MIN_KEY_BYTES: u64 = 8 + 4 + 1;

/// Content of one file.
pub(crate) struct Gguf {
    pub(crate) metadata: Map<String, Value>,
    /// In file order.
    pub(crate) tensors: Vec<StoredTensor>,
}

/// Whether `bytes` begin like a GGUF file.
pub(crate) fn is_gguf(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// Reads the header of `file` and checks it against the file's length.
///
/// # Errors
/// When it contradicts itself, the file or the format, or a limit is passed.
pub(crate) fn read(file: &FileBytes) -> Result<Gguf, CheckpointError> {
    let path = &file.file;
    let mut cursor = Cursor { bytes: &file.bytes, at: 0, values_left: MAX_VALUES };
    let (tensor_count, key_count) = cursor.preamble().map_err(|(f, e)| e.at(path, f))?;

    // Twice: an error further on must not have cost the memory of a vocabulary.
    let metadata_at = cursor.at;
    let alignment = cursor.metadata(path, key_count, &mut None)?;
    let mut infos = Vec::with_capacity(tensor_count as usize);
    for index in 0..tensor_count {
        let name = cursor.name().map_err(|e| e.at(path, format!("name of tensor {index}")))?;
        let layout = cursor
            .layout(alignment)
            .map_err(|(field, e)| e.at(path, format!("tensor {}, {field}", shown(&name))))?;
        infos.push((name, layout));
    }
    let tensors = place_tensors(file, infos, cursor.at.next_multiple_of(alignment as usize))?;

    let mut metadata = Some(Map::new());
    cursor = Cursor { bytes: &file.bytes, at: metadata_at, values_left: MAX_VALUES };
    cursor.metadata(path, key_count, &mut metadata)?;
    Ok(Gguf { metadata: metadata.unwrap_or_default(), tensors })
}

fn checked_alignment(kind: GgufType, value: &Value) -> Result<u64, Fault> {
    let alignment = value.as_u64().filter(|_| kind == GgufType::U32);
    let alignment = alignment.ok_or_else(|| Fault::corrupt("expected a u32"))?;
    if !super::valid_alignment(alignment) {
        let reason = format!("{alignment} is not a power of two from 8 to 65536");
        return Err(Fault::corrupt(reason));
    }
    Ok(alignment)
}

/// Cuts the tensors out of the data that begins at `start`, refusing overlaps.
fn place_tensors(
    file: &FileBytes,
    infos: Vec<(String, Layout)>,
    start: usize,
) -> Result<Vec<StoredTensor>, CheckpointError> {
    let path = &file.file;
    // The padding before the data may be absent when there is no data.
    let data = file.bytes.slice(start.min(file.bytes.len())..);
    for (name, info) in &infos {
        let end = info.offset.checked_add(info.bytes as u64);
        if end.is_none_or(|end| end > data.len() as u64) {
            let reason = format!(
                "{} bytes at offset {} do not lie in the {} bytes of data",
                info.bytes,
                info.offset,
                data.len()
            );
            let field = format!("tensor {}, offset", shown(name));
            return Err(Fault::corrupt(reason).at(path, field));
        }
    }

    let mut order: Vec<u32> = (0..infos.len() as u32).collect();
    order.sort_unstable_by_key(|&i| (infos[i as usize].1.offset, infos[i as usize].1.bytes));
    let mut end = 0;
    for &i in &order {
        let (name, info) = &infos[i as usize];
        if info.bytes == 0 {
            continue;
        }
        if info.offset < end {
            let reason = format!("offset {} lies inside the tensor before", info.offset);
            let field = format!("tensor {}, offset", shown(name));
            return Err(Fault::corrupt(reason).at(path, field));
        }
        end = info.offset + info.bytes as u64;
    }

    let tensors = infos.into_iter().map(|(name, info)| {
        let begin = info.offset as usize;
        StoredTensor {
            name,
            encoding: info.encoding,
            shape: info.shape,
            data: data.slice(begin..begin + info.bytes),
            file: path.clone(),
        }
    });
    Ok(tensors.collect())
}

/// A tensor info; `bytes` is what `shape` and `encoding` need.
struct Layout {
    encoding: Encoding,
    shape: Vec<usize>,
    offset: u64,
    bytes: usize,
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    values_left: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8], Fault> {
        let left = self.left();
        let Some(count) = usize::try_from(count).ok().filter(|&n| n <= left) else {
            return Err(Fault::corrupt(format!("needs {count} bytes, the file has {left} left")));
        };
        let found = &self.bytes[self.at..self.at + count];
        self.at += count;
        Ok(found)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        Ok(*self.take(N as u64)?.first_chunk().expect("took N bytes"))
    }

    fn u32(&mut self) -> Result<u32, Fault> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, Fault> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Result<&'a str, Fault> {
        let length = self.u64()?;
        let bytes = self.take(length)?;
        str::from_utf8(bytes).map_err(|e| Fault::corrupt(format!("string: {e}")))
    }

    /// A key or a tensor name.
    fn name(&mut self) -> Result<String, Fault> {
        let length = self.bytes[self.at..].first_chunk().map(|b| u64::from_le_bytes(*b));
        match length {
            Some(length) if length > MAX_NAME_BYTES => {
                let reason = format!("length {length}; at most {MAX_NAME_BYTES} are allowed");
                Err(Fault::corrupt(reason))
            }
            _ => self.text().map(str::to_owned),
        }
    }

    /// Magic, version and counts: tensors, metadata keys.
    fn preamble(&mut self) -> Result<(u64, u64), (&'static str, Fault)> {
        let magic: [u8; 4] = self.array().map_err(|e| ("magic", e))?;
        if magic != *MAGIC {
            return Err(("magic", Fault::corrupt("the file does not begin with GGUF")));
        }
        let version = self.u32().map_err(|e| ("version", e))?;
        if version & 0xffff == 0 && version != 0 {
            let reason = format!(
                "big-endian file (version {}); convert it with `gguf-convert-endian FILE little`",
                version.swap_bytes()
            );
            return Err(("version", Fault::unsupported(reason)));
        }
        if !(2..=3).contains(&version) {
            let reason = format!("version {version}; versions 2 and 3 are read, convert it anew");
            return Err(("version", Fault::unsupported(reason)));
        }
        let tensors = self.u64().map_err(|e| ("tensor count", e))?;
        let keys = self.u64().map_err(|e| ("metadata count", e))?;
        let left = self.left() as u64;
        let check = |field, count: u64, most: u64, each: u64| {
            let reason = if count > most {
                format!("{count}; at most {most} are read")
            } else if count * each > left {
                format!("{count} need at least {} bytes, the file has {left} left", count * each)
            } else {
                return Ok(());
            };
            Err((field, Fault::corrupt(reason)))
        };
        check("metadata count", keys, MAX_KEYS, MIN_KEY_BYTES)?;
        check("tensor count", tensors, MAX_TENSORS, MIN_TENSOR_BYTES)?;
        Ok((tensors, keys))
    }

    /// Reads `count` keys and values, into `out` if it is there; returns the alignment.
    fn metadata(
        &mut self,
        path: &Path,
        count: u64,
        out: &mut Option<Map<String, Value>>,
    ) -> Result<u64, CheckpointError> {
        let mut alignment = DEFAULT_ALIGNMENT;
        for index in 0..count {
            let key = self.name().map_err(|e| e.at(path, format!("metadata key {index}")))?;
            let at_key = |e: Fault| e.at(path, format!("metadata {}", shown(&key)));
            let kind = self.kind().map_err(at_key)?;
            self.count_values(1).map_err(at_key)?;
            let keep = out.is_some() || key == ALIGNMENT_KEY;
            let value = self.value(kind, 0, keep).map_err(at_key)?;
            if key == ALIGNMENT_KEY {
                alignment = checked_alignment(kind, &value).map_err(at_key)?;
            }
            if let Some(out) = out {
                if out.contains_key(&key) {
                    return Err(at_key(Fault::corrupt("key appears twice")));
                }
                out.insert(key, value);
            }
        }
        Ok(alignment)
    }

    fn kind(&mut self) -> Result<GgufType, Fault> {
        let number = self.u32()?;
        GgufType::from_number(number)
            .ok_or_else(|| Fault::corrupt(format!("unknown value type {number}")))
    }

    fn count_values(&mut self, count: usize) -> Result<(), Fault> {
        let left = self.values_left.checked_sub(count);
        self.values_left = left.ok_or_else(|| {
            Fault::corrupt(format!("more than {MAX_VALUES} metadata values in one file"))
        })?;
        Ok(())
    }

    /// A value nested in `depth` arrays. Unless `keep`, strings and arrays are checked all the
    /// same but returned as null.
    fn value(&mut self, kind: GgufType, depth: usize, keep: bool) -> Result<Value, Fault> {
        Ok(match kind {
            GgufType::U8 => u8::from_le_bytes(self.array()?).into(),
            GgufType::I8 => i8::from_le_bytes(self.array()?).into(),
            GgufType::U16 => u16::from_le_bytes(self.array()?).into(),
            GgufType::I16 => i16::from_le_bytes(self.array()?).into(),
            GgufType::U32 => self.u32()?.into(),
            GgufType::I32 => i32::from_le_bytes(self.array()?).into(),
            GgufType::U64 => self.u64()?.into(),
            GgufType::I64 => i64::from_le_bytes(self.array()?).into(),
            GgufType::F32 => float_to_json(f32::from_le_bytes(self.array()?).into()),
            GgufType::F64 => float_to_json(f64::from_le_bytes(self.array()?)),
            GgufType::Bool => match self.array()? {
                [0] => false.into(),
                [1] => true.into(),
                [other] => return Err(Fault::corrupt(format!("{other} is not a bool"))),
            },
            GgufType::String => match self.text()? {
                text if keep => text.into(),
                _ => Value::Null,
            },
            GgufType::Array => self.elements(depth + 1, keep)?,
        })
    }

    fn elements(&mut self, depth: usize, keep: bool) -> Result<Value, Fault> {
        if depth > MAX_DEPTH {
            return Err(Fault::corrupt(format!("arrays nested deeper than {MAX_DEPTH}")));
        }
        let kind = self.kind()?;
        let count = self.u64()?;
        let left = self.left();
        let fits = usize::try_from(count).ok().filter(|&n| n <= left / kind.min_bytes());
        let Some(count) = fits else {
            let reason = format!("array of {count} elements, the file has {left} bytes left");
            return Err(Fault::corrupt(reason));
        };
        self.count_values(count)?;
        let mut out = Vec::with_capacity(if keep { count } else { 0 });
        for _ in 0..count {
            let value = self.value(kind, depth, keep)?;
            if keep {
                out.push(value);
            }
        }
        Ok(Value::Array(out))
    }

    /// What follows a tensor's name.
    fn layout(&mut self, alignment: u64) -> Result<Layout, (&'static str, Fault)> {
        let dims = self.u32().map_err(|e| ("number of dimensions", e))?;
        if dims as usize > MAX_DIMS {
            let reason = format!("{dims}; at most {MAX_DIMS} are allowed");
            return Err(("number of dimensions", Fault::corrupt(reason)));
        }
        let mut shape = Vec::with_capacity(dims as usize);
        for _ in 0..dims {
            let dim = self.u64().map_err(|e| ("dimensions", e))?;
            let dim = usize::try_from(dim);
            shape.push(dim.map_err(|e| ("dimensions", Fault::corrupt(e.to_string())))?);
        }
        shape.reverse();
        let number = self.u32().map_err(|e| ("type", e))?;
        let encoding = Encoding::from_ggml_number(number).ok_or_else(|| {
            ("type", Fault::unsupported(format!("tensor type {number} is not known")))
        })?;
        let offset = self.u64().map_err(|e| ("offset", e))?;
        if offset % alignment != 0 {
            let reason = format!("{offset} is not a multiple of the alignment {alignment}");
            return Err(("offset", Fault::corrupt(reason)));
        }
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let Some(bytes) = elements.and_then(|_| encoding.byte_len(&shape)) else {
            let reason = format!(
                "{shape:?} of {encoding} overflows or has rows that are not whole blocks of {}",
                encoding.block_elements()
            );
            return Err(("dimensions", Fault::corrupt(reason)));
        };
        Ok(Layout { shape, encoding, offset, bytes })
    }
}
