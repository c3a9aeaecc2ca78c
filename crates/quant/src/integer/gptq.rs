//! GPTQ, as AutoGPTQ and GPTQModel write it.
//!
//! | tensor | shape | holds |
//! | --- | --- | --- |
//! | `qweight` | `[in bits / 32, out]` I32 | codes of 2, 3, 4 or 8 bits, dense along the inputs, the lowest bits first |
//! | `qzeros` | `[groups, ⌈out bits / 32⌉]` I32 | zero points, dense along the outputs |
//! | `scales` | `[groups, out]` | floats |
//! | `g_idx` | `[in]` I32, may be missing | the group of every input (`desc_act`: in the order of activations) |
//!
//! The first convention (`checkpoint_format: gptq`, or nothing) stores zero points less one; `gptq_v2`
//! stores them as they are. The one is taken from words and added to words, so that the borrow of
//! a zero point of 0 comes back; with three bits from each field alone.
//!
//! Source: the layout and conversion that GPTQModel 7.7.0 writes and reads.

use super::codes::{Codes, Words, dense};
use super::settings::Settings;
use super::{Grouped, Groups, floats, group_indices, invalid, transposed};
use crate::QuantError;
use marlin_checkpoint::{Checkpoint, CheckpointError};

/// Bits of a code.
const BITS: [usize; 4] = [2, 3, 4, 8];
/// One in every field of a word, by bits; three do not divide a word.
const ONES: [u32; 9] = [0, 0, 0x5555_5555, 0, 0x1111_1111, 0, 0, 0, 0x0101_0101];

pub(super) fn read(
    checkpoint: &Checkpoint,
    settings: &Settings<'_>,
    key: &str,
    (out_features, in_features): (usize, usize),
) -> Result<Grouped, QuantError> {
    let first = check(settings)?;
    let name = |part: &str| format!("{key}.{part}");
    let said = settings.number(&["bits"])?;
    // Layers may differ from the whole where `dynamic` says so.
    let one_rule = settings.get("dynamic").is_none();

    let qweight = checkpoint.get(&name("qweight")).map_or(&[][..], |t| &t.shape);
    let words = |bits: usize| in_features.saturating_mul(bits).div_ceil(32);
    // Few inputs fill the same words at several rates; the configuration chooses.
    let fits = |&bits: &usize| matches!(*qweight, [rows, _] if rows == words(bits));
    let said_bits = said.and_then(|(_, bits)| usize::try_from(bits).ok());
    let found: Vec<usize> = BITS.into_iter().filter(fits).collect();
    let bits = match (said_bits.filter(|b| found.contains(b)), &found[..]) {
        (Some(bits), _) | (None, &[bits]) => Some(bits),
        _ => None,
    };
    let expected = words(bits.or(said_bits.filter(|b| BITS.contains(b))).unwrap_or(4));
    let qweight = checkpoint.require(&name("qweight"), &[expected, out_features])?;
    let bits = bits.ok_or_else(|| {
        let shape = &qweight.shape;
        invalid(&qweight.name, format!("{in_features} inputs in {shape:?}: bits unknown"))
    })?;
    if let Some((field, said)) = said.filter(|&(_, said)| one_rule && said != bits as i64) {
        let (name, shape) = (&qweight.name, &qweight.shape);
        let reason = format!("{said}, but {name} has shape {shape:?}: {bits} bits");
        return Err(settings.unsupported(field, reason));
    }

    let groups = match checkpoint.get(&name("scales")).map(|t| &t.shape[..]) {
        Some(&[groups, _]) => groups,
        _ => 1,
    };
    let scales = checkpoint.require(&name("scales"), &[groups, out_features])?;
    let scales = transposed(&floats(scales)?, groups, out_features);
    let group_of = match group_indices(checkpoint, &name("g_idx"), in_features, groups)? {
        Some(listed) => Groups::listed(listed),
        None if settings.flag("desc_act")? == Some(true) => {
            return Err(CheckpointError::Missing {
                path: checkpoint.path.clone(),
                key: name("g_idx"),
            }
            .into());
        }
        None => Groups::Even(group_size(settings, &name("scales"), in_features, groups, one_rule)?),
    };

    let width = out_features.saturating_mul(bits).div_ceil(32);
    let qzeros = Words::of(checkpoint.require(&name("qzeros"), &[groups, width])?)?;
    let less = if first { ONES[bits] } else { 0 };
    let mut zeros = vec![0u8; groups * out_features];
    for (group, zeros) in zeros.chunks_exact_mut(out_features.max(1)).enumerate() {
        dense(|w| qzeros.get(group * width + w).wrapping_add(less), bits as u32, 0, zeros);
        if first && bits == 3 {
            zeros.iter_mut().for_each(|z| *z = (*z + 1) & 7);
        }
    }
    Ok(Grouped {
        out_features,
        in_features,
        bits: if bits > 4 { 8 } else { 4 },
        codes: Codes::Columns {
            words: Words::of(qweight)?,
            outputs: out_features,
            bits: bits as u32,
        },
        scales,
        zeros: transposed(&zeros, groups, out_features),
        groups,
        group_of,
    })
}

/// Checks what is not in the tensors; whether zero points are stored less one.
fn check(settings: &Settings<'_>) -> Result<bool, QuantError> {
    settings.off(&["is_marlin_format", "rotation", "adapter", "lora", "planar"])?;
    settings.one_of("pack_dtype", &["int32"])?;
    let known = ["gptq", "gptq_v2"];
    let (checkpoint_format, format) =
        (settings.one_of("checkpoint_format", &known)?, settings.one_of("format", &known)?);
    match (&checkpoint_format, &format) {
        (Some(a), Some(b)) if a != b => {
            Err(settings.unsupported("format", format!("{b}, but checkpoint_format is {a}")))
        }
        _ => Ok(checkpoint_format.or(format).as_deref() != Some("gptq_v2")),
    }
}

/// Inputs of a group, where they are in order.
pub(super) fn group_size(
    settings: &Settings<'_>,
    scales: &str,
    in_features: usize,
    groups: usize,
    one_rule: bool,
) -> Result<usize, QuantError> {
    let said = settings.group_size(&["group_size", "q_group_size"])?.filter(|_| one_rule);
    let size = match said {
        Some(size) => size.unwrap_or(in_features.max(1)),
        None => in_features.checked_div(groups).unwrap_or(0).max(1),
    };
    match in_features.div_ceil(size) == groups {
        true => Ok(size),
        false => Err(invalid(
            scales,
            format!("{groups} groups for {in_features} inputs in groups of {size}"),
        )),
    }
}
