//! AWQ in the layout for matrix products (`version: gemm`), four bits.
//!
//! | tensor | shape | holds |
//! | --- | --- | --- |
//! | `qweight` | `[in, out / 8]` I32 | eight outputs a word; nibble `i` is output 0, 2, 4, 6, 1, 3, 5, 7 |
//! | `qzeros` | `[groups, out / 8]` I32 | zero points, likewise |
//! | `scales` | `[groups, out]` | floats |
//!
//! Source: the layout that AutoAWQ 0.2.9 packs and unpacks.

use super::codes::{Codes, Words, interleaved};
use super::gptq::group_size;
use super::settings::Settings;
use super::{Grouped, Groups, floats, invalid, transposed};
use crate::QuantError;
use marlin_checkpoint::Checkpoint;

/// Outputs of a word.
const OUTPUTS: usize = 8;

pub(super) fn read(
    checkpoint: &Checkpoint,
    settings: &Settings<'_>,
    key: &str,
    (out_features, in_features): (usize, usize),
) -> Result<Grouped, QuantError> {
    check(settings)?;
    let name = |part: &str| format!("{key}.{part}");
    if !out_features.is_multiple_of(OUTPUTS) {
        let reason = format!("{out_features} outputs are not whole words of {OUTPUTS}");
        return Err(invalid(&name("qweight"), reason));
    }
    let stride = out_features / OUTPUTS;
    let qweight = checkpoint.require(&name("qweight"), &[in_features, stride])?;
    let groups = match checkpoint.get(&name("scales")).map(|t| &t.shape[..]) {
        Some(&[groups, _]) => groups,
        _ => 1,
    };
    let scales = floats(checkpoint.require(&name("scales"), &[groups, out_features])?)?;
    let qzeros = Words::of(checkpoint.require(&name("qzeros"), &[groups, stride])?)?;
    let zero = |o: usize| (0..groups).map(move |g| (g, o));
    let zeros = (0..out_features).flat_map(zero);
    let size = group_size(settings, &name("scales"), in_features, groups, true)?;
    Ok(Grouped {
        out_features,
        in_features,
        bits: 4,
        codes: Codes::Interleaved { words: Words::of(qweight)?, stride },
        scales: transposed(&scales, groups, out_features),
        zeros: zeros.map(|(g, o)| interleaved(&qzeros, g * stride, o)).collect(),
        groups,
        group_of: Groups::Even(size),
    })
}

fn check(settings: &Settings<'_>) -> Result<(), QuantError> {
    for field in ["version", "checkpoint_format", "format"] {
        settings.one_of(field, &["gemm"])?;
    }
    if let Some((field, bits)) = settings.number(&["bits", "w_bit"])?.filter(|&(_, b)| b != 4) {
        return Err(settings.unsupported(field, format!("{bits}; 4 is read")));
    }
    if settings.flag("zero_point")? == Some(false) {
        return Err(settings.unsupported("zero_point", "false; weights with zero points are read"));
    }
    Ok(())
}
