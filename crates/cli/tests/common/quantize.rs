//! `marlin quantize` as a program.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

pub fn command(model: &Path, text: &Path, output: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_marlin"));
    command.arg("quantize").arg(model).arg("-o").arg(output).arg("--calibration").arg(text);
    command.args(["--bits", "2.5", "--calibration-columns", "64"]).args(more);
    command.stdin(Stdio::null()).env("NO_COLOR", "1");
    command
}

pub fn run(model: &Path, text: &Path, output: &Path, more: &[&str]) -> Output {
    command(model, text, output, more).output().unwrap()
}

pub fn files(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(directory).unwrap().map(|e| e.unwrap().path());
    entries.map(|p| (p.file_name().unwrap().into(), fs::read(&p).unwrap())).collect()
}

pub fn started(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}
