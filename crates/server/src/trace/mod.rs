//! Traces for OpenTelemetry: a span for each request that a model works on, with its waiting, reading and writing below it.
//! Nothing is recorded unless a collector was named.
//!
//! Attributes are those of the conventions for generative AI (`gen_ai.…`, read in semantic-conventions-genai, November
//! 2026), which describe the client's side; two times that they have no name for are called as vLLM calls them. No text of a prompt or
//! an answer is in them.

mod context;
mod export;
mod span;

pub use context::TraceContext;
pub use export::{Exporter, Receiver};
pub use span::{Record, Span};

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::mpsc;

/// Spans that wait for the collector; more are dropped.
const QUEUE: usize = 2048;

/// Takes the spans of requests that have ended. Never waits.
#[derive(Debug, Clone)]
pub struct Tracer {
    queue: mpsc::Sender<Record>,
    counts: Arc<Counted>,
}

#[derive(Debug, Default)]
struct Counted {
    exported: AtomicU64,
    dropped: AtomicU64,
}

/// Counts of a tracer.
#[derive(Debug, Clone, Copy, Default)]
pub struct TraceCounts {
    /// Spans of requests that the collector has taken.
    pub exported: u64,
    /// Spans of requests that it has not, and will not.
    pub dropped: u64,
}

impl Tracer {
    /// A tracer, and what [`Exporter`] takes its spans from.
    pub fn new() -> (Self, Receiver) {
        let (queue, records) = mpsc::channel(QUEUE);
        let counts = Arc::new(Counted::default());
        (Self { queue, counts: counts.clone() }, Receiver { records, counts })
    }

    /// What was counted so far.
    pub fn counts(&self) -> TraceCounts {
        self.counts.read()
    }

    fn take(&self, record: Record) {
        if self.queue.try_send(record).is_err() {
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Counted {
    fn read(&self) -> TraceCounts {
        TraceCounts {
            exported: self.exported.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
        }
    }
}

tokio::task_local! {
    /// The span of the request that is being worked on.
    static CURRENT: Option<Arc<Span>>;
}

/// Runs `work`, whose [`current`] is `span`.
pub async fn within<T>(span: Option<Arc<Span>>, work: impl Future<Output = T>) -> T {
    CURRENT.scope(span, work).await
}

/// The span of the request that is being worked on, if it has one.
pub fn current() -> Option<Arc<Span>> {
    CURRENT.try_with(Clone::clone).ok().flatten()
}
