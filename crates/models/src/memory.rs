//! What a model takes before any of it is placed: memory of its weights on a backend, and of a forward pass.
//!
//! Weights are exact: the backend says what it would make of each matrix. Matrices of one shape that are stored alike are held alike, so
//! one of them is looked at, which matters where loading converts. Passes are bounded.

use crate::error::ModelError;
use crate::source::Source;
use crate::spec::{
    BlockSpec, FeedForwardSpec, GatedSpec, LinearSpec, MixerSpec, MlaSpec, ModelSpec, NormSpec,
};
use marlin_checkpoint::{Checkpoint, StoredTensor};
use marlin_tensor::{Backend, LinearOptions, Role, Weight};

type Result<T> = std::result::Result<T, ModelError>;

/// Bytes of an f32.
const FLOAT: u64 = 4;
/// Bytes that a pass takes however few rows it has: what attention, products and their threads keep for the next one.
const LEAST_SCRATCH: u64 = 16 << 20;
/// Most sums that kernels keep beside their outputs.
const MOST_SUMS: u64 = 1 << 24;

/// Memory of the weights of a model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WeightMemory {
    /// Bytes made for them.
    pub bytes: u64,
    /// Bytes that are read where they lie in mapped files.
    pub in_place_bytes: u64,
}

/// What placing the weights of `spec` on `backend` takes, [`Model::load`](crate::Model::load) being the one that does.
///
/// # Errors
/// When a matrix is missing, shaped otherwise, or in no known format.
pub fn weight_memory(
    checkpoint: &Checkpoint,
    spec: &ModelSpec,
    backend: &dyn Backend,
) -> Result<WeightMemory> {
    let source = Source::new(checkpoint);
    let (linear, total) = (Role::Linear(LinearOptions::default()), WeightMemory::default());
    let mut sum = Sum { source: &source, backend, known: Vec::new(), total };
    let table = crate::architecture::linear(
        spec.embedding.key.clone(),
        spec.vocab_size,
        spec.hidden_size,
        "embedding",
    );
    sum.add(&table, Role::Embedding)?;
    spec.blocks.iter().try_for_each(|block| sum.add_block(block))?;
    sum.add_norm(&spec.norm);
    match source.has(&spec.head.linear.key) || !spec.head.tied {
        true => sum.add(&spec.head.linear, linear)?,
        false => sum.add(&table, linear)?,
    }
    if let Some(mtp) = spec.mtp.as_ref().filter(|_| source.has_mtp(spec)) {
        let norms = [&mtp.embedding_norm, &mtp.hidden_norm, &mtp.norm];
        norms.into_iter().for_each(|norm| sum.add_norm(norm));
        sum.add(&mtp.projection, linear)?;
        sum.add_block(&mtp.block)?;
    }
    Ok(sum.total)
}

/// A kind of matrix, and what one takes.
struct Known<'a> {
    role: Role,
    shape: [usize; 2],
    stored: &'a [StoredTensor],
    each: WeightMemory,
}

struct Sum<'a> {
    source: &'a Source<'a>,
    backend: &'a dyn Backend,
    known: Vec<Known<'a>>,
    total: WeightMemory,
}

impl<'a> Sum<'a> {
    fn add_block(&mut self, block: &BlockSpec) -> Result<()> {
        let linear = Role::Linear(LinearOptions::default());
        block.norms().into_iter().for_each(|norm| self.add_norm(norm));
        let absorbed = match &block.mixer {
            MixerSpec::Mla(mla) => Some(mla),
            MixerSpec::Gqa(_) => None,
        };
        let moe = match &block.feed_forward {
            FeedForwardSpec::Moe(moe) => Some(moe),
            FeedForwardSpec::Gated(_) => None,
        };
        if let Some(moe) = moe.filter(|moe| moe.correction_bias.is_some()) {
            self.total.bytes += FLOAT * moe.router.num_experts as u64;
        }
        for matrix in block.linears() {
            match absorbed.filter(|mla| std::ptr::eq(&mla.kv_b, matrix)) {
                Some(mla) => self.add_absorbed(mla)?,
                None => {
                    let float_activations = moe.is_some_and(|moe| std::ptr::eq(&moe.gate, matrix));
                    let role = match float_activations {
                        true => Role::Linear(LinearOptions { float_activations }),
                        false => linear,
                    };
                    self.add(matrix, role)?;
                }
            }
        }
        Ok(())
    }

    fn add_norm(&mut self, norm: &NormSpec) {
        self.total.bytes += FLOAT * norm.size as u64;
    }

    /// `kv_b`, which is decoded, and may be stored in two halves.
    fn add_absorbed(&mut self, mla: &MlaSpec) -> Result<()> {
        let Some((keys, values)) = self.source.split_kv_b(&mla.kv_b) else {
            return self.add(&mla.kv_b, Role::Heads);
        };
        let (heads, rank) = (mla.num_heads, mla.kv_lora_rank);
        for (name, rows, columns) in
            [(keys, heads * rank, mla.qk_nope_head_dim), (values, heads * mla.v_head_dim, rank)]
        {
            let weight = self.source.matrix(&name, rows, columns)?;
            let stored = self.source.checkpoint().under(&format!("{name}."));
            self.count(&self.memory(&weight, Role::Heads, stored));
        }
        Ok(())
    }

    fn add(&mut self, matrix: &LinearSpec, role: Role) -> Result<()> {
        let stored = self.source.tensors_of(matrix);
        let shape = [matrix.out_features, matrix.in_features];
        let alike = |known: &&Known| {
            let same = |(a, b): (&StoredTensor, &StoredTensor)| {
                a.encoding == b.encoding && a.shape == b.shape
            };
            (known.role, known.shape) == (role, shape)
                && known.stored.len() == stored.len()
                && known.stored.iter().zip(stored).all(same)
        };
        let each = match self.known.iter().find(alike) {
            Some(known) => known.each,
            None => {
                let each = self.memory(&self.source.linear(matrix)?, role, stored);
                self.known.push(Known { role, shape, stored, each });
                each
            }
        };
        self.count(&each);
        if matrix.bias {
            self.total.bytes += FLOAT * matrix.out_features as u64;
        }
        Ok(())
    }

    fn count(&mut self, each: &WeightMemory) {
        self.total.bytes += each.bytes;
        self.total.in_place_bytes += each.in_place_bytes;
    }

    /// What `weight`, made from the `stored` tensors, takes.
    fn memory(&self, weight: &Weight, role: Role, stored: &[StoredTensor]) -> WeightMemory {
        let placed = self.backend.placed(weight, role);
        let mut memory = WeightMemory { bytes: placed.bytes, in_place_bytes: 0 };
        for (_, part) in weight.parts.iter().filter(|_| placed.keeps_parts) {
            let start = part.bytes().as_ptr();
            let lies_in_file = stored.iter().any(|t| t.data.as_ptr_range().contains(&start));
            let bytes = part.bytes().len() as u64;
            match lies_in_file {
                true => memory.in_place_bytes += bytes,
                false => memory.bytes += bytes,
            }
        }
        memory
    }
}

/// The most memory that a pass over `rows` tokens takes, of which `outputs` are asked for logits, beside weights and cache.
///
/// Counted are all tensors of the largest block, as if none took another's place, in f32 and rounded up to powers of two, which is how the
/// processor's buffers are kept; inputs of its widest product in the form that kernels make of them, at most three halves an element; sums
/// that kernels of EXL3 keep; logits, and their copy on the host. A pass of 512 tokens takes about half of it (docs/performance.md).
pub fn scratch_bytes(spec: &ModelSpec, rows: usize, outputs: usize) -> u64 {
    let (r, h) = (rows as u64, spec.hidden_size as u64);
    let tensor = |elements: u64| FLOAT * elements.max(16).next_power_of_two();
    let tensors = |columns: &[u64]| columns.iter().map(|c| tensor(r * c)).sum::<u64>();
    let gated = |g: &GatedSpec| g.gate.out_features as u64;
    let block = |block: &BlockSpec| {
        let mixer = match &block.mixer {
            MixerSpec::Gqa(gqa) => {
                let p = &gqa.params;
                let [q, k] = [p.num_heads, p.num_kv_heads].map(|n| (n * p.key_head_dim) as u64);
                let [y, v] = [p.num_heads, p.num_kv_heads].map(|n| (n * p.value_head_dim) as u64);
                tensors(&[q, q, k, k, v, y])
            }
            MixerSpec::Mla(mla) => {
                let per_head = [
                    mla.qk_nope_head_dim + mla.qk_rope_head_dim,
                    mla.qk_nope_head_dim,
                    mla.qk_rope_head_dim,
                    mla.kv_lora_rank,
                    mla.kv_lora_rank + mla.qk_rope_head_dim,
                    mla.kv_lora_rank,
                    mla.v_head_dim,
                ];
                let shared = (mla.kv_lora_rank + mla.qk_rope_head_dim) as u64;
                tensors(&per_head.map(|dim| (mla.num_heads * dim) as u64))
                    + tensors(&[shared, shared])
            }
        };
        let feed_forward = match &block.feed_forward {
            FeedForwardSpec::Gated(g) => tensors(&[gated(g), gated(g)]),
            FeedForwardSpec::Moe(moe) => {
                let (chosen, inner) =
                    (moe.router.top_k as u64, moe.experts.first().map_or(0, gated));
                let shared = moe.shared.as_ref().map_or(0, gated);
                let experts = [chosen * h, chosen * h, chosen * inner, chosen * inner];
                tensors(&experts) + tensors(&[shared, shared, h, moe.router.num_experts as u64])
            }
        };
        let linears = block.linears();
        let widest =
            |of: fn(&LinearSpec) -> usize| linears.iter().map(|l| of(l)).max().unwrap_or(0);
        let inputs = r * widest(|l| l.in_features) as u64 * 3 / 2;
        let sums = (r * widest(|l| l.out_features) as u64).min(MOST_SUMS);
        mixer + feed_forward + FLOAT * (inputs + sums)
    };
    let blocks = spec.blocks.iter().map(block).max().unwrap_or(0);
    let logits = tensor(outputs as u64 * spec.vocab_size as u64);
    LEAST_SCRATCH + blocks + tensors(&[h; 5]) + 2 * logits
}
