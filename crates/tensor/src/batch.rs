//! The rows of one forward pass and the paged cache they read and write.

use crate::{CacheType, Opaque};

/// One sequence's share of a [`Batch`].
#[derive(Debug, Clone)]
pub struct BatchSequence {
    /// First row in the batch.
    pub first_row: usize,
    /// Consecutive rows (tokens) of this sequence in this pass.
    pub rows: usize,
    /// Whether they are tokens of an answer, [`Tensor::decode_rows`](crate::Tensor::decode_rows).
    pub decode: bool,
    /// Tokens in the cache once this pass is done; the last row has position `context_len - 1`.
    pub context_len: usize,
    /// Most tokens this sequence can ever hold (prompt and `max_tokens`): selects LongRoPE's table.
    pub max_context: u32,
    /// Cache block of each `block_size` tokens, in order.
    pub block_table: Vec<u32>,
}

/// Input of a forward pass over any number of sequences, prefill and decode mixed.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Token id per row.
    pub tokens: Vec<u32>,
    /// Position per row.
    pub positions: Vec<u32>,
    /// Cache slot per row: `block * block_size + offset`.
    pub slot_mapping: Vec<u32>,
    /// Sequences, in row order, covering all rows.
    pub sequences: Vec<BatchSequence>,
    /// Tokens per cache block.
    pub block_size: usize,
    /// Rows whose logits are wanted, ascending.
    pub output_rows: Vec<u32>,
    /// Most rows of one sequence among them.
    pub most_outputs: usize,
}

impl Batch {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Rows of answers, which come first.
    pub fn decode_rows(&self) -> usize {
        self.sequences.iter().filter(|s| s.decode).map(|s| s.rows).sum()
    }

    /// An empty batch over blocks of `block_size` tokens.
    pub fn new(block_size: usize) -> Self {
        Self {
            tokens: Vec::new(),
            positions: Vec::new(),
            slot_mapping: Vec::new(),
            sequences: Vec::new(),
            block_size,
            output_rows: Vec::new(),
            most_outputs: 0,
        }
    }

    /// Appends `tokens` of the prompt of one sequence whose cache already holds `start` tokens.
    /// `block_table` must cover `start + tokens.len()` positions. Logits are wanted for the
    /// last `outputs` of them.
    ///
    /// # Panics
    /// When the block table is too short: a bug of the caller.
    pub fn push(
        &mut self,
        tokens: &[u32],
        start: usize,
        block_table: &[u32],
        max_context: u32,
        outputs: usize,
    ) {
        self.append(tokens, start, block_table, max_context, outputs, false);
    }

    /// [`push`](Self::push) for tokens of an answer.
    ///
    /// # Panics
    /// When the block table is too short, or prompts were pushed before: bugs of the caller.
    pub fn push_decode(
        &mut self,
        tokens: &[u32],
        start: usize,
        block_table: &[u32],
        max_context: u32,
        outputs: usize,
    ) {
        assert!(self.sequences.last().is_none_or(|s| s.decode), "answers come before prompts");
        self.append(tokens, start, block_table, max_context, outputs, true);
    }

    fn append(
        &mut self,
        tokens: &[u32],
        start: usize,
        block_table: &[u32],
        max_context: u32,
        outputs: usize,
        decode: bool,
    ) {
        let first_row = self.rows();
        for (i, &token) in tokens.iter().enumerate() {
            let position = start + i;
            let block = block_table[position / self.block_size] as usize;
            self.tokens.push(token);
            self.positions.push(position as u32);
            self.slot_mapping.push((block * self.block_size + position % self.block_size) as u32);
        }
        let end = self.rows();
        self.output_rows.extend((end - outputs.min(tokens.len())..end).map(|r| r as u32));
        self.most_outputs = self.most_outputs.max(outputs.min(tokens.len()));
        self.sequences.push(BatchSequence {
            first_row,
            rows: tokens.len(),
            decode,
            context_len: start + tokens.len(),
            max_context,
            block_table: block_table.to_vec(),
        });
    }
}

/// What one layer caches per token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheLayerSpec {
    /// Key/value heads (1 for latent attention).
    pub num_kv_heads: usize,
    /// Columns of one key head (latent rank plus rotary columns for latent attention).
    pub key_head_dim: usize,
    /// Columns of one value head; 0 when values are a prefix of the keys (latent attention).
    pub value_head_dim: usize,
}

impl CacheLayerSpec {
    /// Bytes stored per token.
    pub fn bytes_per_token(&self, cache_type: CacheType) -> usize {
        self.num_kv_heads * cache_type.bytes_per_head(self.key_head_dim, self.value_head_dim)
    }
}

/// Shape of a paged cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheSpec {
    /// One entry per layer that caches.
    pub layers: Vec<CacheLayerSpec>,
    /// Tokens per block.
    pub block_size: usize,
    /// Blocks in the pool.
    pub num_blocks: usize,
    /// Element type.
    pub cache_type: CacheType,
}

impl CacheSpec {
    /// Bytes one token takes over all layers.
    pub fn bytes_per_token(&self) -> usize {
        self.layers.iter().map(|layer| layer.bytes_per_token(self.cache_type)).sum()
    }
}

/// A paged key/value cache living on a backend.
#[derive(Clone)]
pub struct Cache {
    /// Its shape.
    pub spec: CacheSpec,
    /// Backend storage.
    pub handle: Opaque,
}
