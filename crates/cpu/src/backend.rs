//! The [`Backend`] trait on top of the operators: handles to slices and back.

use crate::cache::PagedCache;
use crate::embedding::{self, Rows};
use crate::frequencies::Frequencies;
use crate::kernel::{Decoded, Inputs, LoadedLinear, Prepared, RowKind};
use crate::memory::{Arena, Buffer, catch};
use crate::moe::Moe;
use crate::order::{FEW_ROWS, Order};
use crate::simd::{Attention, Matrix};
use crate::{Level, Pool, reference, simd};
use marlin_tensor::{
    Activation, AttentionParams, Backend, BackendError, Batch, Cache, CacheSpec, Embedding,
    Experts, HeadLinear, Heads, HostTensor, Linear, LinearOptions, Opaque, Placed, Role, Rope,
    RopeTable, Router, Routing, Tensor, Vector, Weight,
};
use std::sync::{Arc, OnceLock};

/// Whether matrix kernels may round their inputs to integers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Activations {
    /// Kernels choose what is fastest; each states its error.
    #[default]
    Auto,
    /// Inputs stay in float.
    Float,
}

/// How a [`CpuBackend`] works.
#[derive(Debug, Clone, Copy)]
pub struct CpuOptions {
    /// Threads, the calling one included.
    pub threads: usize,
    /// Instructions to use.
    pub level: Level,
    /// Treatment of matrix inputs.
    pub activations: Activations,
}

impl Default for CpuOptions {
    /// All cores, the best instructions, integer activations allowed.
    fn default() -> Self {
        Self {
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            level: Level::detect(),
            activations: Activations::Auto,
        }
    }
}

/// The CPU as a device.
pub struct CpuBackend {
    options: CpuOptions,
    pool: Pool,
    arena: Arena,
    order: Order,
}

/// Elements below which an operator is not worth a parallel region.
const SERIAL: usize = 1 << 15;

/// Result of a backend call.
type Result<T> = std::result::Result<T, BackendError>;

/// Ids and weights of a [`Routing`], each `[rows, top_k]`.
pub(crate) struct Chosen {
    pub(crate) ids: Vec<u32>,
    pub(crate) weights: Vec<f32>,
}

/// What `handle` holds.
///
/// # Errors
/// When it was made by another backend.
pub(crate) fn open<T: 'static>(handle: &Opaque) -> Result<&T> {
    handle.downcast_ref().ok_or_else(|| {
        let expected = std::any::type_name::<T>();
        BackendError::Device(format!("handle is not a {expected} of the cpu backend"))
    })
}

/// `buffer` as the rows of `like`, with columns of its own.
fn tensor(like: &Tensor, columns: usize, buffer: Buffer) -> Tensor {
    let Tensor { rows, decode_rows, .. } = *like;
    Tensor { rows, decode_rows, columns, handle: Arc::new(buffer) }
}

/// The kinds of the rows of `x` that there are, and how many rows have each.
pub(crate) fn kinds(rows: usize, decode_rows: usize) -> impl Iterator<Item = (RowKind, usize)> {
    let parts = [(RowKind::Decode, decode_rows), (RowKind::Prompt, rows - decode_rows)];
    parts.into_iter().filter(|&(_, rows)| rows > 0)
}

impl CpuBackend {
    /// Starts the threads.
    ///
    /// # Errors
    /// When this machine lacks the instructions of `options.level`.
    pub fn new(options: CpuOptions) -> Result<Self> {
        if !options.level.is_supported() {
            return Err(BackendError::Unsupported {
                backend: "cpu".to_owned(),
                what: format!("level {} (this machine has {})", options.level, Level::detect()),
            });
        }
        let (pool, arena) = (Pool::new(options.threads), Arena::default());
        Ok(Self { options, pool, arena, order: Order::default() })
    }

    fn float_activations(&self, options: LinearOptions) -> bool {
        options.float_activations || !self.rounds_inputs()
    }

    /// Rows times several matrices in one region.
    fn parts(&self, x: &[f32], rows: usize, linears: &[&LoadedLinear], outs: &mut [&mut [f32]]) {
        let total: usize = linears.iter().map(|l| l.kernel.out_features()).sum();
        let columns = total.div_ceil(4 * self.pool.available_threads());
        let parts = linears.iter().zip(outs).map(|(linear, out)| {
            let unit = linear.kernel.part_columns().unwrap_or(1);
            (&mut out[..], linear.kernel.out_features(), columns.next_multiple_of(unit))
        });
        let mut prepared: Vec<Prepared> = Vec::with_capacity(linears.len());
        for linear in linears {
            prepared.push(linear.kernel.prepare(x, prepared.last(), &self.pool));
        }
        self.pool.run_parts(parts.collect(), rows, |i, _, columns, out| {
            let inputs = Inputs { x, rows, prepared: &prepared[i] };
            linears[i].kernel.part(inputs, columns, out);
        });
    }

    /// The matrices as tiles, when all of them are.
    fn tiles<'a>(
        &self,
        linears: &[&'a LoadedLinear],
    ) -> Option<(simd::amx::Amx, Vec<&'a dyn simd::amx::Panels>)> {
        let all: Option<Vec<_>> = linears.iter().map(|l| l.kernel.panels()).collect();
        let (amx, panels): (Vec<_>, Vec<_>) = all?.into_iter().unzip();
        Some((*amx.first()?, panels))
    }

    /// Rows of one kind times several matrices.
    fn products(
        &self,
        x: &[f32],
        rows: usize,
        kind: RowKind,
        linears: &[&LoadedLinear],
        outs: &mut [&mut [f32]],
    ) {
        // One region for all is shorter than one each.
        let parted = linears.len() > 1 && linears.iter().all(|l| l.kernel.part_columns().is_some());
        match (kind, self.tiles(linears)) {
            (RowKind::Prompt, Some((amx, panels))) => {
                let columns = x.len() / rows;
                let outs = outs.iter_mut().map(|out| &mut out[..]).collect();
                simd::multiply_amx(amx, &panels, x, columns, outs, &self.pool);
            }
            (RowKind::Decode, _) if parted && rows <= FEW_ROWS => {
                self.parts(x, rows, linears, outs)
            }
            // Inputs are then rounded once.
            (RowKind::Prompt, _)
                if parted && linears.iter().all(|l| l.kernel.parts_of_prompts()) =>
            {
                self.parts(x, rows, linears, outs)
            }
            _ => {
                for (linear, out) in linears.iter().zip(outs) {
                    linear.kernel.matmul(x, rows, kind, out, &self.pool);
                }
            }
        }
    }

    /// Elements of a task of an operator over `[rows, columns]`: whole rows, everything when small.
    fn piece(&self, rows: usize, columns: usize) -> usize {
        let serial = rows * columns < SERIAL;
        let rows = if serial { rows } else { rows.div_ceil(4 * self.pool.threads()) };
        (rows * columns).max(1)
    }

    /// Applies `change` to pieces of `x` and of `y`, in place where possible.
    fn combine(
        &self,
        x: Tensor,
        y: &Tensor,
        change: impl Fn(&mut [f32], &[f32]) + Sync,
    ) -> Result<Tensor> {
        let y: &Buffer = open(&y.handle)?;
        let piece = self.piece(x.rows, x.columns);
        self.update(x, |x| {
            assert_eq!(x.len(), y.len(), "operands of one shape");
            self.pool.run_chunks(x, piece, |i, x| change(x, &y[i * piece..][..x.len()]));
        })
    }

    /// Applies `change` to the values of `x`, in place when nothing else refers to them.
    fn update(&self, mut x: Tensor, change: impl FnOnce(&mut [f32])) -> Result<Tensor> {
        if let Some(buffer) = Arc::get_mut(&mut x.handle).and_then(|h| h.downcast_mut::<Buffer>()) {
            change(buffer);
            return Ok(x);
        }
        let mut copy = self.arena.copy_of(open::<Buffer>(&x.handle)?);
        change(&mut copy);
        Ok(tensor(&x, x.columns, copy))
    }

    /// A new tensor of the rows of `like`, filled by `write`.
    fn create(
        &self,
        like: &Tensor,
        columns: usize,
        write: impl FnOnce(&mut [f32]),
    ) -> Result<Tensor> {
        let mut buffer = self.arena.take(like.rows * columns);
        write(&mut buffer);
        Ok(tensor(like, columns, buffer))
    }
}

impl Backend for CpuBackend {
    fn name(&self) -> String {
        format!("cpu ({}, {} threads)", self.options.level, self.pool.threads())
    }

    fn rounds_inputs(&self) -> bool {
        self.options.activations == Activations::Auto
    }

    fn kernel(&self, format: &str, options: LinearOptions) -> String {
        simd::kernel_name(format, self.options.level, self.float_activations(options))
            .unwrap_or_else(|| Decoded::name_of(format))
    }

    fn placed(&self, weight: &Weight, role: Role) -> Placed {
        let made = match role {
            Role::Linear(_) => simd::bytes(weight, self.options.level),
            Role::Embedding => None,
            Role::Heads => Some(size_of::<f32>() * weight.out_features * weight.in_features),
        };
        Placed { bytes: made.unwrap_or(0) as u64, keeps_parts: made.is_none() }
    }

    fn load_linear(
        &self,
        weight: &Weight,
        bias: Option<&HostTensor>,
        options: LinearOptions,
    ) -> Result<Linear> {
        let float = self.float_activations(options);
        let kernel = catch(|| {
            Ok(match simd::load(weight, self.options.level, float) {
                Some(kernel) => kernel,
                None => Box::new(Decoded::new(weight, self.options.level)?),
            })
        })?;
        let bias = bias.map(HostTensor::to_f32).transpose()?;
        if let Some(bias) = &bias
            && bias.len() != weight.out_features
        {
            return Err(BackendError::Decode {
                what: "bias".to_owned(),
                reason: format!("{} values for {} outputs", bias.len(), weight.out_features),
            });
        }
        Ok(Linear {
            out_features: weight.out_features,
            in_features: weight.in_features,
            bytes: kernel.bytes() + bias.as_ref().map_or(0, |b| 4 * b.len() as u64),
            kernel: kernel.name(),
            handle: Arc::new(LoadedLinear { kernel, bias, next: Arc::default() }),
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
        Ok(HeadLinear { heads, out_features, in_features, handle: Arc::new(values) })
    }

    fn load_embedding(&self, weight: &Weight) -> Result<Embedding> {
        Ok(Embedding {
            vocab_size: weight.out_features,
            hidden_size: weight.in_features,
            bytes: weight.bytes(),
            handle: Arc::new(embedding::load(weight, self.options.level)),
        })
    }

    fn load_vector(&self, values: Vec<f32>) -> Result<Vector> {
        Ok(Vector { len: values.len(), handle: Arc::new(values) })
    }

    fn load_rope(&self, rope: &Rope) -> Result<RopeTable> {
        Ok(RopeTable { handle: Arc::new(Frequencies::new(rope)) })
    }

    fn create_cache(&self, spec: &CacheSpec) -> Result<Cache> {
        Ok(Cache { spec: spec.clone(), handle: Arc::new(PagedCache::new(spec)?) })
    }

    fn copy_blocks(&self, cache: &Cache, pairs: &[(u32, u32)]) -> Result<()> {
        open::<PagedCache>(&cache.handle)?.copy_blocks(pairs);
        Ok(())
    }

    fn upload(&self, rows: usize, columns: usize, values: Vec<f32>) -> Result<Tensor> {
        assert_eq!(values.len(), rows * columns, "values fill [rows, columns]");
        let handle = Arc::new(self.arena.copy_of(&values));
        Ok(Tensor { rows, decode_rows: 0, columns, handle })
    }

    fn download(&self, x: &Tensor) -> Result<Vec<f32>> {
        Ok(open::<Buffer>(&x.handle)?.to_vec())
    }

    fn download_routing(&self, routing: &Routing) -> Result<(Vec<u32>, Vec<f32>)> {
        let chosen: &Chosen = open(&routing.handle)?;
        Ok((chosen.ids.clone(), chosen.weights.clone()))
    }

    fn run_pass(
        &self,
        _: u64,
        _: &Batch,
        _: &Cache,
        pass: &mut dyn FnMut() -> Result<Tensor>,
    ) -> Result<Tensor> {
        catch(pass)
    }

    fn embed(&self, table: &Embedding, batch: &Batch, scale: f32) -> Result<Tensor> {
        let (rows, columns) = (open::<Box<dyn Rows>>(&table.handle)?, table.hidden_size);
        let mut out = self.arena.take(batch.rows() * columns);
        let failure = OnceLock::new();
        let piece = self.piece(batch.rows(), columns);
        self.pool.run_chunks(&mut out, piece, |i, piece_out| {
            let tokens = &batch.tokens[i * piece / columns..];
            for (&token, out) in tokens.iter().zip(piece_out.chunks_exact_mut(columns)) {
                if let Err(error) = rows.row(token as usize, out) {
                    let _ = failure.set(error);
                }
                if scale != 1.0 {
                    out.iter_mut().for_each(|v| *v *= scale);
                }
            }
        });
        match failure.into_inner() {
            Some(error) => Err(error),
            None => {
                let (rows, decode_rows) = (batch.rows(), batch.decode_rows());
                Ok(Tensor { rows, decode_rows, columns, handle: Arc::new(out) })
            }
        }
    }

    fn rms_norm(&self, x: &Tensor, weight: &Vector, eps: f32) -> Result<Tensor> {
        let (values, weight): (&Buffer, &Vec<f32>) = (open(&x.handle)?, open(&weight.handle)?);
        let piece = self.piece(x.rows, x.columns);
        self.create(x, x.columns, |out| {
            self.pool.run_chunks(out, piece, |i, out| {
                let x = &values[i * piece..][..out.len()];
                simd::rms_norm(self.options.level, x, weight, eps, out);
            });
        })
    }

    fn linear(&self, x: &Tensor, weight: &Linear) -> Result<Tensor> {
        Ok(self.linear_many(x, &[weight])?.remove(0))
    }

    fn linear_many(&self, x: &Tensor, weights: &[&Linear]) -> Result<Vec<Tensor>> {
        let values: &Buffer = open(&x.handle)?;
        let linears = weights.iter().map(|w| open::<LoadedLinear>(&w.handle));
        let linears: Vec<&LoadedLinear> = linears.collect::<Result<_>>()?;
        for weight in weights {
            assert_eq!(x.columns, weight.in_features, "input columns of the matrix");
        }
        self.order.expect(&self.pool, x.rows, &linears);
        let mut outs: Vec<Buffer> =
            weights.iter().map(|w| self.arena.take(x.rows * w.out_features)).collect();
        let mut first = 0;
        for (kind, rows) in kinds(x.rows, x.decode_rows) {
            let inputs = &values[first * x.columns..][..rows * x.columns];
            let mut parts: Vec<&mut [f32]> = outs
                .iter_mut()
                .zip(weights)
                .map(|(out, w)| &mut out[first * w.out_features..][..rows * w.out_features])
                .collect();
            self.products(inputs, rows, kind, &linears, &mut parts);
            first += rows;
        }
        for (linear, out) in linears.iter().zip(&mut outs) {
            linear.finish(out)?;
        }
        let tensors = outs.into_iter().zip(weights);
        Ok(tensors.map(|(out, w)| tensor(x, w.out_features, out)).collect())
    }

    fn head_linear(&self, x: &Tensor, weight: &HeadLinear) -> Result<Tensor> {
        let (values, matrices): (&Buffer, &Vec<f32>) = (open(&x.handle)?, open(&weight.handle)?);
        let HeadLinear { heads, out_features, in_features, .. } = *weight;
        assert_eq!(x.columns, heads * in_features, "input columns of the heads");
        let (rows, columns) = (x.rows, heads * out_features);
        let product = |head: usize, rows: std::ops::Range<usize>, out: &mut [f32], stride| {
            let inputs = &values[rows.start * x.columns + head * in_features..];
            let inputs = Matrix::new(inputs, rows.len(), in_features, x.columns);
            let matrix = &matrices[head * out_features * in_features..];
            let matrix = Matrix::new(matrix, out_features, in_features, in_features);
            simd::products(self.options.level, inputs, matrix, out, stride);
        };
        self.create(x, columns, |out| {
            if rows * matrices.len() < SERIAL || rows >= 4 * self.pool.threads() {
                let piece = self.piece(rows, columns);
                self.pool.run_chunks(out, piece, |i, out| {
                    let first = i * piece / columns;
                    for head in 0..heads {
                        let rows = first..first + out.len() / columns;
                        product(head, rows, &mut out[head * out_features..], columns);
                    }
                });
            } else {
                self.pool.run_columns(out, columns, out_features, |range, band| {
                    let mut block = self.arena.take(rows * out_features);
                    product(range.start / out_features, 0..rows, &mut block, out_features);
                    for (row, block) in block.chunks_exact(out_features).enumerate() {
                        band.row(row).copy_from_slice(block);
                    }
                });
            }
        })
    }

    fn rope(&self, x: Tensor, table: &RopeTable, heads: Heads, batch: &Batch) -> Result<Tensor> {
        let frequencies: &Frequencies = open(&table.handle)?;
        let columns = heads.heads * heads.head_dim;
        assert_eq!(x.columns, columns, "columns of the heads");
        let style = frequencies.rope.style;
        self.update(x, |x| {
            for sequence in &batch.sequences {
                let angles = frequencies.angles(sequence.max_context, sequence.context_len);
                let rows = sequence.first_row..sequence.first_row + sequence.rows;
                let positions = &batch.positions[rows.clone()];
                let x = &mut x[rows.start * columns..rows.end * columns];
                let piece = self.piece(rows.len(), columns);
                self.pool.run_chunks(x, piece, |i, x| {
                    let positions = &positions[i * piece / columns..];
                    let table = |row: usize| angles.at(positions[row] as usize);
                    simd::rope(self.options.level, x, heads, style, table);
                });
            }
        })
    }

    fn slice_heads(&self, x: &Tensor, heads: Heads, start: usize, len: usize) -> Result<Tensor> {
        let values: &Buffer = open(&x.handle)?;
        let columns = heads.heads * len;
        let rows = self.piece(x.rows, columns) / columns.max(1);
        self.create(x, columns, |out| {
            self.pool.run_chunks(out, rows * columns, |i, out| {
                let x = &values[i * rows * x.columns..];
                reference::slice_heads(x, heads, start, len, out);
            });
        })
    }

    fn concat_heads(&self, a: &Tensor, b: &Tensor, heads: usize) -> Result<Tensor> {
        let (left, right): (&Buffer, &Buffer) = (open(&a.handle)?, open(&b.handle)?);
        let (m, n) = (a.columns / heads, b.columns / heads);
        let columns = a.columns + b.columns;
        let rows = self.piece(a.rows, columns) / columns.max(1);
        self.create(a, columns, |out| {
            self.pool.run_chunks(out, rows * columns, |i, out| {
                let (left, right) = (&left[i * rows * a.columns..], &right[i * rows * b.columns..]);
                reference::concat_heads(left, m, right, n, out);
            });
        })
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
        let (queries, keys): (&Buffer, &Buffer) = (open(&q.handle)?, open(&k.handle)?);
        let values = v.map(|v| open::<Buffer>(&v.handle)).transpose()?;
        {
            let mut layer = paged.layers[layer].write().unwrap_or_else(|e| e.into_inner());
            let values = values.map(|v| &v[..]);
            layer.write(self.options.level, &batch.slot_mapping, keys, values);
        }
        let layer = paged.layers[layer].read().unwrap_or_else(|e| e.into_inner());
        layer.check(params)?;
        self.create(q, params.num_heads * params.value_head_dim, |out| {
            let level = self.options.level;
            if level == Level::Scalar {
                return reference::attention(queries, &layer, &batch.sequences, params, out);
            }
            let rounding = self.rounds_inputs();
            let (layer, arena) = (&*layer, &self.arena);
            let attention = Attention { level, rounding, params, layer, queries, arena };
            attention.run(&batch.sequences, out, &self.pool);
        })
    }

    fn gated(&self, gate: Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
        let level = self.options.level;
        self.combine(gate, up, |gate, up| simd::gated(level, gate, up, activation))
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        self.combine(x, y, |x, y| simd::add(self.options.level, x, y))
    }

    fn softcap(&self, x: Tensor, cap: f32) -> Result<Tensor> {
        let piece = self.piece(x.rows, x.columns);
        self.update(x, |x| {
            self.pool.run_chunks(x, piece, |_, x| simd::softcap(self.options.level, x, cap));
        })
    }

    fn route(&self, logits: &Tensor, bias: Option<&Vector>, router: &Router) -> Result<Routing> {
        let values: &Buffer = open(&logits.handle)?;
        let bias = bias.map(|b| open::<Vec<f32>>(&b.handle)).transpose()?.map(Vec::as_slice);
        let len = logits.rows * router.top_k;
        let mut chosen = Chosen { ids: vec![0; len], weights: vec![0.0; len] };
        reference::route(values, bias, router, &mut chosen.ids, &mut chosen.weights);
        Ok(Routing { rows: logits.rows, top_k: router.top_k, handle: Arc::new(chosen) })
    }

    fn experts(
        &self,
        x: &Tensor,
        routing: &Routing,
        experts: &Experts,
        activation: Activation,
    ) -> Result<Tensor> {
        let (values, chosen): (&Buffer, &Chosen) = (open(&x.handle)?, open(&routing.handle)?);
        let (level, arena, pool) = (self.options.level, &self.arena, &self.pool);
        let decode_rows = x.decode_rows;
        let moe = Moe { experts, activation, level, decode_rows, arena, pool };
        let out = moe.run(values, chosen)?;
        Ok(tensor(x, out.len() / x.rows.max(1), out))
    }

    fn gather_rows(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        let values: &Buffer = open(&x.handle)?;
        let decode_rows = rows.iter().take_while(|&&row| (row as usize) < x.decode_rows).count();
        let like = Tensor { rows: rows.len(), decode_rows, ..x.clone() };
        self.create(&like, x.columns, |out| {
            for (&row, out) in rows.iter().zip(out.chunks_exact_mut(x.columns)) {
                out.copy_from_slice(&values[row as usize * x.columns..][..x.columns]);
            }
        })
    }
}
