//! Rows times a matrix.

use super::{Clock, Entrant, Reference, Result, Runs, copies, noise, variants};
use crate::gpu::{Gpu, Reservation};
use crate::ops::tiles::Rows;
use crate::tune::{Choices, Shape, Tuned, Variant, is_integer};
use crate::weights::{Loaded, Matrix, decode_error, has_kernel, place, rule};
use marlin_tensor::{BackendError, Weight};
use std::rc::Rc;

/// Outputs that are verified: as many single ones, or blocks of those that are decoded together.
const OUTPUTS: usize = 16;
const BLOCKS: usize = 2;

/// A matrix on the device, as often as it takes to read each copy from memory, and some of its rows on the host.
pub(super) struct Product {
    pub(super) shape: Shape,
    copies: Vec<(Loaded, Reservation)>,
    out_features: usize,
    in_features: usize,
    /// Outputs and their weights.
    decoded: Vec<(usize, Vec<f32>)>,
    /// Relative error of f32 sums, or of weights that are held as halves.
    tolerance: f64,
}

impl Product {
    pub(super) fn new(
        gpu: &Gpu,
        weight: &Weight,
        shape: &Shape,
        copies_bytes: u64,
    ) -> Result<Self> {
        let (out_features, in_features) = (weight.out_features, weight.in_features);
        let placed = || -> Result<(u64, (Loaded, Reservation))> {
            let (matrix, bytes, reservation) = place(gpu, weight)?;
            Ok((bytes, (Loaded { matrix, bias: None, in_features }, reservation)))
        };
        let (bytes, first) = placed()?;
        let mut all = vec![first];
        for _ in 1..copies(gpu, bytes, copies_bytes) {
            all.push(placed()?.1);
        }
        let format = marlin_quant::format(weight.format);
        let together = format.row_granularity().max(1);
        let count = if together == 1 { OUTPUTS } else { BLOCKS };
        let blocks = out_features.div_ceil(together);
        // Spread over the matrix; the last may be cut.
        let mut chosen: Vec<usize> =
            (1..=count).map(|i| (i * blocks / count).saturating_sub(1)).collect();
        chosen.dedup();
        let mut decoded = Vec::new();
        for block in chosen {
            let first = block * together;
            let outputs = first..out_features.min(first + together);
            let mut values = vec![0.0; outputs.len() * in_features];
            let done = format.decode_rows(weight, outputs.clone(), &mut values);
            done.map_err(|e| decode_error(weight, e))?;
            let rows = values.chunks_exact(in_features).map(<[f32]>::to_vec);
            decoded.extend(outputs.zip(rows));
        }
        let exact = match weight.format {
            // Tensor cores add up the bytes of which weights of `mul1` are sums, which the format rounds to f16.
            "exl3" if gpu.tensor_cores => 1e-3,
            "exl3" => 3e-6,
            // Their inputs have 16 bits.
            id if gpu.tensor_cores && is_integer(id) => 1e-4,
            id if has_kernel(id) => 2e-6,
            _ => 1e-3,
        };
        // Of sums of 512 products; it grows as their root.
        let tolerance = exact * (in_features as f64 / 512.0).sqrt().max(1.0);
        let shape = shape.clone();
        Ok(Self { shape, copies: all, out_features, in_features, decoded, tolerance })
    }

    /// All variants in a class of rows, or with one row for every number of rows.
    pub(super) fn runs<'a>(
        &'a self,
        gpu: &'a Gpu,
        rows: Option<usize>,
        tuned: &Tuned,
    ) -> Result<Runs<'a>> {
        let count = rows.unwrap_or(1);
        let x = noise(count as u64, count * self.in_features);
        let reference = self.reference(&x, count);
        let x = Rc::new(gpu.floats(&x));
        let others = match rows {
            Some(_) => tuned.choices(&self.shape, &gpu.facts()),
            None => Choices::default(),
        };
        let clock = |variant: Variant, launches: usize| {
            let choices = others.with(rows, variant);
            let copies: Vec<Loaded> =
                self.copies.iter().map(|(loaded, _)| with(loaded, choices)).collect();
            let x = x.clone();
            Clock::new(gpu, launches, move |i| {
                copies[i % copies.len()].multiply(gpu, &x, count, &Rows::Dense { rows: count })
            })
        };
        let rule = rule(gpu, &self.copies[0].0.matrix, rows).ok_or_else(|| {
            BackendError::Device(format!("{} has no choice for every number of rows", self.shape))
        })?;
        let launches = clock(rule, 1).calibrate();
        let entrants = variants(gpu, &self.shape, rows, rule).into_iter().map(|variant| {
            let clock = Rc::new(clock(variant, launches));
            let (timed, len) = (clock.clone(), count * self.out_features);
            // As the conformance tests have it: up to 32 rows are read as two halves each.
            let coarse = if count > 32 { 1e-2 } else { 2e-3 };
            Entrant {
                variant,
                tolerance: if variant.rounds() {
                    self.tolerance.max(coarse)
                } else {
                    self.tolerance
                },
                outputs: Box::new(move || clock.outputs(len)),
                time: Box::new(move || timed.time()),
            }
        });
        Ok(Runs { reference, entrants: entrants.collect() })
    }

    /// A few outputs of the first, middle and last of `count` rows.
    fn reference(&self, x: &[f32], count: usize) -> Reference {
        let mut rows = vec![0, count / 2, count - 1];
        rows.dedup();
        let dot = |row: usize, weights: &[f32]| -> f64 {
            let x = &x[row * self.in_features..][..self.in_features];
            x.iter().zip(weights).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
        };
        let of_row = |row: usize| {
            let at = move |output: usize| row * self.out_features + output;
            self.decoded.iter().map(move |(output, weights)| (at(*output), dot(row, weights)))
        };
        Reference { expected: rows.into_iter().flat_map(of_row).collect() }
    }
}

/// The matrix with other choices.
fn with(loaded: &Loaded, choices: Choices) -> Loaded {
    let mut loaded = loaded.clone();
    match &mut loaded.matrix {
        Matrix::Rows(matrix) => matrix.choices = choices,
        Matrix::Trellis(trellis) => trellis.choices = choices,
    }
    loaded
}
