//! Eight-bit floats with scales, as safetensors stores them: `KEY.weight: F8_E4M3 [out, in]`.
//!
//! | format | scales | weight |
//! | --- | --- | --- |
//! | `fp8_block128` | `KEY.weight_scale_inv [⌈out / 128⌉, ⌈in / 128⌉]` | `w[i, j] * scale[i / 128, j / 128]` |
//! | `fp8` | `KEY.weight_scale`: one number, or `[out]` or `[out, 1]` | `w[i, j] * scale[i]` |
//!
//! The first is DeepSeek-V3's (in spite of its name the tensor multiplies); the second is what
//! per-tensor and per-channel quantizers write, kept here as one scale per row. E4M3 is one sign
//! bit, four exponent bits of bias 7, three mantissa bits; no infinities; 0x7F and 0xFF are NaN.
//!
//! Source: the OCP eight-bit floating point text; `torch.float8_e4m3fn` made the golden values.

use crate::{Description, QuantError, WeightFormat, parts};
use marlin_checkpoint::{Checkpoint, CheckpointError, Container, Encoding, StoredTensor};
use marlin_tensor::{DType, HostTensor, Weight};
use std::ops::Range;

/// Rows and columns under one scale.
const BLOCK: usize = 128;
/// Largest E4M3 value.
const LARGEST: f32 = 448.0;

/// One scale per 128 x 128 weights.
pub struct Block128;
/// One scale per row.
pub struct PerRow;

/// DeepSeek-V3's encoding.
pub static FP8_BLOCK128: Block128 = Block128;
/// Per-tensor and per-channel encodings.
pub static FP8: PerRow = PerRow;

/// The value of every E4M3 byte.
pub static E4M3: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut x = 0;
    while x < 256 {
        let (sign, exponent, mantissa) = (x as u32 >> 7, x as u32 >> 3 & 15, x as u32 & 7);
        let magnitude = match (exponent, mantissa) {
            (15, 7) => f32::NAN,
            (0, _) => mantissa as f32 / 512.0,
            _ => f32::from_bits((exponent + 120) << 23 | mantissa << 20),
        };
        values[x] = if sign == 0 { magnitude } else { -magnitude };
        x += 1;
    }
    values
};

/// The nearest E4M3 byte, ties to even, larger magnitudes clipped to 448.
fn to_e4m3(x: f32) -> u8 {
    let magnitude = x.abs().min(LARGEST);
    let code = if magnitude < 2f32.powi(-6) {
        (magnitude * 512.0).round_ties_even() as u8
    } else {
        // The top of an f32 is sign, exponent and mantissa in E4M3's order: drop 20 bits to nearest.
        let bits = magnitude.to_bits();
        let rounded = (bits + 0x7_FFFF + (bits >> 20 & 1)) >> 20;
        (rounded - (120 << 3)) as u8
    };
    code | u8::from(x.is_sign_negative()) << 7
}

impl WeightFormat for Block128 {
    fn id(&self) -> &'static str {
        "fp8_block128"
    }

    fn describe(&self) -> Description {
        Description {
            bits_per_weight: "8.002".to_owned(),
            detected_by: "`KEY.weight` of type F8_E4M3 and `KEY.weight_scale_inv`".to_owned(),
        }
    }

    fn detect(&self, checkpoint: &Checkpoint, key: &str) -> bool {
        has_fp8(checkpoint, key) && checkpoint.get(&format!("{key}.weight_scale_inv")).is_some()
    }

    fn load(
        &self,
        checkpoint: &Checkpoint,
        key: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError> {
        check_block_size(checkpoint)?;
        let codes = load_codes(checkpoint, key, out_features, in_features)?;
        let name = format!("{key}.weight_scale_inv");
        let shape = block_grid(out_features, in_features);
        let scale = float_values(checkpoint.require(&name, &shape)?)?;
        Ok(Weight {
            format: self.id(),
            out_features,
            in_features,
            parts: vec![("weight", codes), ("scale", HostTensor::from_f32(shape.to_vec(), &scale))],
        })
    }

    fn decode_rows(
        &self,
        weight: &Weight,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), QuantError> {
        let grid = block_grid(weight.out_features, weight.in_features);
        let scale = parts::require(weight, "scale", DType::F32, &grid)?.to_f32()?;
        decode_with(weight, rows, out, |row, block| scale[row / BLOCK * grid[1] + block])
    }

    fn row_granularity(&self) -> usize {
        BLOCK
    }

    fn slice_rows(&self, weight: &Weight, rows: Range<usize>) -> Result<Weight, QuantError> {
        let (height, grid) =
            (weight.out_features, block_grid(weight.out_features, weight.in_features));
        let cut = |row: usize| row.is_multiple_of(BLOCK) || row == height;
        let whole = cut(rows.start) && cut(rows.end);
        if rows.start > rows.end || rows.end > height || !whole {
            return Err(QuantError::Invalid {
                key: self.id().to_owned(),
                reason: format!("rows {rows:?} of {height} do not fall on blocks of {BLOCK}"),
            });
        }
        let shape = [height, weight.in_features];
        let codes = parts::require(weight, "weight", DType::F8E4M3, &shape)?;
        let scale = parts::require(weight, "scale", DType::F32, &grid)?;
        let blocks = rows.start / BLOCK..rows.end.div_ceil(BLOCK);
        Ok(Weight {
            format: self.id(),
            out_features: rows.len(),
            in_features: weight.in_features,
            parts: vec![("weight", codes.slice_rows(rows)), ("scale", scale.slice_rows(blocks))],
        })
    }

    fn pack(
        &self,
        values: &[f32],
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError> {
        parts::check_values(self.id(), values, out_features, in_features)?;
        let grid = block_grid(out_features, in_features);
        let mut scale = vec![0.0f32; grid[0] * grid[1]];
        let block = |n: usize| n / in_features / BLOCK * grid[1] + n % in_features / BLOCK;
        for (n, v) in values.iter().enumerate() {
            scale[block(n)] = scale[block(n)].max(v.abs() / LARGEST);
        }
        let codes = values.iter().enumerate().map(|(n, &v)| encode(v, scale[block(n)])).collect();
        packed(self.id(), codes, &scale, grid.to_vec(), out_features, in_features)
    }
}

impl WeightFormat for PerRow {
    fn id(&self) -> &'static str {
        "fp8"
    }

    fn describe(&self) -> Description {
        Description {
            bits_per_weight: "8".to_owned(),
            detected_by: "`KEY.weight` of type F8_E4M3 and `KEY.weight_scale`".to_owned(),
        }
    }

    fn detect(&self, checkpoint: &Checkpoint, key: &str) -> bool {
        has_fp8(checkpoint, key) && checkpoint.get(&format!("{key}.weight_scale")).is_some()
    }

    fn load(
        &self,
        checkpoint: &Checkpoint,
        key: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError> {
        let codes = load_codes(checkpoint, key, out_features, in_features)?;
        let name = format!("{key}.weight_scale");
        let stored = checkpoint.get(&name).map_or(&[][..], |t| &t.shape);
        let expected: &[usize] = match stored {
            // One number for the whole matrix, in any rank.
            ones if ones.iter().all(|&d| d == 1) => ones,
            [_] => &[out_features],
            _ => &[out_features, 1],
        };
        let mut scale = float_values(checkpoint.require(&name, expected)?)?;
        if scale.len() == 1 {
            scale = vec![scale[0]; out_features];
        }
        Ok(Weight {
            format: self.id(),
            out_features,
            in_features,
            parts: vec![
                ("weight", codes),
                ("scale", HostTensor::from_f32(vec![out_features], &scale)),
            ],
        })
    }

    fn decode_rows(
        &self,
        weight: &Weight,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), QuantError> {
        let scale =
            parts::require(weight, "scale", DType::F32, &[weight.out_features])?.to_f32()?;
        decode_with(weight, rows, out, |row, _| scale[row])
    }

    fn pack(
        &self,
        values: &[f32],
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError> {
        parts::check_values(self.id(), values, out_features, in_features)?;
        let largest = |row: &[f32]| row.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let rows = values.chunks_exact(in_features.max(1));
        let scale: Vec<f32> = rows.map(|row| largest(row) / LARGEST).collect();
        let codes =
            values.iter().enumerate().map(|(n, &v)| encode(v, scale[n / in_features])).collect();
        packed(self.id(), codes, &scale, vec![out_features], out_features, in_features)
    }
}

fn has_fp8(checkpoint: &Checkpoint, key: &str) -> bool {
    checkpoint
        .get(&format!("{key}.weight"))
        .is_some_and(|t| t.encoding == Encoding::Plain(DType::F8E4M3))
}

fn load_codes(
    checkpoint: &Checkpoint,
    key: &str,
    out_features: usize,
    in_features: usize,
) -> Result<HostTensor, QuantError> {
    let stored = checkpoint.require_matrix(&format!("{key}.weight"), out_features, in_features)?;
    Ok(HostTensor::new(DType::F8E4M3, vec![out_features, in_features], stored.data.clone())?)
}

fn float_values(stored: &StoredTensor) -> Result<Vec<f32>, QuantError> {
    let plain = stored.plain().filter(|t| t.dtype().is_float());
    match plain {
        Some(tensor) => Ok(tensor.to_f32()?),
        None => Err(QuantError::Invalid {
            key: stored.name.clone(),
            reason: format!("scales must be stored as floats, found {:?}", stored.encoding),
        }),
    }
}

/// Blocks down and across.
fn block_grid(out_features: usize, in_features: usize) -> [usize; 2] {
    [out_features.div_ceil(BLOCK), in_features.div_ceil(BLOCK)]
}

/// A small matrix has the same grid under several block sizes, so the shape alone is no proof.
fn check_block_size(checkpoint: &Checkpoint) -> Result<(), QuantError> {
    let Container::HuggingFace { config, .. } = &checkpoint.container else { return Ok(()) };
    match &config["quantization_config"]["weight_block_size"] {
        serde_json::Value::Null => Ok(()),
        size if *size == serde_json::json!([BLOCK, BLOCK]) => Ok(()),
        size => Err(CheckpointError::Unsupported {
            path: checkpoint.path.join("config.json"),
            field: "quantization_config.weight_block_size".to_owned(),
            reason: format!("{size}; only [{BLOCK}, {BLOCK}] is supported"),
        }
        .into()),
    }
}

/// Decodes with the scale of each row and block of columns.
fn decode_with(
    weight: &Weight,
    rows: Range<usize>,
    out: &mut [f32],
    scale: impl Fn(usize, usize) -> f32,
) -> Result<(), QuantError> {
    let shape = [weight.out_features, weight.in_features];
    let codes = parts::require(weight, "weight", DType::F8E4M3, &shape)?;
    parts::check_rows(weight, &rows, out)?;
    let (first, width) = (rows.start, weight.in_features.max(1));
    let codes = codes.slice_rows(rows);
    for (i, (codes, out)) in
        codes.bytes().chunks_exact(width).zip(out.chunks_exact_mut(width)).enumerate()
    {
        for (j, (codes, out)) in codes.chunks(BLOCK).zip(out.chunks_mut(BLOCK)).enumerate() {
            let scale = scale(first + i, j);
            for (x, &code) in out.iter_mut().zip(codes) {
                *x = E4M3[usize::from(code)] * scale;
            }
        }
    }
    Ok(())
}

fn encode(value: f32, scale: f32) -> u8 {
    // A scale too small to divide by stands for zeros.
    to_e4m3(if scale > f32::MIN_POSITIVE { value / scale } else { 0.0 })
}

fn packed(
    format: &'static str,
    codes: Vec<u8>,
    scale: &[f32],
    scale_shape: Vec<usize>,
    out_features: usize,
    in_features: usize,
) -> Result<Weight, QuantError> {
    let codes = HostTensor::new(DType::F8E4M3, vec![out_features, in_features], codes.into())?;
    let scale = HostTensor::from_f32(scale_shape, scale);
    Ok(Weight {
        format,
        out_features,
        in_features,
        parts: vec![("weight", codes), ("scale", scale)],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_goes_to_the_nearest_byte_and_ties_to_even() {
        let e4m3 = |x: u8| E4M3[usize::from(x)];
        let finite: Vec<u8> = (0..=255u8).filter(|&x| !e4m3(x).is_nan()).collect();
        for &x in &finite {
            assert_eq!(to_e4m3(e4m3(x)), x);
        }
        for pair in finite[..127].windows(2) {
            let (low, high) = (e4m3(pair[0]), e4m3(pair[1]));
            let middle = (low + high) / 2.0;
            assert_eq!(to_e4m3(middle), pair[usize::from(pair[0] % 2 == 1)]);
            assert_eq!(to_e4m3(-middle.next_down()), pair[0] | 0x80);
            assert_eq!(to_e4m3(middle.next_up()), pair[1]);
        }
        assert_eq!(to_e4m3(1e30), 0x7E);
    }
}
