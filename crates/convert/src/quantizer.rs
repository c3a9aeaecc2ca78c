//! The seam between a job and a format: one matrix in, one packed weight out.

use crate::error::ConvertError;
use crate::hessian::Hessian;
use crate::matrix::Matrix;
use crate::origin::Origin;
use crate::report::fnv;
use marlin_models::LinearSpec;
use marlin_tensor::Weight;
use std::ops::Range;

/// Reads some rows of a matrix as floats.
pub type ReadRows<'a> = dyn Fn(Range<usize>) -> Result<Matrix, ConvertError> + Sync + 'a;

/// What a quantizer is told about one matrix.
pub struct LinearInput<'a> {
    /// Checkpoint key.
    pub key: &'a str,
    /// `[out_features, in_features]`.
    pub shape: [usize; 2],
    /// Reads rows of the weight; a large one is never held whole.
    pub rows: &'a ReadRows<'a>,
    /// Second moments of the inputs, `[in_features, in_features]`, when they are known.
    pub hessian: Option<&'a Matrix>,
    /// Why there are none, for the report.
    pub why_uncalibrated: &'a str,
    /// Input rows behind `hessian`.
    pub calibration_rows: u64,
    /// Seeds of what is random on the input side (shared by matrices with one input) and on the output side.
    pub seeds: (u64, u64),
    /// Told the share of the matrix that is done, from any thread.
    pub progress: &'a (dyn Fn(f64) + Sync),
}

/// How one matrix fared.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct TensorReport {
    /// Checkpoint key.
    pub key: String,
    /// `[out_features, in_features]`.
    pub shape: [usize; 2],
    /// Bits per weight of the codes.
    pub bits: f64,
    /// `tr(E H Eᵀ) / tr(W H Wᵀ)`: the share of the output's energy that is error.
    pub proxy_error: f64,
    /// Its square root: `‖x E‖ / ‖x W‖`.
    pub relative_output_error: f64,
    /// `‖E‖ / ‖W‖`.
    pub relative_weight_error: f64,
    /// Cosine between the outputs before and after.
    pub cosine: f64,
    /// Input rows the Hessian was made from.
    pub calibration_rows: u64,
    /// Why calibration was not used, if it was not.
    pub fallback: Option<String>,
    /// Time it took.
    pub seconds: f64,
    /// Seconds in the encoder, those of all threads added up.
    #[serde(default)]
    pub encoder_seconds: f64,
    /// Seconds of its phases.
    #[serde(default)]
    pub phases: Phases,
}

/// Seconds that the phases of a matrix took.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Phases {
    /// Reading, scales.
    pub preparation: f64,
    /// Factorization of the moments.
    pub factorization: f64,
    /// Encoding, feedback and a search of the scale included.
    pub feedback: f64,
    /// Fits of scales, passes after the first, and the errors that are reported.
    pub fits: f64,
}

impl std::ops::AddAssign for Phases {
    fn add_assign(&mut self, other: Self) {
        self.preparation += other.preparation;
        self.factorization += other.factorization;
        self.feedback += other.feedback;
        self.fits += other.fits;
    }
}

impl TensorReport {
    /// Weights of the matrix, padding not counted.
    pub fn weights(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product()
    }

    /// Of a table that has no inputs to calibrate with.
    pub fn uncalibrated(key: &str, shape: [usize; 2], bits: f64) -> Self {
        let fallback = Some("a table has no inputs".to_owned());
        Self { bits, fallback, ..Self::kept(key, shape) }
    }

    /// Of a matrix that is stored in fp16.
    pub fn kept(key: &str, shape: [usize; 2]) -> Self {
        Self {
            key: key.to_owned(),
            shape,
            bits: 16.0,
            proxy_error: 0.0,
            relative_output_error: 0.0,
            relative_weight_error: 0.0,
            cosine: 1.0,
            calibration_rows: 0,
            fallback: None,
            seconds: 0.0,
            encoder_seconds: 0.0,
            phases: Phases::default(),
        }
    }
}

/// Quantizes the matrix of `spec` as the output has it, with what `hessian` knows of its inputs. Signs
/// follow from `seed` and names: matrices with one label share those of their inputs. `progress` is told the share done.
///
/// # Errors
/// As [`Quantizer::quantize`], and when the matrix is missing.
pub fn quantize_linear(
    quantizer: &dyn Quantizer,
    origin: &Origin,
    spec: &LinearSpec,
    hessian: Option<&Hessian>,
    seed: u64,
    bits: f64,
    progress: &(dyn Fn(f64) + Sync),
) -> Result<(Weight, TensorReport), ConvertError> {
    let key = origin.output_key(spec);
    let mean = hessian.and_then(Hessian::mean);
    let input = LinearInput {
        key: &key,
        shape: [spec.out_features, spec.in_features],
        rows: &|rows| origin.rows(spec, rows),
        hessian: mean.as_ref(),
        why_uncalibrated: "no calibration token reached it",
        calibration_rows: hessian.map_or(0, Hessian::rows),
        seeds: (seed ^ fnv(spec.label.as_bytes()), seed ^ fnv(key.as_bytes())),
        progress,
    };
    quantizer.quantize(&input, bits)
}

/// Turns a matrix into a packed weight. No I/O; the same input gives the same bytes.
pub trait Quantizer: Send + Sync {
    /// Quantizes at `bits` per weight.
    ///
    /// # Errors
    /// When the weights are not finite, or the format has no such rate or shape.
    fn quantize(
        &self,
        input: &LinearInput<'_>,
        bits: f64,
    ) -> Result<(Weight, TensorReport), ConvertError>;
}
