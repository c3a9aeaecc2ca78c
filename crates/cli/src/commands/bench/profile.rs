//! `marlin bench --profile`: the time of every operator as a table and a trace.

use crate::console;
use anyhow::{Context, Result};
use marlin_engine::profile::Profile;
use serde::Serialize;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Calls of one operator, kernel and shape.
#[derive(Debug, Serialize)]
pub struct Row {
    operator: &'static str,
    kernel: Option<String>,
    shape: Option<String>,
    calls: usize,
    milliseconds: f64,
    /// Of the time of all passes.
    share: f64,
    /// Weights and cache read.
    gigabytes_per_second: Option<f64>,
}

/// What `profile` says of the passes called `name`.
pub fn rows(profile: &Profile, name: &str) -> Vec<Row> {
    let rows = profile.rows().into_iter().filter(|row| row.pass == name);
    rows.map(|row| Row {
        operator: row.operator,
        kernel: row.kernel,
        shape: row.shape.map(|shape| shape.to_string()),
        calls: row.calls,
        milliseconds: row.seconds * 1e3,
        share: row.share,
        gigabytes_per_second: row.gigabytes_per_second,
    })
    .collect()
}

/// A table of `rows`.
pub fn print(name: &str, rows: &[Row]) -> Result<()> {
    let call = |row: &Row| {
        let words = [Some(row.operator), row.kernel.as_deref(), row.shape.as_deref()];
        words.into_iter().flatten().collect::<Vec<_>>().join(" ")
    };
    let calls: Vec<String> = rows.iter().map(call).collect();
    let width = calls.iter().map(|call| call.chars().count()).max().unwrap_or(0).max(8);
    console::line(&format!(
        "\n{name:<width$} {:>8} {:>10} {:>7} {:>8}",
        "calls", "total ms", "share", "GB/s"
    ))?;
    for (row, call) in rows.iter().zip(calls) {
        let speed = row.gigabytes_per_second.map(|speed| format!("{speed:.2}"));
        console::line(&format!(
            "{call:<width$} {:>8} {:>10.3} {:>5.1} % {:>8}",
            row.calls,
            row.milliseconds,
            row.share * 100.0,
            speed.unwrap_or_default()
        ))?;
    }
    Ok(())
}

/// The file of the trace, made before anything is measured.
pub fn create(path: &Path) -> Result<File> {
    File::create(path).with_context(|| path.display().to_string())
}

/// Writes the trace to `file`, which is at `path`.
pub fn write(profile: &Profile, file: File, path: &Path) -> Result<()> {
    let mut out = BufWriter::new(file);
    let written = profile.write_trace(&mut out).and_then(|()| out.flush());
    written.with_context(|| path.display().to_string())?;
    console::note(&format!("trace: {}; ui.perfetto.dev opens it", path.display()));
    Ok(())
}
