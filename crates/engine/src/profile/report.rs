//! A profile as a table, and as a trace for viewers of Chrome's trace events.

use super::{Pass, Shape};
use serde_json::json;
use std::collections::HashMap;
use std::io::{self, Write};

/// What a [`Profiler`](super::Profiler) recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    pub(super) passes: Vec<Pass>,
    pub(super) kernels: Vec<String>,
}

/// Calls of one operator and shape in all passes of a name, or what is left of those passes.
#[derive(Debug, Clone, PartialEq)]
pub struct ProfileRow {
    /// Name of the passes.
    pub pass: String,
    /// Operator; or `between operators`, `profiler`.
    pub operator: &'static str,
    /// Kernel path of its matrices.
    pub kernel: Option<String>,
    /// Shapes.
    pub shape: Option<Shape>,
    /// Calls, or passes where it is no operator.
    pub calls: usize,
    /// Time of all calls.
    pub seconds: f64,
    /// Part of the time of the passes: all rows of a pass sum to 1.
    pub share: f64,
    /// Weights and cache read, in 10⁹ bytes per second.
    pub gigabytes_per_second: Option<f64>,
}

/// Time between operators: the layers above the backend.
const BETWEEN: &str = "between operators";
/// Time the profiler takes itself.
const OWN: &str = "profiler";

impl Profile {
    /// One row per pass, operator, kernel and shape; passes in order of appearance, in each the costliest
    /// operator first and what is no operator last.
    pub fn rows(&self) -> Vec<ProfileRow> {
        let mut names: Vec<&str> = Vec::new();
        for pass in &self.passes {
            if !names.contains(&pass.name.as_str()) {
                names.push(&pass.name);
            }
        }
        names.into_iter().flat_map(|name| self.rows_of(name)).collect()
    }

    fn rows_of(&self, name: &str) -> Vec<ProfileRow> {
        let passes: Vec<&Pass> = self.passes.iter().filter(|pass| pass.name == name).collect();
        // Calls, nanoseconds, bytes.
        let mut groups: HashMap<_, (usize, u64, u64)> = HashMap::new();
        for call in passes.iter().flat_map(|pass| &pass.calls) {
            let group = groups.entry((call.operator, call.kernel, call.shape)).or_default();
            *group = (group.0 + 1, group.1 + call.end - call.start, group.2 + call.bytes);
        }
        let wall: u64 = passes.iter().map(|pass| pass.end - pass.start).sum();
        let own: u64 = passes.iter().map(|pass| pass.own).sum();
        let operators: u64 = groups.values().map(|group| group.1).sum();
        let share = |nanoseconds: u64| nanoseconds as f64 / wall.max(1) as f64;
        let mut rows: Vec<ProfileRow> = groups
            .into_iter()
            .map(|((operator, kernel, shape), (calls, nanoseconds, bytes))| ProfileRow {
                pass: name.to_owned(),
                operator,
                kernel: kernel.map(|i| self.kernels[i].clone()),
                shape: Some(shape),
                calls,
                seconds: nanoseconds as f64 / 1e9,
                share: share(nanoseconds),
                gigabytes_per_second: (bytes > 0).then(|| bytes as f64 / nanoseconds.max(1) as f64),
            })
            .collect();
        let text = |row: &ProfileRow| row.shape.map(|shape| shape.to_string());
        rows.sort_by(|a, b| b.seconds.total_cmp(&a.seconds).then_with(|| text(a).cmp(&text(b))));
        let rest = [(BETWEEN, wall.saturating_sub(operators + own)), (OWN, own)];
        rows.extend(rest.map(|(operator, nanoseconds)| ProfileRow {
            pass: name.to_owned(),
            operator,
            kernel: None,
            shape: None,
            calls: passes.len(),
            seconds: nanoseconds as f64 / 1e9,
            share: share(nanoseconds),
            gigabytes_per_second: None,
        }));
        rows
    }

    /// Writes every pass and call as Chrome trace events (a JSON object with `traceEvents`), which
    /// ui.perfetto.dev opens. Times are microseconds.
    ///
    /// # Errors
    /// When `out` fails.
    pub fn write_trace(&self, out: &mut dyn Write) -> io::Result<()> {
        let named = |kind: &str, name: &str| json!({"name": kind, "ph": "M", "pid": 1, "tid": 1, "args": {"name": name}});
        writeln!(out, "{{\"displayTimeUnit\": \"ms\", \"traceEvents\": [")?;
        write!(out, "{},\n{}", named("process_name", "marlin"), named("thread_name", "operators"))?;
        let micros = |nanoseconds: u64| nanoseconds as f64 / 1e3;
        for pass in &self.passes {
            let event = json!({
                "name": pass.name, "cat": "pass", "ph": "X", "pid": 1, "tid": 1,
                "ts": micros(pass.start), "dur": micros(pass.end - pass.start),
                "args": {"profiler_us": micros(pass.own), "operators": pass.calls.len()},
            });
            write!(out, ",\n{event}")?;
            for call in &pass.calls {
                let mut args = json!({"shape": call.shape.to_string()});
                if let Some(kernel) = call.kernel {
                    args["kernel"] = self.kernels[kernel].as_str().into();
                }
                if call.bytes > 0 {
                    args["bytes"] = call.bytes.into();
                }
                let event = json!({
                    "name": call.operator, "cat": "operator", "ph": "X", "pid": 1, "tid": 1,
                    "ts": micros(call.start), "dur": micros(call.end - call.start), "args": args,
                });
                write!(out, ",\n{event}")?;
            }
        }
        writeln!(out, "\n]}}")
    }
}
