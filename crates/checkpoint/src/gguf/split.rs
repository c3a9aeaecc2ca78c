//! Models split over several GGUF files: `NAME-00001-of-0000N.gguf`.
//!
//! Each part is a complete GGUF file with `split.no` (from 0), `split.count` and
//! `split.tensors.count` (of the whole model) in its metadata. The first part holds the model's
//! metadata and, often, no tensors. Source: `tools/gguf-split` of llama.cpp.

use super::read::{self, Gguf};
use crate::CheckpointError;
use crate::checkpoint::StoredTensor;
use crate::error::Fault;
use crate::source::{FileBytes, map};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Most parts of one model.
const MAX_PARTS: u64 = 1024;

/// A whole model: the first part's metadata, all tensors, all files.
pub(crate) struct Model {
    pub(crate) metadata: Map<String, Value>,
    pub(crate) tensors: Vec<StoredTensor>,
    pub(crate) files: Vec<FileBytes>,
}

/// Reads `file` and, when it is one part of several, all the others beside it.
///
/// # Errors
/// When a file cannot be read, a part is missing, or parts contradict each other.
pub(crate) fn open(file: FileBytes) -> Result<Model, CheckpointError> {
    let opened = read::read(&file)?;
    let path = file.file.clone();
    let Some(count) = number(&path, &opened, "split.count")?.filter(|&n| n > 1) else {
        return Ok(Model { metadata: opened.metadata, tensors: opened.tensors, files: vec![file] });
    };
    if count > MAX_PARTS {
        let reason = format!("{count} parts; at most {MAX_PARTS} are read");
        return Err(Fault::corrupt(reason).at(&path, "split.count"));
    }
    if file.mapped.is_none() {
        let reason = "a model in several files cannot be embedded; merge them first";
        return Err(Fault::unsupported(reason).at(&path, "split.count"));
    }
    let own = part_number(&path, &opened, count)?;
    let stem = stem(&path, own, count)?;
    let total = number(&path, &opened, "split.tensors.count")?;

    let mut model = Model { metadata: Map::new(), tensors: Vec::new(), files: Vec::new() };
    let mut here = Some((file, opened));
    for part in 0..count {
        let (file, read) = match here.take_if(|_| part == own) {
            Some(opened) => opened,
            None => {
                let file = map(&part_path(&path, &stem, part, count))?;
                let read = read::read(&file)?;
                if number(&file.file, &read, "split.count")? != Some(count) {
                    let reason = format!("differs from the {count} of {}", path.display());
                    return Err(Fault::corrupt(reason).at(&file.file, "split.count"));
                }
                let found = part_number(&file.file, &read, count)?;
                if found != part {
                    let reason = format!("{found}, but the file is named as part {}", part + 1);
                    return Err(Fault::corrupt(reason).at(&file.file, "split.no"));
                }
                (file, read)
            }
        };
        if part == 0 {
            model.metadata = read.metadata;
        }
        model.tensors.extend(read.tensors);
        model.files.push(file);
    }
    if let Some(total) = total.filter(|&n| n != model.tensors.len() as u64) {
        let reason = format!("{total}, but the {count} files hold {}", model.tensors.len());
        return Err(Fault::corrupt(reason).at(&path, "split.tensors.count"));
    }
    Ok(model)
}

fn number(path: &Path, read: &Gguf, key: &str) -> Result<Option<u64>, CheckpointError> {
    match read.metadata.get(key) {
        None => Ok(None),
        Some(value) => match value.as_u64() {
            Some(n) => Ok(Some(n)),
            None => Err(Fault::corrupt("expected a whole number").at(path, key)),
        },
    }
}

fn part_number(path: &Path, read: &Gguf, count: u64) -> Result<u64, CheckpointError> {
    match number(path, read, "split.no")? {
        Some(part) if part < count => Ok(part),
        found => {
            let reason = format!("expected a number below {count}, found {found:?}");
            Err(Fault::corrupt(reason).at(path, "split.no"))
        }
    }
}

fn suffix(part: u64, count: u64) -> String {
    format!("-{:05}-of-{count:05}.gguf", part + 1)
}

/// File name without its part number.
fn stem(path: &Path, part: u64, count: u64) -> Result<String, CheckpointError> {
    let name = path.file_name().and_then(|n| n.to_str());
    let stem = name.and_then(|n| n.strip_suffix(suffix(part, count).as_str()));
    stem.map(str::to_owned).ok_or_else(|| {
        let reason = format!(
            "part {} of {count} must be named `NAME{}` for the others to be found; rename it",
            part + 1,
            suffix(part, count)
        );
        Fault::unsupported(reason).at(path, "split.no")
    })
}

fn part_path(path: &Path, stem: &str, part: u64, count: u64) -> PathBuf {
    path.with_file_name(format!("{stem}{}", suffix(part, count)))
}
