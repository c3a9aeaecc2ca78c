//! Where a forward pass spends its time: a backend that times every operator of another one.
//!
//! ```text
//! Profiler::pass("tg128", || model.forward(…)) ──► Calls ──► Profile: rows by operator and shape,
//!                                                            and a trace of every call
//! ```
//!
//! Operators are recorded inside a [`pass`](Profiler::pass) only; loading is not. What lies between them
//! is the engine's own time, what the profiler itself takes is counted apart. A backend that queues its
//! operators is timed while queueing, which is what the calling thread waits for.

mod report;
mod shape;

pub use report::{Profile, ProfileRow};
pub use shape::Shape;

use marlin_tensor::{
    Activation, AttentionParams, Backend, BackendError, Batch, Cache, CacheSpec, DeviceMemory,
    Draw, Drawn, Embedding, Experts, HeadLinear, Heads, HostTensor, Linear, LinearOptions, Placed,
    Role, Rope, RopeTable, Router, Routing, Tensor, Vector, Weight,
};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

type Result<T> = std::result::Result<T, BackendError>;

/// One call of an operator. Times are nanoseconds since the profiler was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) operator: &'static str,
    /// Index into the kernels' names.
    pub(crate) kernel: Option<usize>,
    pub(crate) shape: Shape,
    /// Bytes of weights and cache that it reads.
    pub(crate) bytes: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
}

/// One pass, and the calls inside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pass {
    pub(crate) name: String,
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// The profiler's own time inside the pass, nanoseconds.
    pub(crate) own: u64,
    pub(crate) calls: Vec<Call>,
}

#[derive(Default)]
struct State {
    open: Option<Pass>,
    done: Vec<Pass>,
    kernels: Vec<String>,
}

impl State {
    /// Index of a kernel's name; there are few.
    fn kernel(&mut self, name: &str) -> usize {
        self.kernels.iter().position(|known| known == name).unwrap_or_else(|| {
            self.kernels.push(name.to_owned());
            self.kernels.len() - 1
        })
    }
}

/// What a call works on, as far as it is known before it runs.
struct Work<'a> {
    kernel: Option<&'a str>,
    shape: Shape,
    bytes: u64,
}

impl Work<'_> {
    fn rows(x: &Tensor) -> Self {
        let shape = Shape::Rows { rows: x.rows, columns: x.columns };
        Self { kernel: None, shape, bytes: 0 }
    }
}

/// The timing backend.
pub struct Profiler {
    inner: Arc<dyn Backend>,
    begin: Instant,
    state: Mutex<State>,
    loaded: AtomicU64,
}

impl Profiler {
    /// Times the operators of `inner`.
    pub fn new(inner: Arc<dyn Backend>) -> Self {
        let state = Mutex::default();
        Self { inner, begin: Instant::now(), state, loaded: AtomicU64::new(0) }
    }

    /// Records the operators that `run` calls, under `name`. Passes do not nest.
    ///
    /// # Errors
    /// What `run` fails with; the pass is then dropped.
    pub fn pass<T, E>(
        &self,
        name: &str,
        run: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        let calls = Vec::with_capacity(1024);
        let pass = Pass { name: name.to_owned(), start: self.now(), end: 0, own: 0, calls };
        self.state().open = Some(pass);
        let result = run();
        let end = self.now();
        let mut state = self.state();
        if let (Some(mut pass), Ok(_)) = (state.open.take(), &result) {
            pass.end = end;
            state.done.push(pass);
        }
        result
    }

    /// What was recorded since the last call.
    pub fn take(&self) -> Profile {
        let mut state = self.state();
        Profile { passes: std::mem::take(&mut state.done), kernels: state.kernels.clone() }
    }

    /// Bytes that the matrices, tables and vectors loaded so far occupy on the device.
    pub fn loaded_bytes(&self) -> u64 {
        self.loaded.load(Ordering::Relaxed)
    }

    fn now(&self) -> u64 {
        self.begin.elapsed().as_nanos() as u64
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn recording(&self) -> bool {
        self.state().open.is_some()
    }

    fn loaded<T>(&self, placed: T, bytes: u64) -> T {
        self.loaded.fetch_add(bytes, Ordering::Relaxed);
        placed
    }

    /// Runs one operator, and records it inside a pass.
    fn time<T>(
        &self,
        operator: &'static str,
        work: Work<'_>,
        run: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if !self.recording() {
            return run();
        }
        let start = self.now();
        let result = run();
        let end = self.now();
        let mut state = self.state();
        let kernel = work.kernel.map(|name| state.kernel(name));
        if let Some(pass) = &mut state.open {
            let Work { shape, bytes, .. } = work;
            pass.calls.push(Call { operator, kernel, shape, bytes, start, end });
            pass.own += self.now() - end;
        }
        result
    }

    /// Bytes of the experts that `routing` chose, for a call that is being recorded.
    fn chosen_bytes(&self, routing: &Routing, experts: &Experts) -> Result<u64> {
        if !self.recording() {
            return Ok(0);
        }
        let start = self.now();
        let ids: BTreeSet<u32> = self.inner.download_routing(routing)?.0.into_iter().collect();
        let bytes = |id: u32| {
            let id = id as usize;
            experts.gate[id].bytes + experts.up[id].bytes + experts.down[id].bytes
        };
        let bytes = ids.into_iter().map(bytes).sum();
        let own = self.now() - start;
        if let Some(pass) = &mut self.state().open {
            pass.own += own;
        }
        Ok(bytes)
    }
}

impl Backend for Profiler {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn rounds_inputs(&self) -> bool {
        self.inner.rounds_inputs()
    }

    fn memory(&self) -> Option<DeviceMemory> {
        self.inner.memory()
    }

    fn kernel(&self, format: &str, options: LinearOptions) -> String {
        self.inner.kernel(format, options)
    }

    fn placed(&self, weight: &Weight, role: Role) -> Placed {
        self.inner.placed(weight, role)
    }

    fn load_linear(
        &self,
        weight: &Weight,
        bias: Option<&HostTensor>,
        options: LinearOptions,
    ) -> Result<Linear> {
        let linear = self.inner.load_linear(weight, bias, options)?;
        let bytes = linear.bytes;
        Ok(self.loaded(linear, bytes))
    }

    fn load_head_linear(
        &self,
        heads: usize,
        out_features: usize,
        in_features: usize,
        values: Vec<f32>,
    ) -> Result<HeadLinear> {
        let bytes = 4 * values.len() as u64;
        let placed = self.inner.load_head_linear(heads, out_features, in_features, values)?;
        Ok(self.loaded(placed, bytes))
    }

    fn load_embedding(&self, weight: &Weight) -> Result<Embedding> {
        let table = self.inner.load_embedding(weight)?;
        let bytes = table.bytes;
        Ok(self.loaded(table, bytes))
    }

    fn load_vector(&self, values: Vec<f32>) -> Result<Vector> {
        let bytes = 4 * values.len() as u64;
        let vector = self.inner.load_vector(values)?;
        Ok(self.loaded(vector, bytes))
    }

    fn load_rope(&self, rope: &Rope) -> Result<RopeTable> {
        self.inner.load_rope(rope)
    }

    fn create_cache(&self, spec: &CacheSpec) -> Result<Cache> {
        self.inner.create_cache(spec)
    }

    fn copy_blocks(&self, cache: &Cache, pairs: &[(u32, u32)]) -> Result<()> {
        self.inner.copy_blocks(cache, pairs)
    }

    fn upload(&self, rows: usize, columns: usize, values: Vec<f32>) -> Result<Tensor> {
        let shape = Shape::Rows { rows, columns };
        let work = Work { kernel: None, shape, bytes: 0 };
        self.time("upload", work, || self.inner.upload(rows, columns, values))
    }

    fn download(&self, x: &Tensor) -> Result<Vec<f32>> {
        self.time("download", Work::rows(x), || self.inner.download(x))
    }

    fn draw(&self, logits: &Tensor, draws: &[Draw]) -> Result<Option<Vec<Option<Drawn>>>> {
        self.time("draw", Work::rows(logits), || self.inner.draw(logits, draws))
    }

    fn download_routing(&self, routing: &Routing) -> Result<(Vec<u32>, Vec<f32>)> {
        self.inner.download_routing(routing)
    }

    fn embed(&self, table: &Embedding, batch: &Batch, scale: f32) -> Result<Tensor> {
        let shape = Shape::Rows { rows: batch.rows(), columns: table.hidden_size };
        let bytes = table.bytes / table.vocab_size.max(1) as u64 * batch.rows() as u64;
        let work = Work { kernel: None, shape, bytes };
        self.time("embed", work, || self.inner.embed(table, batch, scale))
    }

    fn rms_norm(&self, x: &Tensor, weight: &Vector, eps: f32) -> Result<Tensor> {
        self.time("rms_norm", Work::rows(x), || self.inner.rms_norm(x, weight, eps))
    }

    fn linear(&self, x: &Tensor, weight: &Linear) -> Result<Tensor> {
        let shape = Shape::product(x, &[weight]);
        let work = Work { kernel: Some(&weight.kernel), shape, bytes: weight.bytes };
        self.time("linear", work, || self.inner.linear(x, weight))
    }

    fn linear_many(&self, x: &Tensor, weights: &[&Linear]) -> Result<Vec<Tensor>> {
        let work = Work {
            kernel: weights.first().map(|w| w.kernel.as_str()),
            shape: Shape::product(x, weights),
            bytes: weights.iter().map(|w| w.bytes).sum(),
        };
        self.time("linear_many", work, || self.inner.linear_many(x, weights))
    }

    fn head_linear(&self, x: &Tensor, weight: &HeadLinear) -> Result<Tensor> {
        let HeadLinear { heads, out_features, in_features, .. } = *weight;
        let shape = Shape::HeadProduct { rows: x.rows, heads, in_features, out_features };
        let bytes = 4 * (heads * out_features * in_features) as u64;
        let work = Work { kernel: None, shape, bytes };
        self.time("head_linear", work, || self.inner.head_linear(x, weight))
    }

    fn rope(&self, x: Tensor, table: &RopeTable, heads: Heads, batch: &Batch) -> Result<Tensor> {
        let work = Work::rows(&x);
        self.time("rope", work, || self.inner.rope(x, table, heads, batch))
    }

    fn slice_heads(&self, x: &Tensor, heads: Heads, start: usize, len: usize) -> Result<Tensor> {
        let shape = Shape::Rows { rows: x.rows, columns: heads.heads * len };
        let work = Work { kernel: None, shape, bytes: 0 };
        self.time("slice_heads", work, || self.inner.slice_heads(x, heads, start, len))
    }

    fn concat_heads(&self, a: &Tensor, b: &Tensor, heads: usize) -> Result<Tensor> {
        let shape = Shape::Rows { rows: a.rows, columns: a.columns + b.columns };
        let work = Work { kernel: None, shape, bytes: 0 };
        self.time("concat_heads", work, || self.inner.concat_heads(a, b, heads))
    }

    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: Option<&Tensor>,
        cache: &Cache,
        layer: usize,
        batch: &Batch,
        params: &AttentionParams,
    ) -> Result<Tensor> {
        let tokens: usize = batch.sequences.iter().map(|s| s.context_len).sum();
        let cache_type = cache.spec.cache_type;
        let layer_spec = cache.spec.layers.get(layer);
        let per_token = layer_spec.map_or(0, |l| l.bytes_per_token(cache_type));
        let shape = Shape::Attention {
            rows: q.rows,
            num_heads: params.num_heads,
            num_kv_heads: params.num_kv_heads,
            key_head_dim: params.key_head_dim,
        };
        let bytes = (tokens * per_token) as u64;
        self.time("attention", Work { kernel: None, shape, bytes }, || {
            self.inner.attention(q, k, v, cache, layer, batch, params)
        })
    }

    fn gated(&self, gate: Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
        let work = Work::rows(&gate);
        self.time("gated", work, || self.inner.gated(gate, up, activation))
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        let work = Work::rows(&x);
        self.time("add", work, || self.inner.add(x, y))
    }

    fn softcap(&self, x: Tensor, cap: f32) -> Result<Tensor> {
        let work = Work::rows(&x);
        self.time("softcap", work, || self.inner.softcap(x, cap))
    }

    fn route(&self, logits: &Tensor, bias: Option<&Vector>, router: &Router) -> Result<Routing> {
        self.time("route", Work::rows(logits), || self.inner.route(logits, bias, router))
    }

    fn experts(
        &self,
        x: &Tensor,
        routing: &Routing,
        experts: &Experts,
        activation: Activation,
    ) -> Result<Tensor> {
        let first = experts.gate.first();
        let shape = Shape::Experts {
            rows: x.rows,
            columns: x.columns,
            top_k: routing.top_k,
            num_experts: experts.gate.len(),
            intermediate_size: first.map_or(0, |g| g.out_features),
        };
        let bytes = self.chosen_bytes(routing, experts)?;
        let work = Work { kernel: first.map(|g| g.kernel.as_str()), shape, bytes };
        self.time("experts", work, || self.inner.experts(x, routing, experts, activation))
    }

    fn gather_rows(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        let shape = Shape::Rows { rows: rows.len(), columns: x.columns };
        let work = Work { kernel: None, shape, bytes: 0 };
        self.time("gather_rows", work, || self.inner.gather_rows(x, rows))
    }
}
