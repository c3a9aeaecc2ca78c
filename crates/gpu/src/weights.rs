//! Weights on the device: a matrix in the form its kernel reads.

use crate::decode::{Format, UNIT};
use crate::experts::{Stack, Stacks};
use crate::gpu::{Buffer, Gpu, Reservation, WORD};
use crate::ops::columns;
use crate::ops::exl3::{self, Trellis};
use crate::ops::gemm::{self, Instruction};
use crate::ops::integer;
use crate::ops::matrix::{self, RowMatrix};
use crate::ops::text::Inputs;
use crate::ops::tiles::{Entries, Rows};
use crate::tune::{Choices, Shape, Variant};
use half::{bf16, f16};
use marlin_quant::exl3::Exl3Parts;
use marlin_quant::format;
use marlin_tensor::{BackendError, DType, HostTensor, Weight};
use std::sync::{Arc, OnceLock, RwLock};

type Result<T> = std::result::Result<T, BackendError>;

/// A matrix, or a stack of equal ones.
#[derive(Clone)]
pub(crate) enum Matrix {
    Rows(RowMatrix),
    Trellis(Trellis),
}

/// A matrix and what is added to its outputs.
#[derive(Clone)]
pub(crate) struct Loaded {
    pub(crate) matrix: Matrix,
    pub(crate) bias: Option<Buffer>,
    pub(crate) in_features: usize,
}

/// The storage behind a [`Linear`].
pub(crate) struct GpuLinear {
    pub(crate) place: RwLock<Place>,
    /// The stacks of the experts whose first gate this is.
    pub(crate) stacks: OnceLock<Arc<Stacks>>,
    _reservation: Reservation,
}

pub(crate) enum Place {
    Own(Box<Loaded>),
    Stacked(Arc<Stack>, u32),
}

/// Whether kernels read weights of `format` as they are.
pub(crate) fn has_kernel(format: &str) -> bool {
    format == "exl3" || Format::from_id(format).is_some()
}

/// How the kernel for weights of `format` is called on `runtime`.
pub(crate) fn kernel_name(format: &str, runtime: &str) -> String {
    match has_kernel(format) {
        true => format!("{format} {runtime}"),
        false => format!("{format} held as f16 {runtime}"),
    }
}

/// The shape for which choices of kernels are kept.
///
/// # Errors
/// When the parts of a trellis contradict each other.
pub(crate) fn shape(weight: &Weight) -> Result<Shape> {
    let format = match weight.format {
        "exl3" => {
            let parts = Exl3Parts::of(weight).map_err(|e| decode_error(weight, e))?;
            format!("exl3 {:.1} {}", parts.rate.bits(), parts.codebook.name())
        }
        id if has_kernel(id) => id.to_owned(),
        _ => "f16".to_owned(),
    };
    let (out_features, in_features) = (weight.out_features, weight.in_features);
    Ok(Shape::Linear { format, out_features, in_features })
}

/// That `weight` does not decode, and why.
pub(crate) fn decode_error(weight: &Weight, reason: impl ToString) -> BackendError {
    BackendError::Decode { what: weight.format.to_owned(), reason: reason.to_string() }
}

/// Bytes that [`place`] would take for `weight`; those stored, where its parts contradict each other.
pub(crate) fn bytes(weight: &Weight) -> u64 {
    let (n, k) = (weight.out_features, weight.in_features);
    if weight.format == "exl3" {
        let parts = Exl3Parts::of(weight).map(|parts| trellis_bytes(&parts));
        return parts.unwrap_or(weight.bytes());
    }
    let Some(format) = Format::from_id(weight.format) else {
        return HALF * (n * k.next_multiple_of(UNIT)) as u64;
    };
    let order = weight.part("order").map_or(0, |order| order.bytes().len() as u64);
    let first = |rows: usize| {
        let rows = marlin_quant::slice_rows(weight, 0..rows).ok()?;
        Some(format.split(&rows).bytes())
    };
    // Rows are laid out one like the other, beside what belongs to all: two stretches of them tell both. Sixteen rows of any format are whole
    // words.
    let few = marlin_quant::format(weight.format).row_granularity().next_multiple_of(16);
    let all = match n <= 2 * few {
        true => first(n),
        false => first(few).zip(first(2 * few)).map(|(one, two)| {
            let rest = (two - one) * (n - few) as u64;
            one + rest.div_ceil(few as u64).next_multiple_of(WORD as u64)
        }),
    };
    all.map_or(weight.bytes(), |rows| rows + order)
}

/// Bytes of the matrices of heads that are decoded from `weight`: floats are stored as they are, what else there is has all their bits.
pub(crate) fn head_bytes(weight: &Weight) -> u64 {
    let each = if matches!(weight.format, "bf16" | "f16") { HALF } else { WORD as u64 };
    each * (weight.out_features * weight.in_features) as u64
}

fn trellis_bytes(parts: &Exl3Parts) -> u64 {
    (parts.trellis.len() + WORD * (parts.suh.len() + parts.svh.len())) as u64
}

/// Places a matrix.
///
/// # Errors
/// When it does not decode, or the device has no room.
pub(crate) fn place(gpu: &Gpu, weight: &Weight) -> Result<(Matrix, u64, Reservation)> {
    let (n, k) = (weight.out_features, weight.in_features);
    let choices = match gpu.tuned.is_empty() {
        true => Choices::default(),
        false => gpu.tuned.choices(&shape(weight)?, &gpu.facts()),
    };
    if weight.format == "exl3" {
        let parts = Exl3Parts::of(weight).map_err(|e| decode_error(weight, e))?;
        let bytes = trellis_bytes(&parts);
        let reservation = gpu.reserve("a matrix", bytes)?;
        let trellis = Trellis {
            tiles: gpu.bytes(&parts.trellis),
            suh: gpu.floats(&parts.suh),
            svh: gpu.floats(&parts.svh),
            padded_in: parts.padded_in,
            padded_out: parts.padded_out,
            in_features: k,
            out_features: n,
            twice_bits: parts.rate.twice_bits() as u32,
            codebook: parts.codebook,
            choices,
        };
        return Ok((Matrix::Trellis(trellis), bytes, reservation));
    }
    let order = weight.part("order").filter(|_| has_kernel(weight.format));
    let (format, parts) = match Format::from_id(weight.format) {
        Some(format) => {
            // Decoding the first row checks the parts' names, types and shapes.
            let mut row = vec![0.0; k];
            let decoded = marlin_quant::format(weight.format).decode_rows(weight, 0..1, &mut row);
            decoded.map_err(|e| decode_error(weight, e))?;
            (format, format.split(weight))
        }
        None => (Format::F16, Format::F16.split(&halves(weight)?)),
    };
    let bytes = parts.bytes() + order.map_or(0, |order| order.bytes().len() as u64);
    let reservation = gpu.reserve("a matrix", bytes)?;
    let parts =
        [parts.codes, parts.high, parts.scales, parts.supers].map(|words| gpu.words(&words));
    let order = order.map(|order| gpu.bytes(order.bytes()));
    let rows = RowMatrix { format, parts, out_features: n, units: format.units(k), order, choices };
    Ok((Matrix::Rows(rows), bytes, reservation))
}

/// A matrix of `values` in the smallest float format that holds all of them exactly.
pub(crate) fn narrowest(out_features: usize, in_features: usize, values: &[f32]) -> Weight {
    let bits = |v: &f32| v.to_bits();
    let brain = values.iter().all(|v| bits(v) & 0xffff == 0);
    let half = || values.iter().all(|v| bits(&f16::from_f32(*v).to_f32()) == bits(v));
    let (format, dtype, bytes): (_, _, Vec<u8>) = if brain {
        let bytes = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes());
        ("bf16", DType::BF16, bytes.collect())
    } else if half() {
        let bytes = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes());
        ("f16", DType::F16, bytes.collect())
    } else {
        ("f32", DType::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    };
    let tensor = HostTensor::new(dtype, vec![out_features, in_features], bytes.into());
    let tensor = tensor.expect("as many bytes as the shape says");
    Weight { format, out_features, in_features, parts: vec![("weight", tensor)] }
}

/// Bytes of a half.
const HALF: u64 = 2;
/// Rows decoded at a time.
const BAND: usize = 128;

/// A weight of any format as f16, row by row.
fn halves(weight: &Weight) -> Result<Weight> {
    let (n, k) = (weight.out_features, weight.in_features);
    let format = format(weight.format);
    let band = BAND.next_multiple_of(format.row_granularity());
    let mut out = Vec::with_capacity(2 * n * k);
    let mut values = vec![0.0; band.min(n) * k];
    for first in (0..n).step_by(band) {
        let rows = first..n.min(first + band);
        let values = &mut values[..rows.len() * k];
        format.decode_rows(weight, rows, values).map_err(|e| decode_error(weight, e))?;
        for &value in &*values {
            let half = f16::from_f32(value);
            if half.is_infinite() {
                return Err(decode_error(
                    weight,
                    format!("{value} is too large for f16, in which it would be held"),
                ));
            }
            out.extend(half.to_le_bytes());
        }
    }
    let values = HostTensor::new(DType::F16, vec![n, k], out.into())?;
    Ok(Weight { format: "f16", parts: vec![("weight", values)], ..weight.clone() })
}

/// What multiplies a matrix that it pays to decode first. Halves are too coarse for f32.
fn wide(gpu: &Gpu, matrix: &RowMatrix, rows: &Rows) -> Option<Instruction> {
    let rows = rows.dense()?;
    let rule = || {
        let takes = integer::takes(gpu, matrix.format);
        let integers = takes.then(|| integer::few_rows(matrix));
        Instruction::of(gpu).filter(|with| rows > integers.unwrap_or(with.few_plain_rows()))
    };
    let with = matrix.choices.of(rows).map_or_else(rule, Instruction::chosen);
    with.filter(|_| matrix.format != Format::F32)
}

/// What the rule says of a class of rows, or of every number of rows.
pub(crate) fn rule(gpu: &Gpu, matrix: &Matrix, rows: Option<usize>) -> Option<Variant> {
    match (matrix, rows) {
        (Matrix::Trellis(trellis), rows) => Some(exl3::rule(gpu, trellis, rows)),
        (Matrix::Rows(_), None) => None,
        (Matrix::Rows(plain), Some(rows)) => Some(match wide(gpu, plain, &Rows::Dense { rows }) {
            Some(Instruction::Wgmma) => Variant::Halves,
            Some(Instruction::Mma) => Variant::Mma,
            None if integer::takes(gpu, plain.format) => Variant::Bytes,
            None => matrix::rule(rows),
        }),
    }
}

impl Loaded {
    /// `x: [.., in_features]` times the matrices. `x_rows` is the number of rows of `x`.
    pub(crate) fn multiply(&self, gpu: &Gpu, x: &Buffer, x_rows: usize, rows: &Rows) -> Buffer {
        let reordered;
        let (x, x_rows, rows) = match &self.matrix {
            Matrix::Rows(RowMatrix { order: Some(order), .. }) => {
                reordered = columns::reorder(gpu, x, self.in_features, order, rows);
                (&reordered.0, rows.count(), &reordered.1)
            }
            _ => (x, x_rows, rows),
        };
        match &self.matrix {
            Matrix::Trellis(trellis) => exl3::multiply(gpu, x, trellis, self.bias.as_ref(), rows),
            Matrix::Rows(matrix) => {
                let bias = self.bias.as_ref();
                if let Some(with) = wide(gpu, matrix, rows) {
                    return gemm::plain(gpu, with, x, self.in_features, matrix, bias, x_rows);
                }
                let heads = match rows {
                    Rows::Heads { rows, heads } => {
                        gemm::heads(gpu, x, self.in_features, matrix, *rows, *heads)
                    }
                    _ => None,
                };
                if let Some(out) = heads {
                    return out;
                }
                let padded = matrix.units * UNIT;
                let wide;
                let x = match padded == self.in_features {
                    true => x,
                    false => {
                        wide = columns::pad(gpu, x, x_rows, self.in_features, padded);
                        &wide
                    }
                };
                matrix::multiply(gpu, x, matrix, bias, rows)
            }
        }
    }

    /// Heads times their matrices, each row before `columns` of `beside`; `None` where there is no such kernel.
    pub(crate) fn multiply_beside(
        &self,
        gpu: &Gpu,
        x: &Buffer,
        rows: &Rows,
        beside: &Buffer,
        columns: usize,
    ) -> Option<Buffer> {
        let many = |m: &RowMatrix| match rows {
            Rows::Heads { rows, heads } => gemm::takes_heads(gpu, m, *rows, *heads).is_some(),
            _ => false,
        };
        match &self.matrix {
            Matrix::Rows(m)
                if m.units * UNIT == self.in_features && m.order.is_none() && !many(m) =>
            {
                Some(matrix::multiply_beside(gpu, x, m, rows, beside, columns))
            }
            _ => None,
        }
    }

    pub(crate) fn arrays(&self) -> Vec<&Buffer> {
        let mut arrays: Vec<&Buffer> = match &self.matrix {
            Matrix::Rows(m) => m.parts.iter().chain(&m.order).collect(),
            Matrix::Trellis(t) => vec![&t.tiles, &t.suh, &t.svh],
        };
        arrays.extend(&self.bias);
        arrays
    }

    pub(crate) fn with_arrays(&self, arrays: Vec<Buffer>) -> Self {
        let mut arrays = arrays.into_iter();
        let mut next = || arrays.next().expect("as many arrays as were taken");
        let matrix = match &self.matrix {
            Matrix::Rows(m) => {
                let parts = std::array::from_fn(|_| next());
                let order = m.order.as_ref().map(|_| next());
                Matrix::Rows(RowMatrix { parts, order, ..m.clone() })
            }
            Matrix::Trellis(t) => {
                Matrix::Trellis(Trellis { tiles: next(), suh: next(), svh: next(), ..t.clone() })
            }
        };
        let bias = self.bias.as_ref().map(|_| next());
        Self { matrix, bias, in_features: self.in_features }
    }

    /// Whether `other` can lie in one stack with it.
    pub(crate) fn stacks_with(&self, other: &Self) -> bool {
        let same = match (&self.matrix, &other.matrix) {
            (Matrix::Rows(a), Matrix::Rows(b)) => {
                let key = |m: &RowMatrix| (m.format, m.out_features, m.units, m.order.is_some());
                key(a) == key(b)
            }
            (Matrix::Trellis(a), Matrix::Trellis(b)) => {
                let key = |t: &Trellis| {
                    (t.twice_bits, t.codebook, t.padded_in, t.padded_out, t.out_features)
                };
                key(a) == key(b)
            }
            _ => false,
        };
        same && self.bias.is_some() == other.bias.is_some()
    }
}

impl GpuLinear {
    pub(crate) fn new(loaded: Loaded, reservation: Reservation) -> Self {
        let place = RwLock::new(Place::Own(Box::new(loaded)));
        Self { place, stacks: OnceLock::new(), _reservation: reservation }
    }

    /// `x Wᵀ + bias` of `rows` rows.
    pub(crate) fn multiply(&self, gpu: &Gpu, x: &Buffer, rows: usize) -> Buffer {
        match &*self.place.read().unwrap_or_else(|e| e.into_inner()) {
            Place::Own(loaded) => loaded.multiply(gpu, x, rows, &Rows::Dense { rows }),
            Place::Stacked(stack, slot) => {
                if let Some(loaded) = stack.member(gpu, *slot as usize) {
                    return loaded.multiply(gpu, x, rows, &Rows::Dense { rows });
                }
                // One expert, in its place.
                let entries = Entries {
                    count: rows,
                    ids: gpu.zeros(rows),
                    slots: gpu.words(&[*slot]),
                    divisor: 1,
                    grouped: None,
                };
                stack.loaded.multiply(gpu, x, rows, &Rows::Entries(entries))
            }
        }
    }

    /// Several matrices over one input in one launch, where there is such a kernel for them.
    pub(crate) fn multiply_many(
        linears: &[&Self],
        gpu: &Gpu,
        x: &Buffer,
        rows: usize,
    ) -> Option<Vec<Buffer>> {
        let places: Vec<_> =
            linears.iter().map(|l| l.place.read().unwrap_or_else(|e| e.into_inner())).collect();
        let loaded = places.iter().map(|place| match &**place {
            Place::Own(loaded) => Some(&**loaded),
            Place::Stacked(..) => None,
        });
        multiply_many(gpu, x.into(), &loaded.collect::<Option<Vec<_>>>()?, &Rows::Dense { rows })
    }

    /// `(activation(gate) * up) Wᵀ + bias` of `rows` rows in one launch, where there is such a kernel.
    pub(crate) fn multiply_gated(&self, gpu: &Gpu, x: Inputs<'_>, rows: usize) -> Option<Buffer> {
        match &*self.place.read().unwrap_or_else(|e| e.into_inner()) {
            Place::Own(loaded) => multiply_many(gpu, x, &[loaded], &Rows::Dense { rows })?.pop(),
            Place::Stacked(..) => None,
        }
    }
}

/// The same rows times several matrices, or stacks in which every expert has the same place, in one launch, where there is such a kernel for them.
pub(crate) fn multiply_many(
    gpu: &Gpu,
    x: Inputs<'_>,
    loaded: &[&Loaded],
    rows: &Rows,
) -> Option<Vec<Buffer>> {
    let trellises = loaded.iter().map(|loaded| match &loaded.matrix {
        Matrix::Trellis(trellis) => Some((trellis, loaded.bias.as_ref())),
        Matrix::Rows(_) => None,
    });
    if let Some(trellises) = trellises.collect::<Option<Vec<_>>>() {
        return exl3::multiply_many(gpu, x, &trellises, rows);
    }
    // Each matrix may have an order of inputs of its own.
    let matrices = loaded.iter().map(|loaded| match &loaded.matrix {
        Matrix::Rows(matrix) if matrix.order.is_none() && wide(gpu, matrix, rows).is_none() => {
            Some((matrix, loaded.bias.as_ref()))
        }
        _ => None,
    });
    integer::multiply_many(gpu, x, &matrices.collect::<Option<Vec<_>>>()?, rows)
}
