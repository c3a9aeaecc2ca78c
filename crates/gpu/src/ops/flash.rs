//! Attention of prompts on NVIDIA's tensor cores: for caches of 16, 8 and 4 bits and heads of up to 128 columns (`flash.cu`), and where values are a prefix
//! of the keys, of 16 bits (`flash_latent.cu`).

use super::cache::{Element, PagedCache};
use super::text::{Defines, Text};
use crate::gpu::{Buffer, Gpu};
use crate::step::Step;
use marlin_tensor::AttentionParams;

/// Rows of a block, where values are a prefix of the keys too, and its threads.
const ROWS: usize = 64;
const LATENT_ROWS: usize = 16;
const THREADS: u32 = 128;
/// Rows of a sequence from which on it pays, on average.
const ROWS_PER_SEQUENCE: usize = 16;
/// Most columns of a head, and of one whose first columns are the values; these come in as many.
const MOST: usize = 128;
const MOST_LATENT: usize = 576;
const LATENT_COLUMNS: usize = 64;

/// What `flash.cu` is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    heads: usize,
    kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
    /// Bits of a column of keys and of values in the cache.
    bits: (usize, usize),
    brain: bool,
    block_size: usize,
    /// Bits of floats.
    scale: u32,
    window: u32,
    cap: Option<u32>,
}

impl Defines for Shape {
    const TEXT: &str = concat!(
        include_str!("ptx.cuh"),
        include_str!("halves.cuh"),
        include_str!("flash.cuh"),
        include_str!("flash.cu")
    );

    fn defines(&self) -> Vec<(&'static str, String)> {
        let float = |bits: u32| format!("{:e}f", f32::from_bits(bits));
        vec![
            ("HEADS", self.heads.to_string()),
            ("KV_HEADS", self.kv_heads.to_string()),
            ("KEY", self.key_dim.to_string()),
            ("VALUE", self.value_dim.to_string()),
            ("KEY_BITS", self.bits.0.to_string()),
            ("VALUE_BITS", self.bits.1.to_string()),
            ("BRAIN", u32::from(self.brain).to_string()),
            ("BLOCK_SIZE", self.block_size.to_string()),
            ("SCALE", float(self.scale)),
            ("WINDOW", format!("{}u", self.window)),
            ("CAPPED", u32::from(self.cap.is_some()).to_string()),
            ("CAP", float(self.cap.unwrap_or(1.0f32.to_bits()))),
        ]
    }
}

/// The same for `flash_latent.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Latent(Shape);

impl Defines for Latent {
    const TEXT: &str = concat!(
        include_str!("ptx.cuh"),
        include_str!("halves.cuh"),
        include_str!("flash.cuh"),
        include_str!("flash_latent.cu")
    );

    fn defines(&self) -> Vec<(&'static str, String)> {
        self.0.defines()
    }
}

/// `[rows, num_heads * value_head_dim]`; `None` where another kernel has to do it.
pub(super) fn attend(
    gpu: &Gpu,
    q: &Buffer,
    cache: &PagedCache,
    layer: usize,
    step: &Step,
    params: &AttentionParams,
) -> Option<Buffer> {
    let layer = &cache.layers[layer];
    let latent = layer.value_dim == 0;
    let (columns, most) = if latent { (LATENT_COLUMNS, MOST_LATENT) } else { (16, MOST) };
    let dims = [params.key_head_dim, params.value_head_dim];
    let fits = dims.iter().all(|dim| dim.is_multiple_of(columns) && (columns..=most).contains(dim));
    let bits = (32 / cache.keys.per_word(), 32 / cache.values.per_word());
    let narrow = bits.0 < 32 && (!latent || (bits.0 == 16 && params.num_kv_heads == 1));
    let many = step.rows >= ROWS_PER_SEQUENCE * step.sequences;
    if !(gpu.tensor_cores && fits && narrow && many) {
        return None;
    }
    let shape = Shape {
        heads: params.num_heads,
        kv_heads: params.num_kv_heads,
        key_dim: params.key_head_dim,
        value_dim: params.value_head_dim,
        bits,
        brain: cache.keys == Element::Bf16,
        block_size: cache.block_size,
        scale: params.scale.to_bits(),
        window: params.window.unwrap_or(0),
        cap: params.softcap.map(f32::to_bits),
    };
    let out = gpu.empty(step.rows * params.num_heads * params.value_head_dim);
    let word = step.rows as u64 | (step.blocks as u64) << 32;
    let blocks = |rows: usize| (step.rows.div_ceil(rows) as u32, params.num_heads as u32);
    let (function, threads) = ("attend", THREADS);
    if latent {
        let text = Text { function, threads, defines: Latent(shape) };
        text.launch(gpu, blocks(LATENT_ROWS), &[q, &layer.keys, &step.meta, &out], word);
    } else {
        let text = Text { function, threads, defines: shape };
        let arrays = [q, &layer.keys, &layer.values, &step.meta, &out];
        text.launch(gpu, blocks(ROWS), &arrays, word);
    }
    Some(out)
}
