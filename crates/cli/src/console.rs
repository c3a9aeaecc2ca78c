//! Everything that reaches the terminal: results on stdout, the rest on stderr.

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicI8, Ordering};

static VERBOSITY: AtomicI8 = AtomicI8::new(0);

/// -1 quiet, 0 normal, 1 and more verbose.
pub fn set_verbosity(level: i8) {
    VERBOSITY.store(level, Ordering::Relaxed);
}

/// What was set.
pub fn verbosity() -> i8 {
    VERBOSITY.load(Ordering::Relaxed)
}

fn colour() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()) && std::io::stderr().is_terminal()
}

/// An error, on stderr, always.
pub fn error(message: &str) {
    let label = if colour() { "\x1b[1;31merror:\x1b[0m" } else { "error:" };
    // Nothing is left to tell when stderr itself is gone.
    let _ = writeln!(std::io::stderr(), "{label} {message}");
}

/// Something the user should know, on stderr unless quiet.
pub fn note(message: &str) {
    if VERBOSITY.load(Ordering::Relaxed) >= 0 {
        let _ = writeln!(std::io::stderr(), "{message}");
    }
}

/// Detail, on stderr when verbose.
pub fn detail(message: &str) {
    if VERBOSITY.load(Ordering::Relaxed) >= 1 {
        let _ = writeln!(std::io::stderr(), "{message}");
    }
}

/// Text of the result, on stdout at once.
///
/// # Errors
/// When stdout is closed.
pub fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// A line of the result.
///
/// # Errors
/// When stdout is closed.
pub fn line(text: &str) -> std::io::Result<()> {
    print(&format!("{text}\n"))
}

/// One JSON document on stdout.
///
/// # Errors
/// When stdout is closed.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    Ok(line(&serde_json::to_string_pretty(value)?)?)
}

/// Whether stderr is a terminal.
pub fn is_terminal() -> bool {
    std::io::stderr().is_terminal()
}

/// Where bars are drawn: nowhere when quiet or not on a terminal.
fn target() -> ProgressDrawTarget {
    let shown = VERBOSITY.load(Ordering::Relaxed) >= 0 && is_terminal();
    if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() }
}

/// Several bars on stderr, one below the other; hidden as [`bar`] is.
pub fn bars() -> MultiProgress {
    MultiProgress::with_draw_target(target())
}

/// A bar on stderr, hidden when quiet or not on a terminal.
pub fn bar(total: u64, what: &str, bytes: bool) -> ProgressBar {
    let template = match bytes {
        true => "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        false => "{msg} {wide_bar} {pos}/{len} {eta}",
    };
    let style =
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::with_draw_target(Some(total), target()).with_style(style);
    bar.set_message(what.to_owned());
    bar
}

/// A bar of hundredths, below others.
pub fn share(what: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("  {msg} {wide_bar} {percent} %");
    bar(100, what, false).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// `1234567` as `1.23 MB`, powers of ten.
pub fn bytes(n: u64) -> String {
    scaled(n as f64, &["B", "kB", "MB", "GB", "TB"])
}

/// `29943390208` as `29.9 B`, powers of ten.
pub fn count(n: u64) -> String {
    scaled(n as f64, &["", "k", "M", "B", "T"])
}

/// A value from a file as one short line.
pub fn short(value: &str) -> String {
    const LONGEST: usize = 60;
    let mut text: String = value.chars().take(LONGEST).collect();
    if text.len() < value.len() {
        text.push('…');
    }
    text
}

fn scaled(mut value: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = match value {
        _ if unit == 0 => 0,
        v if v < 10.0 => 2,
        v if v < 100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {}", units[unit]).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_three_digits() {
        for (n, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.00 kB"),
            (999_600, "1.00 MB"),
            (20_389_777, "20.4 MB"),
        ] {
            assert_eq!(bytes(n), text);
        }
        assert_eq!(count(29_943_390_208), "29.9 B");
        assert_eq!(count(512), "512");
    }
}
