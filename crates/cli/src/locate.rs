//! From what the user wrote after `-m` to an opened checkpoint.

use crate::hub::{Cache, MAIN, ModelName, Repository};
use crate::{embedded, exit, fit};
use anyhow::Result;
use marlin_checkpoint::Checkpoint;
use std::path::{Path, PathBuf};

/// Opens `model`: a directory, a `.gguf` file, a `config.json`, a name in the hub cache; nothing is the embedded model.
///
/// # Errors
/// When it does not exist or is damaged.
pub fn open(model: Option<&str>) -> Result<Checkpoint> {
    let Some(model) = model else { return embedded::open() };
    let path = Path::new(model);
    let path = match (path.exists(), ModelName::parse(model)) {
        (true, _) => path.to_path_buf(),
        (false, Some(name)) => cached(&name)?,
        (false, None) => {
            let message = format!(
                "{model}: no such file or directory; name a directory with config.json and \
                 safetensors, a .gguf file, a pulled ORG/NAME, or leave -m out for the embedded model"
            );
            return Err(exit::coded(exit::NOT_FOUND, message));
        }
    };
    Checkpoint::open(&path).map_err(fit::unopened)
}

/// Where the hub cache has the model.
fn cached(name: &ModelName) -> Result<PathBuf> {
    let repository = Cache::from_environment()?.repository(&name.id);
    let Some(snapshot) = repository.find(&name.revision) else {
        let others: Vec<_> = repository.revisions()?.into_keys().collect();
        let hint = match (name.revision == MAIN, others.is_empty()) {
            (_, true) => String::new(),
            (true, false) => {
                format!(", or write -m {}@REVISION; cached: {}", name.id, others.join(", "))
            }
            (false, false) => format!("; cached: {}", others.join(", ")),
        };
        let message = format!(
            "{} is neither a file nor a downloaded model; to download it run\n  {}{hint}",
            name.id,
            name.pull_command()
        );
        return Err(exit::coded(exit::NOT_FOUND, message));
    };
    let missing = |what: &str| {
        let command = name.pull_command();
        exit::coded(
            exit::NOT_FOUND,
            format!("{}: {what} not downloaded; run\n  {command}", name.id),
        )
    };
    if let Some(file) = &name.file {
        let path = snapshot.join(file);
        return path.is_file().then_some(path).ok_or_else(|| missing(&format!("{file} is")));
    }
    match models_in(&snapshot)?.as_slice() {
        [] => Err(missing("its weights are")),
        [one] => Ok(snapshot.join(one)),
        several => {
            let at = match name.revision.as_str() {
                MAIN => String::new(),
                other => format!("@{other}"),
            };
            let lines = several.iter().map(|file| format!("\n  -m {}{at}/{file}", name.id));
            let lines: String = lines.collect();
            Err(exit::usage(format!("{} has several models; choose one:{lines}", name.id)))
        }
    }
}

/// The models in a snapshot, relative to it: itself (`""`), or each of its GGUF files.
///
/// # Errors
/// When it cannot be read.
pub fn models_in(snapshot: &Path) -> Result<Vec<String>> {
    let mut files = Repository::files(snapshot)?;
    let weights = |f: &String| f.ends_with(".safetensors") && !f.contains('/');
    if files.iter().any(|f| f == "config.json") && files.iter().any(weights) {
        return Ok(vec![String::new()]);
    }
    // Of a split model the first part stands for all.
    files.retain(|f| match f.strip_suffix(".gguf").map(|f| f.rsplit_once("-of-")) {
        Some(Some((stem, count))) if count.len() == 5 => stem.ends_with("-00001"),
        stem => stem.is_some(),
    });
    Ok(files)
}

/// What to call `model` in results.
pub fn name(model: Option<&str>) -> &str {
    model.unwrap_or(embedded::NAME)
}
