//! What kernels know of a batch: one array of words, written once per pass.
//!
//! | words | what |
//! | --- | --- |
//! | `4 r …` | token, position, cache slot and sequence of row `r` |
//! | `4 rows + s · blocks …` | cache blocks of sequence `s`, zeros past its last |
//!
//! Cosines and sines of the rows' positions are computed on the host, as transformers does, and kept per rotary table.

use crate::gpu::{Buffer, Gpu, lock};
use marlin_tensor::{Batch, Rope};
use std::sync::{Arc, Mutex};

/// A rotary table, told apart by its address.
pub(crate) struct Frequencies(pub(crate) Rope);

/// Angles of one rotary table, on the device.
type Angles = (Arc<Frequencies>, Buffer);

/// A batch on the device.
pub(crate) struct Step {
    pub(crate) rows: usize,
    /// Places for cache blocks per sequence.
    pub(crate) blocks: usize,
    pub(crate) meta: Buffer,
    angles: Mutex<Vec<Angles>>,
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
        Self { rows: shape.rows, blocks: shape.blocks, meta, angles: Mutex::default() }
    }

    /// Overwrites it with another batch of the same shape.
    pub(crate) fn rewrite(&self, gpu: &Gpu, batch: &Batch) {
        gpu.write(&self.meta, &words(batch, StepShape::of(batch)));
        for (frequencies, buffer) in lock(&self.angles).iter() {
            let angles: Vec<u32> =
                angles(&frequencies.0, batch).into_iter().map(f32::to_bits).collect();
            gpu.write(buffer, &angles);
        }
    }

    /// `[rows, pairs, 2]`: cosine and sine, magnitude included.
    pub(crate) fn angles(
        &self,
        gpu: &Gpu,
        frequencies: &Arc<Frequencies>,
        batch: &Batch,
    ) -> Buffer {
        let mut known = lock(&self.angles);
        if let Some((_, buffer)) = known.iter().find(|(f, _)| Arc::ptr_eq(f, frequencies)) {
            return buffer.clone();
        }
        let buffer = gpu.floats(&angles(&frequencies.0, batch));
        known.push((frequencies.clone(), buffer.clone()));
        buffer
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
