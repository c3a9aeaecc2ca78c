//! The `pack-quantized` layout of compressed-tensors: 1 to 8 bits, scales per group, output or matrix.
//!
//! | tensor | shape | holds |
//! | --- | --- | --- |
//! | `weight_packed` | `[out, ⌈in bits / 32⌉]` I32 | codes plus 2^(bits - 1), dense along the inputs, the lowest bits first |
//! | `weight_scale` | `[out, groups]`, `[out]` or one number | floats |
//! | `weight_zero_point` | `[⌈out bits / 32⌉, groups]` I32, dense along the outputs, or `[out, groups]` I8 | zero points, packed as codes; missing where weights are symmetric |
//! | `weight_shape` | `[2]` | `out`, `in` |
//! | `weight_g_idx` | `[in]`, may be missing | the group of every input |
//!
//! What the configuration says about activations is for programs that quantize those, and not read.
//!
//! Source: the layout that compressed-tensors 0.20.1 packs and unpacks; `weight_g_idx` is of versions
//! before 0.20.

use super::codes::{Codes, Words, dense};
use super::settings::Settings;
use super::{Grouped, Groups, floats, group_indices, invalid};
use crate::QuantError;
use marlin_checkpoint::{Checkpoint, CheckpointError, Encoding, StoredTensor};
use marlin_tensor::DType;
use serde_json::Value;

/// What the configuration says about weights of one set of layers.
struct Scheme {
    bits: u32,
    symmetric: bool,
}

pub(super) fn read(
    checkpoint: &Checkpoint,
    settings: Option<&Settings<'_>>,
    key: &str,
    (out_features, in_features): (usize, usize),
) -> Result<Grouped, QuantError> {
    let name = |part: &str| format!("{key}.{part}");
    let schemes = settings.map_or(Ok(Vec::new()), schemes)?;
    check_shape(checkpoint, &name("weight_shape"), (out_features, in_features))?;

    let packed = checkpoint.get(&name("weight_packed")).map_or(&[][..], |t| &t.shape);
    let words = |bits: u32| in_features.saturating_mul(bits as usize).div_ceil(32);
    // Few inputs fill the same words at several rates; the configuration chooses.
    let fits = |bits: &u32| matches!(*packed, [_, found] if found == words(*bits));
    let candidates: Vec<u32> = match settings {
        Some(_) => schemes.iter().map(|s| s.bits).filter(fits).collect(),
        None => (1..=8).filter(fits).collect(),
    };
    let bits = candidates.first().copied();
    let expected = bits.or(schemes.first().map(|s| s.bits)).unwrap_or(4);
    let packed = checkpoint.require(&name("weight_packed"), &[out_features, words(expected)])?;
    let bits = match bits {
        Some(bits) if candidates.iter().all(|&b| b == bits) => bits,
        _ => {
            let reason = format!("{in_features} inputs in {:?}: bits unknown", packed.shape);
            return Err(invalid(&packed.name, reason));
        }
    };

    let stored = require(checkpoint, &name("weight_scale"))?;
    let groups = match stored.shape[..] {
        [rows, groups] if rows == out_features => groups,
        _ => 1,
    };
    let one = stored.shape.iter().all(|&d| d == 1);
    if !one && stored.shape != [out_features] {
        checkpoint.require(&stored.name, &[out_features, groups])?;
    }
    let mut scales = floats(stored)?;
    if one {
        scales = vec![scales[0]; out_features];
    }
    let size = match in_features.checked_div(groups) {
        Some(size) if size > 0 && size * groups == in_features => size,
        _ => {
            let reason = format!("{groups} groups do not divide {in_features} inputs");
            return Err(invalid(&stored.name, reason));
        }
    };
    let listed = group_indices(checkpoint, &name("weight_g_idx"), in_features, groups)?;

    let zeros = zeros(checkpoint, &name("weight_zero_point"), bits, (out_features, groups))?;
    let asymmetric = schemes.iter().filter(|s| s.bits == bits).all(|s| !s.symmetric);
    if zeros.is_none() && asymmetric && !schemes.is_empty() {
        require(checkpoint, &name("weight_zero_point"))?;
    }
    let zeros = zeros.unwrap_or_else(|| vec![1 << (bits - 1); out_features * groups]);
    Ok(Grouped {
        out_features,
        in_features,
        bits: if bits > 4 { 8 } else { 4 },
        codes: Codes::Rows { words: Words::of(packed)?, stride: words(bits), bits },
        scales,
        zeros,
        groups,
        group_of: listed.map_or(Groups::Even(size), Groups::listed),
    })
}

fn require<'a>(checkpoint: &'a Checkpoint, name: &str) -> Result<&'a StoredTensor, QuantError> {
    let missing =
        || CheckpointError::Missing { path: checkpoint.path.clone(), key: name.to_owned() };
    Ok(checkpoint.get(name).ok_or_else(missing)?)
}

/// Checks that the tensor called `name`, where there is one, says `out` and `in`.
fn check_shape(
    checkpoint: &Checkpoint,
    name: &str,
    (out_features, in_features): (usize, usize),
) -> Result<(), QuantError> {
    if checkpoint.get(name).is_none() {
        return Ok(());
    }
    let stored = checkpoint.require(name, &[2])?;
    let found = stored.plain().and_then(|t| t.to_i64().ok());
    match found.as_deref() {
        Some(&[rows, columns]) if (rows, columns) == (out_features as i64, in_features as i64) => {
            Ok(())
        }
        Some(found) => {
            let reason = format!("{found:?}, but the layer is [{out_features}, {in_features}]");
            Err(invalid(name, reason))
        }
        None => Err(invalid(name, "must be stored as I64 or I32")),
    }
}

/// Zero points as unsigned codes, `[out_features, groups]`.
fn zeros(
    checkpoint: &Checkpoint,
    name: &str,
    bits: u32,
    (out_features, groups): (usize, usize),
) -> Result<Option<Vec<u8>>, QuantError> {
    let Some(stored) = checkpoint.get(name) else { return Ok(None) };
    if stored.encoding == Encoding::Plain(DType::I8) {
        let stored = checkpoint.require_matrix(name, out_features, groups)?;
        let zero = |&z: &u8| i32::from(z as i8) + (1 << (bits - 1));
        let zeros = stored.data.iter().map(zero);
        let known = zeros.map(|z| u8::try_from(z).ok().filter(|&z| u32::from(z) >> bits == 0));
        let known = known.collect::<Option<Vec<_>>>();
        let found =
            known.ok_or_else(|| invalid(name, format!("zero points beyond {bits} bits")))?;
        return Ok(Some(found));
    }
    let height = out_features.saturating_mul(bits as usize).div_ceil(32);
    let words = Words::of(checkpoint.require(name, &[height, groups])?)?;
    let mut zeros = vec![0; out_features * groups];
    let mut column = vec![0u8; out_features];
    for group in 0..groups {
        dense(|w| words.get(w * groups + group), bits, 0, &mut column);
        column.iter().enumerate().for_each(|(o, &z)| zeros[o * groups + group] = z);
    }
    Ok(Some(zeros))
}

/// What is said of the weights of each set of layers.
fn schemes(settings: &Settings<'_>) -> Result<Vec<Scheme>, QuantError> {
    match settings.method()? {
        Some("compressed-tensors") | None => {}
        Some(found) => {
            let reason = format!("{found} beside weight_packed; compressed-tensors is read");
            return Err(settings.unsupported("quant_method", reason));
        }
    }
    settings.one_of("format", &["pack-quantized", "mixed-precision"])?;
    settings.off(&["transform_config"])?;
    if let Some(format) = settings.get("sparsity_config").and_then(|s| s["format"].as_str())
        && format != "dense"
    {
        return Err(
            settings.unsupported("sparsity_config.format", format!("{format}; dense is read"))
        );
    }
    let Some(sets) = settings.get("config_groups") else {
        return Err(
            settings.unsupported("config_groups", "is missing; nothing else says how many bits")
        );
    };
    let Value::Object(sets) = sets else {
        return Err(settings.unsupported("config_groups", "expected an object"));
    };
    let mut schemes = Vec::new();
    for (set, fields) in sets {
        // In a file of several formats only this one is read here.
        if fields["format"].as_str().is_some_and(|f| f != "pack-quantized") {
            continue;
        }
        let weights = &fields["weights"];
        let error = |field: &str, reason: String| {
            settings.unsupported(&format!("config_groups.{set}.weights.{field}"), reason)
        };
        let bits = weights["num_bits"].as_u64().filter(|b| (1..=8).contains(b));
        let bits = bits
            .ok_or_else(|| error("num_bits", format!("{}; 1 to 8 is read", weights["num_bits"])))?;
        for (field, known) in
            [("type", &["int"][..]), ("strategy", &["group", "channel", "tensor"])]
        {
            let value = &weights[field];
            if !value.is_null() && !value.as_str().is_some_and(|v| known.contains(&v)) {
                return Err(error(field, format!("{value}; {} is read", known.join(" or "))));
            }
        }
        if weights["dynamic"] == Value::Bool(true) {
            return Err(error("dynamic", "true; weights quantized beforehand are read".to_owned()));
        }
        let symmetric = match &weights["symmetric"] {
            Value::Null => true,
            Value::Bool(symmetric) => *symmetric,
            value => return Err(error("symmetric", format!("{value}; true or false is read"))),
        };
        schemes.push(Scheme { bits: bits as u32, symmetric });
    }
    Ok(schemes)
}
