//! What `marlin bench ops` measures.

use super::weights::{self, Random};
use super::{draws, host};
use crate::console;
use crate::glob::glob;
use anyhow::Result;
use marlin_quant::{WeightFormat, formats};
use marlin_tensor::{
    Activation, AttentionParams, Backend, BackendError, Batch, CacheLayerSpec, CacheSpec,
    CacheType, Experts, Heads, Linear, LinearOptions, Rope, RopeStyle, Router, Scoring, Tensor,
    Weight,
};

const BLOCK_SIZE: usize = 16;
/// Format of the experts.
const EXPERT_FORMAT: &str = "q4_0";

/// Which peak bounds the arithmetic of an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arithmetic {
    /// Floats in vectors.
    F32,
    /// 8-bit integers in vectors.
    Int8,
    /// bf16 in vectors.
    Bf16,
    /// bf16 in tiles.
    AmxBf16,
    /// Floats as three bf16 in tiles, six products for one.
    AmxSplit,
}

impl Arithmetic {
    /// What a kernel of this name computes `rows` rows with.
    fn of(kernel: &str, rows: usize) -> Self {
        if kernel.contains("amx bf16") && rows > DECODE_ROWS {
            Self::AmxBf16
        } else if kernel.contains("amx split") && rows > DECODE_ROWS {
            Self::AmxSplit
        } else if kernel.contains(", bf16 for prompts") && rows > DECODE_ROWS {
            Self::Bf16
        } else if kernel.contains(" int8") {
            Self::Int8
        } else {
            Self::F32
        }
    }
}

/// Up to so many rows are measured as tokens of answers, more as those of a prompt.
const DECODE_ROWS: usize = 16;

/// One operator on one shape.
pub struct Case<'a> {
    pub name: String,
    pub shape: String,
    pub kernel: Option<String>,
    /// Whether runs take turns at more weights than caches hold.
    pub cold: bool,
    /// Bytes that must be read and written.
    pub bytes: u64,
    /// Bytes that runs take turns at: as many as of one run, but for cold weights.
    pub working_set: u64,
    /// Operations, a multiply-add being two.
    pub flops: u64,
    pub arithmetic: Arithmetic,
    /// What it reads its positions from, if it does.
    pub batch: Option<Batch>,
    /// Whether it has returned only when it is done, whatever the device.
    pub waits: bool,
    /// Runs it; told how often it was run before.
    pub run: Box<dyn FnMut(usize) -> Result<()> + 'a>,
}

impl<'a> Case<'a> {
    pub fn new(
        name: impl Into<String>,
        shape: String,
        bytes: usize,
        flops: usize,
        run: impl FnMut(usize) -> Result<()> + 'a,
    ) -> Self {
        Self {
            name: name.into(),
            shape,
            kernel: None,
            cold: false,
            bytes: bytes as u64,
            working_set: bytes as u64,
            flops: flops as u64,
            arithmetic: Arithmetic::F32,
            batch: None,
            waits: false,
            run: Box::new(run),
        }
    }
}

/// Sizes of what is measured.
struct Sizes {
    rows: &'static [usize],
    /// Inputs and outputs of matrices that stay in a cache, and of those that do not.
    hot: usize,
    cold: usize,
    /// Bytes of weights that do not.
    cold_bytes: u64,
    vocab: &'static [usize],
    contexts: &'static [usize],
    prompt: usize,
    experts: usize,
}

const FULL: Sizes = Sizes {
    rows: &[1, 8, 512],
    hot: 2048,
    cold: 4096,
    cold_bytes: 320 << 20,
    vocab: &[49_152, 151_936],
    contexts: &[512, 4096],
    prompt: 512,
    experts: 32,
};
const QUICK: Sizes = Sizes {
    rows: &[1, 8],
    hot: 256,
    cold: 256,
    cold_bytes: 1 << 17,
    vocab: &[1000],
    contexts: &[64],
    prompt: 32,
    experts: 8,
};

/// Formats that embeddings are kept in: those whose rows decode by themselves.
fn tables() -> impl Iterator<Item = &'static dyn WeightFormat> {
    formats().iter().copied().filter(|format| format.row_granularity() == 1)
}

/// What is done with a case.
pub type Visit<'v> = dyn FnMut(Case<'_>) -> Result<()> + 'v;

/// Every operator whose name fits a pattern, on one backend.
pub struct Table<'a> {
    backend: &'a dyn Backend,
    pattern: &'a str,
    sizes: Sizes,
    /// Whether it is the processor, whose cases are also those of the host.
    is_processor: bool,
}

/// Attention by kind of heads and cache.
const ATTENTION: [(&str, CacheType, bool); 4] = [
    ("attention gqa", CacheType::F16, false),
    ("attention gqa q8", CacheType::Q8, false),
    ("attention gqa q4", CacheType::Q4, false),
    ("attention mla", CacheType::F16, true),
];

const OTHERS: [&str; 9] = [
    "head_linear",
    "route",
    "experts",
    "rms_norm",
    "rope",
    "gated",
    "add",
    "slice_heads",
    "concat_heads",
];

impl<'a> Table<'a> {
    /// Names that fit `pattern`.
    pub fn new(
        backend: &'a dyn Backend,
        pattern: &'a str,
        quick: bool,
        is_processor: bool,
    ) -> Self {
        Self { backend, pattern, sizes: if quick { QUICK } else { FULL }, is_processor }
    }

    /// Every name there is.
    pub fn names(&self) -> Vec<String> {
        let linears = formats().iter().map(|format| format!("linear {}", format.id()));
        let embeds = tables().map(|format| format!("embed {}", format.id()));
        let attention = ATTENTION.iter().map(|(name, ..)| *name);
        let others = attention.chain(OTHERS).chain(draws::names()).map(str::to_owned);
        let host = if self.is_processor { host::names() } else { Vec::new() };
        linears.chain(embeds).chain(others).chain(host).collect()
    }

    /// Whether any name fits.
    pub fn any(&self) -> bool {
        self.names().iter().any(|name| self.wants(name))
    }

    fn wants(&self, name: &str) -> bool {
        glob(self.pattern, name)
    }

    /// Calls `visit` with every case in turn; only its operands are in memory meanwhile.
    pub fn each(&self, visit: &mut Visit<'_>) -> Result<()> {
        let mut random = Random::new();
        for format in formats() {
            told(self.linears(*format, &mut random, visit))?;
        }
        for format in tables() {
            told(self.embeddings(format, &mut random, visit))?;
        }
        for (name, cache_type, latent) in ATTENTION {
            told(self.attention(name, cache_type, latent, &mut random, visit))?;
        }
        told(self.mixture(&mut random, visit))?;
        told(self.elementwise(&mut random, visit))?;
        let wants = |name: &str| self.wants(name);
        told(draws::each(self.backend, &wants, self.sizes.vocab, &mut random, visit))?;
        if self.is_processor {
            host::each(&wants, self.sizes.vocab, &mut random, visit)?;
        }
        Ok(())
    }

    fn upload(&self, rows: usize, columns: usize, random: &mut Random) -> Result<Tensor> {
        let x = self.backend.upload(rows, columns, random.floats(rows * columns))?;
        Ok(Tensor { decode_rows: if rows <= DECODE_ROWS { rows } else { 0 }, ..x })
    }

    fn load(&self, weight: &Weight) -> Result<Linear> {
        Ok(self.backend.load_linear(weight, None, LinearOptions::default())?)
    }

    fn linears(
        &self,
        format: &dyn WeightFormat,
        random: &mut Random,
        visit: &mut Visit<'_>,
    ) -> Result<()> {
        let name = format!("linear {}", format.id());
        if !self.wants(&name) {
            return Ok(());
        }
        let Sizes { hot, cold, cold_bytes, rows, .. } = self.sizes;
        for (size, is_cold) in [(hot, false), (cold, true)] {
            let Some(weight) = weights::random(format, size, size, random) else {
                console::detail(&format!("{name}: no matrix without a model"));
                return Ok(());
            };
            let mut linears = vec![self.load(&weights::copy(&weight)?)?];
            let bytes = linears[0].bytes;
            let wanted = if is_cold { cold_bytes.div_ceil(bytes.max(1)) } else { 1 };
            for _ in 1..wanted {
                linears.push(self.load(&weights::copy(&weight)?)?);
            }
            // Many rows find their weights in a cache anyway, once they are there.
            for &rows in rows.iter().filter(|&&rows| !is_cold || rows <= 8) {
                let x = self.upload(rows, size, random)?;
                let shape = format!("[{rows},{size}]x[{size}]");
                let moved = bytes as usize + 4 * rows * 2 * size;
                let case = Case::new(&*name, shape, moved, 2 * rows * size * size, |turn| {
                    self.backend.linear(&x, &linears[turn % linears.len()])?;
                    Ok(())
                });
                let kernel = linears[0].kernel.clone();
                let arithmetic = Arithmetic::of(&kernel, rows);
                let working_set = moved as u64 + bytes * (linears.len() as u64 - 1);
                let kernel = Some(kernel);
                visit(Case { kernel, cold: is_cold, arithmetic, working_set, ..case })?;
            }
        }
        Ok(())
    }

    fn embeddings(
        &self,
        format: &dyn WeightFormat,
        random: &mut Random,
        visit: &mut Visit<'_>,
    ) -> Result<()> {
        let name = format!("embed {}", format.id());
        if !self.wants(&name) {
            return Ok(());
        }
        let Sizes { hot, prompt, .. } = self.sizes;
        let Some(weight) = weights::random(format, hot, hot, random) else {
            console::detail(&format!("{name}: no matrix without a model"));
            return Ok(());
        };
        let table = self.backend.load_embedding(&weight)?;
        let mut batch = Batch::new(prompt);
        let tokens: Vec<u32> = (0..prompt).map(|_| (random.next() % hot as u64) as u32).collect();
        batch.push(&tokens, 0, &[0], prompt as u32, 1);
        let bytes = prompt * (weight.bytes() as usize / hot + 4 * hot);
        let case = Case::new(name, format!("[{prompt},{hot}]"), bytes, 0, |_| {
            self.backend.embed(&table, &batch, 1.0)?;
            Ok(())
        });
        visit(Case { batch: Some(batch.clone()), ..case })
    }

    fn attention(
        &self,
        name: &'static str,
        cache_type: CacheType,
        latent: bool,
        random: &mut Random,
        visit: &mut Visit<'_>,
    ) -> Result<()> {
        if !self.wants(name) {
            return Ok(());
        }
        let params = |num_heads, num_kv_heads, key_head_dim, value_head_dim| AttentionParams {
            num_heads,
            num_kv_heads,
            key_head_dim,
            value_head_dim,
            scale: (key_head_dim as f32).powf(-0.5),
            window: None,
            softcap: None,
        };
        // Latent attention reads its values from the keys.
        let params = if latent { params(16, 1, 576, 512) } else { params(32, 8, 64, 64) };
        let kind = AttentionKind { name, params, cache_type, latent };
        let decode = self.sizes.contexts.iter().map(|&context| (context, 1));
        for (context, rows) in decode.chain([(self.sizes.prompt, self.sizes.prompt)]) {
            self.attend(&kind, context, rows, random, visit)?;
        }
        Ok(())
    }

    /// The last `rows` tokens of a sequence of `context`.
    fn attend(
        &self,
        kind: &AttentionKind,
        context: usize,
        rows: usize,
        random: &mut Random,
        visit: &mut Visit<'_>,
    ) -> Result<()> {
        let AttentionKind { name, params: p, cache_type, latent } = kind;
        let (latent, cache_type) = (*latent, *cache_type);
        let (keys, values) = (p.num_kv_heads * p.key_head_dim, p.num_kv_heads * p.value_head_dim);
        let layer = CacheLayerSpec {
            num_kv_heads: p.num_kv_heads,
            key_head_dim: p.key_head_dim,
            value_head_dim: if latent { 0 } else { p.value_head_dim },
        };
        let num_blocks = context.div_ceil(BLOCK_SIZE);
        let spec =
            CacheSpec { layers: vec![layer], block_size: BLOCK_SIZE, num_blocks, cache_type };
        let cache = self.backend.create_cache(&spec)?;
        let table: Vec<u32> = (0..num_blocks as u32).collect();
        let inputs = |rows: usize, random: &mut Random| -> Result<_> {
            let q = self.upload(rows, p.num_heads * p.key_head_dim, random)?;
            let k = self.upload(rows, keys, random)?;
            let v = if latent { None } else { Some(self.upload(rows, values, random)?) };
            Ok((q, k, v))
        };
        // Written as one short sequence per block, which costs less than one long one.
        let mut fill = Batch::new(BLOCK_SIZE);
        for block in &table {
            fill.push(&[0; BLOCK_SIZE], 0, &[*block], BLOCK_SIZE as u32, 1);
        }
        let (q, k, v) = inputs(fill.rows(), random)?;
        self.backend.attention(&q, &k, v.as_ref(), &cache, 0, &fill, p)?;

        let mut batch = Batch::new(BLOCK_SIZE);
        let tokens = vec![0; rows];
        match rows {
            ..=DECODE_ROWS => batch.push_decode(&tokens, context - rows, &table, context as u32, 1),
            _ => batch.push(&tokens, context - rows, &table, context as u32, 1),
        }
        let (q, k, v) = inputs(rows, random)?;
        let seen = (context - rows) * rows + rows * (rows + 1) / 2;
        let flops = 2 * seen * p.num_heads * (p.key_head_dim + p.value_head_dim);
        let columns = p.num_heads * (p.key_head_dim + p.value_head_dim) + keys;
        let bytes = context * spec.bytes_per_token() + 4 * rows * columns;
        let shape = format!("[{rows}] of {context}, {}/{}", p.num_heads, p.num_kv_heads);
        let case = Case::new(*name, shape, bytes, flops, |_| {
            self.backend.attention(&q, &k, v.as_ref(), &cache, 0, &batch, p)?;
            Ok(())
        });
        // Prompts are multiplied as matrices of bf16 are.
        let arithmetic = match self.backend.rounds_inputs() {
            true => {
                let kernel = self.backend.kernel("bf16", LinearOptions::default());
                Arithmetic::of(&kernel, rows)
            }
            false => Arithmetic::F32,
        };
        visit(Case { arithmetic, batch: Some(batch.clone()), ..case })
    }

    fn mixture(&self, random: &mut Random, visit: &mut Visit<'_>) -> Result<()> {
        let (num_experts, top_k) = (self.sizes.experts, 4);
        let (columns, inner) = (self.sizes.hot / 2, self.sizes.hot / 4);
        let router = Router {
            scoring: Scoring::Softmax,
            num_experts,
            top_k,
            num_groups: 1,
            top_k_groups: 1,
            group_score_experts: 1,
            normalize: true,
            scaling_factor: 1.0,
        };
        if self.wants("route") {
            for &rows in self.sizes.rows {
                let logits = self.upload(rows, num_experts, random)?;
                let shape = format!("[{rows},{num_experts}] top {top_k}");
                visit(Case::new("route", shape, 4 * rows * num_experts, 0, |_| {
                    self.backend.route(&logits, None, &router)?;
                    Ok(())
                }))?;
            }
        }
        if !self.wants("experts") {
            return Ok(());
        }
        let format = marlin_quant::format(EXPERT_FORMAT);
        // Blocks of 256 at most divide every width; bands divide every height.
        let (columns, inner) = (columns.max(256), inner.max(256));
        let mut load = |out: usize, input: usize| -> Result<Vec<Linear>> {
            let weight = weights::random(format, out, input, random);
            let weight = weight.ok_or_else(|| anyhow::anyhow!("{EXPERT_FORMAT} has a packer"))?;
            (0..num_experts).map(|_| self.load(&weights::copy(&weight)?)).collect()
        };
        let experts = Experts {
            gate: load(inner, columns)?,
            up: load(inner, columns)?,
            down: load(columns, inner)?,
        };
        let each = experts.gate[0].bytes + experts.up[0].bytes + experts.down[0].bytes;
        for &rows in self.sizes.rows {
            let x = self.upload(rows, columns, random)?;
            let routing =
                self.backend.route(&self.upload(rows, num_experts, random)?, None, &router)?;
            let mut chosen = self.backend.download_routing(&routing)?.0;
            chosen.sort_unstable();
            chosen.dedup();
            let bytes = chosen.len() * each as usize + 8 * rows * columns;
            let flops = rows * top_k * 3 * 2 * columns * inner;
            let shape = format!("[{rows},{columns}]x[{inner}] {top_k}/{num_experts}");
            let case = Case::new("experts", shape, bytes, flops, |_| {
                self.backend.experts(&x, &routing, &experts, Activation::Silu)?;
                Ok(())
            });
            let kernel = experts.gate[0].kernel.clone();
            let arithmetic = Arithmetic::of(&kernel, rows);
            visit(Case { kernel: Some(kernel), arithmetic, ..case })?;
        }
        Ok(())
    }

    fn elementwise(&self, random: &mut Random, visit: &mut Visit<'_>) -> Result<()> {
        let (b, columns) = (self.backend, self.sizes.hot);
        let heads = Heads { heads: columns / 64, head_dim: 64 };
        for &rows in self.sizes.rows {
            let n = rows * columns;
            let shape = format!("[{rows},{columns}]");
            let x = self.upload(rows, columns, random)?;
            if self.wants("head_linear") {
                let (heads, input, out) = (16, 128, columns / 4);
                let matrices = random.floats(heads * out * input);
                let matrices = b.load_head_linear(heads, out, input, matrices)?;
                let x = self.upload(rows, heads * input, random)?;
                let bytes = 4 * heads * (out * input + rows * (out + input));
                let shape = format!("[{rows},{heads}x{input}]x[{out}]");
                let flops = 2 * rows * heads * out * input;
                visit(Case::new("head_linear", shape, bytes, flops, |_| {
                    b.head_linear(&x, &matrices)?;
                    Ok(())
                }))?;
            }
            if self.wants("rms_norm") {
                let weight = b.load_vector(vec![1.0; columns])?;
                visit(Case::new("rms_norm", shape.clone(), 8 * n, 4 * n, |_| {
                    b.rms_norm(&x, &weight, 1e-5)?;
                    Ok(())
                }))?;
            }
            if self.wants("rope") {
                let inv_freq = (0..32).map(|i| 10_000f32.powf(-(i as f32) / 32.0)).collect();
                let style = RopeStyle::HalfSplit;
                let table = b.load_rope(&Rope { style, inv_freq, magnitude: 1.0, long: None })?;
                let mut batch = Batch::new(rows);
                batch.push(&vec![0; rows], 0, &[0], rows as u32, 1);
                let mut place = InPlace::new(self.upload(rows, columns, random)?);
                let case = Case::new("rope", shape.clone(), 8 * n, 3 * n, |_| {
                    place.change(|x| Ok(b.rope(x, &table, heads, &batch)?))
                });
                visit(Case { batch: Some(batch.clone()), ..case })?;
            }
            if self.wants("gated") {
                // Values that neither grow nor vanish when the result is the next gate.
                let gate = random.floats(n).into_iter().map(|v| -v.abs()).collect();
                let mut place = InPlace::new(b.upload(rows, columns, gate)?);
                let up = b.upload(rows, columns, vec![2.0; n])?;
                visit(Case::new("gated", shape.clone(), 12 * n, 5 * n, |_| {
                    place.change(|gate| Ok(b.gated(gate, &up, Activation::Silu)?))
                }))?;
            }
            if self.wants("add") {
                let mut place = InPlace::new(self.upload(rows, columns, random)?);
                let zeros = b.upload(rows, columns, vec![0.0; n])?;
                visit(Case::new("add", shape.clone(), 12 * n, n, |_| {
                    place.change(|x| Ok(b.add(x, &zeros)?))
                }))?;
            }
            if self.wants("slice_heads") {
                visit(Case::new("slice_heads", format!("{shape} half"), 4 * n, 0, |_| {
                    b.slice_heads(&x, heads, 0, 32)?;
                    Ok(())
                }))?;
            }
            if self.wants("concat_heads") {
                let y = self.upload(rows, columns, random)?;
                visit(Case::new("concat_heads", format!("{shape} twice"), 16 * n, 0, |_| {
                    b.concat_heads(&x, &y, heads.heads)?;
                    Ok(())
                }))?;
            }
        }
        Ok(())
    }
}

/// One kind of attention.
struct AttentionKind {
    name: &'static str,
    params: AttentionParams,
    cache_type: CacheType,
    latent: bool,
}

/// A device says what it has no kernel for; the others go on.
fn told(measured: Result<()>) -> Result<()> {
    match measured {
        Err(error) if matches!(error.downcast_ref(), Some(BackendError::Unsupported { .. })) => {
            console::note(&format!("note: left out: {error:#}"));
            Ok(())
        }
        other => other,
    }
}

/// A tensor that operators change where it lies, as they do in a model, because nothing else refers to it.
struct InPlace(Option<Tensor>);

impl InPlace {
    fn new(tensor: Tensor) -> Self {
        Self(Some(tensor))
    }

    fn change(&mut self, change: impl FnOnce(Tensor) -> Result<Tensor>) -> Result<()> {
        if let Some(tensor) = self.0.take() {
            self.0 = Some(change(tensor)?);
        }
        Ok(())
    }
}
