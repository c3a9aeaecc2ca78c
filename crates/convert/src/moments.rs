//! Second moments on disk while the matrices that need them are not finished: a job that is resumed does not run
//! the calibration rows through a block again. One file per label, gone when its matrices are done.

use crate::error::ConvertError;
use crate::hessian::{Hessian, Hessians};
use marlin_checkpoint::write_file;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

type Result<T> = std::result::Result<T, ConvertError>;

/// Most bytes that are kept for one pass. Beyond it, gathering again is the smaller nuisance.
pub const LIMIT: u64 = 4 << 30;
/// Names the labels of the pass, and which of them have a file.
const LIST: &str = "moments.json";
/// The same of the sums over experts, which outlast a pass.
const POOLS: &str = "pools.json";

/// Bytes of the file of a label with `size` inputs.
pub fn file_bytes(size: u64) -> u64 {
    size * (size + 1) / 2 * 4 + 24
}

/// The moments of `labels` in `directory`.
pub struct Moments<'a> {
    directory: &'a Path,
    labels: &'a BTreeSet<String>,
    list: &'static str,
}

impl<'a> Moments<'a> {
    /// Of `labels`, kept in `directory`.
    pub fn of(directory: &'a Path, labels: &'a BTreeSet<String>) -> Self {
        Self { directory, labels, list: LIST }
    }

    /// Of sums over experts, named by `labels`, beside the moments of a pass.
    pub fn of_pools(directory: &'a Path, labels: &'a BTreeSet<String>) -> Self {
        Self { directory, labels, list: POOLS }
    }

    fn file(&self, label: &str) -> PathBuf {
        self.directory.join(format!("{label}.moments"))
    }

    /// All that were kept, if every file is there and whole.
    pub fn read(&self) -> Option<Hessians> {
        let list = std::fs::read(self.directory.join(self.list)).ok()?;
        let seen: BTreeMap<String, bool> = serde_json::from_slice(&list).ok()?;
        if !seen.keys().eq(self.labels) {
            return None;
        }
        let kept = seen.into_iter().filter(|(_, seen)| *seen);
        kept.map(|(label, _)| read(&self.file(&label)).map(|h| (label, h))).collect()
    }

    /// Keeps `hessians`.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&self, hessians: &Hessians) -> Result<()> {
        let bytes: u64 = hessians.values().map(|h| file_bytes(h.size() as u64)).sum();
        if bytes > LIMIT {
            return Ok(());
        }
        for (label, hessian) in hessians {
            let path = self.file(label);
            let partial = path.with_extension("partial");
            let io = |source| ConvertError::Io { path: path.clone(), source };
            write(&partial, hessian).map_err(io)?;
            std::fs::rename(&partial, &path).map_err(io)?;
        }
        // Last; experts that no token reached have no file.
        let seen: BTreeMap<&String, bool> =
            self.labels.iter().map(|label| (label, hessians.contains_key(label))).collect();
        Ok(write_file(&self.directory.join(self.list), json!(seen).to_string().as_bytes())?)
    }

    /// Removes the files.
    pub fn remove(&self) {
        let _ = std::fs::remove_file(self.directory.join(self.list));
        for label in self.labels {
            // Only disk space is lost when one stays.
            let _ = std::fs::remove_file(self.file(label));
        }
    }
}

/// Rows seen, rows dropped, the lower triangle, and a sum over all of it.
fn write(path: &Path, h: &Hessian) -> std::io::Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    let mut sum = Sum::default();
    for value in [h.rows(), h.dropped()] {
        out.write_all(&value.to_le_bytes())?;
        sum.add(value as u32);
    }
    for i in 0..h.size() {
        for value in &h.row(i)[..=i] {
            sum.add(value.to_bits());
            out.write_all(&value.to_le_bytes())?;
        }
    }
    out.write_all(&sum.0.to_le_bytes())?;
    out.into_inner().map_err(|e| e.into_error())?;
    Ok(())
}

fn read(path: &Path) -> Option<Hessian> {
    let file = File::open(path).ok()?;
    let bytes = file.metadata().ok()?.len();
    // 24 + 4 · size (size + 1) / 2 bytes.
    let size = (((bytes.checked_sub(24)? / 2) as f64).sqrt()) as usize;
    let size = (size.saturating_sub(2)..=size).find(|&s| file_bytes(s as u64) == bytes)?;
    let mut file = BufReader::new(file);
    let mut sum = Sum::default();
    let mut word = [0; 8];
    let mut counts = [0u64; 2];
    for count in &mut counts {
        file.read_exact(&mut word).ok()?;
        *count = u64::from_le_bytes(word);
        sum.add(*count as u32);
    }
    let mut hessian = Hessian::seen(size, counts[0], counts[1]);
    let mut row = vec![0u8; size * 4];
    for i in 0..size {
        file.read_exact(&mut row[..(i + 1) * 4]).ok()?;
        for (j, &value) in row.as_chunks().0[..=i].iter().enumerate() {
            let value = f32::from_le_bytes(value);
            sum.add(value.to_bits());
            hessian.set(i, j, value);
        }
    }
    file.read_exact(&mut word).ok()?;
    (u64::from_le_bytes(word) == sum.0).then_some(hessian)
}

/// FNV-1a over words.
struct Sum(u64);

impl Default for Sum {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Sum {
    fn add(&mut self, word: u32) {
        self.0 = (self.0 ^ u64::from(word)).wrapping_mul(0x0000_0100_0000_01b3);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::Matrix;

    #[test]
    fn moments_come_back_as_they_were_and_damage_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let labels = BTreeSet::from(["a", "b", "unseen"].map(str::to_owned));
        let moments = Moments::of(directory.path(), &labels);
        assert!(moments.read().is_none());
        let hessian = |size: usize| {
            let mut h = Hessian::new(size);
            h.add(Matrix::new(3, size, (0..3 * size).map(|i| (i as f32).sin()).collect()));
            h
        };
        let all = Hessians::from([("a".to_owned(), hessian(5)), ("b".to_owned(), hessian(130))]);
        moments.write(&all).unwrap();
        let found = moments.read().unwrap();
        for (label, h) in &all {
            assert_eq!(found[label].mean(), h.mean(), "{label}");
            assert_eq!(found[label].rows(), 3);
        }
        let file = directory.path().join("b.moments");
        let mut bytes = std::fs::read(&file).unwrap();
        bytes[1000] ^= 1;
        std::fs::write(&file, &bytes).unwrap();
        assert!(moments.read().is_none(), "a changed byte");
        std::fs::write(&file, &bytes[..500]).unwrap();
        assert!(moments.read().is_none(), "cut short");
        moments.remove();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
