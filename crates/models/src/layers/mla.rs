//! Multi-head latent attention in the absorbed form: the key half of `kv_b` is applied to queries
//! and the value half to outputs, so that the cache holds one latent vector and one rotary key per
//! token, shared by all heads.

use super::{Loader, Norm, Result, Step};
use crate::spec::{MlaQuery, MlaSpec};
use marlin_tensor::{AttentionParams, HeadLinear, Linear, RopeTable, Tensor};

enum Query {
    Full(Linear),
    LowRank { a: Linear, norm: Norm, b: Linear },
}

/// Loaded latent attention.
pub struct Mla {
    query: Query,
    kv_a: Linear,
    kv_a_norm: Norm,
    /// Per head `nope -> latent`.
    absorb_key: HeadLinear,
    /// Per head `latent -> value`.
    absorb_value: HeadLinear,
    o: Linear,
    rope: RopeTable,
    params: AttentionParams,
}

impl Mla {
    /// Loads the weights of `spec`; `kv_b` is decoded, and split by head unless it is stored so.
    pub fn load(loader: &mut Loader, spec: &MlaSpec) -> Result<Self> {
        let (heads, rank) = (spec.num_heads, spec.kv_lora_rank);
        let (nope, value) = (spec.qk_nope_head_dim, spec.v_head_dim);
        let query = match &spec.query {
            MlaQuery::Full(q) => Query::Full(loader.linear(q)?),
            MlaQuery::LowRank { a, norm, b } => Query::LowRank {
                a: loader.linear(a)?,
                norm: loader.norm(norm)?,
                b: loader.linear(b)?,
            },
        };
        let (keys, values) = absorbed(loader, spec)?;
        let backend = loader.backend.clone();
        Ok(Self {
            query,
            kv_a: loader.linear(&spec.kv_a)?,
            kv_a_norm: loader.norm(&spec.kv_a_norm)?,
            absorb_key: backend.load_head_linear(heads, rank, nope, keys)?,
            absorb_value: backend.load_head_linear(heads, value, rank, values)?,
            o: loader.linear(&spec.o)?,
            rope: loader.rope(&spec.rope)?,
            params: spec.attention(),
        })
    }

    /// `[rows, hidden] -> [rows, hidden]`; `layer` is the cache layer.
    pub fn forward(&self, step: &Step, layer: usize, x: &Tensor) -> Result<Tensor> {
        let (b, p) = (step.backend, &self.params);
        let (q, kv) = match &self.query {
            Query::Full(q) => (b.linear(x, q)?, b.linear(x, &self.kv_a)?),
            Query::LowRank { a, norm, b: up } => {
                let mut down = b.linear_many(x, &[a, &self.kv_a])?;
                let (Some(kv), Some(low)) = (down.pop(), down.pop()) else {
                    unreachable!("linear_many returns one tensor per matrix")
                };
                (b.linear(&norm.forward(b, &low)?, up)?, kv)
            }
        };
        let norm = &self.kv_a_norm;
        let (nope, q_rope, k) =
            b.latent_inputs(&q, &kv, &norm.weight, norm.eps, &self.rope, p.num_heads, step.batch)?;
        let q = b.head_linear_beside(&nope, &self.absorb_key, &q_rope)?;
        let y = b.attention(&q, &k, None, step.cache, layer, step.batch, p)?;
        Ok(b.linear(&b.head_linear(&y, &self.absorb_value)?, &self.o)?)
    }
}

/// `kv_b` by head: keys `[heads, rank, nope]` and values `[heads, value, rank]`. GGUF files may
/// hold the two halves as tensors of exactly these shapes.
fn absorbed(loader: &mut Loader, spec: &MlaSpec) -> Result<(Vec<f32>, Vec<f32>)> {
    let (heads, rank) = (spec.num_heads, spec.kv_lora_rank);
    let (nope, value) = (spec.qk_nope_head_dim, spec.v_head_dim);
    if let Some((key, values)) = loader.source.split_kv_b(&spec.kv_b) {
        let mut half = |name: String, rows, columns| -> Result<Vec<f32>> {
            let weight = loader.source.matrix(&name, rows, columns)?;
            (loader.progress)(weight.bytes());
            loader.source.decode(&name, &weight)
        };
        return Ok((half(key, heads * rank, nope)?, half(values, heads * value, rank)?));
    }
    let kv_b = loader.source.linear(&spec.kv_b)?;
    let dense = loader.source.decode(&spec.kv_b.key, &kv_b)?;
    (loader.progress)(kv_b.bytes());
    let mut keys = vec![0.0; heads * rank * nope];
    let mut values = Vec::with_capacity(heads * value * rank);
    for (head, rows) in dense.chunks_exact((nope + value) * rank).enumerate() {
        let (key_rows, value_rows) = rows.split_at(nope * rank);
        let key = &mut keys[head * rank * nope..][..rank * nope];
        for (i, row) in key_rows.chunks_exact(rank).enumerate() {
            row.iter().enumerate().for_each(|(j, &w)| key[j * nope + i] = w);
        }
        values.extend_from_slice(value_rows);
    }
    Ok((keys, values))
}
