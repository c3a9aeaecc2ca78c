//! What kernels know of a batch: one array of words, written once per pass.
//!
//! | words | what |
//! | --- | --- |
//! | `4 r …` | token, position, cache slot and sequence of row `r` |
//! | `4 rows + s · blocks …` | cache blocks of sequence `s`, zeros past its last |
//!
//! What the host works out of a batch ([`Source`]) is kept beside it and written anew with it: cosines and sines of the rows'
//! positions, as transformers does, and rows of embeddings in formats that no kernel reads by rows.

use crate::gpu::{Buffer, Gpu, lock};
use marlin_tensor::{BackendError, Batch, Rope, Weight};
use std::sync::{Arc, Mutex};

/// A table from which the host works out values of a batch.
#[derive(Clone)]
pub(crate) enum Source {
    /// Cosines and sines, `[rows, pairs, 2]`, magnitude included.
    Rope(Arc<Rope>),
    /// Rows of an embedding times a factor, `[rows, columns]`.
    Embedding(Arc<Weight>, f32),
}

impl Source {
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Rope(a), Self::Rope(b)) => Arc::ptr_eq(a, b),
            (Self::Embedding(a, x), Self::Embedding(b, y)) => Arc::ptr_eq(a, b) && x == y,
            _ => false,
        }
    }

    fn values(&self, batch: &Batch) -> Result<Vec<f32>, BackendError> {
        match self {
            Self::Rope(rope) => Ok(angles(rope, batch)),
            Self::Embedding(weight, scale) => embeddings(weight, *scale, batch),
        }
    }
}

/// A batch on the device.
pub(crate) struct Step {
    pub(crate) rows: usize,
    pub(crate) sequences: usize,
    /// Places for cache blocks per sequence.
    pub(crate) blocks: usize,
    pub(crate) meta: Buffer,
    made: Mutex<Vec<(Source, Buffer)>>,
}

/// Rows and places for blocks: batches of one shape fit the same [`Step`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StepShape {
    pub(crate) rows: usize,
    pub(crate) sequences: usize,
    pub(crate) blocks: usize,
}

/// Places for blocks a sequence has at least.
const FEWEST_BLOCKS: usize = 16;

impl StepShape {
    /// The shape of `batch`, with room for its sequences to grow.
    pub(crate) fn of(batch: &Batch) -> Self {
        let longest = batch.sequences.iter().map(|s| s.block_table.len()).max().unwrap_or(0);
        Self {
            rows: batch.rows(),
            sequences: batch.sequences.len(),
            blocks: longest.next_power_of_two().max(FEWEST_BLOCKS),
        }
    }
}

impl Step {
    /// Writes `batch` to the device.
    pub(crate) fn new(gpu: &Gpu, batch: &Batch) -> Self {
        let shape = StepShape::of(batch);
        let meta = gpu.words(&words(batch, shape));
        let StepShape { rows, sequences, blocks } = shape;
        Self { rows, sequences, blocks, meta, made: Mutex::default() }
    }

    /// Overwrites it with another batch of the same shape.
    ///
    /// # Errors
    /// When a table cannot be decoded.
    pub(crate) fn rewrite(&self, gpu: &Gpu, batch: &Batch) -> Result<(), BackendError> {
        gpu.write(&self.meta, &words(batch, StepShape::of(batch)));
        for (source, buffer) in lock(&self.made).iter() {
            let values: Vec<u32> = source.values(batch)?.into_iter().map(f32::to_bits).collect();
            gpu.write(buffer, &values);
        }
        Ok(())
    }

    /// Values of the batch from `source`, to be read only: the next pass finds them here too.
    ///
    /// # Errors
    /// When the table cannot be decoded.
    pub(crate) fn made(
        &self,
        gpu: &Gpu,
        source: &Source,
        batch: &Batch,
    ) -> Result<Buffer, BackendError> {
        let mut known = lock(&self.made);
        if let Some((_, buffer)) = known.iter().find(|(s, _)| s.is(source)) {
            return Ok(buffer.clone());
        }
        let buffer = gpu.floats(&source.values(batch)?);
        known.push((source.clone(), buffer.clone()));
        Ok(buffer)
    }
}

fn words(batch: &Batch, shape: StepShape) -> Vec<u32> {
    let mut words = vec![0; 4 * shape.rows + shape.sequences * shape.blocks];
    let (rows, tables) = words.split_at_mut(4 * shape.rows);
    for (row, words) in rows.chunks_exact_mut(4).enumerate() {
        words[0] = batch.tokens[row];
        words[1] = batch.positions[row];
        words[2] = batch.slot_mapping[row];
    }
    let parts = batch.sequences.iter().zip(tables.chunks_exact_mut(shape.blocks));
    for (s, (sequence, table)) in parts.enumerate() {
        table[..sequence.block_table.len()].copy_from_slice(&sequence.block_table);
        for row in sequence.first_row..sequence.first_row + sequence.rows {
            rows[4 * row + 3] = s as u32;
        }
    }
    words
}

/// Angles are rounded to f32 before cosine and sine are taken.
fn angles(rope: &Rope, batch: &Batch) -> Vec<f32> {
    let mut out = Vec::with_capacity(batch.rows() * rope.rotary_dim());
    for sequence in &batch.sequences {
        let (frequencies, magnitude) = match &rope.long {
            Some(long) if sequence.max_context > long.threshold => (&long.inv_freq, long.magnitude),
            _ => (&rope.inv_freq, rope.magnitude),
        };
        let rows = sequence.first_row..sequence.first_row + sequence.rows;
        for &position in &batch.positions[rows] {
            for frequency in frequencies {
                let (sin, cos) = (position as f32 * frequency).sin_cos();
                out.extend([cos * magnitude, sin * magnitude]);
            }
        }
    }
    out
}

/// Rows of the tokens, times `scale`.
fn embeddings(weight: &Weight, scale: f32, batch: &Batch) -> Result<Vec<f32>, BackendError> {
    let format = marlin_quant::format(weight.format);
    let columns = weight.in_features;
    let mut out = vec![0.0; batch.rows() * columns];
    for (&token, row) in batch.tokens.iter().zip(out.chunks_exact_mut(columns)) {
        format.decode_row(weight, token as usize, row).map_err(|e| {
            let what = format!("embedding of token {token}");
            BackendError::Decode { what, reason: e.to_string() }
        })?;
        row.iter_mut().for_each(|v| *v *= scale);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_hold_rows_and_tables() {
        let mut batch = Batch::new(4);
        batch.push(&[7], 5, &[3, 1], 64, 1);
        batch.push(&[8, 9], 0, &[2], 64, 1);
        let shape = StepShape::of(&batch);
        assert_eq!(shape, StepShape { rows: 3, sequences: 2, blocks: FEWEST_BLOCKS });
        let words = words(&batch, shape);
        assert_eq!(words[..12], [7, 5, 5, 0, 8, 0, 8, 1, 9, 1, 9, 1]);
        assert_eq!(words[12..15], [3, 1, 0]);
        assert_eq!(words[12 + FEWEST_BLOCKS..][..2], [2, 0]);
        assert_eq!(words.len(), 12 + 2 * FEWEST_BLOCKS);
    }
}
