//! Opening a model: which files belong to it, and what they must agree on.
//!
//! * A directory with `config.json`: the tensors of the files that `model.safetensors.index.json`
//!   names; without an index those of `model.safetensors`, and failing that of every
//!   `*.safetensors`. EXL3 directories have no reliable index (the quantizer writes one, its loader
//!   ignores it and takes every `*.safetensors`), so neither do we use it.
//! * A directory with `config.json` alone, or a `config.json` itself: no tensors. Enough to
//!   describe a model.
//! * A `.gguf` file, or a directory that holds one model in that form and no `config.json`.

use crate::checkpoint::{Checkpoint, Container};
use crate::error::{Fault, shown};
use crate::json::{self, Text};
use crate::source::{self, FileBytes, Folder, plain_file_name};
use crate::{CheckpointError, gguf, safetensors};
use bytes::Bytes;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

const CONFIG: &str = "config.json";
const GENERATION_CONFIG: &str = "generation_config.json";
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Most files of one model.
const MAX_SHARDS: usize = 4096;
/// Most tensors in an index. Kimi K2 in EXL3 has 280 thousand.
const MAX_INDEXED: usize = 1024 * 1024;
/// Files kept as bytes for whoever needs them.
const SIDECARS: [&str; 11] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    GENERATION_CONFIG,
    "quantization_config.json",
    "hf_quant_config.json",
    // Of AutoGPTQ and AutoAWQ, before these settings went into config.json.
    "quantize_config.json",
    "quant_config.json",
    // Of sentence-transformers: how states become a vector.
    "1_Pooling/config.json",
];

impl Checkpoint {
    /// Opens the model at `path`: a directory, a `.gguf` file, or a `config.json`.
    ///
    /// Weights are mapped, not read. The files must not change while the checkpoint is in use.
    ///
    /// # Errors
    /// When there is no model, or a file contradicts itself, the others, or its format.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let about = std::fs::metadata(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => CheckpointError::NotFound {
                path: path.to_path_buf(),
                what: "model file or directory".to_owned(),
            },
            _ => source::io_error(path, e),
        })?;
        if about.is_dir() {
            return open_folder(path, &Folder::Disk(path));
        }
        match path.extension().and_then(|e| e.to_str()) {
            Some("json") => open_config(path),
            Some("safetensors") => {
                let reason = "a safetensors file lacks the configuration; \
                              give the directory that holds it and config.json";
                Err(Fault::unsupported(reason).at(path, "file"))
            }
            _ => open_gguf(path, source::map(path)?),
        }
    }

    /// Opens a model compiled into the program: `files` are its file names and contents, `name`
    /// stands for the directory in messages. The same checks as in [`open`](Self::open).
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_embedded(
        name: &str,
        files: &[(&str, &'static [u8])],
    ) -> Result<Self, CheckpointError> {
        let files: Vec<_> = files.iter().map(|(n, b)| (*n, Bytes::from_static(b))).collect();
        Self::from_memory(name, &files)
    }

    /// As [`from_embedded`](Self::from_embedded) for files that came to memory in another way.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_memory(name: &str, files: &[(&str, Bytes)]) -> Result<Self, CheckpointError> {
        let name = Path::new(name);
        open_folder(name, &Folder::Memory { name, files })
    }
}

fn open_config(path: &Path) -> Result<Checkpoint, CheckpointError> {
    let file = source::read_small(path)?;
    let config = Value::Object(json::parse_object(path, &file.bytes)?);
    let container = Container::HuggingFace { config, generation_config: None };
    Ok(Checkpoint::from_parts(path.to_path_buf(), container, [], BTreeMap::new()))
}

fn open_gguf(path: &Path, file: FileBytes) -> Result<Checkpoint, CheckpointError> {
    if !gguf::is_gguf(&file.bytes) {
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            return Err(Fault::corrupt("is not that of a GGUF file").at(path, "magic number"));
        }
        let reason = "neither a GGUF file nor a directory with config.json and safetensors";
        return Err(Fault::unsupported(reason).at(path, "file"));
    }
    let model = gguf::open(file)?;
    let maps = model.files.into_iter().filter_map(|f| f.mapped).map(|m| m.0).collect();
    let container = Container::Gguf { metadata: model.metadata };
    Checkpoint::from_files(path.to_path_buf(), container, model.tensors, BTreeMap::new(), maps)
}

fn open_folder(path: &Path, folder: &Folder) -> Result<Checkpoint, CheckpointError> {
    let Some(config) = folder.small(CONFIG)? else {
        return open_folder_gguf(path, folder);
    };
    let config = json::parse_object(&config.file, &config.bytes)?;
    let mut sidecars = BTreeMap::new();
    for name in SIDECARS {
        if let Some(file) = folder.small(name)? {
            sidecars.insert(name.to_owned(), file.bytes);
        }
    }
    let generation_config = sidecars.get(GENERATION_CONFIG).map(|bytes: &Bytes| {
        json::parse_object(&folder.path(GENERATION_CONFIG), bytes).map(Value::Object)
    });
    let generation_config = generation_config.transpose()?;

    let index = match is_exl3(&config) {
        true => None,
        false => folder.small(INDEX)?,
    };
    let names = match &index {
        Some(index) => index_shards(index)?.into_iter().collect(),
        None => shards_without_index(path, &folder.names()?, is_exl3(&config))?,
    };
    let mut tensors = Vec::new();
    let mut maps = Vec::new();
    for name in &names {
        let file = folder.map(name).map_err(|e| match e {
            CheckpointError::NotFound { path, .. } if index.is_some() => {
                CheckpointError::NotFound { path, what: format!("file named in {INDEX}") }
            }
            other => other,
        })?;
        tensors.extend(safetensors::read(&file)?.tensors);
        maps.extend(file.mapped.map(|m| m.0));
    }
    let container = Container::HuggingFace { config: Value::Object(config), generation_config };
    let checkpoint =
        Checkpoint::from_files(path.to_path_buf(), container, tensors, sidecars, maps)?;
    if let Some(index) = &index {
        check_index(index, &checkpoint)?;
    }
    Ok(checkpoint)
}

fn open_folder_gguf(path: &Path, folder: &Folder) -> Result<Checkpoint, CheckpointError> {
    let mut names = folder.names()?;
    names.retain(|n| n.ends_with(".gguf"));
    // Of a split model the first part stands for all.
    names.retain(|n| numbered(n, ".gguf").is_none_or(|(_, part, _)| part == 1));
    match names.as_slice() {
        [] => Err(CheckpointError::NotFound {
            path: path.to_path_buf(),
            what: format!("{CONFIG} (or a .gguf file)"),
        }),
        [name] => open_gguf(&folder.path(name), folder.map(name)?),
        several => {
            let reason = format!("{}; give the path of one", several.join(", "));
            Err(Fault::unsupported(reason).at(path, "several models"))
        }
    }
}

fn is_exl3(config: &Map<String, Value>) -> bool {
    let method = config.get("quantization_config").and_then(|q| q.get("quant_method"));
    method.and_then(Value::as_str) == Some("exl3")
}

/// Splits `STEM-00002-of-00005SUFFIX` into stem, part and count.
fn numbered<'n>(name: &'n str, suffix: &str) -> Option<(&'n str, u32, u32)> {
    let (rest, count) = name.strip_suffix(suffix)?.rsplit_once("-of-")?;
    let (stem, part) = rest.rsplit_once('-')?;
    let number = |text: &str| match text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit()) {
        true => text.parse().ok(),
        false => None,
    };
    Some((stem, number(part)?, number(count)?))
}

/// The weight files among `names` when no index lists them; none at all is fine.
fn shards_without_index(
    path: &Path,
    names: &[String],
    exl3: bool,
) -> Result<Vec<String>, CheckpointError> {
    if !exl3 && names.iter().any(|n| n == SINGLE) {
        return Ok(vec![SINGLE.to_owned()]);
    }
    let found: Vec<_> = names.iter().filter(|n| n.ends_with(".safetensors")).cloned().collect();
    if found.len() > MAX_SHARDS {
        let reason = format!("{} safetensors files; at most {MAX_SHARDS} are read", found.len());
        return Err(Fault::unsupported(reason).at(path, "directory"));
    }
    for name in &found {
        let Some((stem, _, count)) = numbered(name, ".safetensors") else { continue };
        let present = found.iter().filter(|n| {
            numbered(n, ".safetensors")
                .is_some_and(|(s, p, c)| s == stem && c == count && (1..=count).contains(&p))
        });
        let present = present.count();
        if present as u64 != u64::from(count) {
            return Err(CheckpointError::NotFound {
                path: path.to_path_buf(),
                what: format!(
                    "{} of the {count} files like {name}",
                    u64::from(count) - present as u64
                ),
            });
        }
    }
    Ok(found)
}

/// Names of the files in the index, each checked to lie in the directory.
fn index_shards(index: &FileBytes) -> Result<BTreeSet<String>, CheckpointError> {
    let mut shards = BTreeSet::new();
    read_index(index, |_, shard| {
        if shards.contains(shard) {
            return Ok(());
        }
        plain_file_name(shard)?;
        if shards.len() == MAX_SHARDS {
            return Err(Fault::corrupt(format!("more than {MAX_SHARDS} files")));
        }
        shards.insert(shard.to_owned());
        Ok(())
    })?;
    if shards.is_empty() {
        return Err(Fault::corrupt("names no file").at(&index.file, "weight_map"));
    }
    Ok(shards)
}

/// Checks that every tensor of the index is in the file the index says.
fn check_index(index: &FileBytes, checkpoint: &Checkpoint) -> Result<(), CheckpointError> {
    read_index(index, |tensor, shard| {
        let found = checkpoint.get(tensor);
        match found.map(|t| t.file.file_name() == Some(shard.as_ref())) {
            Some(true) => Ok(()),
            Some(false) => {
                let file = found.map(|t| t.file.display().to_string()).unwrap_or_default();
                let reason = format!("listed in {}, stored in {file}", shown(shard));
                Err(Fault::corrupt(reason))
            }
            None => {
                let reason = format!("listed in {}, which does not hold it", shown(shard));
                Err(Fault::corrupt(reason))
            }
        }
    })
}

/// Calls `visit` with each tensor name and file name of the index, without storing them.
fn read_index(
    index: &FileBytes,
    visit: impl FnMut(&str, &str) -> Result<(), Fault>,
) -> Result<(), CheckpointError> {
    let mut found = None;
    let mut parser = serde_json::Deserializer::from_slice(&index.bytes);
    let parsed =
        IndexSeed { visit, found: &mut found }.deserialize(&mut parser).and_then(|()| parser.end());
    match (found, parsed) {
        (Some((tensor, fault)), _) => {
            Err(fault.at(&index.file, format!("weight_map, {}", shown(&tensor))))
        }
        (None, Err(e)) => Err(Fault::corrupt(e.to_string()).at(&index.file, "weight_map")),
        (None, Ok(())) => Ok(()),
    }
}

/// Walks `{"weight_map": {tensor: file}}`.
struct IndexSeed<'s, F> {
    visit: F,
    /// What `visit` objected to.
    found: &'s mut Option<(String, Fault)>,
}

impl<'de, F: FnMut(&str, &str) -> Result<(), Fault>> DeserializeSeed<'de> for IndexSeed<'_, F> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, F: FnMut(&str, &str) -> Result<(), Fault>> Visitor<'de> for IndexSeed<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with weight_map")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        let mut seen = false;
        while let Some(Text(key)) = map.next_key()? {
            if key != "weight_map" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if std::mem::replace(&mut seen, true) {
                return Err(A::Error::custom("appears twice"));
            }
            map.next_value_seed(WeightMap { visit: &mut self.visit, found: &mut *self.found })?;
        }
        match seen {
            true => Ok(()),
            false => Err(A::Error::custom("is missing")),
        }
    }
}

struct WeightMap<'s, F> {
    visit: &'s mut F,
    found: &'s mut Option<(String, Fault)>,
}

impl<'de, F: FnMut(&str, &str) -> Result<(), Fault>> DeserializeSeed<'de> for WeightMap<'_, F> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, F: FnMut(&str, &str) -> Result<(), Fault>> Visitor<'de> for WeightMap<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from tensor names to file names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut count = 0;
        while let Some((Text(tensor), Text(shard))) = map.next_entry()? {
            let visited = match count == MAX_INDEXED {
                true => Err(Fault::corrupt(format!("more than {MAX_INDEXED} tensors"))),
                false => (self.visit)(&tensor, &shard),
            };
            visited.map_err(|fault| {
                *self.found = Some((tensor.into_owned(), fault));
                A::Error::custom("refused")
            })?;
            count += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn numbered_names() {
        let parse = |n| numbered(n, ".safetensors");
        assert_eq!(parse("model-00002-of-00005.safetensors"), Some(("model", 2, 5)));
        assert_eq!(parse("a-b-00001-of-00001.safetensors"), Some(("a-b", 1, 1)));
        for name in
            ["model.safetensors", "model-2-of-5.safetensors", "x-0000+-of-00005.safetensors"]
        {
            assert_eq!(parse(name), None);
        }
    }

    #[test]
    fn index_errors_name_the_tensor() {
        let rows = [
            (r#"{"weight_map": {"w": "../x.safetensors"}}"#, "weight_map, w: file name `../x"),
            (r#"{"weight_map": {"w": "/etc/passwd"}}"#, "does not lie in the directory"),
            (r#"{"weight_map": {"w": 3}}"#, "invalid type"),
            (r#"{"weight_map": {}}"#, "names no file"),
            (r#"{"metadata": {}}"#, "weight_map: is missing"),
            (r#"{"weight_map": {"w": "a"}, "weight_map": {}}"#, "appears twice"),
            ("[]", "weight_map"),
            ("{", "EOF"),
        ];
        for (text, part) in rows {
            let file = FileBytes {
                file: PathBuf::from(INDEX).into(),
                bytes: Bytes::from_static(text.as_bytes()),
                mapped: None,
            };
            let error = index_shards(&file).unwrap_err().to_string();
            assert!(error.contains(INDEX) && error.contains(part), "{text}: {error}");
        }
    }
}
