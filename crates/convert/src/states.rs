//! Hidden states of the calibration rows between two blocks, on disk: memory holds one row at a time, and
//! a job that was interrupted goes on from the last block it finished.

use crate::error::ConvertError;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

type Result<T> = std::result::Result<T, ConvertError>;

/// Residual streams in front of block `layer`: per row `[tokens, hidden]` f32, little-endian, one
/// after the other.
pub struct States {
    path: PathBuf,
}

impl States {
    /// The file in `directory` for block `layer`.
    pub fn at(directory: &Path, layer: usize) -> Self {
        Self { path: directory.join(format!("states-{layer:05}.f32")) }
    }

    /// Whether the file is there and whole.
    pub fn exists(&self, tokens: usize, hidden: usize) -> bool {
        std::fs::metadata(&self.path).is_ok_and(|m| m.len() == (tokens * hidden * 4) as u64)
    }

    /// Writes what `next` gives for every row, under the file's name only once all are written.
    ///
    /// # Errors
    /// Those of `next` and of the file system.
    pub fn write(
        &self,
        rows: usize,
        mut next: impl FnMut(usize) -> Result<Vec<f32>>,
    ) -> Result<()> {
        let io = |source| ConvertError::Io { path: self.path.clone(), source };
        let partial = self.path.with_extension("partial");
        let mut out = BufWriter::new(File::create(&partial).map_err(io)?);
        for row in 0..rows {
            for value in next(row)? {
                out.write_all(&value.to_le_bytes()).map_err(io)?;
            }
        }
        out.into_inner().map_err(|e| io(e.into_error()))?.sync_all().map_err(io)?;
        std::fs::rename(&partial, &self.path).map_err(io)
    }

    /// Opens the file for reading its rows in order.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(&self, hidden: usize) -> Result<StatesReader> {
        let io = |source| ConvertError::Io { path: self.path.clone(), source };
        let file = BufReader::new(File::open(&self.path).map_err(io)?);
        Ok(StatesReader { path: self.path.clone(), file, hidden })
    }

    /// Removes the file.
    pub fn remove(&self) {
        // Only disk space is lost when it stays.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Reads rows one after the other.
pub struct StatesReader {
    path: PathBuf,
    file: BufReader<File>,
    hidden: usize,
}

impl StatesReader {
    /// The next row, of `tokens` tokens: `[tokens, hidden]`.
    ///
    /// # Errors
    /// When the file is cut short.
    pub fn row(&mut self, tokens: usize) -> Result<Vec<f32>> {
        let mut bytes = vec![0; tokens * self.hidden * 4];
        let io = |source| ConvertError::Io { path: self.path.clone(), source };
        self.file.read_exact(&mut bytes).map_err(io)?;
        Ok(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
    }
}
