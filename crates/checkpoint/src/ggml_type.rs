//! The block types of ggml, as numbered in GGUF files, with the size of their blocks.
//!
//! A block covers consecutive elements of the fastest dimension, so a row holds a whole number of
//! blocks. Types with one element per block (F32, F16, BF16, F64 and the integers) are not listed
//! here: they are [`Encoding::Plain`]. Source of numbers and sizes: the `gguf` Python package
//! 0.19.0, `gguf.constants.GGML_QUANT_SIZES`.

use crate::Encoding;
use marlin_tensor::DType;
use std::fmt;

/// Storage type of a GGUF tensor whose elements come in blocks.
///
/// All but [`Q8_1`](Self::Q8_1), [`Q8K`](Self::Q8K) (activations, never stored by a converter) and
/// [`Q1_0`](Self::Q1_0) can be dequantized by the `gguf` package.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum GgmlType {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q8_1,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Q8K,
    Iq2Xxs,
    Iq2Xs,
    Iq3Xxs,
    Iq1S,
    Iq4Nl,
    Iq3S,
    Iq2S,
    Iq4Xs,
    Iq1M,
    Tq1_0,
    Tq2_0,
    Mxfp4,
    Nvfp4,
    Q1_0,
}

/// Type, number in the file, name, elements per block, bytes per block. In the enum's order.
const TABLE: [(GgmlType, u32, &str, usize, usize); 26] = [
    (GgmlType::Q4_0, 2, "Q4_0", 32, 18),
    (GgmlType::Q4_1, 3, "Q4_1", 32, 20),
    (GgmlType::Q5_0, 6, "Q5_0", 32, 22),
    (GgmlType::Q5_1, 7, "Q5_1", 32, 24),
    (GgmlType::Q8_0, 8, "Q8_0", 32, 34),
    (GgmlType::Q8_1, 9, "Q8_1", 32, 40),
    (GgmlType::Q2K, 10, "Q2_K", 256, 84),
    (GgmlType::Q3K, 11, "Q3_K", 256, 110),
    (GgmlType::Q4K, 12, "Q4_K", 256, 144),
    (GgmlType::Q5K, 13, "Q5_K", 256, 176),
    (GgmlType::Q6K, 14, "Q6_K", 256, 210),
    (GgmlType::Q8K, 15, "Q8_K", 256, 292),
    (GgmlType::Iq2Xxs, 16, "IQ2_XXS", 256, 66),
    (GgmlType::Iq2Xs, 17, "IQ2_XS", 256, 74),
    (GgmlType::Iq3Xxs, 18, "IQ3_XXS", 256, 98),
    (GgmlType::Iq1S, 19, "IQ1_S", 256, 50),
    (GgmlType::Iq4Nl, 20, "IQ4_NL", 32, 18),
    (GgmlType::Iq3S, 21, "IQ3_S", 256, 110),
    (GgmlType::Iq2S, 22, "IQ2_S", 256, 82),
    (GgmlType::Iq4Xs, 23, "IQ4_XS", 256, 136),
    (GgmlType::Iq1M, 29, "IQ1_M", 256, 56),
    (GgmlType::Tq1_0, 34, "TQ1_0", 256, 54),
    (GgmlType::Tq2_0, 35, "TQ2_0", 256, 66),
    (GgmlType::Mxfp4, 39, "MXFP4", 32, 17),
    (GgmlType::Nvfp4, 40, "NVFP4", 64, 36),
    (GgmlType::Q1_0, 41, "Q1_0", 128, 18),
];

/// Plain types and their numbers in the file.
const PLAIN: [(DType, u32); 8] = [
    (DType::F32, 0),
    (DType::F16, 1),
    (DType::I8, 24),
    (DType::I16, 25),
    (DType::I32, 26),
    (DType::I64, 27),
    (DType::F64, 28),
    (DType::BF16, 30),
];

impl GgmlType {
    /// Every block type, in order of number.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }

    /// The block type with this number in a GGUF file. `None` also for plain types: see
    /// [`Encoding::from_ggml_number`].
    pub fn from_number(number: u32) -> Option<Self> {
        TABLE.iter().find(|row| row.1 == number).map(|row| row.0)
    }

    /// Number in a GGUF file.
    pub fn number(self) -> u32 {
        TABLE[self as usize].1
    }

    /// Name as the `gguf` package spells it, for example `Q4_K`.
    pub fn name(self) -> &'static str {
        TABLE[self as usize].2
    }

    /// Elements of the fastest dimension in one block.
    pub fn block_elements(self) -> usize {
        TABLE[self as usize].3
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        TABLE[self as usize].4
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Encoding {
    /// The encoding with this number in a GGUF file, plain or in blocks.
    pub fn from_ggml_number(number: u32) -> Option<Self> {
        let plain = PLAIN.iter().find(|row| row.1 == number);
        plain
            .map(|row| Self::Plain(row.0))
            .or_else(|| GgmlType::from_number(number).map(Self::Ggml))
    }

    /// Number in a GGUF file; `None` for the plain types that GGUF cannot store.
    pub fn ggml_number(self) -> Option<u32> {
        match self {
            Self::Plain(dtype) => PLAIN.iter().find(|row| row.0 == dtype).map(|row| row.1),
            Self::Ggml(ggml) => Some(ggml.number()),
        }
    }

    /// Elements of the fastest dimension in one block; 1 for plain types.
    pub fn block_elements(self) -> usize {
        match self {
            Self::Plain(_) => 1,
            Self::Ggml(ggml) => ggml.block_elements(),
        }
    }

    /// Bytes of one block; of one element for plain types.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::Plain(dtype) => dtype.size_bytes(),
            Self::Ggml(ggml) => ggml.block_bytes(),
        }
    }

    /// Bytes that a tensor of `shape` (slowest dimension first) takes. `None` when the fastest
    /// dimension is not a whole number of blocks or the size overflows.
    pub fn byte_len(self, shape: &[usize]) -> Option<usize> {
        let (&columns, rows) = match shape.split_last() {
            Some(split) => split,
            None => (&1, shape),
        };
        if columns % self.block_elements() != 0 {
            return None;
        }
        let row = (columns / self.block_elements()).checked_mul(self.block_bytes())?;
        rows.iter().try_fold(row, |n, &d| n.checked_mul(d))
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(dtype) => dtype.fmt(f),
            Self::Ggml(ggml) => ggml.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_in_the_enum_order_and_numbers_invert() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(row.0 as usize, i);
            assert_eq!(GgmlType::from_number(row.1), Some(row.0));
            assert_eq!(Encoding::from_ggml_number(row.1), Some(Encoding::Ggml(row.0)));
            assert_eq!(row.0.number(), row.1);
        }
        for (dtype, number) in PLAIN {
            assert_eq!(Encoding::from_ggml_number(number), Some(Encoding::Plain(dtype)));
            assert_eq!(Encoding::Plain(dtype).ggml_number(), Some(number));
        }
        // 4 and 5 were withdrawn, 31 to 33 and 36 to 38 are repacked forms.
        for number in [4, 5, 31, 32, 33, 36, 37, 38, 42, u32::MAX] {
            assert_eq!(Encoding::from_ggml_number(number), None);
        }
    }

    #[test]
    fn byte_lengths() {
        let q4k = Encoding::Ggml(GgmlType::Q4K);
        assert_eq!(q4k.byte_len(&[3, 512]), Some(3 * 2 * 144));
        assert_eq!(q4k.byte_len(&[3, 300]), None);
        assert_eq!(q4k.byte_len(&[usize::MAX, 512]), None);
        let f32 = Encoding::Plain(DType::F32);
        assert_eq!(f32.byte_len(&[]), Some(4));
        assert_eq!(f32.byte_len(&[0, 7]), Some(0));
        assert_eq!(f32.byte_len(&[usize::MAX]), None);
    }
}
