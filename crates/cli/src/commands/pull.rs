//! `marlin pull`: brings a model into the shared cache.

use crate::args::Pull;
use crate::hub::{self, Cache, Client, ModelId, RemoteFile, Repository};
use crate::{console, exit, interrupt, locate};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

/// Pulls, or says offline what is there.
pub fn run(args: &Pull) -> Result<ExitCode> {
    let id = super::list::parse_id(&args.model)?;
    if !hub::is_revision(&args.revision) {
        return Err(exit::usage(format!(
            "--revision {:?} is not a branch, tag or commit",
            args.revision
        )));
    }
    let cache = Cache::from_environment()?;
    let repository = cache.repository(&id);
    if hub::offline()
        && let Some(path) = repository.find(&args.revision)
        && !locate::models_in(&path)?.is_empty()
    {
        console::note("HF_HUB_OFFLINE is set: this is what is cached");
        return finish(args, &path, Vec::new(), Instant::now());
    }
    let client = Client::from_environment()?;
    interrupt::say("interrupted; the same command continues");
    let started = Instant::now();
    let commit = client.commit(&id, &args.revision)?;
    let files = client.files(&id, &commit)?;
    let pull = Puller { client: &client, repository: &repository, commit: &commit, cache: &cache };
    let small: Vec<_> = files.iter().filter(|f| hub::is_small_file(&f.path)).collect();
    let mut report = Vec::new();
    let weights = match args.include.is_empty() {
        false => included(&id, &files, &args.include)?,
        true => {
            report.extend(pull.all(&small)?);
            let read = |name: &str| pull.read(&files, name);
            let (config, index) = (read("config.json")?, read("model.safetensors.index.json")?);
            let name = format!("{id} at revision {}", args.revision);
            hub::choose_weights(&name, &files, config.as_deref(), index.as_deref())
                .map_err(|e| with_branches(e, &client, &id, &args.revision))?
        }
    };
    let mut wanted = weights;
    if !args.include.is_empty() && wanted.iter().any(|f| f.path.ends_with(".safetensors")) {
        wanted.extend(small.iter().filter(|s| !wanted.contains(s)).copied().collect::<Vec<_>>());
    }
    report.extend(pull.all(&wanted)?);
    repository.set_revision(&args.revision, &commit)?;
    finish(args, &repository.snapshot(&commit), report, started)
}

/// What every transfer of one pull shares.
struct Puller<'a> {
    client: &'a Client,
    repository: &'a Repository,
    commit: &'a str,
    cache: &'a Cache,
}

impl Puller<'_> {
    /// Downloads `files`; returns a row of the report for each.
    fn all(&self, files: &[&RemoteFile]) -> Result<Vec<Value>> {
        self.check_space(files)?;
        let mut rows = Vec::new();
        for file in files {
            let bar = console::bar(file.bytes, &file.path, true);
            let travelled = self
                .client
                .download(self.repository, self.commit, file, &bar)
                .inspect_err(|_| {
                    bar.abandon();
                })?;
            bar.finish();
            if bar.is_hidden() && travelled > 0 {
                console::note(&format!("{} {}", file.path, console::bytes(file.bytes)));
            }
            rows.push(json!({
                "path": file.path,
                "bytes": file.bytes,
                "downloaded_bytes": travelled,
            }));
        }
        Ok(rows)
    }

    /// Fails before the first byte when the last would not fit.
    fn check_space(&self, files: &[&RemoteFile]) -> Result<()> {
        let size = |path: &Path| std::fs::metadata(path).map_or(0, |m| m.len());
        let missing = |f: &&RemoteFile| match self.repository.blob(&f.etag).exists() {
            true => 0,
            false => f.bytes.saturating_sub(size(&self.repository.incomplete(&f.etag))),
        };
        let needed: u64 = files.iter().map(missing).sum();
        match free_bytes(self.cache.root()) {
            Some(free) if free < needed => {
                let message = format!(
                    "{} are to download, {} are free at {}; free some space or set HF_HOME",
                    console::bytes(needed),
                    console::bytes(free),
                    self.cache.root().display()
                );
                Err(exit::coded(exit::DOES_NOT_FIT, message))
            }
            _ => Ok(()),
        }
    }

    /// Contents of a file that was pulled, if the repository has it.
    fn read(&self, files: &[RemoteFile], name: &str) -> Result<Option<Vec<u8>>> {
        let Some(file) = files.iter().find(|f| f.path == name) else { return Ok(None) };
        let path = self.repository.blob(&file.etag);
        let bytes =
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Some(bytes))
    }
}

/// Bytes an ordinary user may still write at `path` or the nearest parent that exists.
#[cfg(unix)]
fn free_bytes(path: &Path) -> Option<u64> {
    let stat = path.ancestors().find_map(|p| rustix::fs::statvfs(p).ok())?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Unknown here; a full disk shows when it is.
#[cfg(not(unix))]
fn free_bytes(_path: &Path) -> Option<u64> {
    None
}

/// The files that match one of the patterns.
fn included<'f>(
    id: &ModelId,
    files: &'f [RemoteFile],
    patterns: &[String],
) -> Result<Vec<&'f RemoteFile>> {
    for pattern in patterns {
        if !files.iter().any(|f| hub::matching(pattern, &f.path)) {
            let names: Vec<_> = files.iter().map(|f| f.path.as_str()).take(40).collect();
            let message = format!("{id}: nothing matches {pattern:?} among {}", names.join(", "));
            return Err(exit::coded(exit::NOT_FOUND, message));
        }
    }
    let wanted = |f: &&RemoteFile| patterns.iter().any(|p| hub::matching(p, &f.path));
    Ok(files.iter().filter(wanted).collect())
}

/// Adds the other branches to an error that may come from the wrong one.
fn with_branches(
    error: anyhow::Error,
    client: &Client,
    id: &ModelId,
    revision: &str,
) -> anyhow::Error {
    match error.downcast::<exit::Coded>() {
        Ok(exit::Coded { code: exit::NOT_FOUND, message }) => {
            let mut others = client.branches(id);
            others.retain(|b| b != revision);
            let hint = match others.is_empty() {
                true => String::new(),
                false => format!("; other revisions: {}", others.join(", ")),
            };
            exit::coded(exit::NOT_FOUND, format!("{message}{hint}"))
        }
        Ok(other) => other.into(),
        Err(other) => other,
    }
}

fn finish(args: &Pull, path: &Path, files: Vec<Value>, started: Instant) -> Result<ExitCode> {
    if !args.json {
        console::line(&path.display().to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    let sum = |key: &str| files.iter().filter_map(|f| f[key].as_u64()).sum::<u64>();
    console::json(&json!({
        "id": args.model,
        "revision": args.revision,
        "commit": path.file_name().map(|n| n.to_string_lossy()),
        "path": path,
        "bytes": sum("bytes"),
        "downloaded_bytes": sum("downloaded_bytes"),
        "seconds": started.elapsed().as_secs_f64(),
        "files": files,
    }))?;
    Ok(ExitCode::SUCCESS)
}
