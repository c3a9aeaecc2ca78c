//! What the hub serves: a revision's commit, its files with sizes and checksums, their contents.
//!
//! `GET api/models/ID/revision/REV` resolves a name to a commit; `api/models/ID/tree/COMMIT` lists
//! files in pages, each with its git blob id (SHA-1) and, for LFS files, the SHA-256 of the
//! contents; `ID/resolve/COMMIT/PATH` serves them, usually by a redirect to another host, to which
//! the token is not sent. The tree's checksum is the blob's name in the cache, so no further
//! request is needed to know it.

use super::{ModelId, Repository};
use crate::{console, exit};
use anyhow::{Context as _, Result, anyhow, bail};
use indicatif::ProgressBar;
use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use serde::Deserialize;
use serde_json::Value;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

/// Where models are when `HF_ENDPOINT` names no mirror.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// Tries without a new byte before giving up.
const ATTEMPTS: u32 = 5;
/// Most pages of a file listing, 1000 files each.
const MAX_PAGES: usize = 100;
/// Most bytes of one answer of the API.
const MAX_ANSWER: u64 = 64 << 20;
/// Longest silence of a server.
const SILENCE: Duration = Duration::from_secs(30);

/// A connection to the hub.
pub struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

/// One file of a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteFile {
    /// Path in the repository.
    pub path: String,
    /// Size.
    pub bytes: u64,
    /// Checksum in hexadecimal: SHA-256 of LFS files, git blob id of others.
    pub etag: String,
}

#[derive(Deserialize)]
struct TreeEntry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    oid: String,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

/// A file on its way, and the checksum of what is there.
struct Partial<'f> {
    file: &'f RemoteFile,
    path: PathBuf,
    out: File,
    digest: Context,
    /// Bytes that are there.
    at: u64,
}

/// Why an attempt failed.
enum Failure {
    /// Another attempt may succeed.
    Transient(anyhow::Error),
    /// None will.
    Final(anyhow::Error),
}

impl Client {
    /// A client for the endpoint and token of the environment.
    ///
    /// # Errors
    /// When `HF_ENDPOINT` is not an address, or `HF_HUB_OFFLINE` forbids the network.
    pub fn from_environment() -> Result<Self> {
        if super::offline() {
            let message = "HF_HUB_OFFLINE is set; unset it to download";
            return Err(exit::coded(exit::NETWORK, message));
        }
        let endpoint = super::variable("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.into());
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(exit::usage(format!("HF_ENDPOINT {endpoint:?}: expected https://HOST")));
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .user_agent(concat!("marlin/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_resolve(Some(SILENCE))
            .timeout_connect(Some(SILENCE))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .build();
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        Ok(Self { agent: config.into(), endpoint, token: super::token() })
    }

    /// The commit that `revision` stands for now.
    ///
    /// # Errors
    /// When there is no such model or revision, access is refused, or the network fails.
    pub fn commit(&self, id: &ModelId, revision: &str) -> Result<String> {
        let url = format!("{}/api/models/{id}/revision/{}", self.endpoint, encoded(revision, ""));
        let what = format!("{id} at revision {revision}");
        let (answer, _) = self.json(&url, &what)?;
        match answer["sha"].as_str().filter(|sha| super::is_commit(sha)) {
            Some(sha) => Ok(sha.to_ascii_lowercase()),
            None => bail!("{what}: the hub's answer has no commit in `sha`"),
        }
    }

    /// Every file of a commit.
    ///
    /// # Errors
    /// As [`Self::commit`]; also when a path or checksum is not one.
    pub fn files(&self, id: &ModelId, commit: &str) -> Result<Vec<RemoteFile>> {
        let mut url = format!("{}/api/models/{id}/tree/{commit}?recursive=true", self.endpoint);
        let mut files = Vec::new();
        for _ in 0..MAX_PAGES {
            let (page, next) = self.json(&url, &format!("file list of {id}"))?;
            let page: Vec<TreeEntry> = serde_json::from_value(page)
                .with_context(|| format!("file list of {id}: unexpected answer"))?;
            let page = page.into_iter().filter(|e| e.kind == "file");
            files.extend(page.map(RemoteFile::parse).collect::<Result<Vec<_>>>()?);
            match next {
                Some(next) => url = format!("{}{next}", self.endpoint),
                None => return Ok(files),
            }
        }
        bail!("file list of {id}: more than {MAX_PAGES} pages")
    }

    /// Branches of a model, where the hub says; quantizers publish one per bit width.
    pub fn branches(&self, id: &ModelId) -> Vec<String> {
        let url = format!("{}/api/models/{id}/refs", self.endpoint);
        let Ok((answer, _)) = self.json(&url, "branches") else { return Vec::new() };
        let branches = answer["branches"].as_array().cloned().unwrap_or_default();
        branches.iter().filter_map(|b| b["name"].as_str().map(str::to_owned)).collect()
    }

    /// Brings `file` into the cache and returns the bytes that travelled. A partial file is
    /// continued; contents are checked before they get their name.
    ///
    /// # Errors
    /// When the network stays down, the disk is full, or the checksum is wrong twice.
    pub fn download(
        &self,
        repository: &Repository,
        commit: &str,
        file: &RemoteFile,
        bar: &ProgressBar,
    ) -> Result<u64> {
        let blob = repository.blob(&file.etag);
        let partial = repository.incomplete(&file.etag);
        let lock = repository.lock(&file.etag);
        for path in [&partial, &lock] {
            let parent = path.parent().unwrap_or(path);
            fs::create_dir_all(parent).map_err(|e| disk(e, parent))?;
        }
        let lock = File::create(&lock).map_err(|e| disk(e, &lock))?;
        // A file system without locks is no reason to refuse.
        if let Err(fs::TryLockError::WouldBlock) = lock.try_lock() {
            console::note(&format!("waiting for another download of {}", file.path));
            lock.lock().context("cannot wait for another download")?;
        }
        let mut travelled = 0;
        if fs::metadata(&blob).is_ok_and(|m| m.len() == file.bytes) {
            bar.set_position(file.bytes);
        } else {
            let path = encoded(&file.path, "/");
            let url = format!("{}/{}/resolve/{commit}/{path}", self.endpoint, repository.id);
            let mut growing = Partial::open(file, partial.clone())?;
            if growing.at > 0 {
                let kept = console::bytes(growing.at);
                console::detail(&format!("{}: continuing at {kept}", file.path));
            }
            travelled += self.fill(&url, &mut growing, bar)?;
            fs::rename(&partial, &blob).map_err(|e| disk(e, &blob))?;
        }
        repository.link(commit, &file.path, &file.etag)?;
        Ok(travelled)
    }

    /// Completes and checks a partial file; returns the bytes that travelled.
    fn fill(&self, url: &str, partial: &mut Partial, bar: &ProgressBar) -> Result<u64> {
        let file = partial.file;
        let mut resumed = partial.at > 0;
        let (mut travelled, mut failures) = (0, 0);
        loop {
            bar.set_position(partial.at);
            bar.reset_eta();
            let before = travelled;
            let result = match partial.at < file.bytes {
                true => self.stream(url, partial, &mut travelled, bar),
                false => Ok(()),
            };
            failures = if travelled > before { 0 } else { failures + 1 };
            match result {
                Ok(()) => {}
                Err(Failure::Transient(e)) if failures < ATTEMPTS => {
                    console::detail(&format!("{}: {e:#}; trying again", file.path));
                    pause(failures);
                    continue;
                }
                Err(Failure::Transient(e)) => {
                    let (at, all) = (console::bytes(partial.at), console::bytes(file.bytes));
                    let kept = format!("{at} of {all} are kept, the same command continues");
                    let message = format!("{}: {e:#}; {kept}", file.path);
                    return Err(exit::coded(exit::NETWORK, message));
                }
                Err(Failure::Final(e)) => return Err(e),
            }
            let length = partial.at;
            let found = partial.checksum();
            if length == file.bytes && found == file.etag {
                partial.out.sync_all().map_err(|e| disk(e, &partial.path))?;
                return Ok(travelled);
            }
            partial.restart()?;
            if !resumed {
                fs::remove_file(&partial.path).map_err(|e| disk(e, &partial.path))?;
                let message = format!(
                    "{}: the {length} bytes that arrived have checksum {found}, the hub lists {}; \
                     nothing is kept, pull again",
                    file.path, file.etag
                );
                return Err(exit::coded(exit::CORRUPT, message));
            }
            // The part from an earlier run may be what is wrong.
            console::note(&format!("{}: the partial file is damaged; starting over", file.path));
            resumed = false;
        }
    }

    /// One request for what is missing.
    fn stream(
        &self,
        url: &str,
        partial: &mut Partial,
        travelled: &mut u64,
        bar: &ProgressBar,
    ) -> Result<(), Failure> {
        let file = partial.file;
        let range = (partial.at > 0).then(|| format!("bytes={}-", partial.at));
        let mut response = self.get(url, range.as_deref(), &file.path)?;
        if response.status() == StatusCode::PARTIAL_CONTENT {
            let found = header(&response, "content-range");
            if !found.starts_with(&format!("bytes {}-", partial.at)) {
                let message = format!("{}: asked for {range:?}, got {found:?}", file.path);
                return Err(Failure::Final(exit::coded(exit::NETWORK, message)));
            }
        } else if partial.at > 0 {
            // The server ignores ranges: what follows is the file from its start.
            partial.restart().map_err(Failure::Final)?;
        }
        let mut body = response.body_mut().as_reader();
        let mut buffer = vec![0; 256 << 10];
        while partial.at < file.bytes {
            let n = match body.read(&mut buffer) {
                Ok(0) => return Err(Failure::Transient(anyhow!("the connection ended early"))),
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(Failure::Transient(e.into())),
            };
            partial.append(&buffer[..n]).map_err(Failure::Final)?;
            *travelled += n as u64;
            bar.set_position(partial.at.min(file.bytes));
        }
        Ok(())
    }

    /// An answer of the API, and where the next page is.
    fn json(&self, url: &str, what: &str) -> Result<(Value, Option<String>)> {
        for attempt in 1.. {
            match self.json_once(url, what) {
                Ok(answer) => return Ok(answer),
                Err(Failure::Final(e)) => return Err(e),
                Err(Failure::Transient(e)) if attempt >= ATTEMPTS => {
                    let message = format!("{what}: {e:#}");
                    return Err(exit::coded(exit::NETWORK, message));
                }
                Err(Failure::Transient(e)) => {
                    console::detail(&format!("{what}: {e:#}; trying again"));
                    pause(attempt);
                }
            }
        }
        unreachable!("the last attempt returns")
    }

    fn json_once(&self, url: &str, what: &str) -> Result<(Value, Option<String>), Failure> {
        let mut response = self.get(url, None, what)?;
        let next = next_page(&header(&response, "link"));
        let body = response.body_mut().with_config().limit(MAX_ANSWER).read_to_vec();
        let body = body.map_err(|e| Failure::Transient(e.into()))?;
        let answer = serde_json::from_slice(&body).map_err(|e| {
            let message = format!("{what}: {} did not answer with JSON: {e}", self.endpoint);
            Failure::Final(exit::coded(exit::NETWORK, message))
        })?;
        Ok((answer, next))
    }

    /// A successful answer.
    fn get(&self, url: &str, range: Option<&str>, what: &str) -> Result<Response<Body>, Failure> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if let Some(range) = range {
            request = request.header("range", range);
        }
        let response = request.call().map_err(|e| self.unreachable(e))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        if status == StatusCode::TOO_MANY_REQUESTS
            || status == StatusCode::REQUEST_TIMEOUT
            || status.is_server_error()
        {
            return Err(Failure::Transient(anyhow!("{} answered {status}", self.endpoint)));
        }
        Err(Failure::Final(self.refused(&response, what)))
    }

    fn unreachable(&self, error: ureq::Error) -> Failure {
        let endpoint = &self.endpoint;
        match error {
            ureq::Error::HostNotFound => {
                let message = format!("cannot find {endpoint}; is this machine online?");
                Failure::Final(exit::coded(exit::NETWORK, message))
            }
            ureq::Error::Http(_) | ureq::Error::BadUri(_) => Failure::Final(exit::usage(format!(
                "cannot ask {endpoint}: {error}; check HF_ENDPOINT and HF_TOKEN"
            ))),
            other => Failure::Transient(anyhow!("cannot reach {endpoint}: {other}")),
        }
    }

    /// What a refusal means. The hub hides private models behind 401 and says why in a header.
    fn refused(&self, response: &Response<Body>, what: &str) -> anyhow::Error {
        let status = response.status();
        let reason = header(response, "x-error-code");
        let endpoint = &self.endpoint;
        let (code, message) = match (status.as_u16(), reason.as_str()) {
            (_, "RevisionNotFound") => {
                (exit::NOT_FOUND, format!("{what}: there is no such revision at {endpoint}"))
            }
            (_, "GatedRepo") | (403, _) => (
                exit::FAILED,
                format!(
                    "{what}: access is restricted; accept the model's terms at {endpoint}, then \
                     set HF_TOKEN to a token of that account"
                ),
            ),
            (401, _) if self.token.is_some() => (
                exit::NOT_FOUND,
                format!(
                    "{what}: {endpoint} does not show this to your token; check id and HF_TOKEN"
                ),
            ),
            (401, _) => (
                exit::NOT_FOUND,
                format!("{what}: not found, or private; check the id, or set HF_TOKEN"),
            ),
            (404 | 410, _) => (exit::NOT_FOUND, format!("{what}: not found at {endpoint}")),
            _ => (exit::NETWORK, format!("{what}: {endpoint} answered {status}")),
        };
        exit::coded(code, message)
    }
}

impl<'f> Partial<'f> {
    /// Opens what an earlier run left, or nothing.
    fn open(file: &'f RemoteFile, path: PathBuf) -> Result<Self> {
        let mut options = OpenOptions::new();
        let options = options.read(true).append(true).create(true);
        let out = options.open(&path).map_err(|e| disk(e, &path))?;
        let mut partial = Self { file, path, out, digest: file.digest(), at: 0 };
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = partial.out.read(&mut buffer).map_err(|e| disk(e, &partial.path))?;
            if n == 0 {
                return Ok(partial);
            }
            partial.digest.update(&buffer[..n]);
            partial.at += n as u64;
        }
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|e| disk(e, &self.path))?;
        self.digest.update(bytes);
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Forgets everything.
    fn restart(&mut self) -> Result<()> {
        self.out.set_len(0).map_err(|e| disk(e, &self.path))?;
        (self.digest, self.at) = (self.file.digest(), 0);
        Ok(())
    }

    fn checksum(&self) -> String {
        hexadecimal(self.digest.clone().finish().as_ref())
    }
}

impl RemoteFile {
    fn parse(entry: TreeEntry) -> Result<Self> {
        let TreeEntry { path, size, oid, lfs, .. } = entry;
        let safe = path.split('/').all(|part| !matches!(part, "" | "." | ".."))
            && !path.contains(['\\', ':'])
            && !path.chars().any(char::is_control);
        if !safe {
            bail!("file list: {path:?} is not a path inside the repository");
        }
        let (etag, bytes, digits) = match lfs {
            Some(lfs) => (lfs.oid, lfs.size, 64),
            None => (oid, size, 40),
        };
        if etag.len() != digits || !etag.bytes().all(|b| b.is_ascii_hexdigit()) {
            bail!("file list: {path}: checksum {etag:?} is not {digits} hexadecimal digits");
        }
        Ok(Self { path, bytes, etag: etag.to_ascii_lowercase() })
    }

    /// The start of the checksum in `etag`.
    fn digest(&self) -> Context {
        if self.etag.len() == 64 {
            return Context::new(&SHA256);
        }
        let mut digest = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
        digest.update(format!("blob {}\0", self.bytes).as_bytes());
        digest
    }

    /// A file of which only the path matters.
    #[cfg(test)]
    pub fn for_test(path: &str) -> Self {
        Self { path: path.to_owned(), bytes: 1, etag: "0".repeat(64) }
    }
}

/// Waits longer after each failure.
fn pause(failures: u32) {
    let longest = Duration::from_secs(8);
    std::thread::sleep((Duration::from_millis(250) * 2u32.pow(failures.min(8))).min(longest));
}

/// An error of the local file system.
fn disk(error: std::io::Error, path: &Path) -> anyhow::Error {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            let message = format!(
                "{}: the disk is full; free some space (`marlin list` shows what models occupy) \
                 and run the same command, it continues",
                path.display()
            );
            exit::coded(exit::DOES_NOT_FIT, message)
        }
        _ => anyhow::Error::new(error).context(format!("cannot write {}", path.display())),
    }
}

fn header(response: &Response<Body>, name: &str) -> String {
    let value = response.headers().get(name).and_then(|v| v.to_str().ok());
    value.unwrap_or_default().to_owned()
}

/// Path of the next page in a `Link` header. Its host is dropped: a mirror may pass on the
/// original's, and the token is for the endpoint alone.
fn next_page(link: &str) -> Option<String> {
    let next = link.split(',').find(|part| part.contains("rel=\"next\""))?;
    let url = next.split_once('<')?.1.split_once('>')?.0;
    Some(url[url.find("/api/")?..].to_owned())
}

/// Percent-encodes all but unreserved characters and `keep`.
fn encoded(text: &str, keep: &str) -> String {
    let mut out = String::new();
    for b in text.bytes() {
        match b.is_ascii_alphanumeric() || b"-_.~".contains(&b) || keep.as_bytes().contains(&b) {
            true => out.push(char::from(b)),
            false => out += &format!("%{b:02X}"),
        }
    }
    out
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
