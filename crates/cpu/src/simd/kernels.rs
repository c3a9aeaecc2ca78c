//! [`Kernel`]s: a stored matrix, the level it is multiplied at, and how the work is cut.

use super::amx::{self, Amx, Packed, Panels, Part, Tile};
use super::float::{self, Element, F32, Rows};
use super::integer::{self, Blocks};
use super::isa::{FloatIsa, IntegerIsa};
use super::panel::{self, Bands};
use super::quantized::Quantized;
use super::tile::{BAND, Format, Tiles};
use crate::kernel::{Inputs, Prepared, RowKind};
use crate::{ColumnBand, Kernel, Level, Pool};
use bytes::Bytes;
use marlin_quant::WeightFormat;
use marlin_tensor::Weight;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// Columns per task: whole units of `unit`, several tasks a thread so that a slow one is not
/// waited for, one task where nobody helps.
fn columns_per_task(columns: usize, unit: usize, pool: &Pool) -> usize {
    let tasks = match pool.available_threads() {
        1 => 1,
        threads => 4 * threads,
    };
    columns.div_ceil(tasks).next_multiple_of(unit)
}

/// Rows for which a thread may decode weights that others decode too.
const ROWS_OF_A_THREAD: usize = 128;

/// How activations are multiplied.
#[derive(Clone, Copy)]
enum Path {
    Float(FloatIsa),
    Integer(IntegerIsa),
}

/// Tiles of bf16 for many rows, where the machine multiplies them faster than floats; inputs are rounded if they may be.
pub(super) fn tiles(level: Level, float_activations: bool) -> Option<Amx> {
    match float_activations {
        true => Amx::with_registers(level).map(Amx::exact),
        false => Amx::new(level),
    }
}

/// What the name of a path says of [`tiles`].
pub(super) fn tiles_name(level: Level, float_activations: bool) -> &'static str {
    match (tiles(level, float_activations), Amx::with_registers(level), float_activations) {
        (Some(_), Some(_), true) => ", amx split f32 for prompts",
        (Some(_), Some(_), false) => ", amx bf16 for prompts",
        (Some(_), None, _) => ", bf16 for prompts",
        (None, _, _) => "",
    }
}

/// The same where weights are small integers, which vectors multiply twice as fast as bf16: tile registers only.
fn integer_tiles(level: Level, float_activations: bool) -> Option<Amx> {
    Amx::with_registers(level).and_then(|_| tiles(level, float_activations))
}

/// `out = x Wᵀ` on tiles, for several matrices over one input of `columns` columns.
pub(crate) fn multiply_amx(
    amx: Amx,
    weights: &[&dyn Panels],
    x: &[f32],
    columns: usize,
    outs: Vec<&mut [f32]>,
    pool: &Pool,
) {
    // Threads keep to rows of their own, which are then in their cache, if these are so many that
    // decoding the weights for each does not matter.
    let threads = pool.available_threads();
    let rows = x.len() / columns;
    let groups = (rows / ROWS_OF_A_THREAD).clamp(1, threads);
    let height = rows.div_ceil(groups).next_multiple_of(2 * amx::ROWS);
    let x = &Packed::new(amx, x, columns, height, pool);
    let tasks = if threads == 1 { 1 } else { (4 * threads).div_ceil(groups) };
    let total: usize = outs.iter().map(|out| out.len() / x.rows).sum();
    let width = total.div_ceil(tasks).next_multiple_of(2 * BAND);
    let sized = outs.into_iter().map(|out| {
        let n = out.len() / x.rows;
        (out, n, width)
    });
    pool.run_parts(sized.collect(), height, |i, rows, columns, out| {
        let blocks = rows.start / amx::ROWS..rows.end.div_ceil(amx::ROWS);
        let bands = columns.start / BAND..columns.end.div_ceil(BAND);
        amx::multiply(amx, weights[i], x, blocks, bands, out);
    });
}

/// A repacked block format.
pub(crate) struct Tiled<F> {
    tiles: Tiles<F>,
    path: Path,
    amx: Option<Amx>,
    name: String,
}

impl<F: Format> Tiled<F> {
    /// Repacks `weight`; `None` when its parts are not what the format calls for, or the level is
    /// not supported.
    pub(crate) fn new(weight: &Weight, level: Level, float_activations: bool) -> Option<Self> {
        let bytes = weight.part("blocks")?.bytes();
        let (rows, columns) = (weight.out_features, weight.in_features);
        let l = F::LAYOUT;
        let whole = columns.is_multiple_of(l.block) && columns > 0;
        if !whole || bytes.len() != rows * (columns / l.block) * l.bytes {
            return None;
        }
        let path = match float_activations {
            true => Path::Float(FloatIsa::new(level)?),
            false => Path::Integer(IntegerIsa::new(level)?),
        };
        let amx = integer_tiles(level, float_activations);
        let name = Self::name_of(level, float_activations);
        Some(Self { tiles: Tiles::new(bytes, rows, columns), path, amx, name })
    }

    /// Name of its path.
    pub(crate) fn name_of(level: Level, float_activations: bool) -> String {
        let many = integer_tiles(level, float_activations)
            .map_or("", |_| tiles_name(level, float_activations));
        match float_activations {
            true => format!("{} {}{many}", F::ID, FloatIsa::level(level)),
            false => format!("{} {} int8{many}", F::ID, IntegerIsa::level(level)),
        }
    }
}

impl<F: Format> Kernel for Tiled<F> {
    fn name(&self) -> String {
        self.name.clone()
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

    fn matmul(&self, x: &[f32], rows: usize, kind: RowKind, out: &mut [f32], pool: &Pool) {
        match self.amx.filter(|_| kind == RowKind::Prompt) {
            Some(amx) => {
                assert_eq!(
                    x.len(),
                    rows * self.tiles.in_features,
                    "input fills [rows, in_features]"
                );
                multiply_amx(amx, &[&self.tiles], x, self.tiles.in_features, vec![out], pool);
            }
            None => multiply_tiles(&self.tiles, self.path, x, rows, out, pool),
        }
    }

    fn panels(&self) -> Option<(Amx, &dyn Panels)> {
        self.amx.map(|amx| (amx, &self.tiles as &dyn Panels))
    }

    fn stored(&self) -> &[u8] {
        self.tiles.stored()
    }

    fn part_columns(&self) -> Option<usize> {
        Some(2 * BAND)
    }

    fn parts_of_prompts(&self) -> bool {
        self.amx.is_none()
    }

    fn prepare(&self, x: &[f32], ready: Option<&Prepared>, pool: &Pool) -> Prepared {
        prepare(&self.tiles, self.path, x, ready, pool)
    }

    fn part(&self, inputs: Inputs<'_>, columns: Range<usize>, out: &mut ColumnBand<'_>) {
        multiply_part(&self.tiles, self.path, inputs, columns, out);
    }
}

/// [`Kernel::prepare`] of tiles, the format out of sight.
fn prepare(
    weights: &dyn Repacked,
    path: Path,
    x: &[f32],
    ready: Option<&Prepared>,
    pool: &Pool,
) -> Prepared {
    let Path::Integer(isa) = path else { return Arc::new(()) };
    let (columns, layout) = (weights.in_features(), weights.layout());
    let quantized = |ready: &&Prepared| {
        ready.downcast_ref::<Quantized>().is_some_and(|q| q.suits(isa, columns, layout))
    };
    match ready.filter(quantized) {
        Some(ready) => Arc::clone(ready),
        None => Arc::new(Quantized::new(isa, x, columns, layout, pool)),
    }
}

/// [`Kernel::part`] of tiles, the format out of sight.
fn multiply_part(
    weights: &dyn Repacked,
    path: Path,
    inputs: Inputs<'_>,
    columns: Range<usize>,
    out: &mut ColumnBand<'_>,
) {
    let bands = columns.start / BAND..columns.end.div_ceil(BAND);
    match path {
        Path::Float(isa) => panel::multiply(isa, weights, inputs.x, inputs.rows, bands, out),
        Path::Integer(isa) => {
            let x = inputs.prepared.downcast_ref().expect("inputs this kernel prepared");
            integer::multiply(isa, weights, x, bands, out);
        }
    }
}

/// A repacked matrix for either path.
trait Repacked: Blocks + Bands {}
impl<F: Format> Repacked for Tiles<F> {}

/// `out = x Wᵀ`, the format out of sight so that this is compiled once.
fn multiply_tiles(
    weights: &dyn Repacked,
    path: Path,
    x: &[f32],
    rows: usize,
    out: &mut [f32],
    pool: &Pool,
) {
    assert_eq!(x.len(), rows * weights.in_features(), "input fills [rows, in_features]");
    if rows == 0 {
        return;
    }
    let n = out.len() / rows;
    let prepared = &prepare(weights, path, x, None, pool);
    let inputs = Inputs { x, rows, prepared };
    pool.run_columns(out, n, columns_per_task(n, 2 * BAND, pool), |columns, out| {
        multiply_part(weights, path, inputs, columns, out);
    });
}

/// Float weights in place.
pub(crate) struct Plain<E> {
    bytes: Bytes,
    scales: Vec<f32>,
    out_features: usize,
    in_features: usize,
    isa: FloatIsa,
    amx: Option<Amx>,
    name: String,
    element: PhantomData<E>,
}

impl<E: Element> Plain<E> {
    /// Wraps `weight`; `None` when its parts are not what the format calls for.
    pub(crate) fn new(weight: &Weight, level: Level, float_activations: bool) -> Option<Self> {
        let bytes = weight.part("weight")?.bytes().clone();
        let (out_features, in_features) = (weight.out_features, weight.in_features);
        let fits = in_features > 0 && bytes.len() == out_features * in_features * E::BYTES;
        let scales = match float::scale_grid::<E>(out_features, in_features) {
            [0, _] => Vec::new(),
            [down, across] => {
                let scales = weight.part("scale")?.to_f32().ok()?;
                (scales.len() == down * across).then_some(scales)?
            }
        };
        let (isa, name) = (FloatIsa::new(level)?, Self::name_of(level, float_activations));
        let amx = tiles(level, float_activations);
        let element = PhantomData;
        fits.then_some(Self { bytes, scales, out_features, in_features, isa, amx, name, element })
    }

    fn rows(&self) -> Rows<'_, E> {
        Rows::new(&self.bytes, self.in_features).with_scales(&self.scales, 0)
    }

    /// Output columns `columns` for all rows of `x`.
    fn columns(
        &self,
        x: &[f32],
        rows: usize,
        kind: RowKind,
        columns: Range<usize>,
        out: &mut ColumnBand<'_>,
    ) {
        let stride = self.in_features * E::BYTES;
        let bytes = &self.bytes[columns.start * stride..columns.end * stride];
        let weights = Rows::<E>::new(bytes, self.in_features);
        let weights = weights.with_scales(&self.scales, columns.start);
        float::multiply(self.isa, weights, x, rows, kind, out);
    }

    /// Name of its path.
    pub(crate) fn name_of(level: Level, float_activations: bool) -> String {
        let many = tiles_name(level, float_activations);
        format!("{} {}{many}", E::ID, FloatIsa::level(level))
    }
}

impl<E: Element> Kernel for Plain<E> {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn bytes(&self) -> u64 {
        (self.bytes.len() + size_of_val(&*self.scales)) as u64
    }

    fn in_features(&self) -> usize {
        self.in_features
    }

    fn out_features(&self) -> usize {
        self.out_features
    }

    fn matmul(&self, x: &[f32], rows: usize, kind: RowKind, out: &mut [f32], pool: &Pool) {
        let (n, k) = (self.out_features, self.in_features);
        assert_eq!(x.len(), rows * k, "input fills [rows, in_features]");
        if let Some(amx) = self.amx.filter(|_| kind == RowKind::Prompt) {
            return multiply_amx(amx, &[&self.rows()], x, k, vec![out], pool);
        }
        let width = columns_per_task(n, 2 * BAND, pool);
        pool.run_columns(out, n, width, |columns, out| self.columns(x, rows, kind, columns, out));
    }

    fn panels(&self) -> Option<(Amx, &dyn Panels)> {
        self.amx.map(|amx| (amx, self as &dyn Panels))
    }

    fn stored(&self) -> &[u8] {
        &self.bytes
    }

    fn part_columns(&self) -> Option<usize> {
        Some(BAND)
    }

    fn part(&self, inputs: Inputs<'_>, columns: Range<usize>, out: &mut ColumnBand<'_>) {
        self.columns(inputs.x, inputs.rows, RowKind::Decode, columns, out);
    }
}

impl<E: Element> Panels for Plain<E> {
    fn fill(&self, amx: Amx, part: Part, bands: Range<usize>, start: usize, out: &mut [Tile]) {
        Panels::fill(&self.rows(), amx, part, bands, start, out);
    }
}

/// Output rows decoded at a time: few enough to stay in cache, enough to amortise.
const DECODED_ROWS: usize = 64;

/// Any format: a band of rows is decoded by its scalar definition, then multiplied as f32.
pub(crate) struct DecodedBands {
    weight: Weight,
    format: &'static dyn WeightFormat,
    isa: FloatIsa,
    amx: Option<Amx>,
    name: String,
    failure: Mutex<Option<String>>,
}

impl DecodedBands {
    /// Wraps `weight`; `None` when its first rows do not decode.
    pub(crate) fn new(weight: &Weight, level: Level, float_activations: bool) -> Option<Self> {
        let format = marlin_quant::format(weight.format);
        let rows = format.row_granularity().min(weight.out_features);
        let mut scratch = vec![0.0; rows * weight.in_features];
        format.decode_rows(weight, 0..rows, &mut scratch).ok()?;
        (weight.in_features > 0).then_some(())?;
        let isa = FloatIsa::new(level)?;
        let name = Self::name_of(weight.format, level, float_activations);
        let amx = tiles(level, float_activations);
        let weight = weight.clone();
        Some(Self { weight, format, isa, amx, name, failure: Mutex::new(None) })
    }

    /// Name of its path.
    pub(crate) fn name_of(format: &str, level: Level, float_activations: bool) -> String {
        let many = tiles_name(level, float_activations);
        format!("{format} decoded to f32, {}{many}", FloatIsa::level(level))
    }
}

impl Kernel for DecodedBands {
    fn name(&self) -> String {
        self.name.clone()
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

    fn matmul(&self, x: &[f32], rows: usize, kind: RowKind, out: &mut [f32], pool: &Pool) {
        let (n, k) = (self.weight.out_features, self.weight.in_features);
        assert_eq!(x.len(), rows * k, "input fills [rows, in_features]");
        let band = DECODED_ROWS.next_multiple_of(self.format.row_granularity());
        let amx = self.amx.filter(|_| kind == RowKind::Prompt);
        let packed = amx.map(|amx| (amx, Packed::new(amx, x, k, rows, pool)));
        pool.run_columns(out, n, band, |columns, out| {
            let mut decoded = vec![0.0f32; columns.len() * k];
            if let Err(e) = self.format.decode_rows(&self.weight, columns, &mut decoded) {
                *self.failure.lock().unwrap_or_else(|e| e.into_inner()) = Some(e.to_string());
                return;
            }
            // SAFETY: floats read as bytes.
            let bytes = unsafe {
                std::slice::from_raw_parts(decoded.as_ptr().cast::<u8>(), decoded.len() * 4)
            };
            let weights = Rows::<F32>::new(bytes, k);
            match &packed {
                Some((amx, packed)) => {
                    let bands = 0..weights.out_features().div_ceil(BAND);
                    amx::multiply(*amx, &weights, packed, 0..packed.blocks(), bands, out);
                }
                None => float::multiply(self.isa, weights, x, rows, kind, out),
            }
        });
    }

    fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}
