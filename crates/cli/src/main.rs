//! `marlin`: the composition root. Parses arguments, opens models, injects a backend, prints.
//! The only crate that names backends, writes to the terminal or reads the environment.

mod args;
mod commands;
mod console;
mod embedded;
mod exit;
mod generate;
mod hub;
mod loaded;
mod locate;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    console::set_verbosity(cli.verbosity());
    match commands::run(cli.command) {
        Ok(code) => code,
        Err(error) => exit::report(&error),
    }
}
