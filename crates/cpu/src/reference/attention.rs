//! Causal attention over paged caches.

use super::dot;
use crate::cache::Layer;
use marlin_tensor::{AttentionParams, BatchSequence};

/// Attends every row of every sequence. `q: [rows, num_heads * key_head_dim]`,
/// `out: [rows, num_heads * value_head_dim]`.
pub(crate) fn attention(
    q: &[f32],
    layer: &Layer,
    sequences: &[BatchSequence],
    params: &AttentionParams,
    out: &mut [f32],
) {
    let (dk, dv) = (params.key_head_dim, params.value_head_dim);
    let heads_per_kv = params.num_heads / params.num_kv_heads;
    let mut key = vec![0.0; dk];
    let mut value = vec![0.0; dv];
    for sequence in sequences {
        for i in 0..sequence.rows {
            let row = sequence.first_row + i;
            let position = sequence.context_len - sequence.rows + i;
            let start = first_visible(position, params.window);
            for head in 0..params.num_heads {
                let q = &q[(row * params.num_heads + head) * dk..][..dk];
                let kv_head = head / heads_per_kv;
                let slot = |p: usize| {
                    let block = sequence.block_table[p / layer.block_size] as usize;
                    block * layer.block_size + p % layer.block_size
                };
                let mut scores = Vec::with_capacity(position + 1 - start);
                for p in start..=position {
                    layer.key(slot(p), kv_head, &mut key);
                    let score = dot(q, &key) * params.scale;
                    scores.push(match params.softcap {
                        Some(cap) => cap * (score / cap).tanh(),
                        None => score,
                    });
                }
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f64> = scores.iter().map(|s| f64::from(s - max).exp()).collect();
                let total: f64 = weights.iter().sum();
                let mut sums = vec![0.0f64; dv];
                for (p, weight) in (start..=position).zip(&weights) {
                    if layer.is_latent() {
                        layer.key(slot(p), kv_head, &mut value);
                    } else {
                        layer.value(slot(p), kv_head, &mut value);
                    }
                    for (sum, v) in sums.iter_mut().zip(&value) {
                        *sum += weight / total * f64::from(*v);
                    }
                }
                let out = &mut out[(row * params.num_heads + head) * dv..][..dv];
                out.iter_mut().zip(&sums).for_each(|(o, s)| *o = *s as f32);
            }
        }
    }
}

/// First position a query at `position` sees.
pub(crate) fn first_visible(position: usize, window: Option<u32>) -> usize {
    window.map_or(0, |w| (position + 1).saturating_sub(w as usize))
}
