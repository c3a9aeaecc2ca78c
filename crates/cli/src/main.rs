//! `marlin`: the composition root. Parses arguments, opens models, injects a backend, prints.
//! The only crate that names backends, writes to the terminal or reads the environment.

mod args;
mod commands;
mod console;
mod device;
mod embedded;
mod exit;
mod fit;
mod generate;
mod glob;
mod http;
mod hub;
mod interrupt;
mod loaded;
mod locate;
mod report;
mod settings;
mod tuned;

use clap::{CommandFactory, Parser};
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: marlin_cpu::HugePages = marlin_cpu::HugePages;

fn main() -> ExitCode {
    if std::env::args_os().len() <= 1 {
        // Someone looks at what this is: that is no mistake.
        return match args::Cli::command().print_help() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => exit::report(&error.into()),
        };
    }
    let arguments = match settings::arguments() {
        Ok(arguments) => arguments,
        Err(error) => return exit::report(&error),
    };
    let cli = args::Cli::parse_from(arguments);
    console::set_verbosity(cli.verbosity());
    match interrupt::catch().and_then(|()| commands::run(cli.command)) {
        Ok(code) => code,
        Err(error) => exit::report(&error),
    }
}
