//! Attention of one token after [`TOKENS`] others.

use super::{Clock, Entrant, Reference, Result, Runs, copies, noise, variants};
use crate::gpu::{Buffer, Gpu};
use crate::ops::attention::{RULE, attend_in_parts};
use crate::ops::cache::PagedCache;
use crate::step::Step;
use crate::tune::Shape;
use marlin_tensor::{AttentionParams, Batch, CacheLayerSpec, CacheSpec, CacheType};
use std::rc::Rc;

/// Tokens that are seen, the one itself included.
const TOKENS: usize = 2048;
/// Tokens of a cache block.
const BLOCK: usize = 16;
/// Heads whose outputs are verified.
const HEADS: usize = 4;

/// A full cache, one layer a copy, and a query.
pub(super) struct Parts {
    params: AttentionParams,
    cache: PagedCache,
    step: Step,
    q: Buffer,
    reference: Reference,
}

impl Parts {
    pub(super) fn new(
        gpu: &Gpu,
        params: AttentionParams,
        cache_type: CacheType,
        latent: bool,
        copies_bytes: u64,
    ) -> Result<Self> {
        let AttentionParams { num_kv_heads, key_head_dim, value_head_dim, .. } = params;
        let value = if latent { 0 } else { value_head_dim };
        let layer = CacheLayerSpec { num_kv_heads, key_head_dim, value_head_dim: value };
        let num_blocks = TOKENS / BLOCK;
        let bytes = (layer.bytes_per_token(cache_type) * TOKENS) as u64;
        let layers = copies(gpu, bytes, copies_bytes) as usize;
        let spec =
            CacheSpec { layers: vec![layer; layers], block_size: BLOCK, num_blocks, cache_type };
        let cache = PagedCache::new(gpu, &spec)?;

        let round = |values: Vec<f32>| -> Vec<f32> {
            let rounded = values.into_iter().map(|v| match cache_type {
                CacheType::F16 => half::f16::from_f32(v).to_f32(),
                CacheType::Bf16 => half::bf16::from_f32(v).to_f32(),
                _ => v,
            });
            rounded.collect()
        };
        let keys = round(noise(1, TOKENS * num_kv_heads * key_head_dim));
        let values = round(noise(2, TOKENS * num_kv_heads * value));
        let q = noise(3, params.num_heads * key_head_dim);

        let table: Vec<u32> = (0..num_blocks as u32).collect();
        let mut prompt = Batch::new(BLOCK);
        prompt.push(&[0; TOKENS], 0, &table, TOKENS as u32, 1);
        let mut last = Batch::new(BLOCK);
        last.push_decode(&[0], TOKENS - 1, &table, TOKENS as u32, 1);
        let written = Step::new(gpu, &prompt);
        let (k, v) = (gpu.floats(&keys), gpu.floats(&values));
        for layer in 0..layers {
            cache.write(gpu, layer, &written.meta, TOKENS, &k, (!latent).then_some(&v));
        }
        let expected = expected(&params, latent, &q, &keys, &values);
        let step = Step::new(gpu, &last);
        Ok(Self { params, cache, step, q: gpu.floats(&q), reference: Reference { expected } })
    }

    /// All ways to cut a sequence.
    pub(super) fn runs<'a>(&'a self, gpu: &'a Gpu, shape: &Shape) -> Runs<'a> {
        let clock = |variant, launches| {
            Clock::new(gpu, launches, move |i| {
                let layer = i % self.cache.layers.len();
                attend_in_parts(gpu, &self.q, &self.cache, layer, &self.step, &self.params, variant)
            })
        };
        let launches = clock(RULE, 1).calibrate();
        let len = self.params.num_heads * self.params.value_head_dim;
        let entrants = variants(gpu, shape, None, RULE).into_iter().map(|variant| {
            let clock = Rc::new(clock(variant, launches));
            let timed = clock.clone();
            Entrant {
                variant,
                // The cache holds what the reference is computed of; sums are in f32.
                tolerance: 1e-4,
                outputs: Box::new(move || clock.outputs(len)),
                time: Box::new(move || timed.time()),
            }
        });
        Runs { reference: self.reference.clone(), entrants: entrants.collect() }
    }
}

/// Outputs of some heads.
fn expected(
    params: &AttentionParams,
    latent: bool,
    q: &[f32],
    keys: &[f32],
    values: &[f32],
) -> Vec<(usize, f64)> {
    let AttentionParams { num_heads, num_kv_heads, key_head_dim, value_head_dim, .. } = *params;
    let first = params.window.map_or(0, |window| TOKENS.saturating_sub(window as usize));
    let mut heads: Vec<usize> = (0..HEADS).map(|i| i * (num_heads - 1) / (HEADS - 1)).collect();
    heads.dedup();
    let mut all = Vec::new();
    for head in heads {
        let kv_head = head / (num_heads / num_kv_heads);
        let query = &q[head * key_head_dim..][..key_head_dim];
        let key = |p: usize| &keys[(p * num_kv_heads + kv_head) * key_head_dim..][..key_head_dim];
        let value = |p: usize| match latent {
            true => &key(p)[..value_head_dim],
            false => &values[(p * num_kv_heads + kv_head) * value_head_dim..][..value_head_dim],
        };
        let score = |p: usize| {
            let dot = query.iter().zip(key(p)).map(|(a, b)| f64::from(*a) * f64::from(*b));
            let score = dot.sum::<f64>() * f64::from(params.scale);
            params.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
        };
        let scores: Vec<f64> = (first..TOKENS).map(score).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut sums = vec![0.0; value_head_dim];
        for (p, weight) in (first..TOKENS).zip(&weights) {
            let add = |(sum, v): (&mut f64, &f32)| *sum += weight * f64::from(*v);
            sums.iter_mut().zip(value(p)).for_each(add);
        }
        let at = head * value_head_dim;
        all.extend(sums.into_iter().enumerate().map(|(i, sum)| (at + i, sum / total)));
    }
    all
}
