//! Grouped-query attention over a paged cache.

use super::{Loader, Norm, Result, Step};
use crate::spec::GqaSpec;
use marlin_tensor::{AttentionParams, Heads, Linear, RopeTable, Tensor};

/// Loaded grouped-query attention.
pub struct Gqa {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    q_norm: Option<Norm>,
    k_norm: Option<Norm>,
    rope: Option<RopeTable>,
    params: AttentionParams,
}

impl Gqa {
    /// Loads the weights of `spec`.
    pub fn load(loader: &mut Loader, spec: &GqaSpec) -> Result<Self> {
        Ok(Self {
            q: loader.linear(&spec.q)?,
            k: loader.linear(&spec.k)?,
            v: loader.linear(&spec.v)?,
            o: loader.linear(&spec.o)?,
            q_norm: loader.optional_norm(&spec.q_norm)?,
            k_norm: loader.optional_norm(&spec.k_norm)?,
            rope: spec.rope.as_ref().map(|r| loader.rope(r)).transpose()?,
            params: spec.params,
        })
    }

    /// `[rows, hidden] -> [rows, hidden]`; `layer` is the cache layer.
    pub fn forward(&self, step: &Step, layer: usize, x: &Tensor) -> Result<Tensor> {
        let (b, p) = (step.backend, &self.params);
        let mut projected = b.linear_many(x, &[&self.q, &self.k, &self.v])?.into_iter();
        let (Some(mut q), Some(mut k), Some(v)) =
            (projected.next(), projected.next(), projected.next())
        else {
            unreachable!("linear_many returns one tensor per matrix")
        };
        if let Some(norm) = &self.q_norm {
            q = norm.forward(b, &q)?;
        }
        if let Some(norm) = &self.k_norm {
            k = norm.forward(b, &k)?;
        }
        if let Some(rope) = &self.rope {
            let heads = |heads| Heads { heads, head_dim: p.key_head_dim };
            q = b.rope(q, rope, heads(p.num_heads), step.batch)?;
            k = b.rope(k, rope, heads(p.num_kv_heads), step.batch)?;
        }
        let y = b.attention(&q, &k, Some(&v), step.cache, layer, step.batch, p)?;
        Ok(b.linear(&y, &self.o)?)
    }
}
