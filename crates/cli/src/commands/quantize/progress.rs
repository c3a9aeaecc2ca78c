//! How a job gets on: a bar for all of it and one for every matrix at work; lines where there is no terminal.

use crate::console;
use indicatif::{MultiProgress, ProgressBar};
use marlin_convert::Event;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time between lines about finished matrices: a log stays readable.
const BETWEEN_LINES: Duration = Duration::from_secs(1);

/// What is shown of a running job.
pub struct Progress {
    state: Mutex<State>,
    /// Whether finished matrices are told in lines.
    lines: bool,
}

struct State {
    bars: MultiProgress,
    job: ProgressBar,
    at_work: BTreeMap<String, ProgressBar>,
    done: usize,
    matrices: usize,
    last_line: Option<Instant>,
}

impl Progress {
    /// Of a job of so many matrices and weights; `quiet` leaves out the lines.
    pub fn new(matrices: usize, weights: u64, quiet: bool) -> Self {
        let bars = console::bars();
        let job = bars.add(console::bar(weights, "quantizing", false));
        let at_work = BTreeMap::new();
        let state = State { bars, job, at_work, done: 0, matrices, last_line: None };
        Self { state: Mutex::new(state), lines: !quiet && !console::is_terminal() }
    }

    /// Shows one event.
    pub fn show(&self, event: &Event) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Resumed { matrices, weights } => {
                state.done += matrices;
                state.job.inc(*weights);
                state.job.reset_eta();
                let line = format!("resuming: {matrices} matrices are done");
                state.bars.suspend(|| console::note(&line));
            }
            Event::Rows { part, capture, row, rows } => {
                let doing = if *capture { "calibrating" } else { "advancing" };
                state.job.set_message(format!("{doing} {part}, row {} of {rows}", row + 1));
            }
            Event::Within { key, percent } => {
                let State { bars, at_work, job, .. } = &mut *state;
                let new = || {
                    job.set_message("quantizing");
                    bars.add(console::share(key))
                };
                at_work.entry(key.clone()).or_insert_with(new).set_position(*percent as u64);
            }
            Event::Matrix(report) => {
                if let Some(bar) = state.at_work.remove(&report.key) {
                    bar.finish_and_clear();
                    state.bars.remove(&bar);
                }
                state.done += 1;
                state.job.inc(report.weights());
                state.job.set_message("quantizing");
                let fallback =
                    report.fallback.as_deref().map_or(String::new(), |f| format!(" ({f})"));
                let line = format!(
                    "[{}/{}] {}: {} bits, output error {:.4}, {:.1} s{fallback}",
                    state.done,
                    state.matrices,
                    report.key,
                    report.bits,
                    report.relative_output_error,
                    report.seconds
                );
                let due = state.last_line.is_none_or(|at| at.elapsed() >= BETWEEN_LINES);
                match self.lines && (due || state.done == state.matrices) {
                    true => {
                        state.last_line = Some(Instant::now());
                        console::note(&line);
                    }
                    false => state.bars.suspend(|| console::detail(&line)),
                }
            }
            Event::Writing => state.job.set_message("writing"),
            Event::Verifying => state.job.set_message("reading back"),
        }
    }

    /// Takes all bars away.
    pub fn end(&self) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.at_work.values().for_each(ProgressBar::finish_and_clear);
        state.job.finish_and_clear();
    }
}
