//! Writing a file so that its name never shows half of it.

use crate::CheckpointError;
use crate::source::io_error;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Bytes collected before a write.
const BUFFER_BYTES: usize = 1 << 20;

/// Lets `body` write into a temporary file in the directory of `path`, makes it durable, and only
/// then gives it the name `path`, replacing what was there. On any error, a full disk included,
/// the temporary file is removed and `path` is as it was.
///
/// # Errors
/// Those of `body` and of the file system.
pub(crate) fn write(
    path: &Path,
    body: impl FnOnce(&mut dyn Write) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let at = |source| io_error(path, source);
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".").suffix(".partial");
    // A temporary file is private by default; this one is going to be an ordinary file.
    #[cfg(unix)]
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    #[cfg(unix)]
    builder.permissions(permissions);
    let mut temporary = builder.tempfile_in(directory).map_err(at)?;

    let mut writer = BufWriter::with_capacity(BUFFER_BYTES, temporary.as_file_mut());
    body(&mut writer)?;
    writer.flush().map_err(at)?;
    drop(writer);
    temporary.as_file().sync_all().map_err(at)?;
    temporary.persist(path).map_err(|e| at(e.error))?;
    // The new name is durable once the directory is.
    #[cfg(unix)]
    File::open(directory).and_then(|d| d.sync_all()).map_err(at)?;
    Ok(())
}

/// Writes `bytes` to `path`, which never shows half of them: they are durable before the name is
/// theirs. On an error `path` is as it was.
///
/// # Errors
/// Those of the file system.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    write(path, |out| out.write_all(bytes).map_err(|e| io_error(path, e)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Fault;

    #[test]
    fn failure_leaves_the_old_file_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.gguf");
        std::fs::write(&path, "old").unwrap();
        let failed = write(&path, |w| {
            w.write_all(&[7; 3 * BUFFER_BYTES]).unwrap();
            Err(Fault::corrupt("disk full").at(&path, "test"))
        });
        assert!(failed.is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);

        write(&path, |w| w.write_all(b"new").map_err(|e| io_error(&path, e))).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
