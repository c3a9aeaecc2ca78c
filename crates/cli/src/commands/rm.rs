//! `marlin rm`: deletes a model from the shared cache.

use crate::args::Rm;
use crate::console;
use crate::hub::Cache;
use anyhow::Result;
use serde_json::json;
use std::process::ExitCode;

/// Deletes all revisions of one model.
pub fn run(args: &Rm) -> Result<ExitCode> {
    let id = super::list::parse_id(&args.model)?;
    let freed = Cache::from_environment()?.repository(&id).remove()?;
    if args.json {
        console::json(&json!({"id": id.to_string(), "freed_bytes": freed}))?;
    } else {
        console::note(&format!("removed {id}, {}", console::bytes(freed)));
    }
    Ok(ExitCode::SUCCESS)
}
