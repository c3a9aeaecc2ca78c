//! One file per verb.

mod bench;
mod chat;
mod completions;
mod config;
mod doctor;
mod eval;
mod inspect;
mod launch;
mod list;
#[cfg(feature = "hub")]
mod pull;
mod quantize;
mod rm;
mod run;
mod serve;
mod tokenize;
mod tune;

use crate::args::Command;
use anyhow::Result;
use std::process::ExitCode;

/// Runs a verb.
///
/// # Errors
/// What `exit::report` prints.
pub fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Run(args) => run::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Tokenize(args) => tokenize::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Tune(args) => tune::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Config(args) => config::run(&args),
        #[cfg(feature = "hub")]
        Command::Pull(args) => pull::run(&args),
        Command::List(args) => list::run(&args),
        Command::Rm(args) => rm::run(&args),
        Command::Launch(args) => launch::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Completions { shell } => completions::run(shell),
    }
}
