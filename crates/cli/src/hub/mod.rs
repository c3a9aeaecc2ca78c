//! Models by hub id: the cache shared with other programs, and the client that fills it.
//!
//! The cache is laid out as `huggingface_hub` lays it out, so a model pulled by one program is
//! found by the other:
//!
//! ```text
//! models--ORG--NAME/refs/REVISION            commit the name stood for when it was pulled
//! models--ORG--NAME/blobs/ETAG               contents, once, by SHA-256 (LFS) or git blob id
//! models--ORG--NAME/blobs/ETAG.incomplete    what has arrived so far
//! models--ORG--NAME/snapshots/COMMIT/PATH    relative link to the blob
//! .locks/models--ORG--NAME/ETAG.lock         held while a blob is written
//! ```
//!
//! `refs/REVISION` is written last, so that an interrupted update leaves the old snapshot in use.
//! Source: `huggingface_hub`'s guide to its cache, and its tree API.
//!
//! The client is `ureq` over rustls with ring: blocking, few small crates, no cmake, and ring also
//! computes the checksums. `hf-hub` is built on `reqwest`, hence tokio and hyper, for no gain here.

mod cache;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod files;

pub use cache::{Cache, CachedModel, Repository};
#[cfg(feature = "hub")]
pub use client::{Client, RemoteFile};
#[cfg(feature = "hub")]
pub use files::{choose_weights, is_small_file, matching};

use anyhow::{Result, anyhow};
use std::fmt;
use std::path::PathBuf;

/// The revision that a bare id means.
pub const MAIN: &str = "main";

/// `ORG/NAME` on the hub.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ModelId {
    org: String,
    name: String,
}

impl ModelId {
    /// Reads `ORG/NAME`.
    pub fn parse(text: &str) -> Option<Self> {
        let (org, name) = text.split_once('/')?;
        (is_segment(org) && is_segment(name))
            .then(|| Self { org: org.to_owned(), name: name.to_owned() })
    }

    /// Name of its directory in the cache.
    fn folder(&self) -> String {
        format!("models--{}--{}", self.org, self.name)
    }

    /// The id whose directory is `folder`.
    fn from_folder(folder: &str) -> Option<Self> {
        let (org, name) = folder.strip_prefix("models--")?.split_once("--")?;
        (is_segment(org) && is_segment(name))
            .then(|| Self { org: org.to_owned(), name: name.to_owned() })
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.org, self.name)
    }
}

/// The hub's rule for names: letters, digits, `-_.`, no `--`, no `..`, no punctuation at the ends.
fn is_segment(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_');
    let bytes = text.as_bytes();
    bytes.len() <= 96
        && bytes.iter().all(|&b| plain(b))
        && edge(bytes.first())
        && bytes.last().is_some_and(|&b| b != b'.' && b != b'-')
        && !text.contains("--")
        && !text.contains("..")
}

/// A branch, tag or commit that is safe as a path below `refs`.
pub fn is_revision(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 255
        && text.split('/').all(|part| {
            !part.is_empty()
                && part != "."
                && part != ".."
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b))
        })
}

/// Forty hexadecimal digits.
pub fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// What follows `-m` when it is not a path: `ORG/NAME[@REVISION]` or `ORG/NAME[@REVISION]/FILE.gguf`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelName {
    /// Which model.
    pub id: ModelId,
    /// Which revision; [`MAIN`] when not said.
    pub revision: String,
    /// Which of several GGUF files.
    pub file: Option<String>,
}

impl ModelName {
    /// Reads a name.
    pub fn parse(text: &str) -> Option<Self> {
        let (org, rest) = text.split_once('/')?;
        let (name, file) = match rest.split_once('/') {
            Some((name, file)) if file.ends_with(".gguf") => (name, Some(file.to_owned())),
            Some(_) => return None,
            None => (rest, None),
        };
        let (name, revision) = name.split_once('@').unwrap_or((name, MAIN));
        let id = ModelId::parse(&format!("{org}/{name}"))?;
        is_revision(revision).then(|| Self { id, revision: revision.to_owned(), file })
    }

    /// The command that fetches it.
    pub fn pull_command(&self) -> String {
        let mut command = format!("marlin pull {}", self.id);
        if self.revision != MAIN {
            command += &format!(" --revision {}", self.revision);
        }
        if let Some(file) = &self.file {
            command += &format!(" --include '{file}'");
        }
        command
    }
}

/// Directory of the cache: `HF_HUB_CACHE`, else `hub` in `HF_HOME`.
///
/// # Errors
/// When there is no home directory to put it in.
pub fn cache_directory() -> Result<PathBuf> {
    match variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE")) {
        Some(path) => Ok(expand(&path)),
        None => Ok(home()?.join("hub")),
    }
}

/// `HF_HOME`, else `huggingface` in `XDG_CACHE_HOME` or `~/.cache`.
fn home() -> Result<PathBuf> {
    if let Some(path) = variable("HF_HOME") {
        return Ok(expand(&path));
    }
    let caches =
        caches().ok_or_else(|| anyhow!("no home directory for the model cache; set HF_HOME"))?;
    Ok(caches.join("huggingface"))
}

/// Where programs keep what they can make again: `XDG_CACHE_HOME`, else `~/.cache`.
pub fn caches() -> Option<PathBuf> {
    match variable("XDG_CACHE_HOME") {
        Some(path) => Some(expand(&path)),
        None => Some(std::env::home_dir()?.join(".cache")),
    }
}

fn expand(path: &str) -> PathBuf {
    match (path.strip_prefix("~/"), std::env::home_dir()) {
        (Some(rest), Some(user)) => user.join(rest),
        _ => PathBuf::from(path),
    }
}

/// A variable that is set to something.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.trim().is_empty())
}

/// Whether a variable says yes, in `huggingface_hub`'s spellings.
fn flag(name: &str) -> bool {
    let yes = ["1", "ON", "YES", "TRUE"];
    variable(name).is_some_and(|v| yes.contains(&v.trim().to_ascii_uppercase().as_str()))
}

/// Whether `HF_HUB_OFFLINE` forbids the network.
pub fn offline() -> bool {
    flag("HF_HUB_OFFLINE") || flag("TRANSFORMERS_OFFLINE")
}

/// The user's token: `HF_TOKEN`, else the file that `hf auth login` writes.
#[cfg(feature = "hub")]
fn token() -> Option<String> {
    let written = || {
        let path = match variable("HF_TOKEN_PATH") {
            Some(path) => expand(&path),
            None => home().ok()?.join("token"),
        };
        std::fs::read_to_string(path).ok()
    };
    let stored = || if flag("HF_HUB_DISABLE_IMPLICIT_TOKEN") { None } else { written() };
    let token = variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN"));
    token.or_else(stored).map(|t| t.trim().to_owned()).filter(|t| !t.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_unsafe_ones_refused() {
        for text in ["org/name", "a-b/c.d_e", "01-ai/Yi-1.5"] {
            let id = ModelId::parse(text).unwrap();
            assert_eq!(id.to_string(), text);
            assert_eq!(ModelId::from_folder(&id.folder()), Some(id));
        }
        for text in
            ["name", "/name", "org/", "../name", "org/..", "a--b/c", "a/b/c", "a/b c", "./x"]
        {
            assert_eq!(ModelId::parse(text), None, "{text}");
        }
        let name = ModelName::parse("org/name@3.0bpw").unwrap();
        assert_eq!(name.pull_command(), "marlin pull org/name --revision 3.0bpw");
        let name = ModelName::parse("org/name/a/b.gguf").unwrap();
        assert_eq!(name.pull_command(), "marlin pull org/name --include 'a/b.gguf'");
        for text in ["org/name/config.json", "org/name@../x", "models/x.gguf/"] {
            assert_eq!(ModelName::parse(text), None, "{text}");
        }
    }

    #[test]
    fn revisions_stay_below_refs() {
        for text in ["main", "refs/pr/1", "3.0bpw", "v1.0+x"] {
            assert!(is_revision(text), "{text}");
        }
        for text in ["", "..", "a/../b", "/a", "a/", "a b", "a\\b"] {
            assert!(!is_revision(text), "{text}");
        }
    }
}
