//! `marlin completions SHELL`.

use crate::args::Cli;
use anyhow::Result;
use clap::CommandFactory;
use std::process::ExitCode;

/// Prints the script.
pub fn run(shell: clap_complete::Shell) -> Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "marlin", &mut script);
    crate::console::print(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}
