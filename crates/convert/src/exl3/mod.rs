//! The EXL3 quantizer: one matrix and the second moments of its inputs to trellis, `suh` and `svh`.
//!
//! 1. [`basis`]: channel scales, random signs, Hadamard rotation of both sides.
//! 2. [`ldl`]: the rotated Hessian, damped, as `L D Lᵀ`.
//! 3. [`search`]: the root mean square of `Ŵ`, on some of its tiles, or from a table by rate.
//! 4. [`feedback`]: LDLQ with the tail-biting Viterbi encoder, tile by tile.
//! 5. [`refit`]: least-squares scales of both sides for the tiles that were chosen.
//! 6. Passes of coordinate descent, each followed by another fit.

pub mod basis;
pub mod feedback;
pub mod ldl;
pub mod panels;
pub mod refit;
pub mod search;
pub mod table;

use crate::error::ConvertError;
use crate::matrix::{Matrix, dot};
use crate::metric::Metric;
use crate::pooling::CalibrationRule;
use crate::quantizer::{LinearInput, Phases, Quantizer, TensorReport};
use crate::report::Watch;
use basis::{ScaleRule, Scales};
use bytes::Bytes;
use feedback::Coder;
use half::f16;
use marlin_quant::exl3::encode::LdlqMatrix;
use marlin_quant::exl3::ring::TILE;
use marlin_quant::exl3::{Codebook, Rate, TileEncoder};
use marlin_tensor::{Backend, BackendError, DType, HostTensor, Weight};
use panels::Panels;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

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
    /// Tiles of each matrix that its root mean square is searched on; 0 takes that of Gaussian weights.
    pub search: usize,
    /// What a job makes of the calibration rows.
    pub calibration: CalibrationRule,
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
            search: 0,
            calibration: CalibrationRule::default(),
        }
    }
}

/// Makes EXL3 weights.
pub struct Exl3Quantizer {
    /// Finds rings.
    pub encoder: Arc<dyn TileEncoder>,
    /// Multiplies matrices, where it can.
    pub backend: Arc<dyn Backend>,
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
        let [out_features, in_features] = input.shape;
        let (n, k) =
            (out_features.next_multiple_of(PADDING), in_features.next_multiple_of(PADDING));
        let mut watch = Watch::start();
        let mut panels = Panels::new(input, n, k)?;
        let algebra = self.backend.algebra();
        let h = input.hessian.map(|h| Metric::new(h.padded(k, k), algebra)).transpose()?;
        let mut fallback = match (&h, self.options.feedback) {
            (_, false) => Some("feedback is off".to_owned()),
            (None, _) => Some(input.why_uncalibrated.to_owned()),
            (Some(_), true) => None,
        };
        let used = h.as_ref().filter(|_| fallback.is_none());

        let diagonal = used.map(|h| diagonal(&h.h, self.options.damping));
        let rule = self.options.scales;
        let choose = |panels: &Panels, rms| {
            let visit = |each: &mut dyn FnMut(usize, &Matrix)| panels.weights(each);
            Scales::choose([n, k], &visit, diagonal.as_deref(), rule, rms, input.seeds)
        };
        let mut scales = choose(&panels, self.rms(rate))?;
        let table = self.codebook.table();
        let tiles = n * k / TILE * (1 + self.options.passes);
        let encoder = Timed::new(self.encoder.as_ref(), tiles, input.progress);
        let coder = Coder { encoder: &encoder, rate, codebook: self.codebook, table: &table };

        let preparation = watch.lap();
        let damping = self.options.damping;
        let factor =
            used.map(|h| ldl::block_ldl(&scales.hessian(&h.h), damping, algebra)).transpose()?;
        if matches!(factor, Some(None)) {
            fallback = Some("the Hessian has no factorisation".to_owned());
        }
        let factor = factor.flatten().map(|(l, _)| l);
        let factorization = watch.lap();
        if self.options.search > 0 {
            let tiles = self.options.search;
            let gain = search::gain(&panels, &coder, &scales, factor.as_ref(), tiles)?;
            // One factor on all inputs: `L` stays what it is.
            scales = choose(&panels, self.rms(rate) * gain as f32)?;
        }
        panels.encode(h.as_ref(), |rows, w| {
            coder.feedback(&scales.part(rows).rotate(w), factor.as_ref())
        })?;
        let passes = if factor.is_some() { self.options.passes } else { 0 };
        drop(factor);
        let feedback = watch.lap();
        self.fit(&mut scales, &mut panels, &coder, h.as_ref())?;
        for _ in 0..passes {
            let Some(h) = &h else { break };
            let rotated_h = damped(&scales.hessian(&h.h), self.options.damping);
            let Some(inverse) = ldl::inverse_blocks(&rotated_h) else { break };
            let mut changed = 0;
            panels.visit(&coder, Some(h), |rows, open| {
                let target = scales.part(rows).rotate(&open.w);
                let here = coder.descend(&target, &rotated_h, &inverse, &mut open.tiles)?;
                changed += here;
                Ok(here > 0)
            })?;
            if changed == 0 {
                break;
            }
            self.fit(&mut scales, &mut panels, &coder, Some(h))?;
        }

        // Padded outputs decode to exact zeros.
        scales.svh[out_features..].fill(0.0);
        let mut sums = Sums::default();
        panels.visit(&coder, h.as_ref(), |rows, open| {
            let decoded = scales.part(rows).apply(&Scales::unscaled(&open.tiles.decoded));
            sums.add(&open.w, decoded, h.as_ref().zip(open.wh.as_ref()))?;
            Ok(false)
        })?;
        let mut report = sums.report(input, h.is_some(), rate, fallback);
        report.encoder_seconds = encoder.seconds();
        report.phases = Phases { preparation, factorization, feedback, fits: watch.lap() };
        let weight = Weight {
            format: "exl3",
            out_features,
            in_features,
            parts: self.parts(&panels.pack(), &scales, rate, n, k)?,
        };
        Ok((weight, report))
    }
}

impl Exl3Quantizer {
    /// Fits `scales` to the tiles, outputs and inputs in turn.
    fn fit(
        &self,
        scales: &mut Scales,
        panels: &mut Panels,
        coder: &Coder,
        h: Option<&Metric>,
    ) -> Result<(), ConvertError> {
        let Some(h) = h.filter(|_| self.options.refit) else { return Ok(()) };
        for round in 0..=refit::ROUNDS {
            let mut inputs = (round < refit::ROUNDS).then(|| refit::Inputs::new(h)).transpose()?;
            panels.visit(coder, Some(h), |rows, open| {
                let Some(wh) = &open.wh else { return Ok(false) };
                let unscaled = Scales::unscaled(&open.tiles.decoded);
                let mut own = scales.part(rows.clone());
                refit::fit_outputs(&mut own, &unscaled, h, wh)?;
                if let Some(inputs) = &mut inputs {
                    inputs.add(&own, &unscaled, wh)?;
                }
                scales.svh[rows].copy_from_slice(&own.svh);
                Ok(false)
            })?;
            if let Some(inputs) = inputs {
                inputs.fit(scales, &h.h)?;
            }
        }
        Ok(())
    }
}

/// An encoder with a stopwatch, and a count of tiles; the seconds of all threads are summed.
struct Timed<'a> {
    encoder: &'a dyn TileEncoder,
    nanoseconds: AtomicU64,
    /// Tiles encoded, of how many at most.
    done: AtomicUsize,
    tiles: usize,
    progress: &'a (dyn Fn(f64) + Sync),
}

impl<'a> Timed<'a> {
    fn new(encoder: &'a dyn TileEncoder, tiles: usize, progress: &'a (dyn Fn(f64) + Sync)) -> Self {
        let (nanoseconds, done) = (AtomicU64::new(0), AtomicUsize::new(0));
        Self { encoder, nanoseconds, done, tiles, progress }
    }

    fn seconds(&self) -> f64 {
        self.nanoseconds.load(Ordering::Relaxed) as f64 * 1e-9
    }

    /// What began at `start` has encoded `tiles`.
    fn add(&self, start: Instant, tiles: usize) {
        self.nanoseconds.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        self.tell(tiles);
    }

    fn tell(&self, tiles: usize) {
        let so_far = self.done.fetch_add(tiles, Ordering::Relaxed) + tiles;
        (self.progress)(so_far as f64 / self.tiles as f64);
    }
}

impl TileEncoder for Timed<'_> {
    fn name(&self) -> String {
        self.encoder.name()
    }

    fn encode(
        &self,
        tiles: &[f32],
        rate: Rate,
        codebook: Codebook,
        states: &mut [u16],
    ) -> Result<(), BackendError> {
        let start = Instant::now();
        let done = self.encoder.encode(tiles, rate, codebook, states);
        self.add(start, states.len() / TILE);
        done
    }

    fn ldlq(
        &self,
        matrix: &LdlqMatrix,
        rate: Rate,
        codebook: Codebook,
        _: &dyn Fn(usize),
    ) -> Result<Option<Vec<u16>>, BackendError> {
        let start = Instant::now();
        let states = self.encoder.ldlq(matrix, rate, codebook, &|tiles| self.tell(tiles))?;
        if states.is_some() {
            self.add(start, 0);
        }
        Ok(states)
    }

    fn together(&self) -> usize {
        self.encoder.together()
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

/// How far what was decoded is from the weights, summed over panels of outputs.
#[derive(Default)]
struct Sums {
    energy: f64,
    lost: f64,
    /// `tr(E H Eᵀ)`.
    error: f64,
    /// `tr(W H Wᵀ)`.
    whole: f64,
    /// `tr(Q H Qᵀ)`, or `tr(Q Qᵀ)` without moments.
    own: f64,
    /// `tr(W H Qᵀ)`, or `tr(W Qᵀ)`.
    both: f64,
}

impl Sums {
    /// Adds a panel: `decoded` stands for `w`, under the moments and `W · H`.
    fn add(
        &mut self,
        w: &Matrix,
        decoded: Matrix,
        moments: Option<(&Metric, &Matrix)>,
    ) -> Result<(), BackendError> {
        match moments {
            Some((h, wh)) => {
                let qh = h.times(&decoded)?;
                self.own += dot(&qh.data, &decoded.data);
                self.whole += dot(&wh.data, &w.data);
                self.both += dot(&wh.data, &decoded.data);
            }
            None => {
                self.own += dot(&decoded.data, &decoded.data);
                self.both += dot(&w.data, &decoded.data);
            }
        }
        let mut error = decoded;
        error.data.iter_mut().zip(&w.data).for_each(|(q, w)| *q = w - *q);
        self.energy += dot(&w.data, &w.data);
        self.lost += dot(&error.data, &error.data);
        if let Some((h, _)) = moments {
            self.error += dot(&h.times(&error)?.data, &error.data);
        }
        Ok(())
    }

    fn report(
        &self,
        input: &LinearInput<'_>,
        moments: bool,
        rate: Rate,
        fallback: Option<String>,
    ) -> TensorReport {
        let Self { energy, lost, error, whole, own, both } = *self;
        let (proxy_error, cosine) = match moments {
            true => (error / whole, both / (whole * own).sqrt()),
            false => (lost / energy, both / (energy * own).sqrt()),
        };
        // A matrix of zeros is kept exactly.
        let proxy_error = if energy == 0.0 { 0.0 } else { proxy_error.max(0.0) };
        TensorReport {
            key: input.key.to_owned(),
            shape: input.shape,
            bits: rate.bits(),
            proxy_error,
            relative_output_error: proxy_error.sqrt(),
            relative_weight_error: if energy == 0.0 { 0.0 } else { (lost / energy).sqrt() },
            cosine: if energy == 0.0 { 1.0 } else { cosine },
            calibration_rows: input.calibration_rows,
            fallback,
            seconds: 0.0,
            encoder_seconds: 0.0,
            phases: Phases::default(),
        }
    }
}
