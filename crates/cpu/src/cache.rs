//! Paged keys and values.
//!
//! Every layer keeps values as `[block][kv_head][slot][value_head_dim]` and keys transposed, as
//! `[block][kv_head][key_head_dim][slot]`: the scores of neighbouring slots are then sums of
//! registers, with nothing to add up inside one. Latent keys, which are values too, stay
//! `[block][slot][key_head_dim]`. Pages are mapped by the system when first written.

use crate::Level;
use crate::memory::{available_bytes, zeroed};
use crate::simd::{narrow_f16, transpose_f16, widen_bf16, widen_f16};
use half::{bf16, f16};
use marlin_tensor::{BackendError, CacheLayerSpec, CacheSpec, DType};
use std::ops::Range;
use std::sync::RwLock;

/// Elements of one cache array; halves as bit patterns, so that zeros come unmapped from the system.
pub(crate) enum Elements {
    F32(Vec<f32>),
    F16(Vec<u16>),
    BF16(Vec<u16>),
}

impl Elements {
    fn zeros(dtype: DType, len: usize) -> Option<Self> {
        Some(match dtype {
            DType::F16 => Self::F16(zeroed(len)?),
            DType::BF16 => Self::BF16(zeroed(len)?),
            _ => Self::F32(zeroed(len)?),
        })
    }

    /// Rounds `values` to the element type and writes them at `at`.
    pub(crate) fn write(&mut self, level: Level, at: usize, values: &[f32]) {
        let range = at..at + values.len();
        match self {
            Self::F32(e) => e[range].copy_from_slice(values),
            Self::F16(e) => narrow_f16(level, values, &mut e[range]),
            Self::BF16(e) => {
                let rounded = values.iter().map(|v| bf16::from_f32(*v).to_bits());
                e[range].iter_mut().zip(rounded).for_each(|(e, v)| *e = v);
            }
        }
    }

    /// Widens `out.len()` elements from `at`.
    pub(crate) fn read(&self, level: Level, at: usize, out: &mut [f32]) {
        let range = at..at + out.len();
        match self {
            Self::F32(e) => out.copy_from_slice(&e[range]),
            Self::F16(e) => widen_f16(level, &e[range], out),
            Self::BF16(e) => widen_bf16(level, &e[range], out),
        }
    }

    /// Rounds `values` to the element type and writes them `stride` apart from `at` on.
    fn scatter(&mut self, at: usize, stride: usize, values: &[f32]) {
        match self {
            Self::F32(e) => {
                e[at..].iter_mut().step_by(stride).zip(values).for_each(|(e, v)| *e = *v);
            }
            Self::F16(e) => {
                let rounded = values.iter().map(|v| f16::from_f32(*v).to_bits());
                e[at..].iter_mut().step_by(stride).zip(rounded).for_each(|(e, v)| *e = v);
            }
            Self::BF16(e) => {
                let rounded = values.iter().map(|v| bf16::from_f32(*v).to_bits());
                e[at..].iter_mut().step_by(stride).zip(rounded).for_each(|(e, v)| *e = v);
            }
        }
    }

    /// Widens `out.len()` elements `stride` apart from `at` on.
    fn gather(&self, at: usize, stride: usize, out: &mut [f32]) {
        for (i, out) in out.iter_mut().enumerate() {
            *out = match self {
                Self::F32(e) => e[at + i * stride],
                Self::F16(e) => f16::from_bits(e[at + i * stride]).to_f32(),
                Self::BF16(e) => bf16::from_bits(e[at + i * stride]).to_f32(),
            };
        }
    }

    fn copy_within(&mut self, from: usize, to: usize, len: usize) {
        match self {
            Self::F32(e) => e.copy_within(from..from + len, to),
            Self::F16(e) => e.copy_within(from..from + len, to),
            Self::BF16(e) => e.copy_within(from..from + len, to),
        }
    }
}

/// One layer's arrays.
pub(crate) struct Layer {
    pub(crate) spec: CacheLayerSpec,
    pub(crate) block_size: usize,
    pub(crate) keys: Elements,
    /// Empty when values are a prefix of the keys.
    pub(crate) values: Elements,
}

impl Layer {
    /// Whether values are a prefix of the keys.
    pub(crate) fn is_latent(&self) -> bool {
        self.spec.value_head_dim == 0
    }

    /// Start of head `head` at `slot` (`block * block_size + offset`) in an array of `dim` columns
    /// that is not transposed.
    pub(crate) fn at(&self, slot: usize, head: usize, dim: usize) -> usize {
        let (block, offset) = (slot / self.block_size, slot % self.block_size);
        self.block_at(block, head, dim) + offset * dim
    }

    /// Start of head `head` of a block in an array of `dim` columns.
    pub(crate) fn block_at(&self, block: usize, head: usize, dim: usize) -> usize {
        (block * self.spec.num_kv_heads + head) * self.block_size * dim
    }

    /// The key of one head at `slot`.
    pub(crate) fn key(&self, slot: usize, head: usize, out: &mut [f32]) {
        let (at, stride) = self.key_at(slot, head);
        self.keys.gather(at, stride, out);
    }

    /// Start and stride of a key.
    fn key_at(&self, slot: usize, head: usize) -> (usize, usize) {
        if self.is_latent() {
            return (self.at(slot, head, self.spec.key_head_dim), 1);
        }
        let (block, offset) = (slot / self.block_size, slot % self.block_size);
        (self.block_at(block, head, self.spec.key_head_dim) + offset, self.block_size)
    }

    /// Stores rows of `k` and `v` (flattened heads) at `slots`, one each.
    pub(crate) fn write(&mut self, level: Level, slots: &[u32], k: &[f32], v: Option<&[f32]>) {
        let mut row = 0;
        while row < slots.len() {
            // Rows that lie side by side in one block.
            let first = slots[row] as usize;
            let room = self.block_size - first % self.block_size;
            let follow = slots[row..].iter().take(room).enumerate();
            let rows = follow.take_while(|&(i, &slot)| slot as usize == first + i).count();
            self.write_run(level, first, row..row + rows, k, v);
            row += rows;
        }
    }

    /// Stores rows `rows` of `k` and `v` from `slot` on, all in one block.
    fn write_run(
        &mut self,
        level: Level,
        slot: usize,
        rows: Range<usize>,
        k: &[f32],
        v: Option<&[f32]>,
    ) {
        let (dk, dv, heads) =
            (self.spec.key_head_dim, self.spec.value_head_dim, self.spec.num_kv_heads);
        for head in 0..heads {
            let (at, stride) = self.key_at(slot, head);
            let column = head * dk;
            match &mut self.keys {
                Elements::F16(keys) if stride > 1 => {
                    let k = &k[rows.start * heads * dk + column..];
                    let (shape, to) = ((rows.len(), dk), &mut keys[at..]);
                    transpose_f16(level, k, heads * dk, shape, to, stride);
                }
                keys => {
                    for (i, row) in rows.clone().enumerate() {
                        let key = &k[row * heads * dk + column..][..dk];
                        match stride {
                            1 => keys.write(level, at + i * dk, key),
                            _ => keys.scatter(at + i, stride, key),
                        }
                    }
                }
            }
            if let Some(v) = v {
                for (i, row) in rows.clone().enumerate() {
                    let at = self.at(slot + i, head, dv);
                    self.values.write(level, at, &v[(row * heads + head) * dv..][..dv]);
                }
            }
        }
    }
}

/// All layers; each behind a lock that is never contended within one forward pass.
pub(crate) struct PagedCache {
    pub(crate) layers: Vec<RwLock<Layer>>,
}

impl PagedCache {
    /// Allocates `spec`.
    ///
    /// # Errors
    /// When the element type cannot be cached, or there is no room.
    pub(crate) fn new(spec: &CacheSpec) -> Result<Self, BackendError> {
        // Pages are mapped as the context grows: without this the process would be killed then.
        Self::within(available_bytes(), spec)
    }

    /// Allocates `spec` unless it takes more than `available` bytes, where that is known.
    fn within(available: Option<u64>, spec: &CacheSpec) -> Result<Self, BackendError> {
        if !matches!(spec.dtype, DType::F32 | DType::F16 | DType::BF16) {
            return Err(BackendError::Unsupported {
                backend: "cpu".to_owned(),
                what: format!("a cache of {}", spec.dtype),
            });
        }
        let slots = spec.num_blocks.saturating_mul(spec.block_size);
        let needed_bytes = (slots as u64).saturating_mul(spec.bytes_per_token() as u64);
        let no_room = |available_bytes| BackendError::OutOfMemory {
            what: format!("a cache of {slots} tokens"),
            needed_bytes,
            available_bytes,
        };
        if let Some(available) = available.filter(|a| needed_bytes > *a) {
            return Err(no_room(available));
        }
        let layer = |layer: &CacheLayerSpec| {
            let heads = slots.checked_mul(layer.num_kv_heads)?;
            let zeros = |dim| Elements::zeros(spec.dtype, heads.checked_mul(dim)?);
            Some(RwLock::new(Layer {
                spec: *layer,
                block_size: spec.block_size,
                keys: zeros(layer.key_head_dim)?,
                values: zeros(layer.value_head_dim)?,
            }))
        };
        let layers = spec.layers.iter().map(layer).collect::<Option<_>>();
        Ok(Self { layers: layers.ok_or_else(|| no_room(available.unwrap_or(0)))? })
    }

    /// Copies whole blocks of every layer, pair by pair.
    pub(crate) fn copy_blocks(&self, pairs: &[(u32, u32)]) {
        for layer in &self.layers {
            let mut layer = layer.write().unwrap_or_else(|e| e.into_inner());
            let rows = layer.block_size * layer.spec.num_kv_heads;
            let (keys, values) = (rows * layer.spec.key_head_dim, rows * layer.spec.value_head_dim);
            for &(from, to) in pairs {
                let (from, to) = (from as usize, to as usize);
                layer.keys.copy_within(from * keys, to * keys, keys);
                layer.values.copy_within(from * values, to * values, values);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endless_cache_is_refused_where_the_system_tells_no_memory() {
        let layers = vec![CacheLayerSpec { num_kv_heads: 3, key_head_dim: 8, value_head_dim: 8 }];
        let spec = CacheSpec { layers, block_size: 4, num_blocks: usize::MAX, dtype: DType::F16 };
        let error = PagedCache::within(None, &spec).err().map(|e| e.to_string());
        assert!(error.is_some_and(|e| e.contains("bytes")));
    }
}
