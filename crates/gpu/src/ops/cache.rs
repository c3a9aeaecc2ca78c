//! Paged keys and values on the device: `[slot][kv_head][words]`, a slot being `block * block_size + offset`.
//! A word is one f32, two of the narrower types (a head of an odd number of columns ends in a half-used word), or
//! codes of quantized rows, see `rows`.

mod rows;

use crate::gpu::{Buffer, Gpu, Reservation, WORD};
use cubecl::prelude::*;
use half::f16;
use marlin_tensor::{AttentionParams, BackendError, CACHE_GROUP, CacheSpec, CacheType};
pub(crate) use rows::rotate;

/// How keys or values are stored; comptime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Element {
    F32,
    F16,
    Bf16,
    Q8,
    Q4,
}

impl Element {
    /// Of a type that stores keys and values alike.
    fn of(cache_type: CacheType) -> Self {
        match cache_type {
            CacheType::F32 => Self::F32,
            CacheType::F16 => Self::F16,
            CacheType::Bf16 => Self::Bf16,
            CacheType::Q8 | CacheType::K8V4 => Self::Q8,
            CacheType::Q4 => Self::Q4,
        }
    }

    /// Whether these are codes of rows that are rotated.
    pub(crate) const fn is_quantized(self) -> bool {
        matches!(self, Self::Q8 | Self::Q4)
    }

    /// Elements of a word.
    pub(crate) const fn per_word(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8 => 4,
            Self::Q4 => 8,
        }
    }

    /// Words of a head of `dim` columns that hold elements.
    pub(crate) const fn words(self, dim: usize) -> usize {
        dim.div_ceil(self.per_word())
    }

    /// Words of a head of `dim` columns.
    pub(crate) const fn stride(self, dim: usize) -> usize {
        self.words(dim) + if self.is_quantized() { rows::head_words(dim) } else { 0 }
    }
}

/// One layer.
pub(crate) struct Layer {
    pub(crate) keys: Buffer,
    /// Empty when values are a prefix of the keys.
    pub(crate) values: Buffer,
    pub(crate) heads: usize,
    pub(crate) key_dim: usize,
    pub(crate) value_dim: usize,
}

/// All layers.
pub(crate) struct PagedCache {
    pub(crate) layers: Vec<Layer>,
    pub(crate) cache_type: CacheType,
    pub(crate) keys: Element,
    pub(crate) values: Element,
    pub(crate) block_size: usize,
    _reservation: Reservation,
}

impl PagedCache {
    /// Allocates and clears.
    ///
    /// # Errors
    /// When heads are no whole number of the groups of a quantized type, or the device has no room.
    pub(crate) fn new(gpu: &Gpu, spec: &CacheSpec) -> Result<Self, BackendError> {
        let (keys, values) =
            (Element::of(spec.cache_type.keys()), Element::of(spec.cache_type.values()));
        for l in spec.layers.iter().filter(|_| keys.is_quantized()) {
            let mut dims = [l.key_head_dim, l.value_head_dim].into_iter();
            if let Some(dim) = dims.find(|dim| !dim.is_multiple_of(CACHE_GROUP)) {
                return Err(unsupported(format!(
                    "a cache of type {} for heads of {dim} columns, which are no multiple of {CACHE_GROUP} (take f16, bf16 or f32)",
                    spec.cache_type
                )));
            }
        }
        let slots = spec.num_blocks.saturating_mul(spec.block_size);
        let per_slot =
            |element: Element, dim: usize, heads: usize| element.stride(dim).saturating_mul(heads);
        let of_layer = |l: &marlin_tensor::CacheLayerSpec| {
            per_slot(keys, l.key_head_dim, l.num_kv_heads)
                + per_slot(values, l.value_head_dim, l.num_kv_heads)
        };
        let words = spec.layers.iter().map(of_layer).fold(0usize, usize::saturating_add);
        let needed = (words as u64).saturating_mul(slots as u64).saturating_mul(WORD as u64);
        let reservation = gpu.reserve(&format!("a cache of {slots} tokens"), needed)?;
        let layer = |l: &marlin_tensor::CacheLayerSpec| Layer {
            keys: gpu.zeros(slots * per_slot(keys, l.key_head_dim, l.num_kv_heads)),
            values: match l.value_head_dim {
                0 => gpu.none.clone(),
                dim => gpu.zeros(slots * per_slot(values, dim, l.num_kv_heads)),
            },
            heads: l.num_kv_heads,
            key_dim: l.key_head_dim,
            value_dim: l.value_head_dim,
        };
        let layers = spec.layers.iter().map(layer).collect();
        let block_size = spec.block_size;
        Ok(Self {
            layers,
            cache_type: spec.cache_type,
            keys,
            values,
            block_size,
            _reservation: reservation,
        })
    }

    /// # Errors
    /// When latent values end within columns that were rotated together.
    pub(crate) fn check(&self, layer: usize, params: &AttentionParams) -> Result<(), BackendError> {
        let columns = params.value_head_dim;
        let latent = self.layers[layer].value_dim == 0;
        if latent && self.keys.is_quantized() && !columns.is_multiple_of(CACHE_GROUP) {
            return Err(unsupported(format!("latent values of {columns} columns in 8 or 4 bits")));
        }
        Ok(())
    }

    /// Copies whole blocks of every layer, pair by pair.
    pub(crate) fn copy_blocks(&self, gpu: &Gpu, pairs: &[(u32, u32)]) {
        for layer in &self.layers {
            for (array, stride) in [
                (&layer.keys, self.keys.stride(layer.key_dim)),
                (&layer.values, self.values.stride(layer.value_dim)),
            ] {
                let words = self.block_size * layer.heads * stride;
                for &(from, to) in pairs.iter().filter(|_| words > 0) {
                    let (from, to) = (from as usize * words, to as usize * words);
                    copy_within(gpu, array, from, to, words);
                }
            }
        }
    }

    /// Writes rows of keys and values (flattened heads) to the slots that `meta` holds in the third of every
    /// four words.
    pub(crate) fn write(
        &self,
        gpu: &Gpu,
        layer: usize,
        meta: &Buffer,
        rows: usize,
        keys: &Buffer,
        values: Option<&Buffer>,
    ) {
        let values = values.filter(|_| self.layers[layer].value_dim > 0);
        if self.keys.is_quantized() {
            return rows::write(gpu, self, layer, meta, rows, keys, values);
        }
        let layer = &self.layers[layer];
        let words = |dim: usize| self.keys.words(dim);
        let key_total = rows * layer.heads * words(layer.key_dim);
        let value_total = values.map_or(0, |_| rows * layer.heads * words(layer.value_dim));
        let (count, dims) = gpu.each(key_total + value_total);
        let x = values.unwrap_or(&gpu.none);
        // SAFETY: units past the end do nothing; slots lie in the cache.
        unsafe {
            write_kernel::launch_unchecked(
                &gpu.client,
                count,
                dims,
                keys.arg(),
                x.arg(),
                meta.arg(),
                layer.keys.arg(),
                layer.values.arg(),
                layer.heads as u32,
                key_total as u32,
                value_total as u32,
                layer.key_dim as u32,
                layer.value_dim as u32,
                self.keys,
            );
        }
    }
}

fn unsupported(what: String) -> BackendError {
    BackendError::Unsupported { backend: "gpu".to_owned(), what }
}

fn copy_within(gpu: &Gpu, array: &Buffer, from: usize, to: usize, len: usize) {
    let (count, dim) = gpu.each(len);
    let (from, to, len) = (from as u32, to as u32, len as u32);
    // SAFETY: units past `len` do nothing; blocks do not overlap.
    unsafe { copy_kernel::launch_unchecked(&gpu.client, count, dim, array.arg(), from, to, len) }
}

#[cube(launch_unchecked)]
fn copy_kernel(array: &mut [u32], from: u32, to: u32, len: u32) {
    if ABSOLUTE_POS < len as usize {
        array[ABSOLUTE_POS + to as usize] = array[ABSOLUTE_POS + from as usize];
    }
}

#[cube(launch_unchecked)]
fn write_kernel(
    keys: &[f32],
    values: &[f32],
    meta: &[u32],
    key_array: &mut [u32],
    value_array: &mut [u32],
    heads: u32,
    key_total: u32,
    value_total: u32,
    #[comptime] key_dim: u32,
    #[comptime] value_dim: u32,
    #[comptime] element: Element,
) {
    let i = ABSOLUTE_POS as u32;
    if i < key_total {
        put(keys, meta, key_array, i, heads, key_dim, element);
    } else if i < key_total + value_total {
        put(values, meta, value_array, i - key_total, heads, value_dim, element);
    }
}

/// Writes word `i` of rows of flattened heads to their slots.
#[cube]
fn put(
    x: &[f32],
    meta: &[u32],
    array: &mut [u32],
    i: u32,
    heads: u32,
    #[comptime] dim: u32,
    #[comptime] element: Element,
) {
    let words = comptime!(element.words(dim as usize).max(1) as u32);
    let word = i % words;
    let head = i / words;
    let slot = meta[(head / heads * 4 + 2) as usize];
    let to = ((slot * heads + head % heads) * words + word) as usize;
    if comptime!(element == Element::F32) {
        array[to] = u32::reinterpret(x[(head * dim + word) as usize]);
    } else {
        let column = word * 2;
        let a = x[(head * dim + column) as usize];
        let mut b = f32::new(0.0);
        if column + 1 < dim {
            b = x[(head * dim + column + 1) as usize];
        }
        array[to] = narrow(a, b, element);
    }
}

/// Two values as one word.
#[cube]
fn narrow(a: f32, b: f32, #[comptime] element: Element) -> u32 {
    if comptime!(element == Element::F16) {
        let mut pair = Vector::<f16, Const<2>>::new(f16::new(0.0));
        pair.insert(0usize, f16::cast_from(a));
        pair.insert(1usize, f16::cast_from(b));
        u32::reinterpret(pair)
    } else {
        (upper_half(a) >> 16u32) | upper_half(b)
    }
}

/// The nearest bf16, ties to even, in the upper half.
#[cube]
fn upper_half(v: f32) -> u32 {
    let bits = u32::reinterpret(v);
    let rounded = bits + 0x7fffu32 + ((bits >> 16u32) & 1u32);
    rounded & 0xffff0000u32
}

/// Column that element `e` of word `word` of a row is.
#[cube]
pub(crate) fn column(word: u32, #[comptime] e: u32, #[comptime] element: Element) -> u32 {
    if comptime!(element.is_quantized()) {
        rows::column(word, e, element)
    } else {
        word * comptime!(element.per_word() as u32) + e
    }
}

/// Elements of word `word` of a row of `dim` columns that begins at `row`; those of quantized rows are rotated.
#[cube]
pub(crate) fn read(
    array: &[u32],
    row: u32,
    word: u32,
    #[comptime] dim: u32,
    #[comptime] element: Element,
) -> Array<f32> {
    if comptime!(element.is_quantized()) {
        rows::read(array, row, word, dim, element)
    } else {
        let mut out = Array::<f32>::new(comptime!(element.per_word()));
        let word = array[(row + word) as usize];
        match comptime!(element) {
            Element::F16 => {
                let pair = Vector::<f16, Const<2>>::reinterpret(word);
                out[0] = f32::cast_from(pair.extract(0usize));
                out[1] = f32::cast_from(pair.extract(1usize));
            }
            Element::Bf16 => {
                out[0] = f32::reinterpret(word << 16u32);
                out[1] = f32::reinterpret(word & 0xffff0000u32);
            }
            _ => out[0] = f32::reinterpret(word),
        }
        out
    }
}
