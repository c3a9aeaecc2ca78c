//! The quantized token-embedding table: groups of 256 columns, each one ring in natural order with an fp16
//! scale (see [`marlin_quant::exl3::embedding`]). A table has no inputs to calibrate with: rows are encoded as
//! they are.

use super::basis::Random;
use super::panels::PANEL;
use crate::error::ConvertError;
use crate::matrix::Matrix;
use crate::quantizer::ReadRows;
use half::f16;
use marlin_quant::exl3::hadamard::sylvester;
use marlin_quant::exl3::{Codebook, Rate, TileEncoder};
use marlin_tensor::{BackendError, DType, HostTensor};
use rayon::prelude::*;

/// Columns of one ring.
const GROUP: usize = 256;
/// Rows that one task encodes.
const ROWS: usize = 16;

/// The parts `trellis: [vocab, G·(1 + 16·bits)]` and `signs: [G, 256]` of the table `[vocab, hidden]` that
/// `read` gives.
///
/// # Errors
/// When `bits` is not 1 to 8, or the table cannot be read or is not finite.
pub fn quantize_table(
    [vocab, hidden]: [usize; 2],
    read: &ReadRows,
    bits: usize,
    encoder: &dyn TileEncoder,
    seed: u64,
) -> Result<Vec<(&'static str, HostTensor)>, ConvertError> {
    let rate = Rate::from_bits(bits as f64).ok_or_else(|| ConvertError::Option {
        field: "--embedding-bits".to_owned(),
        reason: format!("{bits} is out of range; 1 to 8, or 16 for no quantization"),
    })?;
    let groups = hidden.div_ceil(GROUP);
    let words = 1 + GROUP / 16 * bits;
    let mut random = Random(seed);
    let signs: Vec<f32> =
        (0..groups * GROUP).map(|_| if random.draw() >> 63 == 0 { 1.0 } else { -1.0 }).collect();
    let mut out = vec![0u16; vocab * groups * words];
    for (panel, out) in out.chunks_mut(PANEL * groups * words).enumerate() {
        let first = panel * PANEL;
        let rows = read(first..vocab.min(first + PANEL))?;
        if rows.data.iter().any(|v| !v.is_finite()) {
            return Err(ConvertError::Tensor {
                key: "embedding".to_owned(),
                reason: "the weights hold NaN or infinity; the source is damaged".to_owned(),
            });
        }
        encode_rows(&rows, rate, bits, encoder, &signs, out)?;
    }
    let bytes: Vec<u8> = out.iter().flat_map(|w| w.to_le_bytes()).collect();
    let signs: Vec<u8> = signs.iter().flat_map(|&s| f16::from_f32(s).to_le_bytes()).collect();
    Ok(vec![
        ("trellis", HostTensor::new(DType::I16, vec![vocab, groups * words], bytes.into())?),
        ("signs", HostTensor::new(DType::F16, vec![groups, GROUP], signs.into())?),
    ])
}

/// Encodes some rows of the table into their words.
fn encode_rows(
    table: &Matrix,
    rate: Rate,
    bits: usize,
    encoder: &dyn TileEncoder,
    signs: &[f32],
    out: &mut [u16],
) -> Result<(), BackendError> {
    let codebook = Codebook::Mul1(marlin_quant::exl3::codebook::MUL1_MULTIPLIER);
    let values = codebook.table();
    let groups = table.columns.div_ceil(GROUP);
    let words = 1 + GROUP / 16 * bits;
    let height = ROWS.max(encoder.together() / groups);
    out.par_chunks_mut(height * groups * words).enumerate().try_for_each(|(band, out)| {
        let rings = out.len() / words;
        let mut targets = vec![0.0f32; rings * GROUP];
        let mut scales = vec![0.0f32; rings];
        for ring in 0..rings {
            let (row, group) = (band * height + ring / groups, ring % groups);
            let target = &mut targets[ring * GROUP..][..GROUP];
            let own = &table.row(row)[group * GROUP..table.columns.min((group + 1) * GROUP)];
            for ((t, v), s) in target.iter_mut().zip(own).zip(&signs[group * GROUP..]) {
                *t = v * s;
            }
            sylvester(target);
            let rms = (target.iter().map(|t| t * t).sum::<f32>() / GROUP as f32).sqrt();
            scales[ring] = rms;
            let gain = if rms > 0.0 { 0.95 / rms } else { 0.0 };
            target.iter_mut().for_each(|t| *t *= gain);
        }
        let mut states = vec![0u16; rings * GROUP];
        encoder.encode(&targets, rate, codebook, &mut states)?;
        for ring in 0..rings {
            let (states, target) = (&states[ring * GROUP..][..GROUP], &targets[ring * GROUP..]);
            let value = |s: &u16| f64::from(values[usize::from(*s)]);
            let own: f64 = states.iter().map(|s| value(s).powi(2)).sum();
            let both: f64 = states.iter().zip(target).map(|(s, t)| value(s) * f64::from(*t)).sum();
            // Undo the gain and the factor 16 that `sylvester` leaves, then fit.
            let scale = f64::from(scales[ring]) / 0.95 / 16.0 * both / own;
            let scale = if scales[ring] > 0.0 { f16::from_f64(scale) } else { f16::ZERO };
            let out = &mut out[ring * words..][..words];
            out[0] = scale.to_bits();
            for (i, state) in states.iter().enumerate() {
                let symbol = u32::from(state & ((1 << bits) - 1) as u16);
                let (word, shift) = (i * bits / 16, i * bits % 16);
                let shifted = symbol << shift;
                out[1 + word] |= shifted as u16;
                if shift + bits > 16 {
                    out[2 + word] |= (shifted >> 16) as u16;
                }
            }
        }
        Ok(())
    })
}
