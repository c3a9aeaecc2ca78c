//! Checks that decoders and packers share.

use crate::QuantError;
use marlin_tensor::{DType, HostTensor, Weight};
use std::ops::Range;

/// The part called `name`, which must have this type and shape.
///
/// # Errors
/// When it is missing or another array.
pub fn require<'a>(
    weight: &'a Weight,
    name: &str,
    dtype: DType,
    shape: &[usize],
) -> Result<&'a HostTensor, QuantError> {
    let invalid = |reason| QuantError::Invalid { key: weight.format.to_owned(), reason };
    let part = weight.part(name).ok_or_else(|| invalid(format!("part {name} is missing")))?;
    if part.dtype() != dtype || part.shape() != shape {
        let (found_type, found) = (part.dtype(), part.shape());
        return Err(invalid(format!(
            "part {name}: expected {dtype} {shape:?}, found {found_type} {found:?}"
        )));
    }
    Ok(part)
}

/// Checks that `rows` exist and fill `out: [rows.len(), in_features]`.
///
/// # Errors
/// When they do not.
pub fn check_rows(weight: &Weight, rows: &Range<usize>, out: &[f32]) -> Result<(), QuantError> {
    let fits = rows.start <= rows.end && rows.end <= weight.out_features;
    if !fits || Some(out.len()) != rows.len().checked_mul(weight.in_features) {
        return Err(QuantError::Invalid {
            key: weight.format.to_owned(),
            reason: format!(
                "rows {rows:?} of {} x {} do not fill {} values",
                weight.out_features,
                weight.in_features,
                out.len()
            ),
        });
    }
    Ok(())
}

/// Checks that `values` are finite and fill `[out_features, in_features]`.
///
/// # Errors
/// When they do not, naming the first bad position.
pub fn check_values(
    format: &str,
    values: &[f32],
    out_features: usize,
    in_features: usize,
) -> Result<(), QuantError> {
    let invalid = |reason| QuantError::Invalid { key: format.to_owned(), reason };
    if Some(values.len()) != out_features.checked_mul(in_features) {
        let found = values.len();
        return Err(invalid(format!("{found} values for {out_features} x {in_features} weights")));
    }
    if let Some(i) = values.iter().position(|v| !v.is_finite()) {
        let (row, column) = (i / in_features, i % in_features);
        return Err(invalid(format!("row {row}, column {column} is {}", values[i])));
    }
    Ok(())
}
