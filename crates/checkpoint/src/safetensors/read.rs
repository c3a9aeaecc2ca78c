//! Reader of safetensors files.

use super::{MAX_DIMS, MAX_HEADER_BYTES, MAX_METADATA, MAX_TENSORS, METADATA_KEY};
use crate::CheckpointError;
use crate::checkpoint::{Encoding, StoredTensor};
use crate::error::{Fault, shown};
use crate::json::Text;
use crate::source::{self, FileBytes};
use marlin_tensor::DType;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::borrow::Cow;
use std::fmt;
use std::path::Path;

/// Content of one safetensors file.
#[derive(Debug, Clone)]
pub struct Safetensors {
    /// `__metadata__` in file order.
    pub metadata: Vec<(String, String)>,
    /// By place in the file.
    pub tensors: Vec<StoredTensor>,
}

/// Opens one file without a configuration: statistics, intermediate results, test data.
/// Models are opened by [`Checkpoint::open`](crate::Checkpoint::open).
///
/// # Errors
/// When the file cannot be mapped, contradicts itself or the format, or holds a name twice.
pub fn read_safetensors(path: &Path) -> Result<Safetensors, CheckpointError> {
    let found = read(&source::map(path)?)?;
    let mut names: Vec<_> = found.tensors.iter().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    if let Some([name, _]) = names.array_windows().find(|[a, b]| a == b) {
        let field = format!("tensor {}", shown(name));
        return Err(Fault::corrupt("name appears twice").at(path, field));
    }
    Ok(found)
}

/// Reads the header of `file` and checks it against the file's length.
///
/// # Errors
/// When the header or an entry contradicts itself, the file or the format, or a limit is passed.
/// Names are not checked for duplicates here; [`crate::Checkpoint`] does it across files.
pub(crate) fn read(file: &FileBytes) -> Result<Safetensors, CheckpointError> {
    let path = &file.file;
    let length = file.bytes.len() as u64;
    let Some((prefix, rest)) = file.bytes.split_first_chunk::<8>() else {
        let reason = format!("file has {length} bytes, the length of the header takes 8");
        return Err(Fault::corrupt(reason).at(path, "header length"));
    };
    let header_length = u64::from_le_bytes(*prefix);
    if header_length > MAX_HEADER_BYTES {
        let reason = format!("{header_length} bytes; at most {MAX_HEADER_BYTES} are read");
        return Err(Fault::corrupt(reason).at(path, "header length"));
    }
    let header_length = header_length as usize;
    let Some((header, data)) = rest.split_at_checked(header_length) else {
        let reason = format!("{header_length} bytes, but the file has {length}");
        return Err(Fault::corrupt(reason).at(path, "header length"));
    };

    // Twice: an error in the last entry must not have cost the memory of all before it.
    let parse = |capacity| parse_header(header, data.len() as u64, capacity);
    let count = parse(None).map_err(|(place, e)| e.at(path, place))?.count;
    let parsed = parse(Some(count)).map_err(|(place, e)| e.at(path, place))?;
    let Header { metadata, mut entries, .. } = parsed;

    let mut keys: Vec<_> = metadata.iter().map(|(key, _)| key).collect();
    keys.sort_unstable();
    if let Some([key, _]) = keys.array_windows().find(|[a, b]| a == b) {
        let field = format!("{METADATA_KEY}, {}", shown(key));
        return Err(Fault::corrupt("key appears twice").at(path, field));
    }
    entries.sort_unstable_by_key(|e| (e.begin, e.end));
    let mut end = 0;
    for entry in &entries {
        if entry.begin != end {
            let what =
                if entry.begin < end { "overlaps the tensor before" } else { "leaves a gap" };
            let reason = format!("data begins at {}, expected {end}: {what}", entry.begin);
            let field = format!("tensor {}, data_offsets", shown(&entry.name));
            return Err(Fault::corrupt(reason).at(path, field));
        }
        end = entry.end;
    }
    if end != data.len() {
        let reason = format!("tensors end at byte {end} of {}", data.len());
        return Err(Fault::corrupt(reason).at(path, "data length"));
    }

    let start = 8 + header_length;
    let tensors = entries.into_iter().map(|entry| StoredTensor {
        name: entry.name.into_owned(),
        encoding: Encoding::Plain(entry.dtype),
        shape: entry.shape,
        data: file.bytes.slice(start + entry.begin..start + entry.end),
        file: path.clone(),
    });
    Ok(Safetensors { metadata, tensors: tensors.collect() })
}

/// Parses the header, keeping what it finds if `capacity`, the number of tensors, is given.
fn parse_header(
    header: &[u8],
    data_length: u64,
    capacity: Option<usize>,
) -> Result<Header<'_>, (String, Fault)> {
    let mut place = Place::default();
    let mut parser = serde_json::Deserializer::from_slice(header);
    let parsed = HeaderSeed { place: &mut place, data_length, capacity }
        .deserialize(&mut parser)
        .and_then(|value| parser.end().map(|()| value));
    parsed.map_err(|e| {
        let fault = match place.unsupported.take() {
            Some(reason) => Fault::Unsupported(reason),
            None => Fault::corrupt(e.to_string()),
        };
        (place.to_string(), fault)
    })
}

struct Header<'de> {
    metadata: Vec<(String, String)>,
    entries: Vec<Entry<'de>>,
    /// Number of tensors, whether kept or not.
    count: usize,
}

/// One tensor; `begin <= end <=` data length, and the difference is what the shape needs.
struct Entry<'de> {
    name: Cow<'de, str>,
    dtype: DType,
    shape: Vec<usize>,
    begin: usize,
    end: usize,
}

/// Where in the header the parser is, for messages; left as it is when an error comes up.
#[derive(Default)]
struct Place {
    tensor: String,
    field: &'static str,
    /// Set when the error is about something we do not read, rather than about damage.
    unsupported: Option<String>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.tensor.as_str(), self.field) {
            ("", _) => f.write_str("header"),
            (tensor, "") => write!(f, "tensor {}", shown(tensor)),
            (tensor, field) => write!(f, "tensor {}, {field}", shown(tensor)),
        }
    }
}

struct HeaderSeed<'s> {
    place: &'s mut Place,
    data_length: u64,
    capacity: Option<usize>,
}

impl<'de> DeserializeSeed<'de> for HeaderSeed<'_> {
    type Value = Header<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Header<'de>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderSeed<'_> {
    type Value = Header<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from tensor names to entries")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header<'de>, A::Error> {
        let entries = Vec::with_capacity(self.capacity.unwrap_or(0));
        let mut header = Header { metadata: Vec::new(), entries, count: 0 };
        let mut metadata_seen = false;
        while let Some(Text(name)) = map.next_key()? {
            self.place.field = "";
            self.place.tensor.clear();
            if name == METADATA_KEY {
                if std::mem::replace(&mut metadata_seen, true) {
                    return Err(A::Error::custom(format_args!("`{METADATA_KEY}` appears twice")));
                }
                header.metadata =
                    map.next_value_seed(MetadataSeed { keep: self.capacity.is_some() })?;
                continue;
            }
            if header.count == MAX_TENSORS {
                return Err(A::Error::custom(format_args!("more than {MAX_TENSORS} tensors")));
            }
            self.place.tensor.push_str(&name);
            let seed = EntrySeed { place: self.place, data_length: self.data_length, name };
            let entry = map.next_value_seed(seed)?;
            header.count += 1;
            if self.capacity.is_some() {
                header.entries.push(entry);
            }
        }
        self.place.tensor.clear();
        Ok(header)
    }
}

struct MetadataSeed {
    keep: bool,
}

impl<'de> DeserializeSeed<'de> for MetadataSeed {
    type Value = Vec<(String, String)>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed {
    type Value = Vec<(String, String)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`__metadata__`: a map from strings to strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut out = Vec::new();
        let mut count = 0;
        while let Some((Text(key), Text(value))) = map.next_entry()? {
            if count == MAX_METADATA {
                let message = format_args!("more than {MAX_METADATA} entries in `__metadata__`");
                return Err(A::Error::custom(message));
            }
            count += 1;
            if self.keep {
                out.push((key.into_owned(), value.into_owned()));
            }
        }
        Ok(out)
    }
}

struct EntrySeed<'s, 'de> {
    place: &'s mut Place,
    data_length: u64,
    name: Cow<'de, str>,
}

impl<'de> DeserializeSeed<'de> for EntrySeed<'_, 'de> {
    type Value = Entry<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Entry<'de>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for EntrySeed<'_, 'de> {
    type Value = Entry<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entry<'de>, A::Error> {
        let Self { place, data_length, name } = self;
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(Text(key)) = map.next_key()? {
            let twice = match &*key {
                "dtype" => {
                    place.field = "dtype";
                    let Text(text) = map.next_value()?;
                    let known = DType::from_name(&text);
                    if known.is_none() {
                        place.unsupported = Some(format!("element type `{}`", shown(&text)));
                    }
                    dtype.replace(known.ok_or_else(|| A::Error::custom("unknown"))?).is_some()
                }
                "shape" => {
                    place.field = "shape";
                    shape.replace(map.next_value_seed(Integers { most: MAX_DIMS })?).is_some()
                }
                "data_offsets" => {
                    place.field = "data_offsets";
                    offsets.replace(map.next_value_seed(Integers { most: 2 })?).is_some()
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    false
                }
            };
            if twice {
                return Err(A::Error::custom("appears twice"));
            }
        }
        let mut missing = |field| {
            place.field = field;
            A::Error::custom("is missing")
        };
        let dtype = dtype.ok_or_else(|| missing("dtype"))?;
        let shape = shape.ok_or_else(|| missing("shape"))?;
        let offsets = offsets.ok_or_else(|| missing("data_offsets"))?;

        place.field = "data_offsets";
        let &[begin, end] = offsets.as_slice() else {
            return Err(A::Error::custom(format_args!(
                "expected 2 numbers, found {}",
                offsets.len()
            )));
        };
        if begin > end || end > data_length {
            return Err(A::Error::custom(format_args!(
                "[{begin}, {end}] does not lie in the {data_length} bytes of data"
            )));
        }
        place.field = "shape";
        let shape: Option<Vec<usize>> = shape.iter().map(|&d| usize::try_from(d).ok()).collect();
        let needed = shape.as_deref().and_then(|s| Encoding::Plain(dtype).byte_len(s));
        let (Some(shape), Some(needed)) = (shape, needed) else {
            return Err(A::Error::custom("number of bytes overflows"));
        };
        if needed as u64 != end - begin {
            return Err(A::Error::custom(format_args!(
                "{shape:?} of {dtype} needs {needed} bytes, data_offsets give {}",
                end - begin
            )));
        }
        Ok(Entry { name, dtype, shape, begin: begin as usize, end: end as usize })
    }
}

/// A short list of whole numbers.
struct Integers {
    most: usize,
}

impl<'de> DeserializeSeed<'de> for Integers {
    type Value = Vec<u64>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<u64>, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Integers {
    type Value = Vec<u64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {} whole numbers", self.most)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u64>, A::Error> {
        let mut out = Vec::new();
        while let Some(value) = seq.next_element()? {
            if out.len() == self.most {
                return Err(A::Error::invalid_length(out.len() + 1, &self));
            }
            out.push(value);
        }
        Ok(out)
    }
}
