//! Paged keys and values.
//!
//! Every layer keeps values as `[block][kv_head][slot][value_head_dim]` and keys transposed, as
//! `[block][kv_head][key_head_dim][slot]`: the scores of neighbouring slots are then sums of
//! registers, with nothing to add up inside one. Latent keys, which are values too, stay
//! `[block][slot][key_head_dim]`, and so do quantized keys. Pages are mapped by the system when first written.

mod rows;

use crate::Level;
use crate::memory::system::free;
use crate::memory::zeroed;
use crate::simd::{narrow_f16, transpose_f16, widen_bf16, widen_f16};
use half::{bf16, f16};
use marlin_tensor::{
    AttentionParams, BackendError, CACHE_GROUP, CacheLayerSpec, CacheSpec, CacheType,
};
pub(crate) use rows::{Bits, HADAMARD, HEAD, Rows, rotate};
use std::ops::Range;
use std::sync::RwLock;

/// Elements of one cache array; halves as bit patterns, so that zeros come unmapped from the system.
pub(crate) enum Elements {
    F32(Vec<f32>),
    F16(Vec<u16>),
    BF16(Vec<u16>),
    Quantized(Rows),
}

impl Elements {
    /// `rows` rows of `columns`.
    fn zeros(cache_type: CacheType, rows: usize, columns: usize) -> Option<Self> {
        let len = rows.checked_mul(columns)?;
        Some(match cache_type {
            CacheType::F32 => Self::F32(zeroed(len)?),
            CacheType::F16 => Self::F16(zeroed(len)?),
            CacheType::Bf16 => Self::BF16(zeroed(len)?),
            CacheType::Q8 | CacheType::K8V4 => {
                Self::Quantized(Rows::zeros(Bits::Eight, rows, columns)?)
            }
            CacheType::Q4 => Self::Quantized(Rows::zeros(Bits::Four, rows, columns)?),
        })
    }

    /// Rounds `values` to the element type and writes them at `at`; a row, if it is quantized.
    pub(crate) fn write(&mut self, level: Level, at: usize, values: &[f32]) {
        let range = at..at + values.len();
        match self {
            Self::F32(e) => e[range].copy_from_slice(values),
            Self::F16(e) => narrow_f16(level, values, &mut e[range]),
            Self::BF16(e) => {
                let rounded = values.iter().map(|v| bf16::from_f32(*v).to_bits());
                e[range].iter_mut().zip(rounded).for_each(|(e, v)| *e = v);
            }
            Self::Quantized(rows) => rows.write(at, values),
        }
    }

    /// Widens `out.len()` elements from `at`; rows as they are stored, if it is quantized.
    pub(crate) fn read(&self, level: Level, at: usize, out: &mut [f32]) {
        let range = at..at + out.len();
        match self {
            Self::F32(e) => out.copy_from_slice(&e[range]),
            Self::F16(e) => widen_f16(level, &e[range], out),
            Self::BF16(e) => widen_bf16(level, &e[range], out),
            Self::Quantized(rows) => rows.read(level, at, out),
        }
    }

    /// Rounds `values` to the element type and writes them `stride` apart from `at` on; quantized rows
    /// are never apart.
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
            Self::Quantized(rows) => rows.write(at, values),
        }
    }

    /// Widens `out.len()` elements `stride` apart from `at` on.
    fn gather(&self, at: usize, stride: usize, out: &mut [f32]) {
        let mut each = |element: &dyn Fn(usize) -> f32| {
            out.iter_mut().enumerate().for_each(|(i, out)| *out = element(at + i * stride));
        };
        match self {
            Self::F32(e) => each(&|at| e[at]),
            Self::F16(e) => each(&|at| f16::from_bits(e[at]).to_f32()),
            Self::BF16(e) => each(&|at| bf16::from_bits(e[at]).to_f32()),
            Self::Quantized(rows) => {
                let mut row = vec![0.0; rows.columns()];
                self.read(Level::Scalar, at, &mut row);
                rotate(&mut row);
                out.copy_from_slice(&row[..out.len()]);
            }
        }
    }

    fn copy_within(&mut self, from: usize, to: usize, len: usize) {
        match self {
            Self::F32(e) => e.copy_within(from..from + len, to),
            Self::F16(e) => e.copy_within(from..from + len, to),
            Self::BF16(e) => e.copy_within(from..from + len, to),
            Self::Quantized(rows) => rows.copy_within(from, to, len),
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

    /// Whether rows are stored rotated, see [`Rows`].
    pub(crate) fn is_rotated(&self) -> bool {
        matches!(self.keys, Elements::Quantized(_))
    }

    /// Whether the slots of a block lie side by side in each column of its keys.
    pub(crate) fn has_transposed_keys(&self) -> bool {
        !self.is_latent() && !self.is_rotated()
    }

    /// # Errors
    /// When latent values end within columns that were rotated together.
    pub(crate) fn check(&self, params: &AttentionParams) -> Result<(), BackendError> {
        let columns = params.value_head_dim;
        if self.is_latent() && self.is_rotated() && !columns.is_multiple_of(CACHE_GROUP) {
            let what = format!("latent values of {columns} columns in 8 or 4 bits");
            return Err(BackendError::Unsupported { backend: "cpu".to_owned(), what });
        }
        Ok(())
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

    /// The value of one head at `slot`, of a layer that is not latent.
    pub(crate) fn value(&self, slot: usize, head: usize, out: &mut [f32]) {
        self.values.gather(self.at(slot, head, self.spec.value_head_dim), 1, out);
    }

    /// Start and stride of a key.
    fn key_at(&self, slot: usize, head: usize) -> (usize, usize) {
        if !self.has_transposed_keys() {
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
    /// When there is no room.
    pub(crate) fn new(spec: &CacheSpec) -> Result<Self, BackendError> {
        // Pages are mapped as the context grows: without this the process would be killed then.
        Self::within(free().map(|free| free.bytes), spec)
    }

    /// Allocates `spec` unless it takes more than `available` bytes, where that is known.
    fn within(available: Option<u64>, spec: &CacheSpec) -> Result<Self, BackendError> {
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
            Some(RwLock::new(Layer {
                spec: *layer,
                block_size: spec.block_size,
                keys: Elements::zeros(spec.cache_type.keys(), heads, layer.key_head_dim)?,
                values: Elements::zeros(spec.cache_type.values(), heads, layer.value_head_dim)?,
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
        let cache_type = CacheType::F16;
        let spec = CacheSpec { layers, block_size: 4, num_blocks: usize::MAX, cache_type };
        let error = PagedCache::within(None, &spec).err().map(|e| e.to_string());
        assert!(error.is_some_and(|e| e.contains("bytes")));
    }
}
