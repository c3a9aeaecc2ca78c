//! The [`Backend`] trait on top of the kernels.

use crate::experts::Stacks;
use crate::gpu::{Buffer, Gpu, device_error, lock};
use crate::ops::cache::PagedCache;
use crate::ops::moe::Chosen;
use crate::ops::text::Inputs;
use crate::ops::tiles::Rows;
use crate::ops::{attention, columns, draw, elementwise, exl3, latent, matrix, moe, norm, rope};
use crate::recordings::{Key, Recording, Recordings};
use crate::runtime::found::free_bytes;
use crate::step::{Source, Step};
use crate::tune::Tuned;
use crate::weights::{self, GpuLinear, Loaded, Matrix, has_kernel, kernel_name, place};
use crate::{GpuDevice, Runtime};
use cubecl::prelude::Client;
use marlin_tensor::{
    Activation, Algebra, AttentionParams, Backend, BackendError, Batch, Cache, CacheSpec,
    DeviceMemory, Draw, Drawn, Embedding, Experts, GatedLinears, HeadLinear, Heads, HostTensor,
    Linear, LinearOptions, Opaque, Placed, Role, Rope, RopeStyle, RopeTable, Router, Routing,
    Tensor, Vector, Weight,
};
use std::sync::{Arc, Mutex};

type Result<T> = std::result::Result<T, BackendError>;

/// Groups of experts that a routing kernel has units for.
const MOST_GROUPS: usize = 64;

/// A GPU as a device.
pub(crate) struct GpuBackend {
    pub(crate) gpu: Gpu,
    device: GpuDevice,
    /// The batch whose operators are being called.
    current: Mutex<Option<(Batch, Arc<Step>)>>,
    recordings: Mutex<Recordings>,
}

/// A token-embedding table.
enum Table {
    Rows(Box<matrix::RowMatrix>),
    Trellis(Box<exl3::Trellis>),
    /// Of a format that no kernel reads by rows; rows are decoded on the host.
    Host(Arc<Weight>),
}

pub(crate) fn open<T: 'static>(handle: &Opaque) -> Result<&T> {
    handle.downcast_ref().ok_or_else(|| {
        let expected = std::any::type_name::<T>();
        BackendError::Device(format!("handle is not a {expected} of the gpu backend"))
    })
}

/// Nothing here asks which rows are tokens of answers: all are computed alike. Where the sums of one kernel serve every number of rows, a row is the same bits in any
/// company; on NVIDIA GPUs, EXL3 and many rows of other formats have kernels by the number of rows.
pub(crate) fn tensor(rows: usize, columns: usize, buffer: Buffer) -> Tensor {
    Tensor { rows, decode_rows: 0, columns, handle: Arc::new(buffer) }
}

/// Whether a table is looked up on the device; one whose columns stand in another order is on the host.
fn is_read_by_rows(table: &Weight) -> bool {
    has_kernel(table.format) && table.part("order").is_none()
}

impl GpuBackend {
    pub(crate) fn new(client: Client, device: GpuDevice, tuned: Tuned) -> Self {
        let mut gpu = Gpu::new(client, device.runtime == Runtime::Cuda);
        gpu.tuned = tuned;
        Self { gpu, device, current: Mutex::default(), recordings: Mutex::default() }
    }

    /// The array of `x` to change in place, or a copy when others refer to it.
    fn own(&self, mut x: Tensor) -> Result<Tensor> {
        if Arc::get_mut(&mut x.handle).is_some() {
            return Ok(x);
        }
        let len = x.rows * x.columns;
        let copy = elementwise::copy_of(&self.gpu, open(&x.handle)?, len);
        Ok(tensor(x.rows, x.columns, copy))
    }

    /// `batch` on the device, written there once for all operators of a pass.
    fn step(&self, batch: &Batch) -> Arc<Step> {
        let mut current = lock(&self.current);
        if let Some((known, step)) = &*current
            && known == batch
        {
            return step.clone();
        }
        let step = Arc::new(Step::new(&self.gpu, batch));
        *current = Some((batch.clone(), step.clone()));
        step
    }

    /// Runs `pass` and records it for the next time.
    fn record(
        &self,
        batch: &Batch,
        pass: &mut dyn FnMut() -> Result<Tensor>,
    ) -> Result<(Tensor, Recording)> {
        let client = &self.gpu.client;
        *lock(&self.current) = None;
        let step = self.step(batch);
        if client.graph_prepare().is_err() {
            return Ok((pass()?, Recording::Refused));
        }
        // The first run compiles kernels and gathers what lives longer than a pass. The third is recorded and not run; its
        // memory must be there, beside the result of the second, which is handed out: the first result takes that place.
        let found = pass().and_then(|place| {
            let found = pass();
            drop(place);
            found
        });
        // Ends the preparation, also after a failed run.
        let started = client.start_capture().is_ok();
        let before = self.gpu.copied();
        let recorded = if started && found.is_ok() { pass().ok() } else { None };
        // What the host wrote within the pass would be written again and again.
        let recorded = recorded.filter(|_| self.gpu.copied() == before);
        let graph = client.stop_capture();
        let recording = match (recorded, graph) {
            (Some(out), Ok(graph)) if started => Recording::Made { graph, step, out },
            _ => Recording::Refused,
        };
        Ok((found?, recording))
    }
}

impl Backend for GpuBackend {
    fn name(&self) -> String {
        format!("{} ({})", self.device.runtime.name(), self.device.name)
    }

    fn memory(&self) -> Option<DeviceMemory> {
        Some(DeviceMemory { free_bytes: free_bytes(&self.device), ..self.gpu.memory() })
    }

    fn kernel(&self, format: &str, _: LinearOptions) -> String {
        kernel_name(format, self.device.runtime.name())
    }

    fn placed(&self, weight: &Weight, role: Role) -> Placed {
        let bytes = match role {
            Role::Linear(_) => weights::bytes(weight),
            Role::Embedding if is_read_by_rows(weight) => weights::bytes(weight),
            Role::Embedding => return Placed { bytes: 0, keeps_parts: true },
            Role::Heads => weights::head_bytes(weight),
        };
        Placed { bytes, keeps_parts: false }
    }

    fn load_linear(
        &self,
        weight: &Weight,
        bias: Option<&HostTensor>,
        _: LinearOptions,
    ) -> Result<Linear> {
        let bias = bias.map(HostTensor::to_f32).transpose()?;
        if let Some(bias) = &bias
            && bias.len() != weight.out_features
        {
            return Err(BackendError::Decode {
                what: "bias".to_owned(),
                reason: format!("{} values for {} outputs", bias.len(), weight.out_features),
            });
        }
        let (matrix, bytes, reservation) = place(&self.gpu, weight)?;
        let (out_features, in_features) = (weight.out_features, weight.in_features);
        let bytes = bytes + bias.as_ref().map_or(0, |b| 4 * b.len() as u64);
        let bias = bias.map(|b| self.gpu.floats(&b));
        let loaded = Loaded { matrix, bias, in_features };
        Ok(Linear {
            out_features,
            in_features,
            bytes,
            kernel: self.kernel(weight.format, LinearOptions::default()),
            handle: Arc::new(GpuLinear::new(loaded, reservation)),
        })
    }

    fn load_head_linear(
        &self,
        heads: usize,
        out_features: usize,
        in_features: usize,
        values: Vec<f32>,
    ) -> Result<HeadLinear> {
        assert_eq!(values.len(), heads * out_features * in_features, "values fill the matrices");
        let weight = weights::narrowest(heads * out_features, in_features, &values);
        let (matrix, _, reservation) = place(&self.gpu, &weight)?;
        let matrix = match matrix {
            Matrix::Rows(rows) => Matrix::Rows(matrix::RowMatrix { out_features, ..rows }),
            trellis => trellis,
        };
        let loaded = Loaded { matrix, bias: None, in_features };
        Ok(HeadLinear { heads, out_features, in_features, handle: Arc::new((loaded, reservation)) })
    }

    fn load_embedding(&self, weight: &Weight) -> Result<Embedding> {
        let (table, bytes) = match is_read_by_rows(weight) {
            true => {
                let (matrix, bytes, reservation) = place(&self.gpu, weight)?;
                let table = match matrix {
                    Matrix::Rows(rows) => Table::Rows(Box::new(rows)),
                    Matrix::Trellis(trellis) => Table::Trellis(Box::new(trellis)),
                };
                (Arc::new((table, Some(reservation))), bytes)
            }
            false => (Arc::new((Table::Host(Arc::new(weight.clone())), None)), weight.bytes()),
        };
        Ok(Embedding {
            vocab_size: weight.out_features,
            hidden_size: weight.in_features,
            bytes,
            handle: table,
        })
    }

    fn load_vector(&self, values: Vec<f32>) -> Result<Vector> {
        Ok(Vector { len: values.len(), handle: Arc::new(self.gpu.floats(&values)) })
    }

    fn load_rope(&self, rope: &Rope) -> Result<RopeTable> {
        Ok(RopeTable { handle: Arc::new(Arc::new(rope.clone())) })
    }

    fn create_cache(&self, spec: &CacheSpec) -> Result<Cache> {
        Ok(Cache { spec: spec.clone(), handle: Arc::new(PagedCache::new(&self.gpu, spec)?) })
    }

    fn copy_blocks(&self, cache: &Cache, pairs: &[(u32, u32)]) -> Result<()> {
        open::<PagedCache>(&cache.handle)?.copy_blocks(&self.gpu, pairs);
        Ok(())
    }

    fn upload(&self, rows: usize, columns: usize, values: Vec<f32>) -> Result<Tensor> {
        assert_eq!(values.len(), rows * columns, "values fill [rows, columns]");
        Ok(tensor(rows, columns, self.gpu.floats(&values)))
    }

    fn download(&self, x: &Tensor) -> Result<Vec<f32>> {
        let bytes = self.gpu.read(open(&x.handle)?, x.rows * x.columns)?;
        Ok(bytes.as_chunks().0.iter().map(|&c| f32::from_le_bytes(c)).collect())
    }

    fn draw(&self, logits: &Tensor, draws: &[Draw]) -> Result<Option<Vec<Option<Drawn>>>> {
        assert!(draws.iter().all(|d| d.row < logits.rows), "draws are of rows that there are");
        let values = open(&logits.handle)?;
        draw::draw(&self.gpu, values, logits.columns, draws).map(Some)
    }

    fn download_routing(&self, routing: &Routing) -> Result<(Vec<u32>, Vec<f32>)> {
        let [chosen, _]: &[Chosen; 2] = open(&routing.handle)?;
        let len = routing.rows * routing.top_k;
        let ids = self.gpu.read(&chosen.ids, len)?;
        let weights = self.gpu.read(&chosen.weights, len)?;
        Ok((
            ids.as_chunks().0.iter().map(|&c| u32::from_le_bytes(c)).collect(),
            weights.as_chunks().0.iter().map(|&c| f32::from_le_bytes(c)).collect(),
        ))
    }

    fn run_pass(
        &self,
        owner: u64,
        batch: &Batch,
        cache: &Cache,
        pass: &mut dyn FnMut() -> Result<Tensor>,
    ) -> Result<Tensor> {
        let Some(key) = Key::of(owner, batch, cache) else { return pass() };
        let mut recordings = lock(&self.recordings);
        match recordings.find(&key) {
            Some(Recording::Made { graph, step, out }) => {
                step.rewrite(&self.gpu, batch)?;
                // SAFETY: the model and its cache live as long as this call, and what the launches write in between is
                // guarded by the runtime. All work goes to one stream.
                unsafe { graph.replay() }.map_err(device_error)?;
                // The next launch writes there again.
                let len = out.rows * out.columns;
                let copy = elementwise::copy_of(&self.gpu, open(&out.handle)?, len);
                Ok(tensor(out.rows, out.columns, copy))
            }
            Some(Recording::Refused) => pass(),
            None => {
                let (found, recording) = self.record(batch, pass)?;
                // Its step belongs to the recording from here on.
                *lock(&self.current) = None;
                recordings.keep(key, recording);
                Ok(found)
            }
        }
    }

    fn embed(&self, table: &Embedding, batch: &Batch, scale: f32) -> Result<Tensor> {
        let (rows, columns) = (batch.rows(), table.hidden_size);
        let (stored, _): &(Table, Option<crate::gpu::Reservation>) = open(&table.handle)?;
        let step = self.step(batch);
        let out = match stored {
            Table::Rows(matrix) => {
                matrix::embed(&self.gpu, matrix, &step.meta, rows, columns, scale)
            }
            Table::Trellis(trellis) => exl3::embed(&self.gpu, trellis, &step.meta, rows, scale),
            Table::Host(weight) => {
                let made =
                    step.made(&self.gpu, &Source::Embedding(weight.clone(), scale), batch)?;
                elementwise::copy_of(&self.gpu, &made, rows * columns)
            }
        };
        Ok(tensor(rows, columns, out))
    }

    fn rms_norm(&self, x: &Tensor, weight: &Vector, eps: f32) -> Result<Tensor> {
        let (values, scales) = (open(&x.handle)?, open(&weight.handle)?);
        let groups = x.rows * x.columns / weight.len;
        let out = norm::rms_norm(&self.gpu, values, scales, eps, groups, weight.len);
        Ok(tensor(x.rows, x.columns, out))
    }

    fn add_norm(
        &self,
        x: Tensor,
        y: &Tensor,
        weight: &Vector,
        eps: f32,
    ) -> Result<(Tensor, Tensor)> {
        let x = self.own(x)?;
        let (values, added, scales) = (open(&x.handle)?, open(&y.handle)?, open(&weight.handle)?);
        let groups = x.rows * x.columns / weight.len;
        let out = norm::add_norm(&self.gpu, values, added, scales, eps, groups, weight.len);
        let normed = tensor(x.rows, x.columns, out);
        Ok((x, normed))
    }

    fn linear(&self, x: &Tensor, weight: &Linear) -> Result<Tensor> {
        assert_eq!(x.columns, weight.in_features, "input columns of the matrix");
        let (values, linear): (&Buffer, &GpuLinear) = (open(&x.handle)?, open(&weight.handle)?);
        Ok(tensor(x.rows, weight.out_features, linear.multiply(&self.gpu, values, x.rows)))
    }

    fn linear_many(&self, x: &Tensor, weights: &[&Linear]) -> Result<Vec<Tensor>> {
        let linears = weights.iter().map(|w| open::<GpuLinear>(&w.handle));
        let linears = linears.collect::<Result<Vec<_>>>()?;
        match GpuLinear::multiply_many(&linears, &self.gpu, open(&x.handle)?, x.rows) {
            Some(outs) => {
                let outs = weights.iter().zip(outs);
                Ok(outs.map(|(w, out)| tensor(x.rows, w.out_features, out)).collect())
            }
            None => weights.iter().map(|w| self.linear(x, w)).collect(),
        }
    }

    fn head_linear(&self, x: &Tensor, weight: &HeadLinear) -> Result<Tensor> {
        assert_eq!(x.columns, weight.heads * weight.in_features, "input columns of the heads");
        let values: &Buffer = open(&x.handle)?;
        let (loaded, _): &(Loaded, crate::gpu::Reservation) = open(&weight.handle)?;
        let rows = Rows::Heads { rows: x.rows, heads: weight.heads };
        let out = loaded.multiply(&self.gpu, values, x.rows * weight.heads, &rows);
        Ok(tensor(x.rows, weight.heads * weight.out_features, out))
    }

    fn head_linear_beside(
        &self,
        x: &Tensor,
        weight: &HeadLinear,
        beside: &Tensor,
    ) -> Result<Tensor> {
        let (heads, more) = (weight.heads, beside.columns / weight.heads);
        let (values, others): (&Buffer, &Buffer) = (open(&x.handle)?, open(&beside.handle)?);
        let (loaded, _): &(Loaded, crate::gpu::Reservation) = open(&weight.handle)?;
        let rows = Rows::Heads { rows: x.rows, heads };
        match loaded.multiply_beside(&self.gpu, values, &rows, others, more) {
            Some(out) => Ok(tensor(x.rows, heads * (weight.out_features + more), out)),
            None => self.concat_heads(&self.head_linear(x, weight)?, beside, heads),
        }
    }

    fn rope(&self, x: Tensor, table: &RopeTable, heads: Heads, batch: &Batch) -> Result<Tensor> {
        assert_eq!(x.columns, heads.heads * heads.head_dim, "columns of the heads");
        let rope: &Arc<Rope> = open(&table.handle)?;
        let angles = self.step(batch).made(&self.gpu, &Source::Rope(rope.clone()), batch)?;
        let x = self.own(x)?;
        let (pairs, style) = (rope.inv_freq.len(), rope.style);
        rope::rope(&self.gpu, open(&x.handle)?, &angles, x.rows, heads, pairs, style);
        Ok(x)
    }

    fn slice_heads(&self, x: &Tensor, heads: Heads, start: usize, len: usize) -> Result<Tensor> {
        let out = columns::slice_heads(&self.gpu, open(&x.handle)?, x.rows, heads, start, len);
        Ok(tensor(x.rows, heads.heads * len, out))
    }

    fn concat_heads(&self, a: &Tensor, b: &Tensor, heads: usize) -> Result<Tensor> {
        let (m, n) = (a.columns / heads, b.columns / heads);
        let (left, right) = (open(&a.handle)?, open(&b.handle)?);
        let out = columns::concat_heads(&self.gpu, left, m, right, n, a.rows * heads);
        Ok(tensor(a.rows, a.columns + b.columns, out))
    }

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
        let rope: &Arc<Rope> = open(&table.handle)?;
        let angles = self.step(batch).made(&self.gpu, &Source::Rope(rope.clone()), batch)?;
        let with_positions = kv.columns - norm.len;
        let nope = q.columns / heads - with_positions;
        let shape = latent::Shape {
            heads: heads as u32,
            nope: nope as u32,
            rope: with_positions as u32,
            latent: norm.len as u32,
            pairs: rope.inv_freq.len() as u32,
            interleaved: rope.style == RopeStyle::Interleaved,
        };
        let arrays = [open(&q.handle)?, open(&kv.handle)?, open(&norm.handle)?, &angles];
        let [a, b, k] = latent::inputs(&self.gpu, arrays, eps, q.rows, shape);
        let of = |columns, buffer| tensor(q.rows, columns, buffer);
        Ok((of(heads * nope, a), of(heads * with_positions, b), of(kv.columns, k)))
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
        let paged: &PagedCache = open(&cache.handle)?;
        paged.check(layer, params)?;
        let (queries, keys): (&Buffer, &Buffer) = (open(&q.handle)?, open(&k.handle)?);
        let values = v.map(|v| open::<Buffer>(&v.handle)).transpose()?;
        let step = self.step(batch);
        paged.write(&self.gpu, layer, &step.meta, q.rows, keys, values);
        let out = attention::attend(&self.gpu, queries, paged, layer, &step, params);
        Ok(tensor(q.rows, params.num_heads * params.value_head_dim, out))
    }

    fn gated(&self, gate: Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
        let gate = self.own(gate)?;
        let (values, up, len) = (open(&gate.handle)?, open(&up.handle)?, gate.rows * gate.columns);
        elementwise::gated(&self.gpu, values, up, activation, len);
        Ok(gate)
    }

    fn gated_linear(
        &self,
        gate: Tensor,
        up: &Tensor,
        activation: Activation,
        weight: &Linear,
    ) -> Result<Tensor> {
        let linear: &GpuLinear = open(&weight.handle)?;
        let inputs = Inputs { x: open(&gate.handle)?, gate: Some((activation, open(&up.handle)?)) };
        match linear.multiply_gated(&self.gpu, inputs, gate.rows) {
            Some(out) => Ok(tensor(gate.rows, weight.out_features, out)),
            None => self.linear(&self.gated(gate, up, activation)?, weight),
        }
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        let x = self.own(x)?;
        elementwise::add(&self.gpu, open(&x.handle)?, open(&y.handle)?, x.rows * x.columns);
        Ok(x)
    }

    fn softcap(&self, x: Tensor, cap: f32) -> Result<Tensor> {
        let x = self.own(x)?;
        elementwise::softcap(&self.gpu, open(&x.handle)?, cap, x.rows * x.columns);
        Ok(x)
    }

    fn route(&self, logits: &Tensor, bias: Option<&Vector>, router: &Router) -> Result<Routing> {
        if router.num_groups > MOST_GROUPS {
            return Err(BackendError::Unsupported {
                backend: self.device.runtime.name().to_owned(),
                what: format!("a router of {} groups (at most {MOST_GROUPS})", router.num_groups),
            });
        }
        let bias = bias.map(|b| open::<Buffer>(&b.handle)).transpose()?;
        let chosen = moe::route(&self.gpu, open(&logits.handle)?, bias, router, logits.rows);
        let handle = Arc::new(chosen);
        Ok(Routing { rows: logits.rows, top_k: router.top_k, handle })
    }

    fn experts(
        &self,
        x: &Tensor,
        routing: &Routing,
        experts: &Experts,
        activation: Activation,
    ) -> Result<Tensor> {
        let [chosen, _]: &[Chosen; 2] = open(&routing.handle)?;
        let stacks = Stacks::of(&self.gpu, experts, None, |linear| open(&linear.handle))?;
        let (values, k) = (open(&x.handle)?, routing.top_k);
        let out = stacks.sum(&self.gpu, values, x.rows, chosen, k, activation);
        Ok(tensor(x.rows, x.columns, out))
    }

    fn mixture(
        &self,
        x: &Tensor,
        routing: &Routing,
        experts: &Experts,
        shared: &GatedLinears,
        activation: Activation,
    ) -> Result<Tensor> {
        let stacks = Stacks::of(&self.gpu, experts, Some(shared), |linear| open(&linear.handle))?;
        let [chosen, all]: &[Chosen; 2] = open(&routing.handle)?;
        let share = stacks.share(x.rows, routing.top_k);
        let (chosen, k) = if share { (all, routing.top_k + 1) } else { (chosen, routing.top_k) };
        let values = open(&x.handle)?;
        let y = stacks.sum(&self.gpu, values, x.rows, chosen, k, activation);
        let y = tensor(x.rows, x.columns, y);
        if share {
            return Ok(y);
        }
        self.add(y, &self.feed_forward(x, shared, activation)?)
    }

    fn gather_rows(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        if rows.iter().copied().eq(0..x.rows as u32) {
            return Ok(x.clone());
        }
        let out = columns::gather_rows(&self.gpu, open(&x.handle)?, x.columns, rows);
        Ok(tensor(rows.len(), x.columns, out))
    }

    fn algebra(&self) -> Option<&dyn Algebra> {
        Some(self)
    }
}
