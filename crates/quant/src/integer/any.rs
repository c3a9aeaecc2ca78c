//! Any groups, scales and order of inputs, one code after another: what blocks do not hold.
//!
//! | part | shape | holds |
//! | --- | --- | --- |
//! | `codes` | U8 `[out, in]`, or `[out, ⌈in / 2⌉]` | codes of eight bits, or two of four a byte, the first in the low half |
//! | `scales` | F32 `[out, groups]` | |
//! | `zeros` | U8 `[out, groups]` | zero points |
//! | `groups` | I32 `[in]` | the group of every input |

use super::{Codes, Grouped, Groups, blocks, invalid, read};
use crate::{Description, QuantError, WeightFormat, parts};
use marlin_checkpoint::{Checkpoint, Encoding};
use marlin_tensor::{DType, HostTensor, Weight};
use std::ops::Range;

/// Integers with scales per group, in any container.
pub struct Any;

/// Integers with scales per group, in any container.
pub static INT: Any = Any;

const ID: &str = "int";
/// Inputs that the encoder puts into a group.
const GROUP: usize = 128;

/// `matrix` as it is.
pub(super) fn hold(matrix: &Grouped) -> Result<Weight, QuantError> {
    let (n, k, groups) = (matrix.out_features, matrix.in_features, matrix.groups);
    let mut row = vec![0; k];
    let mut codes = Vec::with_capacity(n * k * matrix.bits as usize / 8);
    for i in 0..n {
        matrix.codes.read(i, 0, k, &mut row);
        match matrix.bits {
            4 => codes.extend(row.chunks(2).map(|c| c[0] | c.get(1).map_or(0, |c| c << 4))),
            _ => codes.extend(&row),
        }
    }
    let width = if matrix.bits == 4 { k.div_ceil(2) } else { k };
    let group_of: Vec<u8> =
        (0..k).flat_map(|i| (matrix.group_of.of(i) as i32).to_le_bytes()).collect();
    Ok(Weight {
        format: ID,
        out_features: n,
        in_features: k,
        parts: vec![
            ("codes", HostTensor::new(DType::U8, vec![n, width], codes.into())?),
            ("scales", HostTensor::from_f32(vec![n, groups], &matrix.scales)),
            ("zeros", HostTensor::new(DType::U8, vec![n, groups], matrix.zeros.clone().into())?),
            ("groups", HostTensor::new(DType::I32, vec![k], group_of.into())?),
        ],
    })
}

impl WeightFormat for Any {
    fn id(&self) -> &'static str {
        ID
    }

    fn describe(&self) -> Description {
        Description {
            bits_per_weight: "4 or 8, and scales".to_owned(),
            detected_by: "`KEY.qweight` (GPTQ, AWQ) or `KEY.weight_packed` of type I32 \
                          (compressed-tensors); becomes one of the next where its groups allow"
                .to_owned(),
        }
    }

    fn detect(&self, checkpoint: &Checkpoint, key: &str) -> bool {
        let packed = checkpoint.get(&format!("{key}.weight_packed"));
        packed.is_some_and(|t| t.encoding == Encoding::Plain(DType::I32))
            || checkpoint.get(&format!("{key}.qweight")).is_some()
    }

    /// The weight is in this format or another of its family.
    fn load(
        &self,
        checkpoint: &Checkpoint,
        key: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError> {
        read(checkpoint, key, out_features, in_features)?.into_weight()
    }

    fn decode_rows(
        &self,
        weight: &Weight,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), QuantError> {
        let (n, k) = (weight.out_features, weight.in_features);
        let width = |name| weight.part(name).and_then(|t| t.shape().get(1).copied()).unwrap_or(0);
        let wide = width("codes") == k;
        let codes_width = if wide { k } else { k.div_ceil(2) };
        let groups = width("scales");
        let codes = parts::require(weight, "codes", DType::U8, &[n, codes_width])?;
        let scales = parts::require(weight, "scales", DType::F32, &[n, groups])?;
        let zeros = parts::require(weight, "zeros", DType::U8, &[n, groups])?;
        let group_of = parts::require(weight, "groups", DType::I32, &[k])?.to_i64()?;
        if let Some(g) = group_of.iter().find(|&&g| g < 0 || g >= groups as i64) {
            return Err(invalid(ID, format!("part groups: {g} is no group of {groups}")));
        }
        parts::check_rows(weight, &rows, out)?;
        // Neighbours of one group are decoded together.
        let mut runs: Vec<(Range<usize>, usize)> = Vec::new();
        for (i, &group) in group_of.iter().enumerate() {
            match runs.last_mut().filter(|(_, last)| *last == group as usize) {
                Some((run, _)) => run.end = i + 1,
                None => runs.push((i..i + 1, group as usize)),
            }
        }
        let scales = scales.slice_rows(rows.clone()).to_f32()?;
        let zeros = zeros.slice_rows(rows.clone());
        let codes = codes.slice_rows(rows);
        for (row, out) in out.chunks_exact_mut(k.max(1)).enumerate() {
            let codes = &codes.bytes()[row * codes_width..][..codes_width];
            for (run, group) in &runs {
                let at = row * groups + group;
                let (scale, zero) = (scales[at], i32::from(zeros.bytes()[at]));
                let weight = |code: u8| scale * (i32::from(code) - zero) as f32;
                let out = &mut out[run.clone()];
                if wide {
                    out.iter_mut().zip(&codes[run.clone()]).for_each(|(w, &c)| *w = weight(c));
                    continue;
                }
                // A run may begin in the middle of a byte.
                let (head, pairs) = out.split_at_mut((run.start % 2).min(run.len()));
                head.iter_mut().for_each(|w| *w = weight(codes[run.start / 2] >> 4));
                let codes = &codes[run.start.div_ceil(2)..];
                for (pair, &both) in pairs.chunks_mut(2).zip(codes) {
                    pair.iter_mut().zip([both & 15, both >> 4]).for_each(|(w, c)| *w = weight(c));
                }
            }
        }
        Ok(())
    }

    fn pack(
        &self,
        values: &[f32],
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError> {
        parts::check_values(ID, values, out_features, in_features)?;
        let mut matrix = Grouped {
            out_features,
            in_features,
            bits: 4,
            codes: Codes::Bytes(Vec::new()),
            scales: Vec::new(),
            zeros: Vec::new(),
            groups: in_features.div_ceil(GROUP),
            group_of: Groups::Even(GROUP),
        };
        let mut codes = vec![0; values.len()];
        for (values, codes) in
            values.chunks(in_features.max(1)).zip(codes.chunks_mut(in_features.max(1)))
        {
            for (values, codes) in values.chunks(GROUP).zip(codes.chunks_mut(GROUP)) {
                let (scale, zero) = blocks::round(values, matrix.bits, codes);
                matrix.scales.push(scale);
                matrix.zeros.push(zero);
            }
        }
        matrix.codes = Codes::Bytes(codes);
        hold(&matrix)
    }

    fn slice_rows(&self, weight: &Weight, rows: Range<usize>) -> Result<Weight, QuantError> {
        if rows.start > rows.end || rows.end > weight.out_features {
            let reason = format!("rows {rows:?} of {}", weight.out_features);
            return Err(invalid(ID, reason));
        }
        let parts = weight.parts.iter().map(|(name, part)| match *name {
            "groups" => (*name, part.clone()),
            _ => (*name, part.slice_rows(rows.clone())),
        });
        Ok(Weight {
            format: ID,
            out_features: rows.len(),
            in_features: weight.in_features,
            parts: parts.collect(),
        })
    }
}
