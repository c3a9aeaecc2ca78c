//! A backend that watches the inputs of matrices and otherwise does what another one does.
//!
//! Matrices are told apart by a tag in their handle, put there when they are loaded
//! ([`Loader::with_tag`](marlin_models::Loader::with_tag)); matrices of one label see the same input, which
//! is added to that label's [`Hessian`](crate::hessian::Hessian) once. Routed experts are run one after the other, so that each sees
//! exactly the tokens routed to it.

use crate::hessian::{Gathering, Hessians};
use marlin_models::LinearSpec;
use marlin_tensor::{
    Activation, AttentionParams, Backend, BackendError, Batch, Cache, CacheSpec, Embedding,
    Experts, HeadLinear, Heads, HostTensor, Linear, LinearOptions, Placed, Role, Rope, RopeTable,
    Router, Routing, Tensor, Vector, Weight,
};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

type Result<T> = std::result::Result<T, BackendError>;

/// A matrix that knows its label.
struct Tagged {
    label: String,
    linear: Linear,
}

/// Puts the label of `spec` on `linear`: the tag for [`Capture`].
pub fn tag(spec: &LinearSpec, linear: Linear) -> Linear {
    let tagged = Tagged { label: spec.label.clone(), linear: linear.clone() };
    Linear { handle: Arc::new(tagged), ..linear }
}

/// The watching backend.
pub struct Capture {
    inner: Arc<dyn Backend>,
    wanted: BTreeSet<String>,
    seen: Mutex<BTreeMap<String, Gathering>>,
}

impl Capture {
    /// Watches the inputs of matrices whose label is in `wanted`.
    pub fn new(inner: Arc<dyn Backend>, wanted: BTreeSet<String>) -> Self {
        Self { inner, wanted, seen: Mutex::default() }
    }

    /// What was seen so far, by label.
    ///
    /// # Errors
    /// When the device fails.
    pub fn take(&self) -> Result<Hessians> {
        let seen = std::mem::take(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner));
        let finish =
            |(label, seen): (String, Gathering)| Ok((label, seen.finish(self.inner.as_ref())?));
        seen.into_iter().map(finish).collect()
    }

    fn record(&self, x: &Tensor, label: &str) -> Result<()> {
        if !self.wanted.contains(label) || x.rows == 0 {
            return Ok(());
        }
        let backend = self.inner.as_ref();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = match seen.entry(label.to_owned()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(Gathering::new(backend, x.columns)?),
        };
        sum.add(backend, x)
    }
}

/// The matrix itself and its label, if it has one.
fn untag(linear: &Linear) -> (&Linear, Option<&str>) {
    match linear.handle.downcast_ref::<Tagged>() {
        Some(tagged) => (&tagged.linear, Some(&tagged.label)),
        None => (linear, None),
    }
}

impl Backend for Capture {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn rounds_inputs(&self) -> bool {
        self.inner.rounds_inputs()
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
        self.inner.load_linear(weight, bias, options)
    }

    fn load_head_linear(
        &self,
        heads: usize,
        out_features: usize,
        in_features: usize,
        values: Vec<f32>,
    ) -> Result<HeadLinear> {
        self.inner.load_head_linear(heads, out_features, in_features, values)
    }

    fn load_embedding(&self, weight: &Weight) -> Result<Embedding> {
        self.inner.load_embedding(weight)
    }

    fn load_vector(&self, values: Vec<f32>) -> Result<Vector> {
        self.inner.load_vector(values)
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
        self.inner.upload(rows, columns, values)
    }

    fn download(&self, x: &Tensor) -> Result<Vec<f32>> {
        self.inner.download(x)
    }

    fn download_routing(&self, routing: &Routing) -> Result<(Vec<u32>, Vec<f32>)> {
        self.inner.download_routing(routing)
    }

    fn embed(&self, table: &Embedding, batch: &Batch, scale: f32) -> Result<Tensor> {
        self.inner.embed(table, batch, scale)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Vector, eps: f32) -> Result<Tensor> {
        self.inner.rms_norm(x, weight, eps)
    }

    fn linear(&self, x: &Tensor, weight: &Linear) -> Result<Tensor> {
        let (linear, label) = untag(weight);
        if let Some(label) = label {
            self.record(x, label)?;
        }
        self.inner.linear(x, linear)
    }

    fn linear_many(&self, x: &Tensor, weights: &[&Linear]) -> Result<Vec<Tensor>> {
        let labels: BTreeSet<&str> = weights.iter().filter_map(|w| untag(w).1).collect();
        labels.into_iter().try_for_each(|label| self.record(x, label))?;
        let weights: Vec<&Linear> = weights.iter().map(|w| untag(w).0).collect();
        self.inner.linear_many(x, &weights)
    }

    fn head_linear(&self, x: &Tensor, weight: &HeadLinear) -> Result<Tensor> {
        self.inner.head_linear(x, weight)
    }

    fn rope(&self, x: Tensor, table: &RopeTable, heads: Heads, batch: &Batch) -> Result<Tensor> {
        self.inner.rope(x, table, heads, batch)
    }

    fn slice_heads(&self, x: &Tensor, heads: Heads, start: usize, len: usize) -> Result<Tensor> {
        self.inner.slice_heads(x, heads, start, len)
    }

    fn concat_heads(&self, a: &Tensor, b: &Tensor, heads: usize) -> Result<Tensor> {
        self.inner.concat_heads(a, b, heads)
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
        self.inner.attention(q, k, v, cache, layer, batch, params)
    }

    fn gated(&self, gate: Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
        self.inner.gated(gate, up, activation)
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        self.inner.add(x, y)
    }

    fn softcap(&self, x: Tensor, cap: f32) -> Result<Tensor> {
        self.inner.softcap(x, cap)
    }

    fn route(&self, logits: &Tensor, bias: Option<&Vector>, router: &Router) -> Result<Routing> {
        self.inner.route(logits, bias, router)
    }

    fn experts(
        &self,
        x: &Tensor,
        routing: &Routing,
        experts: &Experts,
        activation: Activation,
    ) -> Result<Tensor> {
        let (ids, weights) = self.inner.download_routing(routing)?;
        let mut out = vec![0.0; x.rows * x.columns];
        for expert in 0..experts.gate.len() {
            let chosen = |&(_, id): &(usize, &u32)| *id as usize == expert;
            let places: Vec<usize> =
                ids.iter().enumerate().filter(chosen).map(|(i, _)| i).collect();
            if places.is_empty() {
                continue;
            }
            let rows: Vec<u32> = places.iter().map(|p| (p / routing.top_k) as u32).collect();
            let own = self.inner.gather_rows(x, &rows)?;
            let y = self.feed_forward(&own, &experts.get(expert), activation)?;
            let y = self.inner.download(&y)?;
            for ((place, row), y) in places.iter().zip(&rows).zip(y.chunks_exact(x.columns)) {
                let out = &mut out[*row as usize * x.columns..][..x.columns];
                out.iter_mut().zip(y).for_each(|(o, y)| *o += weights[*place] * y);
            }
        }
        self.inner.upload(x.rows, x.columns, out)
    }

    fn gather_rows(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        self.inner.gather_rows(x, rows)
    }
}
