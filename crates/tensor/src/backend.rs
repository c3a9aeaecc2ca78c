//! The operators a device implements.
//!
//! Activations are two-dimensional, `[rows, columns]`, f32 unless a backend keeps something
//! narrower inside; heads are flattened into columns. Operators take handles and return
//! handles: nothing inside a forward pass reads results back, so a GPU can record it as a
//! graph. Operators are coarse (one call is one or a few kernels); those with a default body are
//! compositions a backend may fuse.

use crate::{
    Activation, Algebra, AttentionParams, Batch, Cache, CacheSpec, Draw, Drawn, Heads, HostTensor,
    Rope, Router, TensorError, Weight,
};
use std::any::Any;
use std::sync::Arc;

/// Storage only its backend can interpret.
pub type Opaque = Arc<dyn Any + Send + Sync>;

/// Why a backend cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The device has no room.
    #[error(
        "{what} needs {needed_bytes} bytes, {available_bytes} are available; choose a smaller model or context"
    )]
    OutOfMemory {
        /// What was being placed.
        what: String,
        /// Bytes asked for.
        needed_bytes: u64,
        /// Bytes free.
        available_bytes: u64,
    },
    /// No kernel and no fallback for this storage format or parameter.
    #[error("{what} is not supported by the {backend} backend")]
    Unsupported {
        /// Backend name.
        backend: String,
        /// Format, type or parameter.
        what: String,
    },
    /// Stored bytes do not decode.
    #[error("{what}: {reason}")]
    Decode {
        /// Weight or part.
        what: String,
        /// Reason.
        reason: String,
    },
    /// A host tensor has the wrong type or size.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// The device or driver failed.
    #[error("device error: {0}")]
    Device(String),
}

/// Activations `[rows, columns]` on a device.
#[derive(Clone)]
pub struct Tensor {
    /// Rows (tokens).
    pub rows: usize,
    /// Leading rows that are tokens of answers. Each is computed as if it were alone, so that neither
    /// company nor a second computation changes an answer; the rows of prompts after them are computed in
    /// whatever way is fast for many, which may round otherwise, but does not depend on how many.
    pub decode_rows: usize,
    /// Columns (features).
    pub columns: usize,
    /// Backend storage.
    pub handle: Opaque,
}

/// A loaded matrix with an optional bias: `[rows, in_features] -> [rows, out_features]`.
#[derive(Clone)]
pub struct Linear {
    /// Output columns.
    pub out_features: usize,
    /// Input columns.
    pub in_features: usize,
    /// Bytes it occupies on the device.
    pub bytes: u64,
    /// Kernel path it takes, for `inspect` (`"q4_0 avx512-vnni"`, `"iq2_s decoded to f32"`).
    pub kernel: String,
    /// Backend storage.
    pub handle: Opaque,
}

/// A stack of small dense matrices, one per head: columns `[heads * in] -> [heads * out]`.
#[derive(Clone)]
pub struct HeadLinear {
    /// Heads.
    pub heads: usize,
    /// Output columns per head.
    pub out_features: usize,
    /// Input columns per head.
    pub in_features: usize,
    /// Backend storage.
    pub handle: Opaque,
}

/// A loaded token-embedding table `[vocab_size, hidden_size]`.
#[derive(Clone)]
pub struct Embedding {
    /// Rows of the table.
    pub vocab_size: usize,
    /// Columns of the table.
    pub hidden_size: usize,
    /// Bytes it occupies on the device.
    pub bytes: u64,
    /// Backend storage.
    pub handle: Opaque,
}

/// A loaded f32 vector: norm weights, router correction bias.
#[derive(Clone)]
pub struct Vector {
    /// Elements.
    pub len: usize,
    /// Backend storage.
    pub handle: Opaque,
}

/// Loaded rotary frequencies.
#[derive(Clone)]
pub struct RopeTable {
    /// Backend storage.
    pub handle: Opaque,
}

/// Chosen experts and their weights for every row, on the device.
#[derive(Clone)]
pub struct Routing {
    /// Rows.
    pub rows: usize,
    /// Experts per row.
    pub top_k: usize,
    /// Backend storage.
    pub handle: Opaque,
}

/// The loaded matrices of a set of gated experts; index = expert id.
#[derive(Clone)]
pub struct Experts {
    /// Gate projections.
    pub gate: Vec<Linear>,
    /// Up projections.
    pub up: Vec<Linear>,
    /// Down projections.
    pub down: Vec<Linear>,
}

/// A gated feed-forward's matrices, `down(activation(gate x) * up x)`.
#[derive(Clone)]
pub struct GatedLinears {
    /// Gate projection.
    pub gate: Linear,
    /// Up projection.
    pub up: Linear,
    /// Down projection.
    pub down: Linear,
}

impl Experts {
    /// The matrices of one expert.
    ///
    /// # Panics
    /// When there is no such expert.
    pub fn get(&self, expert: usize) -> GatedLinears {
        let [gate, up, down] = [&self.gate, &self.up, &self.down].map(|all| all[expert].clone());
        GatedLinears { gate, up, down }
    }
}

/// How a matrix is to be loaded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinearOptions {
    /// Keep activations in float even where the backend would quantize them (routers).
    pub float_activations: bool,
}

/// What a matrix is placed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// [`Backend::load_linear`].
    Linear(LinearOptions),
    /// [`Backend::load_embedding`].
    Embedding,
    /// [`Backend::load_head_linear`], twice, with the values of its halves.
    Heads,
}

/// Memory that a placed matrix takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// Bytes made for it.
    pub bytes: u64,
    /// Whether the parts it was loaded from are still read, where they are.
    pub keeps_parts: bool,
}

/// Memory of a device, as its allocator counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// All that the device has for programs, where it says.
    pub total_bytes: Option<u64>,
    /// What no program holds now, where the driver says.
    pub free_bytes: Option<u64>,
    /// Bytes of what is alive.
    pub used_bytes: u64,
    /// Bytes taken from the device, among them what is kept for the next allocation: the most that was ever needed.
    pub reserved_bytes: u64,
}

impl DeviceMemory {
    /// Bytes that can still be allocated, where the device says: what no program holds, and what the allocator keeps for the next one.
    pub fn available_bytes(&self) -> Option<u64> {
        let own = self.total_bytes.map(|total| total.saturating_sub(self.used_bytes));
        let kept = self.reserved_bytes.saturating_sub(self.used_bytes);
        let all = self.free_bytes.map(|free| free.saturating_add(kept));
        [own, all].into_iter().flatten().min()
    }
}

/// Result of a backend call.
type Result<T> = std::result::Result<T, BackendError>;

/// A device that holds weights and runs operators.
pub trait Backend: Send + Sync {
    /// What the user sees, for example `"cpu (avx512-vnni, 2 threads)"`.
    fn name(&self) -> String;

    /// Whether kernels may round the inputs of matrices to fewer bits than f32 has.
    fn rounds_inputs(&self) -> bool {
        false
    }

    /// Memory of the device, where it has its own beside the process's.
    fn memory(&self) -> Option<DeviceMemory> {
        None
    }

    /// Kernel path that [`load_linear`](Self::load_linear) would choose for `format`, without loading.
    fn kernel(&self, format: &str, options: LinearOptions) -> String;

    /// Memory that placing `weight` for `role` would take, without placing it.
    fn placed(&self, weight: &Weight, role: Role) -> Placed;

    /// Places a matrix; `bias` has `out_features` elements.
    fn load_linear(
        &self,
        weight: &Weight,
        bias: Option<&HostTensor>,
        options: LinearOptions,
    ) -> Result<Linear>;

    /// Places per-head dense matrices `values: [heads, out_features, in_features]`.
    fn load_head_linear(
        &self,
        heads: usize,
        out_features: usize,
        in_features: usize,
        values: Vec<f32>,
    ) -> Result<HeadLinear>;

    /// Places a token-embedding table.
    fn load_embedding(&self, weight: &Weight) -> Result<Embedding>;

    /// Places a vector.
    fn load_vector(&self, values: Vec<f32>) -> Result<Vector>;

    /// Places rotary frequencies.
    fn load_rope(&self, rope: &Rope) -> Result<RopeTable>;

    /// Allocates a paged cache.
    fn create_cache(&self, spec: &CacheSpec) -> Result<Cache>;

    /// Copies whole cache blocks, all layers: `(from, to)` pairs.
    fn copy_blocks(&self, cache: &Cache, pairs: &[(u32, u32)]) -> Result<()>;

    /// Copies host values `[rows, columns]` to the device.
    fn upload(&self, rows: usize, columns: usize, values: Vec<f32>) -> Result<Tensor>;

    /// Copies activations back to the host.
    fn download(&self, x: &Tensor) -> Result<Vec<f32>>;

    /// Draws tokens from rows of `logits` without copying them. `None` where that gains nothing because the host has them; `None` for a draw
    /// whose row has to be read whole: one with a value that is not finite, with nothing left to draw, or with very many equals where it is cut.
    ///
    /// A token depends on its row and its draw alone. Sums may be f32: beside the token of exact sums, one may be drawn whose interval
    /// of `uniform` begins or ends within a hundred-thousandth of it.
    fn draw(&self, logits: &Tensor, draws: &[Draw]) -> Result<Option<Vec<Option<Drawn>>>> {
        let _ = (logits, draws);
        Ok(None)
    }

    /// Copies a routing back: expert ids and weights, each `[rows, top_k]`.
    fn download_routing(&self, routing: &Routing) -> Result<(Vec<u32>, Vec<f32>)>;

    /// Runs `pass`, which computes from `batch` and `cache` alone and calls the same operators for every batch of
    /// one shape. `owner` tells models apart. A backend may record what a pass launches, and launch
    /// that the next time instead of running it.
    fn run_pass(
        &self,
        owner: u64,
        batch: &Batch,
        cache: &Cache,
        pass: &mut dyn FnMut() -> Result<Tensor>,
    ) -> Result<Tensor> {
        let _ = (owner, batch, cache);
        pass()
    }

    /// Rows of the table for `batch.tokens`, times `scale`.
    fn embed(&self, table: &Embedding, batch: &Batch, scale: f32) -> Result<Tensor>;

    /// `x / sqrt(mean(x²) + eps) * weight` over each consecutive group of `weight.len` columns.
    fn rms_norm(&self, x: &Tensor, weight: &Vector, eps: f32) -> Result<Tensor>;

    /// `x + y`, and its [`rms_norm`](Self::rms_norm).
    fn add_norm(
        &self,
        x: Tensor,
        y: &Tensor,
        weight: &Vector,
        eps: f32,
    ) -> Result<(Tensor, Tensor)> {
        let x = self.add(x, y)?;
        let normed = self.rms_norm(&x, weight, eps)?;
        Ok((x, normed))
    }

    /// `x Wᵀ + bias`.
    fn linear(&self, x: &Tensor, weight: &Linear) -> Result<Tensor>;

    /// Several matrices over one input (q, k, v; gate, up).
    fn linear_many(&self, x: &Tensor, weights: &[&Linear]) -> Result<Vec<Tensor>> {
        weights.iter().map(|w| self.linear(x, w)).collect()
    }

    /// Each head's columns times that head's matrix.
    fn head_linear(&self, x: &Tensor, weight: &HeadLinear) -> Result<Tensor>;

    /// Rotates `heads` in place at the positions of `batch`.
    fn rope(&self, x: Tensor, table: &RopeTable, heads: Heads, batch: &Batch) -> Result<Tensor>;

    /// Columns `start .. start + len` of every head: `[rows, heads * head_dim] -> [rows, heads * len]`.
    fn slice_heads(&self, x: &Tensor, heads: Heads, start: usize, len: usize) -> Result<Tensor>;

    /// Per head `[a | b]`: `[rows, heads * m], [rows, heads * n] -> [rows, heads * (m + n)]`.
    fn concat_heads(&self, a: &Tensor, b: &Tensor, heads: usize) -> Result<Tensor>;

    /// Per head its columns times its matrix, and `beside` it: the queries of absorbed latent attention, `[rows, heads * (latent + rope)]`.
    fn head_linear_beside(
        &self,
        x: &Tensor,
        weight: &HeadLinear,
        beside: &Tensor,
    ) -> Result<Tensor> {
        self.concat_heads(&self.head_linear(x, weight)?, beside, weight.heads)
    }

    /// What latent attention makes of its projections `q: [rows, heads * (nope + rope)]` and `kv: [rows, latent + rope]`: the columns of queries
    /// without positions, those with, rotated, and keys, the latent ones normalised by `norm` and the others rotated.
    #[allow(clippy::too_many_arguments)]
    fn latent_inputs(
        &self,
        q: &Tensor,
        kv: &Tensor,
        norm: &Vector,
        eps: f32,
        table: &RopeTable,
        heads: usize,
        batch: &Batch,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let (latent, wide) = (norm.len, q.columns / heads);
        let rope = kv.columns - latent;
        let q_heads = Heads { heads, head_dim: wide };
        let nope = self.slice_heads(q, q_heads, 0, wide - rope)?;
        let q_rope = self.slice_heads(q, q_heads, wide - rope, rope)?;
        let kv_heads = Heads { heads: 1, head_dim: kv.columns };
        let k = self.rms_norm(&self.slice_heads(kv, kv_heads, 0, latent)?, norm, eps)?;
        let k_rope = self.slice_heads(kv, kv_heads, latent, rope)?;
        let q_rope = self.rope(q_rope, table, Heads { heads, head_dim: rope }, batch)?;
        let k_rope = self.rope(k_rope, table, Heads { heads: 1, head_dim: rope }, batch)?;
        Ok((nope, q_rope, self.concat_heads(&k, &k_rope, 1)?))
    }

    /// Writes `k` (and `v`) into `cache` layer `layer`, then attends causally over every sequence's
    /// cached tokens. `v = None` takes values from the first `value_head_dim` columns of the keys.
    #[allow(clippy::too_many_arguments)]
    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: Option<&Tensor>,
        cache: &Cache,
        layer: usize,
        batch: &Batch,
        params: &AttentionParams,
    ) -> Result<Tensor>;

    /// `activation(gate) * up`.
    fn gated(&self, gate: Tensor, up: &Tensor, activation: Activation) -> Result<Tensor>;

    /// `down(activation(gate x) * up x)`.
    fn feed_forward(
        &self,
        x: &Tensor,
        linears: &GatedLinears,
        activation: Activation,
    ) -> Result<Tensor> {
        let mut projected = self.linear_many(x, &[&linears.gate, &linears.up])?;
        let (Some(up), Some(gate)) = (projected.pop(), projected.pop()) else {
            unreachable!("linear_many returns one tensor per matrix")
        };
        self.gated_linear(gate, &up, activation, &linears.down)
    }

    /// `activation(gate) * up`, times a matrix.
    fn gated_linear(
        &self,
        gate: Tensor,
        up: &Tensor,
        activation: Activation,
        weight: &Linear,
    ) -> Result<Tensor> {
        self.linear(&self.gated(gate, up, activation)?, weight)
    }

    /// `x + y`.
    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor>;

    /// `cap * tanh(x / cap)`.
    fn softcap(&self, x: Tensor, cap: f32) -> Result<Tensor>;

    /// Chooses experts from router logits `[rows, num_experts]`; ties go to the lower index.
    fn route(&self, logits: &Tensor, bias: Option<&Vector>, router: &Router) -> Result<Routing>;

    /// Weighted sum of the chosen experts' gated feed-forwards.
    fn experts(
        &self,
        x: &Tensor,
        routing: &Routing,
        experts: &Experts,
        activation: Activation,
    ) -> Result<Tensor>;

    /// [`experts`](Self::experts), plus the feed-forward of an expert that all rows share.
    fn mixture(
        &self,
        x: &Tensor,
        routing: &Routing,
        experts: &Experts,
        shared: &GatedLinears,
        activation: Activation,
    ) -> Result<Tensor> {
        let y = self.experts(x, routing, experts, activation)?;
        self.add(y, &self.feed_forward(x, shared, activation)?)
    }

    /// The given rows, in order.
    fn gather_rows(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor>;

    /// What multiplies whole matrices, where the device does that faster than the host.
    fn algebra(&self) -> Option<&dyn Algebra> {
        None
    }
}
