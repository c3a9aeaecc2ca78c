//! Files as bytes: mapped from disk, read whole when small, or in memory already.

use crate::CheckpointError;
use crate::error::{Fault, shown};
use bytes::Bytes;
use memmap2::Mmap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Largest sidecar (`tokenizer.json`, `config.json`, …). The largest known is 35 MB.
const MAX_SMALL_BYTES: u64 = 256 * 1024 * 1024;

/// A mapped file; the pages stay valid for as long as anyone holds it.
#[derive(Debug, Clone)]
pub(crate) struct Mapped(pub(crate) Arc<Mmap>);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// A file's content and the name messages use for it.
#[derive(Debug, Clone)]
pub(crate) struct FileBytes {
    pub(crate) file: Arc<Path>,
    pub(crate) bytes: Bytes,
    /// The mapping behind `bytes`, if there is one.
    pub(crate) mapped: Option<Mapped>,
}

/// Maps `path`, which must be a regular file.
///
/// # Errors
/// When it is missing, not a regular file, or cannot be mapped.
pub(crate) fn map(path: &Path) -> Result<FileBytes, CheckpointError> {
    let (file, length) = open_regular(path)?;
    let name: Arc<Path> = path.into();
    if length == 0 {
        return Ok(FileBytes { file: name, bytes: Bytes::new(), mapped: None });
    }
    // SAFETY: the map is private and read-only. What it shows is undefined if another process
    // writes or truncates the file meanwhile; every loader of model files that maps accepts that,
    // and nothing here relies on two reads of one byte being equal: headers are parsed once and
    // only their validated copies are used.
    let mapped = unsafe { Mmap::map(&file) }.map_err(|e| io_error(path, e))?;
    let mapped = Mapped(Arc::new(mapped));
    Ok(FileBytes { file: name, bytes: Bytes::from_owner(mapped.clone()), mapped: Some(mapped) })
}

fn open_regular(path: &Path) -> Result<(File, u64), CheckpointError> {
    // Asked before opening: opening a named pipe would wait for its writer.
    let about = fs::metadata(path).map_err(|e| io_error(path, e))?;
    if !about.is_file() {
        return Err(Fault::unsupported("not a regular file").at(path, "file"));
    }
    let file = File::open(path).map_err(|e| io_error(path, e))?;
    Ok((file, about.len()))
}

pub(crate) fn io_error(path: &Path, source: io::Error) -> CheckpointError {
    match source.kind() {
        io::ErrorKind::NotFound => {
            CheckpointError::NotFound { path: path.to_path_buf(), what: "file".to_owned() }
        }
        _ => CheckpointError::Io { path: path.to_path_buf(), source },
    }
}

/// The files of one model, on disk or in memory.
pub(crate) enum Folder<'a> {
    Disk(&'a Path),
    Memory { name: &'a Path, files: &'a [(&'a str, Bytes)] },
}

impl Folder<'_> {
    /// Path of the file called `name`, for messages.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        match self {
            Self::Disk(directory) => directory.join(name),
            Self::Memory { name: folder, .. } => folder.join(name),
        }
    }

    /// Names of all files, sorted. Names that are not UTF-8 are none of ours.
    pub(crate) fn names(&self) -> Result<Vec<String>, CheckpointError> {
        let mut names: Vec<String> = match self {
            Self::Disk(directory) => {
                let entries = fs::read_dir(directory).map_err(|e| io_error(directory, e))?;
                let names = entries.map(|e| e.map(|e| e.file_name().into_string().ok()));
                let names: io::Result<Vec<_>> = names.collect();
                names.map_err(|e| io_error(directory, e))?.into_iter().flatten().collect()
            }
            Self::Memory { files, .. } => files.iter().map(|(n, _)| (*n).to_owned()).collect(),
        };
        names.sort_unstable();
        Ok(names)
    }

    /// The content of `name`, mapped if on disk.
    pub(crate) fn map(&self, name: &str) -> Result<FileBytes, CheckpointError> {
        match self {
            Self::Disk(directory) => map(&directory.join(name)),
            Self::Memory { files, .. } => match files.iter().find(|(n, _)| *n == name) {
                Some((_, bytes)) => Ok(FileBytes {
                    file: self.path(name).into(),
                    bytes: bytes.clone(),
                    mapped: None,
                }),
                None => Err(CheckpointError::NotFound {
                    path: self.path(name),
                    what: "file in memory".to_owned(),
                }),
            },
        }
    }

    /// The content of the small file `name`; `None` when there is none.
    pub(crate) fn small(&self, name: &str) -> Result<Option<FileBytes>, CheckpointError> {
        let found = match self {
            Self::Disk(directory) => read_small(&directory.join(name)),
            Self::Memory { .. } => self.map(name),
        };
        match found {
            Err(CheckpointError::NotFound { .. }) => Ok(None),
            other => other.map(Some),
        }
    }
}

/// Reads a small file whole: the user may edit it while the program runs, so it is not mapped.
///
/// # Errors
/// When it is missing, not a regular file, larger than a sidecar can be, or unreadable.
pub(crate) fn read_small(path: &Path) -> Result<FileBytes, CheckpointError> {
    let (file, length) = open_regular(path)?;
    let mut bytes = Vec::new();
    if length <= MAX_SMALL_BYTES {
        let wanted = length as usize + 1;
        bytes.try_reserve_exact(wanted).map_err(|e| io_error(path, io::Error::other(e)))?;
        // One byte past the limit tells a file that grew meanwhile from one that just fits.
        let mut limited = file.take(MAX_SMALL_BYTES + 1);
        limited.read_to_end(&mut bytes).map_err(|e| io_error(path, e))?;
    }
    if length.max(bytes.len() as u64) > MAX_SMALL_BYTES {
        let reason = format!("{length} bytes; at most {MAX_SMALL_BYTES} are read");
        return Err(Fault::unsupported(reason).at(path, "file size"));
    }
    Ok(FileBytes { file: path.into(), bytes: bytes.into(), mapped: None })
}

/// Checks that `name`, read from a file, is a plain file name and cannot leave the directory.
///
/// # Errors
/// When it is empty, `.` or `..`, or holds a separator, a drive or a NUL.
pub(crate) fn plain_file_name(name: &str) -> Result<(), Fault> {
    let outside = name.is_empty()
        || name == "."
        || name == ".."
        || name.contains(['/', '\\', ':', '\0'])
        || name.len() > 255;
    if outside {
        return Err(Fault::corrupt(format!(
            "file name `{}` does not lie in the directory",
            shown(name)
        )));
    }
    Ok(())
}
