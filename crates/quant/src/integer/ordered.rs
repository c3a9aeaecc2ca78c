//! Blocks over inputs in another order, as GPTQ with `desc_act` chooses them: part `blocks` as in the
//! plain format, and `order: I32 [in]`, the input that each place of a row belongs to.
//!
//! A kernel multiplies the blocks with its inputs put into that order.

use super::blocks::{self, Blocks};
use super::{Grouped, Groups, invalid};
use crate::{Description, QuantError, WeightFormat, parts};
use marlin_checkpoint::Checkpoint;
use marlin_tensor::{DType, HostTensor, Weight};
use std::ops::Range;

/// Blocks of one size, and an order.
pub struct Ordered {
    id: &'static str,
    blocks: &'static Blocks,
}

/// [`INT4_G128`](super::INT4_G128) and an order.
pub static INT4_G128_ORDERED: Ordered =
    Ordered { id: "int4_g128_ordered", blocks: &blocks::INT4_G128 };
/// [`INT4_G64`](super::INT4_G64) and an order.
pub static INT4_G64_ORDERED: Ordered =
    Ordered { id: "int4_g64_ordered", blocks: &blocks::INT4_G64 };
/// [`INT4_G32`](super::INT4_G32) and an order.
pub static INT4_G32_ORDERED: Ordered =
    Ordered { id: "int4_g32_ordered", blocks: &blocks::INT4_G32 };
/// [`INT8_G128`](super::INT8_G128) and an order.
pub static INT8_G128_ORDERED: Ordered =
    Ordered { id: "int8_g128_ordered", blocks: &blocks::INT8_G128 };
/// [`INT8_G32`](super::INT8_G32) and an order.
pub static INT8_G32_ORDERED: Ordered =
    Ordered { id: "int8_g32_ordered", blocks: &blocks::INT8_G32 };

/// In the order of [`blocks::SIZES`].
static SIZES: [&Ordered; 5] = [
    &INT4_G128_ORDERED,
    &INT4_G64_ORDERED,
    &INT4_G32_ORDERED,
    &INT8_G128_ORDERED,
    &INT8_G32_ORDERED,
];

/// The blocks of a weight in an ordered format, and its order: a permutation of the inputs.
///
/// # Errors
/// When the weight is in another format, or its parts are not what its format calls for.
pub fn blocks_and_order(weight: &Weight) -> Result<(Weight, Vec<u32>), QuantError> {
    let known = SIZES.into_iter().find(|f| f.id == weight.format);
    let format = known.ok_or_else(|| invalid(weight.format, "no order of inputs"))?;
    let order = format.order(weight)?;
    Ok((format.inner(weight), order))
}

impl Ordered {
    fn order(&self, weight: &Weight) -> Result<Vec<u32>, QuantError> {
        let k = weight.in_features;
        let order = parts::require(weight, "order", DType::I32, &[k])?.to_i64()?;
        let mut seen = vec![false; k];
        let place = |&input: &i64| {
            let input = usize::try_from(input).ok().filter(|&i| i < k)?;
            (!std::mem::replace(&mut seen[input], true)).then_some(input as u32)
        };
        let order = order.iter().map(place).collect::<Option<Vec<u32>>>();
        order.ok_or_else(|| invalid(self.id, format!("part order: no permutation of {k} inputs")))
    }

    fn inner(&self, weight: &Weight) -> Weight {
        let blocks = weight.parts.iter().filter(|(name, _)| *name == "blocks").cloned();
        Weight { format: self.blocks.id(), parts: blocks.collect(), ..weight.clone() }
    }

    fn weight(&self, mut blocks: Weight, order: &[u32]) -> Result<Weight, QuantError> {
        let bytes: Vec<u8> = order.iter().flat_map(|i| i.to_le_bytes()).collect();
        blocks.format = self.id;
        blocks.parts.push(("order", HostTensor::new(DType::I32, vec![order.len()], bytes.into())?));
        Ok(blocks)
    }
}

/// `matrix` in ordered blocks, if they hold it exactly.
pub(super) fn hold(matrix: &Grouped) -> Result<Option<Weight>, QuantError> {
    let Groups::Listed(group_of) = &matrix.group_of else { return Ok(None) };
    let (n, k) = (matrix.out_features, matrix.in_features);
    let mut order: Vec<u32> = (0..k as u32).collect();
    order.sort_by_key(|&input| group_of[input as usize]);
    let groups: Vec<u32> = order.iter().map(|&input| group_of[input as usize]).collect();
    let whole = |f: &&&Ordered| {
        f.blocks.bits() == matrix.bits as usize
            && k.is_multiple_of(f.blocks.group)
            && groups.chunks(f.blocks.group).all(|block| block.iter().all(|g| *g == block[0]))
    };
    let Some(format) = SIZES.iter().find(whole) else { return Ok(None) };
    if !blocks::exact(matrix) {
        return Ok(None);
    }
    let (blocks, size) = (format.blocks, format.blocks.group);
    let (mut row, mut codes) = (vec![0; k], vec![0; k]);
    let mut data = vec![0; n * blocks.row_bytes(k)?];
    let mut stored = data.chunks_exact_mut(blocks.bytes());
    for i in 0..n {
        matrix.codes.read(i, 0, k, &mut row);
        codes.iter_mut().zip(&order).for_each(|(c, &input)| *c = row[input as usize]);
        // One stored block for each.
        let parts = codes.chunks(size).zip(groups.chunks(size));
        for ((codes, groups), block) in parts.zip(&mut stored) {
            blocks.put_group(matrix, i * matrix.groups + groups[0] as usize, codes, block);
        }
    }
    format.weight(blocks.weight(data, n, k)?, &order).map(Some)
}

impl WeightFormat for Ordered {
    fn id(&self) -> &'static str {
        self.id
    }

    fn describe(&self) -> Description {
        let Description { bits_per_weight, detected_by } = self.blocks.describe();
        Description {
            bits_per_weight,
            detected_by: format!("{detected_by}, inputs in another order"),
        }
    }

    /// Never, as [`Blocks`].
    fn detect(&self, _: &Checkpoint, _: &str) -> bool {
        false
    }

    fn load(
        &self,
        checkpoint: &Checkpoint,
        key: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError> {
        self.blocks.load(checkpoint, key, out_features, in_features)
    }

    fn decode_rows(
        &self,
        weight: &Weight,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), QuantError> {
        let order = self.order(weight)?;
        let mut decoded = vec![0.0; out.len()];
        self.blocks.decode_rows(&self.inner(weight), rows, &mut decoded)?;
        let width = weight.in_features.max(1);
        for (decoded, out) in decoded.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            decoded.iter().zip(&order).for_each(|(w, &input)| out[input as usize] = *w);
        }
        Ok(())
    }

    /// The columns of the largest values come first.
    fn pack(
        &self,
        values: &[f32],
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError> {
        parts::check_values(self.id, values, out_features, in_features)?;
        let mut size = vec![0.0f32; in_features];
        for row in values.chunks_exact(in_features.max(1)) {
            size.iter_mut().zip(row).for_each(|(s, v)| *s += v.abs());
        }
        let mut order: Vec<u32> = (0..in_features as u32).collect();
        order.sort_by(|&a, &b| size[b as usize].total_cmp(&size[a as usize]));
        let rows = values.chunks_exact(in_features.max(1));
        let values: Vec<f32> =
            rows.flat_map(|row| order.iter().map(|&input| row[input as usize])).collect();
        self.weight(self.blocks.pack(&values, out_features, in_features)?, &order)
    }

    fn slice_rows(&self, weight: &Weight, rows: Range<usize>) -> Result<Weight, QuantError> {
        let order = self.order(weight)?;
        self.weight(self.blocks.slice_rows(&self.inner(weight), rows)?, &order)
    }
}
