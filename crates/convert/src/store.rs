//! The folder of an unfinished job, inside the output: a settings file and one file per finished matrix.
//! Every file gets its name only when it is whole, so whatever is there can be trusted.

use crate::error::ConvertError;
use crate::origin::Named;
use crate::quantizer::TensorReport;
use marlin_checkpoint::{read_safetensors, write_file, write_safetensors};
use marlin_tensor::HostTensor;
use serde_json::Value;
use std::path::{Path, PathBuf};

type Result<T> = std::result::Result<T, ConvertError>;

/// Name of the folder.
pub const FOLDER: &str = ".quantize";
const SETTINGS: &str = "job.json";
const REPORT: &str = "report";

/// An open folder.
pub struct Store {
    /// Where it is.
    pub path: PathBuf,
}

impl Store {
    /// Opens the folder of the job with these `settings`, or begins one; `fresh` throws away what is there.
    ///
    /// # Errors
    /// When the output holds a finished model or another job, or cannot be written.
    pub fn open(output: &Path, settings: &Value, fresh: bool) -> Result<Self> {
        let path = output.join(FOLDER);
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| ConvertError::Io { path, source }
        };
        if fresh && path.exists() {
            std::fs::remove_dir_all(&path).map_err(io(&path))?;
        }
        let file = path.join(SETTINGS);
        match std::fs::read(&file) {
            Ok(bytes) => {
                let found: Value = serde_json::from_slice(&bytes).map_err(|e| {
                    let reason = format!("{e}; add --fresh to start over");
                    ConvertError::Job { path: file.clone(), reason }
                })?;
                if let Some(difference) = difference(&found, settings) {
                    let reason = format!(
                        "belongs to another job ({difference}); repeat its options, choose \
                         another -o, or add --fresh to start over"
                    );
                    return Err(ConvertError::Job { path: file, reason });
                }
            }
            Err(_) => {
                refuse_finished(output, fresh)?;
                let tensors = path.join("tensors");
                std::fs::create_dir_all(&tensors).map_err(io(&tensors))?;
                write_file(&file, format!("{settings:#}\n").as_bytes())?;
            }
        }
        Ok(Self { path })
    }

    fn file(&self, key: &str) -> PathBuf {
        self.path.join("tensors").join(format!("{key}.safetensors"))
    }

    /// Whether the matrix `key` is finished.
    pub fn has(&self, key: &str) -> bool {
        self.file(key).exists()
    }

    /// Keeps a finished matrix: its tensors under their full names.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn put(&self, report: &TensorReport, tensors: &[Named]) -> Result<()> {
        let text = serde_json::to_string(report).expect("a report is plain data");
        let tensors = tensors.iter().map(|(name, t)| (name.as_str(), t));
        Ok(write_safetensors(&self.file(&report.key), tensors, &[(REPORT, &text)])?)
    }

    /// A finished matrix, mapped.
    ///
    /// # Errors
    /// When it is missing or damaged.
    pub fn get(&self, key: &str) -> Result<(TensorReport, Vec<Named>)> {
        let path = self.file(key);
        let found = read_safetensors(&path)?;
        let text = found.metadata.iter().find(|(k, _)| k == REPORT).map_or("", |(_, v)| v);
        let report = serde_json::from_str(text).map_err(|e| {
            let reason = format!("{e}; delete the file and run again");
            ConvertError::Job { path: path.clone(), reason }
        })?;
        let tensors = found.tensors.iter().filter_map(|t| Some((t.name.clone(), t.plain()?)));
        Ok((report, tensors.collect()))
    }

    /// Removes the folder.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove(self) -> Result<()> {
        std::fs::remove_dir_all(&self.path)
            .map_err(|source| ConvertError::Io { path: self.path, source })
    }
}

/// Refuses a directory that holds a finished model, unless it is to be replaced.
///
/// # Errors
/// When it does.
pub fn refuse_finished(output: &Path, fresh: bool) -> Result<()> {
    let unfinished = output.join(FOLDER).join(SETTINGS).exists();
    if fresh || unfinished || !output.join("config.json").exists() {
        return Ok(());
    }
    let reason = "holds a finished model; choose another -o, or add --fresh to replace it";
    Err(ConvertError::Job { path: output.to_owned(), reason: reason.to_owned() })
}

/// The first field in which two objects differ.
fn difference(found: &Value, wanted: &Value) -> Option<String> {
    let (Value::Object(a), Value::Object(b)) = (found, wanted) else {
        return (found != wanted).then(|| "it is damaged".to_owned());
    };
    let missing = Value::Null;
    a.keys().chain(b.keys()).find_map(|key| {
        let (a, b) = (a.get(key).unwrap_or(&missing), b.get(key).unwrap_or(&missing));
        (a != b).then(|| format!("{key}: {a}, now {b}"))
    })
}

/// Full names of a weight's parts, and its bias.
pub fn named(
    key: &str,
    parts: Vec<(&'static str, HostTensor)>,
    bias: Option<HostTensor>,
) -> Vec<Named> {
    let mut out: Vec<Named> =
        parts.into_iter().map(|(part, t)| (format!("{key}.{part}"), t)).collect();
    out.extend(bias.map(|t| (format!("{key}.bias"), t)));
    out
}
