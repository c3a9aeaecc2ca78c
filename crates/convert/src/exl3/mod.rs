//! The EXL3 quantizer: one matrix and the second moments of its inputs to trellis, `suh` and `svh`.
//!
//! 1. [`basis`]: channel scales, random signs, Hadamard rotation of both sides.
//! 2. [`ldl`]: the rotated Hessian, damped, as `L D Lᵀ`.
//! 3. [`feedback`]: LDLQ with the tail-biting Viterbi encoder, tile by tile.
//! 4. [`refit`]: least-squares scales of both sides for the tiles that were chosen.
//! 5. Passes of coordinate descent, each followed by another fit.

pub mod basis;
pub mod feedback;
pub mod ldl;
pub mod refit;
pub mod table;

use crate::error::ConvertError;
use crate::matrix::{Matrix, dot};
use crate::quantizer::{LinearInput, Quantizer, TensorReport};
use basis::{ScaleRule, Scales};
use bytes::Bytes;
use feedback::Coder;
use half::f16;
use marlin_quant::exl3::{Codebook, Rate, TileEncoder};
use marlin_tensor::{DType, HostTensor, Weight};
use refit::Moments;
use std::sync::Arc;

/// Channels are padded to a multiple of this.
pub const PADDING: usize = 128;

/// Choices of the quantizer that the format leaves open. The defaults are what the guide's ablation
/// found best.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Exl3Options {
    /// Share of the mean diagonal that is added to the Hessian's diagonal.
    pub damping: f32,
    /// Passes of coordinate descent after LDLQ.
    pub passes: usize,
    /// Channel scales.
    pub scales: ScaleRule,
    /// Whether scales are fitted again to the chosen tiles.
    pub refit: bool,
    /// Whether the inputs' second moments are used at all (`false`: tile by tile).
    pub feedback: bool,
    /// Root mean square of `Ŵ` relative to the best for Gaussian weights.
    pub gain: f32,
}

impl Default for Exl3Options {
    fn default() -> Self {
        Self {
            damping: 0.01,
            passes: 0,
            scales: ScaleRule { exponent: 1.0, hessian_exponent: 0.0 },
            refit: true,
            feedback: true,
            gain: 1.0,
        }
    }
}

/// Makes EXL3 weights.
pub struct Exl3Quantizer {
    /// Finds rings.
    pub encoder: Arc<dyn TileEncoder>,
    /// Value generator.
    pub codebook: Codebook,
    /// Choices.
    pub options: Exl3Options,
}

impl Exl3Quantizer {
    /// Root mean square of `Ŵ` at which Gaussian weights lose least.
    fn rms(&self, rate: Rate) -> f32 {
        let best = match rate.twice_bits() {
            2 => 1.14,
            3 => 1.04,
            4 => 1.0,
            5 => 0.97,
            6 => 0.95,
            7 => 0.94,
            _ => 0.92,
        };
        // The two other codebooks have values 1.24 times as large.
        let codebook = match self.codebook {
            Codebook::Mul1(_) => 1.0,
            Codebook::ThreeInst | Codebook::Mcg(_) => 1.2,
        };
        best * codebook * self.options.gain
    }
}

impl Quantizer for Exl3Quantizer {
    fn quantize(
        &self,
        input: &LinearInput<'_>,
        bits: f64,
    ) -> Result<(Weight, TensorReport), ConvertError> {
        let refuse = |reason: &str| ConvertError::Tensor {
            key: input.key.to_owned(),
            reason: reason.to_owned(),
        };
        let rate = Rate::from_bits(bits).ok_or_else(|| refuse("EXL3 has no such rate"))?;
        let (out_features, in_features) = (input.weight.rows, input.weight.columns);
        if input.weight.data.iter().any(|v| !v.is_finite()) {
            return Err(refuse("the weights hold NaN or infinity; the source is damaged"));
        }
        let (n, k) =
            (out_features.next_multiple_of(PADDING), in_features.next_multiple_of(PADDING));
        let w = input.weight.padded(n, k);
        let moments = input.hessian.map(|h| Moments::new(&w, h.padded(k, k)));
        let mut fallback = match (&moments, self.options.feedback) {
            (_, false) => Some("feedback is off".to_owned()),
            (None, _) => Some(input.why_uncalibrated.to_owned()),
            (Some(_), true) => None,
        };
        let used = moments.as_ref().map(|m| &m.h).filter(|_| fallback.is_none());
        let fit = |scales: &mut Scales, unscaled: &Matrix| {
            if let Some(moments) = moments.as_ref().filter(|_| self.options.refit) {
                refit::fit(scales, unscaled, moments);
            }
        };

        let diagonal = used.map(|h| diagonal(h, self.options.damping));
        let rms = self.rms(rate);
        let mut scales =
            Scales::choose(&w, diagonal.as_deref(), self.options.scales, rms, input.seeds);
        let table = self.codebook.table();
        let coder =
            Coder { encoder: self.encoder.as_ref(), rate, codebook: self.codebook, table: &table };

        let rotated_h = used.map(|h| scales.hessian(h));
        let factor = rotated_h.as_ref().and_then(|h| ldl::block_ldl(h, self.options.damping));
        if rotated_h.is_some() && factor.is_none() {
            fallback = Some("the Hessian has no factorisation".to_owned());
        }
        let mut tiles = coder.feedback(&scales.rotate(&w), factor.as_ref().map(|(l, _)| l));
        let mut unscaled = Scales::unscaled(&tiles.decoded);
        fit(&mut scales, &unscaled);
        for _ in 0..if factor.is_some() { self.options.passes } else { 0 } {
            let Some(h) = used else { break };
            let rotated_h = damped(&scales.hessian(h), self.options.damping);
            let Some(inverse) = ldl::inverse_blocks(&rotated_h) else { break };
            if coder.descend(&scales.rotate(&w), &rotated_h, &inverse, &mut tiles) == 0 {
                break;
            }
            unscaled = Scales::unscaled(&tiles.decoded);
            fit(&mut scales, &unscaled);
        }

        // Padded outputs decode to exact zeros.
        scales.svh[out_features..].fill(0.0);
        let decoded = scales.apply(&unscaled);
        let report = report(input, &w, &decoded, moments.as_ref(), rate, fallback);
        let weight = Weight {
            format: "exl3",
            out_features,
            in_features,
            parts: self.parts(&tiles.pack(), &scales, rate, n, k)?,
        };
        Ok((weight, report))
    }
}

impl Exl3Quantizer {
    fn parts(
        &self,
        trellis: &[u16],
        scales: &Scales,
        rate: Rate,
        n: usize,
        k: usize,
    ) -> Result<Vec<(&'static str, HostTensor)>, ConvertError> {
        let half = |values: &[f32]| -> Bytes {
            values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect::<Vec<_>>().into()
        };
        let words: Vec<u8> = trellis.iter().flat_map(|w| w.to_le_bytes()).collect();
        let shape = vec![k / 16, n / 16, rate.half_words()];
        let mut parts = vec![
            ("trellis", HostTensor::new(DType::I16, shape, words.into())?),
            ("suh", HostTensor::new(DType::F16, vec![k], half(&scales.suh))?),
            ("svh", HostTensor::new(DType::F16, vec![n], half(&scales.svh))?),
        ];
        let marker = |m: u32| HostTensor::new(DType::I32, vec![], m.to_le_bytes().to_vec().into());
        match self.codebook {
            Codebook::ThreeInst => {}
            Codebook::Mcg(m) => parts.push(("mcg", marker(m)?)),
            Codebook::Mul1(m) => parts.push(("mul1", marker(m)?)),
        }
        Ok(parts)
    }
}

/// Diagonal of `h` with `damping` of its mean added.
fn diagonal(h: &Matrix, damping: f32) -> Vec<f32> {
    let mean = (0..h.rows).map(|i| h.row(i)[i]).sum::<f32>() / h.rows as f32;
    (0..h.rows).map(|i| h.row(i)[i] + damping * mean).collect()
}

/// `h` with `damping` of its mean diagonal added to the diagonal.
fn damped(h: &Matrix, damping: f32) -> Matrix {
    let mut out = h.clone();
    for (i, value) in diagonal(h, damping).into_iter().enumerate() {
        out.row_mut(i)[i] = value;
    }
    out
}

/// How far `decoded` is from `w`, both `[n, k]`.
fn report(
    input: &LinearInput<'_>,
    w: &Matrix,
    decoded: &Matrix,
    moments: Option<&Moments>,
    rate: Rate,
    fallback: Option<String>,
) -> TensorReport {
    let mut error = w.clone();
    error.data.iter_mut().zip(&decoded.data).for_each(|(a, b)| *a -= b);
    let (energy, lost) = (dot(&w.data, &w.data), dot(&error.data, &error.data));
    let (proxy_error, cosine) = match moments {
        Some(m) => {
            let (eh, qh) = (error.times(&m.h), decoded.times(&m.h));
            let whole = dot(&m.wh.data, &w.data);
            let own = dot(&qh.data, &decoded.data);
            let cosine = dot(&m.wh.data, &decoded.data) / (whole * own).sqrt();
            (dot(&eh.data, &error.data) / whole, cosine)
        }
        None => {
            let own = dot(&decoded.data, &decoded.data);
            (lost / energy, dot(&w.data, &decoded.data) / (energy * own).sqrt())
        }
    };
    // A matrix of zeros is kept exactly.
    let proxy_error = if energy == 0.0 { 0.0 } else { proxy_error.max(0.0) };
    TensorReport {
        key: input.key.to_owned(),
        shape: [input.weight.rows, input.weight.columns],
        bits: rate.bits(),
        proxy_error,
        relative_output_error: proxy_error.sqrt(),
        relative_weight_error: if energy == 0.0 { 0.0 } else { (lost / energy).sqrt() },
        cosine: if energy == 0.0 { 1.0 } else { cosine },
        calibration_rows: input.calibration_rows,
        fallback,
        seconds: 0.0,
    }
}
