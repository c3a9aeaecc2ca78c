//! The cache on disk: what is there, where it is, and removing it.

use super::ModelId;
use crate::exit;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The directory that holds every model.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
}

/// One model's directory, which may not exist yet.
#[derive(Debug)]
pub struct Repository {
    /// Which model.
    pub id: ModelId,
    root: PathBuf,
    locks: PathBuf,
}

/// One model that is there.
#[derive(Debug)]
pub struct CachedModel {
    /// Which model.
    pub id: ModelId,
    /// Its directory.
    pub path: PathBuf,
    /// Everything it occupies.
    pub bytes: u64,
    /// Of which unfinished downloads.
    pub partial_bytes: u64,
    /// Its snapshots, by commit.
    pub snapshots: Vec<Snapshot>,
}

/// The files of one commit.
#[derive(Debug)]
pub struct Snapshot {
    /// Commit.
    pub commit: String,
    /// Branches and tags that stand for it.
    pub revisions: Vec<String>,
    /// Its directory.
    pub path: PathBuf,
    /// Size of its files.
    pub bytes: u64,
    /// How many there are.
    pub files: usize,
}

impl Cache {
    /// The cache that the environment names.
    ///
    /// # Errors
    /// When there is no home directory.
    pub fn from_environment() -> Result<Self> {
        Ok(Self { root: super::cache_directory()? })
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of `id`.
    pub fn repository(&self, id: &ModelId) -> Repository {
        let folder = id.folder();
        let locks = self.root.join(".locks").join(&folder);
        Repository { id: id.clone(), root: self.root.join(folder), locks }
    }

    /// Every model, by name.
    ///
    /// # Errors
    /// When a directory cannot be read. A cache that does not exist is empty.
    pub fn models(&self) -> Result<Vec<CachedModel>> {
        let mut ids: Vec<_> = entries(&self.root)?
            .iter()
            .filter(|e| e.is_dir())
            .filter_map(|e| ModelId::from_folder(e.file_name()?.to_str()?))
            .collect();
        ids.sort();
        ids.iter().map(|id| self.repository(id).describe()).collect()
    }
}

impl Repository {
    /// Whether anything of it is cached.
    pub fn exists(&self) -> bool {
        self.root.is_dir()
    }

    /// File of a blob.
    #[cfg(feature = "hub")]
    pub fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    /// File that a blob grows in.
    #[cfg(feature = "hub")]
    pub fn incomplete(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// File whose lock a writer of the blob holds.
    #[cfg(feature = "hub")]
    pub fn lock(&self, etag: &str) -> PathBuf {
        self.locks.join(format!("{etag}.lock"))
    }

    /// Directory of a commit.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// Directory of what `revision`, a branch, tag or commit, stood for when it was pulled.
    pub fn find(&self, revision: &str) -> Option<PathBuf> {
        let commit = match fs::read_to_string(self.root.join("refs").join(revision)) {
            Ok(text) => text.trim().to_owned(),
            Err(_) => revision.to_owned(),
        };
        let path = self.snapshot(&commit);
        (super::is_commit(&commit) && path.is_dir()).then_some(path)
    }

    /// Branches and tags, with their commits.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn revisions(&self) -> Result<BTreeMap<String, String>> {
        let refs = self.root.join("refs");
        let mut found = BTreeMap::new();
        for path in walk(&refs)? {
            let text = fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            let name = path.strip_prefix(&refs).unwrap_or(&path);
            let name: Vec<_> = name.iter().map(|part| part.to_string_lossy()).collect();
            found.insert(name.join("/"), text.trim().to_owned());
        }
        Ok(found)
    }

    /// Files of a snapshot, relative to it.
    ///
    /// # Errors
    /// When a directory cannot be read.
    pub fn files(snapshot: &Path) -> Result<Vec<String>> {
        let relative = |path: &PathBuf| {
            let path = path.strip_prefix(snapshot).unwrap_or(path);
            let parts: Vec<_> = path.iter().map(|part| part.to_string_lossy()).collect();
            parts.join("/")
        };
        let mut files: Vec<_> =
            walk(snapshot)?.iter().filter(|p| p.is_file()).map(relative).collect();
        files.sort();
        Ok(files)
    }

    fn describe(&self) -> Result<CachedModel> {
        let revisions = self.revisions()?;
        let mut snapshots = Vec::new();
        for path in entries(&self.root.join("snapshots"))?.into_iter().filter(|p| p.is_dir()) {
            let commit = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let files = Self::files(&path)?;
            let size = |f: &String| fs::metadata(path.join(f)).map_or(0, |m| m.len());
            snapshots.push(Snapshot {
                bytes: files.iter().map(size).sum(),
                files: files.len(),
                revisions: revisions
                    .iter()
                    .filter(|(_, c)| **c == commit)
                    .map(|(name, _)| name.clone())
                    .collect(),
                commit,
                path,
            });
        }
        let (mut bytes, mut partial_bytes) = (0, 0);
        for path in walk(&self.root)? {
            let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
            if metadata.is_file() {
                bytes += metadata.len();
                if path.extension().is_some_and(|e| e == "incomplete") {
                    partial_bytes += metadata.len();
                }
            }
        }
        let path = self.root.clone();
        Ok(CachedModel { id: self.id.clone(), path, bytes, partial_bytes, snapshots })
    }

    /// Deletes the model with all its revisions; gives the bytes freed.
    ///
    /// # Errors
    /// When it is not cached, or a file cannot be deleted.
    pub fn remove(&self) -> Result<u64> {
        if !self.exists() {
            let message = format!(
                "{} is not in the cache ({}); `marlin list` shows what is",
                self.id,
                self.root.display()
            );
            return Err(exit::coded(exit::NOT_FOUND, message));
        }
        let bytes = self.describe()?.bytes;
        fs::remove_dir_all(&self.root)
            .with_context(|| format!("cannot delete {}", self.root.display()))?;
        match fs::remove_dir_all(&self.locks) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                Err(e).with_context(|| format!("cannot delete {}", self.locks.display()))
            }
            _ => Ok(bytes),
        }
    }

    /// Makes `snapshots/COMMIT/PATH` stand for the blob.
    ///
    /// # Errors
    /// When the file system refuses.
    #[cfg(feature = "hub")]
    pub fn link(&self, commit: &str, path: &str, etag: &str) -> Result<()> {
        let link = self.snapshot(commit).join(path);
        let context = || format!("cannot write {}", link.display());
        fs::create_dir_all(link.parent().unwrap_or(&link)).with_context(context)?;
        let up = "../".repeat(2 + path.matches('/').count());
        let target = PathBuf::from(format!("{up}blobs/{etag}"));
        if fs::read_link(&link).is_ok_and(|t| t == target) {
            return Ok(());
        }
        match fs::remove_file(&link) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e).with_context(context),
            _ => {}
        }
        symlink(&target, &link, &self.blob(etag)).with_context(context)
    }

    /// Makes `revision` stand for `commit`.
    ///
    /// # Errors
    /// When the file system refuses.
    #[cfg(feature = "hub")]
    pub fn set_revision(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        let context = || format!("cannot write {}", path.display());
        fs::create_dir_all(path.parent().unwrap_or(&path)).with_context(context)?;
        fs::write(&path, commit).with_context(context)
    }
}

#[cfg(all(feature = "hub", unix))]
fn symlink(target: &Path, link: &Path, _blob: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

/// Links need a privilege on Windows; without it the file is copied, as other programs do.
#[cfg(all(feature = "hub", windows))]
fn symlink(target: &Path, link: &Path, blob: &Path) -> std::io::Result<()> {
    std::os::windows::fs::symlink_file(target, link).or_else(|_| fs::copy(blob, link).map(|_| ()))
}

/// Paths in a directory, sorted; none when it does not exist.
fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let context = || format!("cannot read {}", directory.display());
    let found = match fs::read_dir(directory) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        found => found.with_context(context)?,
    };
    let mut paths: Vec<_> =
        found.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>().with_context(context)?;
    paths.sort();
    Ok(paths)
}

/// Everything below a directory that is not one itself. Links are not followed.
fn walk(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut left = vec![directory.to_path_buf()];
    while let Some(next) = left.pop() {
        for path in entries(&next)? {
            match fs::symlink_metadata(&path) {
                Ok(m) if m.is_dir() => left.push(path),
                _ => files.push(path),
            }
        }
    }
    Ok(files)
}
