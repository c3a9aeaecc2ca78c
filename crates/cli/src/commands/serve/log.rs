//! The log of a server, on stderr.

use crate::args::serve::LogFormat;
use crate::console;
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

/// Begins to log. `RUST_LOG` says what, if it is set.
pub fn start(format: LogFormat) {
    let level = match console::verbosity() {
        ..0 => "error",
        0 => "warn,marlin_server=info",
        1 => "info,marlin_server=debug",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let colour = std::io::stderr().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colour);
    // A second call in one process would change nothing.
    let _ = match format {
        LogFormat::Text => log.with_target(false).try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
}
