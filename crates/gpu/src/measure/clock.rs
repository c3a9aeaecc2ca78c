//! Times launches on a device.

use crate::gpu::{Buffer, Gpu};
use cubecl::client::Graph;
use std::cell::OnceCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

/// Microseconds that a measured run should take, so that what starts and ends it counts for little.
const RUN_US: f64 = 3000.0;
/// Most launches of a run.
const MOST_LAUNCHES: usize = 512;

/// Launches of one variant, recorded where the runtime can.
pub(super) struct Clock<'a> {
    gpu: &'a Gpu,
    /// Launches it with a copy of what it reads.
    launch: Box<dyn Fn(usize) -> Buffer + 'a>,
    launches: usize,
    graph: OnceCell<Option<Graph>>,
}

impl<'a> Clock<'a> {
    pub(super) fn new(
        gpu: &'a Gpu,
        launches: usize,
        launch: impl Fn(usize) -> Buffer + 'a,
    ) -> Self {
        Self { gpu, launch: Box::new(launch), launches, graph: OnceCell::new() }
    }

    /// Outputs of a launch.
    pub(super) fn outputs(&self, len: usize) -> Result<Vec<f32>, String> {
        guarded(|| {
            let bytes = self.gpu.read(&(self.launch)(0), len).map_err(|e| e.to_string())?;
            Ok(bytes.as_chunks().0.iter().map(|&c| f32::from_le_bytes(c)).collect())
        })
    }

    /// Microseconds of a launch.
    pub(super) fn time(&self) -> Result<f64, String> {
        guarded(|| {
            let graph = self.graph.get_or_init(|| self.record());
            let start = Instant::now();
            match graph {
                // SAFETY: what the launches read and write lives as long as this; all work goes to one stream.
                Some(graph) => unsafe { graph.replay() }.map_err(|e| e.to_string())?,
                None => self.all(),
            }
            self.finish()?;
            Ok(start.elapsed().as_secs_f64() * 1e6 / self.launches as f64)
        })
    }

    /// Launches that take about as long as a run should.
    pub(super) fn calibrate(&self) -> usize {
        let few = 4;
        let timed = guarded(|| {
            // The first compiles.
            drop((self.launch)(0));
            self.finish()?;
            let start = Instant::now();
            (0..few).for_each(|i| drop((self.launch)(i)));
            self.finish()?;
            Ok(start.elapsed().as_secs_f64() * 1e6 / few as f64)
        });
        timed.map_or(1, |us| (RUN_US / us).ceil().clamp(1.0, MOST_LAUNCHES as f64) as usize)
    }

    fn all(&self) {
        (0..self.launches).for_each(|i| drop((self.launch)(i)));
    }

    fn finish(&self) -> Result<(), String> {
        self.gpu.read(&self.gpu.none, 1).map(drop).map_err(|e| e.to_string())
    }

    fn record(&self) -> Option<Graph> {
        let client = &self.gpu.client;
        client.graph_prepare().ok()?;
        // Compiles kernels, and takes the memory that the recorded launches find.
        self.all();
        let started = client.start_capture().is_ok();
        if started {
            self.all();
        }
        let graph = client.stop_capture();
        graph.ok().filter(|_| started)
    }
}

/// What `f` gives; a panic of a runtime is an error here.
pub(super) fn guarded<T>(f: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|cause| {
        let said = cause.downcast_ref::<String>().map(String::as_str);
        let said = said.or_else(|| cause.downcast_ref::<&str>().copied());
        Err(format!("the runtime failed: {}", said.unwrap_or("no reason given")))
    })
}
