//! Blocks of 128, 64 or 32 inputs of one output under one scale and zero point: what kernels multiply.
//!
//! | bytes | holds |
//! | --- | --- |
//! | 0 | zero point |
//! | 1 … 3 | scale: the upper three bytes of an f32 |
//! | 4 … | codes in the order of the inputs: one byte each, or two a byte, the first in the low half |
//!
//! Stored groups are cut into blocks that divide them; a scale per output is repeated. Three bytes hold
//! every f16 and bf16, and a product with a code in f32 is exact. An f32 is held so only if its lowest byte is zero.

use super::{Grouped, Groups};
use crate::{Description, QuantError, WeightFormat, parts};
use marlin_checkpoint::{Checkpoint, CheckpointError};
use marlin_tensor::{DType, HostTensor, Weight};
use std::ops::Range;

/// Bits of a scale that a block does not hold.
const LOST: u32 = 0xff;
/// Bytes before the codes.
const HEAD: usize = 4;

/// Blocks of one size.
pub struct Blocks {
    id: &'static str,
    /// Bits of a code: 4 or 8.
    bits: usize,
    /// Inputs of a block.
    pub(super) group: usize,
}

/// Four bits, blocks of 128.
pub static INT4_G128: Blocks = Blocks { id: "int4_g128", bits: 4, group: 128 };
/// Four bits, blocks of 64.
pub static INT4_G64: Blocks = Blocks { id: "int4_g64", bits: 4, group: 64 };
/// Four bits, blocks of 32.
pub static INT4_G32: Blocks = Blocks { id: "int4_g32", bits: 4, group: 32 };
/// Eight bits, blocks of 128.
pub static INT8_G128: Blocks = Blocks { id: "int8_g128", bits: 8, group: 128 };
/// Eight bits, blocks of 32.
pub static INT8_G32: Blocks = Blocks { id: "int8_g32", bits: 8, group: 32 };

/// Largest first.
static SIZES: [&Blocks; 5] = [&INT4_G128, &INT4_G64, &INT4_G32, &INT8_G128, &INT8_G32];

impl Blocks {
    /// Bits of a code.
    pub(super) fn bits(&self) -> usize {
        self.bits
    }

    /// Bytes of a block.
    pub(super) const fn bytes(&self) -> usize {
        HEAD + self.group * self.bits / 8
    }

    pub(super) fn row_bytes(&self, in_features: usize) -> Result<usize, QuantError> {
        match in_features.is_multiple_of(self.group) {
            true => Ok(in_features / self.group * self.bytes()),
            false => Err(QuantError::Invalid {
                key: self.id.to_owned(),
                reason: format!("{in_features} columns are not whole blocks of {}", self.group),
            }),
        }
    }

    /// The largest blocks of `bits` that divide the groups of a matrix.
    fn of(bits: u32, size: usize, in_features: usize) -> Option<&'static Self> {
        let divides = |b: &Self| {
            in_features.is_multiple_of(b.group)
                && (size.is_multiple_of(b.group) || size >= in_features)
        };
        SIZES.into_iter().find(|b| b.bits == bits as usize && in_features > 0 && divides(b))
    }

    /// Rows of `blocks: U8 [_, row_bytes]` as f32.
    pub(super) fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        let blocks = blocks.chunks_exact(self.bytes());
        for (block, out) in blocks.zip(out.chunks_exact_mut(self.group)) {
            let scale = f32::from_le_bytes([0, block[1], block[2], block[3]]);
            let (zero, codes) = (i32::from(block[0]), &block[HEAD..]);
            for (i, w) in out.iter_mut().enumerate() {
                let code = match self.bits {
                    4 => codes[i / 2] >> (4 * (i % 2)) & 15,
                    _ => codes[i],
                };
                *w = scale * (i32::from(code) - zero) as f32;
            }
        }
    }

    /// A block from its codes.
    fn put(&self, scale: f32, zero: u8, codes: &[u8], block: &mut [u8]) {
        block[..HEAD].copy_from_slice(&scale.to_le_bytes());
        block[0] = zero;
        match self.bits {
            4 => {
                let pairs = codes.as_chunks::<2>().0;
                block[HEAD..].iter_mut().zip(pairs).for_each(|(b, c)| *b = c[0] | c[1] << 4);
            }
            _ => block[HEAD..].copy_from_slice(codes),
        }
    }

    /// Puts a block under scale and zero point `group` of `matrix`, which must be [`exact`].
    pub(super) fn put_group(&self, matrix: &Grouped, group: usize, codes: &[u8], block: &mut [u8]) {
        self.put(matrix.scales[group], matrix.zeros[group], codes, block);
    }

    /// `blocks`, of which there must be as many as the shape needs, as a weight.
    pub(super) fn weight(
        &self,
        blocks: Vec<u8>,
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError> {
        let shape = vec![out_features, self.row_bytes(in_features)?];
        let blocks = HostTensor::new(DType::U8, shape, blocks.into())?;
        Ok(Weight { format: self.id, out_features, in_features, parts: vec![("blocks", blocks)] })
    }
}

/// Whether blocks hold every scale of `matrix` as it is.
pub(super) fn exact(matrix: &Grouped) -> bool {
    matrix.scales.iter().all(|s| s.to_bits() & LOST == 0)
}

/// `matrix` in blocks, if they hold it exactly.
pub(super) fn hold(matrix: &Grouped) -> Result<Option<Weight>, QuantError> {
    let Groups::Even(size) = matrix.group_of else { return Ok(None) };
    let (n, k) = (matrix.out_features, matrix.in_features);
    let Some(blocks) = Blocks::of(matrix.bits, size, k) else { return Ok(None) };
    if !exact(matrix) {
        return Ok(None);
    }
    let (row_bytes, bytes) = (blocks.row_bytes(k)?, blocks.bytes());
    let mut data = vec![0; n * row_bytes];
    let mut codes = vec![0; blocks.group];
    for b in 0..k / blocks.group {
        let start = b * blocks.group;
        // The words of neighbouring outputs lie side by side in GPTQ's files.
        for row in 0..n {
            matrix.codes.read(row, start, k, &mut codes);
            let group = row * matrix.groups + start / size;
            let block = &mut data[row * row_bytes + b * bytes..][..bytes];
            blocks.put_group(matrix, group, &codes, block);
        }
    }
    blocks.weight(data, n, k).map(Some)
}

impl WeightFormat for Blocks {
    fn id(&self) -> &'static str {
        self.id
    }

    fn describe(&self) -> Description {
        Description {
            bits_per_weight: (self.bytes() as f64 * 8.0 / self.group as f64).to_string(),
            detected_by: format!("what `int` is held as in blocks of {}", self.group),
        }
    }

    /// Never: [`INT`](super::INT) chooses among these when it has seen the groups.
    fn detect(&self, _: &Checkpoint, _: &str) -> bool {
        false
    }

    fn load(
        &self,
        checkpoint: &Checkpoint,
        key: &str,
        _: usize,
        _: usize,
    ) -> Result<Weight, QuantError> {
        let (path, key) = (checkpoint.path.clone(), format!("{key}.weight"));
        Err(CheckpointError::Missing { path, key }.into())
    }

    fn decode_rows(
        &self,
        weight: &Weight,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), QuantError> {
        let shape = [weight.out_features, self.row_bytes(weight.in_features)?];
        let blocks = parts::require(weight, "blocks", DType::U8, &shape)?;
        parts::check_rows(weight, &rows, out)?;
        self.decode(blocks.slice_rows(rows).bytes(), out);
        Ok(())
    }

    fn pack(
        &self,
        values: &[f32],
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError> {
        parts::check_values(self.id, values, out_features, in_features)?;
        let mut data = vec![0; out_features * self.row_bytes(in_features)?];
        let mut codes = vec![0; self.group];
        for (values, block) in
            values.chunks_exact(self.group).zip(data.chunks_exact_mut(self.bytes()))
        {
            let (scale, zero) = round(values, self.bits as u32, &mut codes);
            self.put(scale, zero, &codes, block);
        }
        self.weight(data, out_features, in_features)
    }
}

/// The nearest codes under a scale whose range holds all values and zero; scale and zero point.
pub(super) fn round(values: &[f32], bits: u32, codes: &mut [u8]) -> (f32, u8) {
    let most = ((1u32 << bits) - 1) as f32;
    let low = values.iter().fold(0.0f32, |m, v| m.min(*v));
    let high = values.iter().fold(0.0f32, |m, v| m.max(*v));
    let scale = f32::from_bits((high / most - low / most).to_bits() & !LOST);
    // A scale too small to divide by stands for zeros.
    let inverse = if scale.is_normal() { 1.0 / scale } else { 0.0 };
    let zero = (-low * inverse).round().min(most);
    for (code, value) in codes.iter_mut().zip(values) {
        *code = (value * inverse + zero).round().clamp(0.0, most) as u8;
    }
    // Casts saturate.
    (scale, zero as u8)
}
