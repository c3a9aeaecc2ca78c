//! Codes as containers pack them into 32-bit words, read in the order of the inputs.

use super::invalid;
use crate::QuantError;
use bytes::Bytes;
use marlin_checkpoint::{Encoding, StoredTensor};
use marlin_tensor::DType;

/// Little-endian words.
#[derive(Clone)]
pub(super) struct Words(Bytes);

impl Words {
    /// Those of `stored`.
    pub(super) fn of(stored: &StoredTensor) -> Result<Self, QuantError> {
        match stored.encoding {
            Encoding::Plain(DType::I32 | DType::U32) => Ok(Self(stored.data.clone())),
            _ => Err(invalid(&stored.name, "packed codes must be stored as I32")),
        }
    }

    #[inline]
    pub(super) fn get(&self, i: usize) -> u32 {
        let b = &self.0[4 * i..4 * i + 4];
        u32::from_le_bytes([b[0], b[1], b[2], b[3]])
    }
}

/// Where codes of several bits follow each other without gaps, the lowest bits first, the one at place
/// `start` and those behind it.
pub(super) fn dense(word: impl Fn(usize) -> u32, bits: u32, start: usize, out: &mut [u8]) {
    let first = start * bits as usize;
    let (mut next, skipped) = (first / 32, (first % 32) as u32);
    let (mut buffer, mut held) = (0u64, 0u32);
    if skipped > 0 {
        (buffer, held) = (u64::from(word(next) >> skipped), 32 - skipped);
        next += 1;
    }
    let mask = (1u64 << bits) - 1;
    for code in out {
        if held < bits {
            buffer |= u64::from(word(next)) << held;
            next += 1;
            held += 32;
        }
        *code = (buffer & mask) as u8;
        buffer >>= bits;
        held -= bits;
    }
}

/// All codes of a matrix.
pub(super) enum Codes {
    /// Dense along the inputs, word after word of one output.
    Rows {
        /// `[out_features, words]`.
        words: Words,
        /// Words of an output.
        stride: usize,
        /// Bits of a code.
        bits: u32,
    },
    /// Dense along the inputs, the words of all outputs side by side.
    Columns {
        /// `[words, out_features]`.
        words: Words,
        /// Outputs.
        outputs: usize,
        /// Bits of a code.
        bits: u32,
    },
    /// Eight outputs in a word, interleaved as AWQ does.
    Interleaved {
        /// `[in_features, words]`.
        words: Words,
        /// Words of an input.
        stride: usize,
    },
    /// One byte a code, `[out_features, in_features]`.
    Bytes(Vec<u8>),
}

/// Place of output `i` of eight in an AWQ word, in nibbles.
const AWQ_PLACE: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Code of output `i` in words of eight outputs.
pub(super) fn interleaved(words: &Words, first: usize, i: usize) -> u8 {
    (words.get(first + i / 8) >> (4 * AWQ_PLACE[i % 8]) & 15) as u8
}

impl Codes {
    /// The codes of output `row` from input `start` on.
    pub(super) fn read(&self, row: usize, start: usize, in_features: usize, out: &mut [u8]) {
        match self {
            Self::Rows { words, stride, bits } => {
                dense(|w| words.get(row * stride + w), *bits, start, out);
            }
            Self::Columns { words, outputs, bits } => {
                dense(|w| words.get(w * outputs + row), *bits, start, out);
            }
            Self::Interleaved { words, stride } => {
                for (i, code) in out.iter_mut().enumerate() {
                    *code = interleaved(words, (start + i) * stride, row);
                }
            }
            Self::Bytes(bytes) => {
                out.copy_from_slice(&bytes[row * in_features + start..][..out.len()]);
            }
        }
    }
}
