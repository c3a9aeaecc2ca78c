//! [`Kernel`]s: a stored matrix, the level it is multiplied at, and how the work is cut.

use super::avx2::Avx2;
use super::avx512::Avx512;
use super::float::{Element, F32, FEW_ROWS, MultiplyRows, Rows};
use super::integer::Multiply;
use super::isa::Isa;
use super::panel::{Bands, MultiplyPanels};
use super::quantized::Quantized;
use super::tile::{BAND, Format, Tiles};
use crate::{ColumnBand, Kernel, Level, Pool};
use bytes::Bytes;
use marlin_quant::WeightFormat;
use marlin_tensor::Weight;
use std::marker::PhantomData;
use std::sync::Mutex;

/// Runs `$body` with `$s` bound to the instruction set of a float kernel.
macro_rules! float_level {
    ($level:expr, $s:ident => $body:expr) => {
        match $level {
            Level::Scalar | Level::Avx2 => {
                // SAFETY: kernels are made only for levels the processor supports.
                let $s = unsafe { Avx2::new() };
                $body
            }
            Level::Avx512 | Level::Avx512Vnni => {
                // SAFETY: kernels are made only for levels the processor supports.
                let $s = unsafe { Avx512::<false>::new() };
                $body
            }
        }
    };
}

/// Columns per task: whole units of `unit`, several tasks a thread so that a slow one is not
/// waited for, one task where nobody helps.
fn columns_per_task(columns: usize, unit: usize, pool: &Pool) -> usize {
    let tasks = match pool.available_threads() {
        1 => 1,
        threads => 4 * threads,
    };
    columns.div_ceil(tasks).next_multiple_of(unit)
}

/// A repacked block format.
pub(crate) struct Tiled<F> {
    tiles: Tiles<F>,
    level: Level,
    float_activations: bool,
}

impl<F: Format> Tiled<F> {
    /// Repacks `weight`; `None` when its parts are not what the format calls for.
    pub(crate) fn new(weight: &Weight, level: Level, float_activations: bool) -> Option<Self> {
        let bytes = weight.part("blocks")?.bytes();
        let (rows, columns) = (weight.out_features, weight.in_features);
        let l = F::LAYOUT;
        let whole = columns.is_multiple_of(l.block) && columns > 0;
        if !whole || bytes.len() != rows * (columns / l.block) * l.bytes {
            return None;
        }
        Some(Self { tiles: Tiles::new(bytes, rows, columns), level, float_activations })
    }

    /// Name of its path.
    pub(crate) fn name_of(level: Level, float_activations: bool) -> String {
        match (float_activations, level) {
            (true, Level::Avx512Vnni) => format!("{} avx512", F::ID),
            (true, level) => format!("{} {level}", F::ID),
            (false, Level::Avx512) => format!("{} avx2 int8", F::ID),
            (false, level) => format!("{} {level} int8", F::ID),
        }
    }

    fn multiply_integer<S: Isa>(&self, s: S, x: &[f32], rows: usize, out: &mut [f32], pool: &Pool) {
        let (n, k) = (self.tiles.out_features, self.tiles.in_features);
        let x = &Quantized::new(s, x, k, &F::LAYOUT, pool);
        let width = columns_per_task(n, BAND, pool);
        pool.run_columns(out, n, width, |columns, out| {
            let bands = columns.start / BAND..columns.end.div_ceil(BAND);
            s.enter(Multiply { tiles: &self.tiles, x, rows, bands, out });
        });
    }
}

impl<F: Format> Kernel for Tiled<F> {
    fn name(&self) -> String {
        Self::name_of(self.level, self.float_activations)
    }

    fn bytes(&self) -> u64 {
        self.tiles.bytes()
    }

    fn in_features(&self) -> usize {
        self.tiles.in_features
    }

    fn out_features(&self) -> usize {
        self.tiles.out_features
    }

    fn matmul(&self, x: &[f32], rows: usize, out: &mut [f32], pool: &Pool) {
        assert_eq!(x.len(), rows * self.in_features(), "input fills [rows, in_features]");
        if self.float_activations {
            float_level!(self.level, s => multiply_panels(s, &self.tiles, x, rows, out, pool));
        } else if self.level == Level::Avx512Vnni {
            // SAFETY: kernels are made only for levels the processor supports.
            let s = unsafe { Avx512::<true>::new() };
            self.multiply_integer(s, x, rows, out, pool);
        } else {
            // SAFETY: kernels are made only for levels the processor supports.
            let s = unsafe { Avx2::new() };
            self.multiply_integer(s, x, rows, out, pool);
        }
    }
}

/// `out = x Wᵀ` through panels.
fn multiply_panels<S: Isa, W: Bands>(
    s: S,
    weights: &W,
    x: &[f32],
    rows: usize,
    out: &mut [f32],
    pool: &Pool,
) {
    let n = out.len() / rows.max(1);
    let width = columns_per_task(n, 2 * BAND, pool);
    pool.run_columns(out, n, width, |columns, out| {
        let bands = columns.start / BAND..columns.end.div_ceil(BAND);
        s.enter(MultiplyPanels { weights, x, rows, bands, out, column: 0 });
    });
}

/// Multiplies row-major floats into `out` from `column` on, on this thread.
fn multiply_rows<S: Isa, E: Element>(
    s: S,
    weights: Rows<'_, E>,
    x: &[f32],
    rows: usize,
    out: &mut ColumnBand<'_>,
) {
    if rows <= FEW_ROWS {
        s.enter(MultiplyRows { weights, x, rows, out, column: 0 });
    } else {
        let bands = 0..weights.bands();
        s.enter(MultiplyPanels { weights: &weights, x, rows, bands, out, column: 0 });
    }
}

/// Float weights in place.
pub(crate) struct Plain<E> {
    bytes: Bytes,
    out_features: usize,
    in_features: usize,
    level: Level,
    element: PhantomData<E>,
}

impl<E: Element> Plain<E> {
    /// Wraps `weight`; `None` when its parts are not what the format calls for.
    pub(crate) fn new(weight: &Weight, level: Level) -> Option<Self> {
        let bytes = weight.part("weight")?.bytes().clone();
        let (out_features, in_features) = (weight.out_features, weight.in_features);
        let fits = in_features > 0 && bytes.len() == out_features * in_features * E::BYTES;
        fits.then_some(Self { bytes, out_features, in_features, level, element: PhantomData })
    }

    /// Name of its path.
    pub(crate) fn name_of(level: Level) -> String {
        let level = level.min(Level::Avx512);
        format!("{} {level}", E::ID)
    }
}

impl<E: Element> Kernel for Plain<E> {
    fn name(&self) -> String {
        Self::name_of(self.level)
    }

    fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn in_features(&self) -> usize {
        self.in_features
    }

    fn out_features(&self) -> usize {
        self.out_features
    }

    fn matmul(&self, x: &[f32], rows: usize, out: &mut [f32], pool: &Pool) {
        let (n, k) = (self.out_features, self.in_features);
        assert_eq!(x.len(), rows * k, "input fills [rows, in_features]");
        let width = columns_per_task(n, 2 * BAND, pool);
        float_level!(self.level, s => pool.run_columns(out, n, width, |columns, out| {
            let stride = k * E::BYTES;
            let bytes = &self.bytes[columns.start * stride..columns.end * stride];
            multiply_rows(s, Rows::<E>::new(bytes, k), x, rows, out);
        }));
    }
}

/// Output rows decoded at a time: few enough to stay in cache, enough to amortise.
const DECODED_ROWS: usize = 64;

/// Any format: a band of rows is decoded by its scalar definition, then multiplied as f32.
pub(crate) struct DecodedBands {
    weight: Weight,
    format: &'static dyn WeightFormat,
    level: Level,
    failure: Mutex<Option<String>>,
}

impl DecodedBands {
    /// Wraps `weight`; `None` when its first rows do not decode.
    pub(crate) fn new(weight: &Weight, level: Level) -> Option<Self> {
        let format = marlin_quant::format(weight.format);
        let rows = format.row_granularity().min(weight.out_features);
        let mut scratch = vec![0.0; rows * weight.in_features];
        format.decode_rows(weight, 0..rows, &mut scratch).ok()?;
        (weight.in_features > 0).then_some(())?;
        Some(Self { weight: weight.clone(), format, level, failure: Mutex::new(None) })
    }

    /// Name of its path.
    pub(crate) fn name_of(format: &str, level: Level) -> String {
        format!("{format} decoded to f32, {}", level.min(Level::Avx512))
    }
}

impl Kernel for DecodedBands {
    fn name(&self) -> String {
        Self::name_of(self.weight.format, self.level)
    }

    fn bytes(&self) -> u64 {
        self.weight.bytes()
    }

    fn in_features(&self) -> usize {
        self.weight.in_features
    }

    fn out_features(&self) -> usize {
        self.weight.out_features
    }

    fn matmul(&self, x: &[f32], rows: usize, out: &mut [f32], pool: &Pool) {
        let (n, k) = (self.weight.out_features, self.weight.in_features);
        assert_eq!(x.len(), rows * k, "input fills [rows, in_features]");
        let band = DECODED_ROWS.next_multiple_of(self.format.row_granularity());
        float_level!(self.level, s => pool.run_columns(out, n, band, |columns, out| {
            let mut decoded = vec![0.0f32; columns.len() * k];
            if let Err(e) = self.format.decode_rows(&self.weight, columns, &mut decoded) {
                *self.failure.lock().unwrap_or_else(|e| e.into_inner()) = Some(e.to_string());
                return;
            }
            // SAFETY: floats read as bytes.
            let bytes = unsafe {
                std::slice::from_raw_parts(decoded.as_ptr().cast::<u8>(), decoded.len() * 4)
            };
            multiply_rows(s, Rows::<F32>::new(bytes, k), x, rows, out);
        }));
    }

    fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}
