//! `marlin list`: the models in the shared cache.

use crate::args::List;
use crate::hub::{Cache, CachedModel, ModelId};
use crate::{console, exit};
use anyhow::Result;
use serde_json::{Value, json};
use std::process::ExitCode;

/// Lists models with their revisions and sizes.
pub fn run(args: &List) -> Result<ExitCode> {
    let cache = Cache::from_environment()?;
    let models = cache.models()?;
    if args.json {
        console::json(&models.iter().map(document).collect::<Vec<_>>())?;
        return Ok(ExitCode::SUCCESS);
    }
    if models.is_empty() {
        let root = cache.root().display();
        console::note(&format!("no models in {root}; `marlin pull ORG/NAME` brings one"));
    }
    let rows: Vec<_> = models.iter().flat_map(rows).collect();
    let width = |column: usize| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
    let (name, revision, size) = (width(0), width(1), width(2));
    for row in &rows {
        let text = format!("{:name$}  {:revision$}  {:>size$}  {}", row[0], row[1], row[2], row[3]);
        console::line(text.trim_end())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads an id from the command line.
///
/// # Errors
/// When it is not `ORG/NAME`.
pub fn parse_id(text: &str) -> Result<ModelId> {
    ModelId::parse(text).ok_or_else(|| exit::usage(format!("{text:?} is not ORG/NAME")))
}

/// Name, revision, size, remark: one row for each snapshot, and for what is unfinished.
fn rows(model: &CachedModel) -> Vec<[String; 4]> {
    let mut rows: Vec<_> = model
        .snapshots
        .iter()
        .map(|s| {
            let revision = match s.revisions.is_empty() {
                true => s.commit.clone(),
                false => s.revisions.join(","),
            };
            let files = if s.files == 1 { "file" } else { "files" };
            let files = format!("{} {files}", s.files);
            [model.id.to_string(), revision, console::bytes(s.bytes), files]
        })
        .collect();
    if model.partial_bytes > 0 {
        let size = console::bytes(model.partial_bytes);
        let remark = "unfinished; `marlin pull` continues".to_owned();
        rows.push([model.id.to_string(), "-".to_owned(), size, remark]);
    }
    rows
}

fn document(model: &CachedModel) -> Value {
    let snapshots = model.snapshots.iter().map(|s| {
        json!({
            "commit": s.commit,
            "revisions": s.revisions,
            "bytes": s.bytes,
            "files": s.files,
            "path": s.path,
        })
    });
    json!({
        "id": model.id.to_string(),
        "path": model.path,
        "bytes": model.bytes,
        "partial_bytes": model.partial_bytes,
        "snapshots": snapshots.collect::<Vec<_>>(),
    })
}
