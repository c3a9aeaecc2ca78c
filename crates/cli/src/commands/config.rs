//! `marlin config`: what is set, and where.

use crate::args::serve::Config;
use anyhow::Result;
use std::process::ExitCode;

/// Shows the settings.
pub fn run(args: &Config) -> Result<ExitCode> {
    let Config::Show { origin, json, .. } = args;
    crate::settings::show(*origin, *json)?;
    Ok(ExitCode::SUCCESS)
}
