//! Few rows times matrices in row formats whose weights are small integers with scales, in CUDA C++ (`integer.cu`).
//!
//! A lane multiplies bytes of weights with bytes of inputs, which have 16 bits and a scale for each 32, and scales exact sums once. What this spares
//! beside the portable kernel (`matrix.rs`) is the conversion of every weight to a float, which NVIDIA's GPUs do at a quarter of their rate.
//! A row's sums are the same alone and in company.

use super::matrix::RowMatrix;
use super::text::{Defines, Inputs, Text};
use super::tiles::{Entries, Rows};
use crate::decode::{Format, UNIT};
use crate::gpu::{Buffer, Gpu};

/// Rows up to which a matrix is decoded again for every tile of them, where there is a kernel for many, and the same for a small one.
pub(crate) const FEW_ROWS: usize = 16;
const FEW_ROWS_OF_SMALL: usize = 32;
/// Weights up to which a matrix is small.
const SMALL: usize = 8 << 20;
/// Rows of a tile of entries, at least and at most.
pub(crate) const TILE: (u32, u32) = (2, 8);
/// Matrices over the same inputs that one launch takes.
const MOST_MATRICES: usize = 3;
/// Inputs that share a scale, and those of a chunk: a lane takes one of its groups.
const GROUP: usize = 32;
const CHUNK: usize = 32 * GROUP;
/// Words of a chunk of a prepared row: bytes of the inputs, scales and sums.
const CHUNK_WORDS: usize = 640;
/// Most words of prepared rows that a block keeps to itself.
const SHARED_WORDS: usize = 12 << 10;
/// Warps of a multiprocessor that keep the sums of two outputs.
const MOST_WARPS: usize = 32;
/// Inputs of a long row, and of one that is not short.
const LONG: usize = 8192;
const SHORT: usize = 4096;
const PREPARE: u32 = 256;

/// How bytes become weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Coding {
    /// Bits of the plane of codes, and of the plane above it.
    codes: u32,
    high: u32,
    scales: Scales,
    /// The zero of [`Scales::Half`], the groups of [`Scales::Group`].
    span: u32,
}

/// In the order of `integer.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Scales {
    Half,
    Pair,
    Group,
    K2,
    K3,
    K4,
    K6,
}

fn coding(format: Format) -> Option<Coding> {
    let (codes, high, scales, span) = match format {
        Format::Q4_0 => (4, 0, Scales::Half, 8),
        Format::Q4_1 => (4, 0, Scales::Pair, 1),
        Format::Q5_0 => (4, 1, Scales::Half, 16),
        Format::Q5_1 => (4, 1, Scales::Pair, 1),
        Format::Q8_0 => (8, 0, Scales::Half, 0),
        Format::Q2K => (2, 0, Scales::K2, 1),
        Format::Q3K => (2, 1, Scales::K3, 1),
        Format::Q4K => (4, 0, Scales::K4, 1),
        Format::Q5K => (4, 1, Scales::K4, 1),
        Format::Q6K => (4, 2, Scales::K6, 1),
        Format::Int4G128 => (4, 0, Scales::Group, 4),
        Format::Int4G64 => (4, 0, Scales::Group, 2),
        Format::Int4G32 => (4, 0, Scales::Group, 1),
        Format::Int8G128 => (8, 0, Scales::Group, 4),
        Format::Int8G32 => (8, 0, Scales::Group, 1),
        _ => return None,
    };
    Some(Coding { codes, high, scales, span })
}

/// What `integer.cu` is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    matrices: usize,
    codings: [Coding; MOST_MATRICES],
    outputs: [usize; MOST_MATRICES],
    groups: usize,
    inline: bool,
    entries: bool,
    grouped: bool,
    share: usize,
    bias: bool,
    cut: Cut,
    activation: u32,
}

/// How a launch is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Cut {
    /// Rows of a tile.
    rows: usize,
    /// Outputs that a warp takes together.
    together: usize,
    /// Warps of a block.
    warps: usize,
    /// Blocks of a multiprocessor, for which there are registers.
    resident: usize,
}

impl Defines for Shape {
    const TEXT: &str =
        concat!(include_str!("ptx.cuh"), include_str!("halves.cuh"), include_str!("integer.cu"));

    fn defines(&self) -> Vec<(&'static str, String)> {
        let flag = |on: bool| u32::from(on).to_string();
        let mut defines = vec![
            ("MATRICES", self.matrices.to_string()),
            ("GROUPS", self.groups.to_string()),
            ("M", self.cut.rows.to_string()),
            ("R", self.cut.together.to_string()),
            ("INLINE", flag(self.inline)),
            ("ENTRIES", flag(self.entries)),
            ("GROUPED", flag(self.grouped)),
            ("SHARE", self.share.to_string()),
            ("BIAS", flag(self.bias)),
            ("ACTIVATION", self.activation.to_string()),
            ("WARPS", self.cut.warps.to_string()),
            ("RESIDENT", self.cut.resident.to_string()),
        ];
        let names = [
            ["OUTPUTS_0", "CODES_0", "HIGH_0", "SCALES_0", "SPAN_0"],
            ["OUTPUTS_1", "CODES_1", "HIGH_1", "SCALES_1", "SPAN_1"],
            ["OUTPUTS_2", "CODES_2", "HIGH_2", "SCALES_2", "SPAN_2"],
        ];
        for ((names, coding), outputs) in names.iter().zip(&self.codings).zip(self.outputs) {
            let Coding { codes, high, scales, span } = *coding;
            let values = [outputs as u32, codes, high, scales as u32, span];
            defines.extend(names.iter().zip(values).map(|(name, v)| (*name, v.to_string())));
        }
        defines
    }
}

/// Rows that are few for a matrix, where there is a kernel for many.
pub(crate) fn few_rows(matrix: &RowMatrix) -> usize {
    match matrix.out_features * matrix.units * UNIT <= SMALL {
        true => FEW_ROWS_OF_SMALL,
        false => FEW_ROWS,
    }
}

/// Whether the text takes matrices of `format`.
pub(crate) fn takes(gpu: &Gpu, format: Format) -> bool {
    gpu.tensor_cores && coding(format).is_some()
}

/// `x` times one matrix or its stack, bias included; `None` when the text is not for such rows, or not for such a matrix.
pub(super) fn multiply(
    gpu: &Gpu,
    x: &Buffer,
    matrix: &RowMatrix,
    bias: Option<&Buffer>,
    rows: &Rows,
) -> Option<Buffer> {
    multiply_many(gpu, x.into(), &[(matrix, bias)], rows)?.pop()
}

/// The same rows times several matrices, or stacks of as many, at once. Inputs lie in the order of the weights.
pub(crate) fn multiply_many(
    gpu: &Gpu,
    x: Inputs<'_>,
    matrices: &[(&RowMatrix, Option<&Buffer>)],
    rows: &Rows,
) -> Option<Vec<Buffer>> {
    let (first, first_bias) = *matrices.first()?;
    let alike = |(m, bias): &(&RowMatrix, Option<&Buffer>)| {
        m.units == first.units && bias.is_some() == first_bias.is_some()
    };
    let codings: Option<Vec<Coding>> = matrices.iter().map(|(m, _)| coding(m.format)).collect();
    let codings = codings?;
    let fits = matrices.len() <= MOST_MATRICES && matrices.iter().all(alike);
    let has_tiles = match rows {
        Rows::Dense { .. } => true,
        Rows::Entries(e) => e.grouped.as_ref().is_none_or(|g| g.m <= TILE.1),
        Rows::Heads { .. } => false,
    };
    // Several with a few rows each lack registers.
    let one = matrices.len() == 1 || matches!(tile_rows(rows), 1 | 8);
    let fits = fits && has_tiles && one && takes(gpu, first.format);
    fits.then(|| launch(gpu, x, matrices, &codings, rows))
}

/// Rows of a tile.
fn tile_rows(rows: &Rows) -> usize {
    match rows {
        Rows::Entries(Entries { grouped: Some(grouped), .. }) => grouped.m as usize,
        Rows::Entries(_) | Rows::Heads { .. } => 1,
        Rows::Dense { rows } => rows.next_power_of_two().min(8),
    }
}

/// The cut for `rows` times `outputs` outputs of a launch.
fn cut(rows: &Rows, outputs: usize, inputs: usize, high: u32, multiprocessors: usize) -> Cut {
    let tile = tile_rows(rows);
    // Two outputs for every warp; blocks are the larger the longer a row is, which each of them prepares.
    let few = outputs < 2 * MOST_WARPS * multiprocessors;
    let (rows, together, warps, resident) = match tile {
        1 if few && inputs > LONG => (1, 1, 32, 1),
        1 if few && inputs < SHORT => (1, 1, 16, 2),
        1 => (1, 2, 16, 2),
        2 => (2, 4, 16, 1),
        // Q6_K has words for all registers.
        4 if high == 2 => (4, 2, 16, 1),
        4 => (4, 4, 16, 1),
        _ => (8, 4, 8, 1),
    };
    Cut { rows, together, warps, resident }
}

fn launch(
    gpu: &Gpu,
    x: Inputs<'_>,
    matrices: &[(&RowMatrix, Option<&Buffer>)],
    codings: &[Coding],
    rows: &Rows,
) -> Vec<Buffer> {
    let none = &gpu.none;
    let (first, first_bias) = matrices[0];
    let count = rows.count();
    let entries = if let Rows::Entries(entries) = rows { Some(entries) } else { None };
    let grouped = entries.and_then(|e| e.grouped.as_ref());
    let outputs: usize = matrices.iter().map(|(m, _)| m.out_features).sum();
    let multiprocessors = gpu.multiprocessors();
    let in_features = first.units * UNIT;
    let most_high = codings.iter().map(|c| c.high).max().unwrap_or(0);
    let cut = cut(rows, outputs, in_features, most_high, multiprocessors);
    let Cut { rows: m, together, warps, resident } = cut;
    let row_words = in_features.div_ceil(CHUNK) * CHUNK_WORDS;
    let shape = Shape {
        matrices: matrices.len(),
        codings: std::array::from_fn(|i| codings.get(i).copied().unwrap_or(codings[0])),
        outputs: std::array::from_fn(|i| matrices.get(i).map_or(0, |(m, _)| m.out_features)),
        groups: in_features / GROUP,
        inline: m * row_words <= SHARED_WORDS,
        entries: entries.is_some(),
        grouped: grouped.is_some(),
        share: entries.map_or(1, |e| e.divisor),
        bias: first_bias.is_some(),
        cut,
        activation: x.activation(),
    };
    let (x, up) = (x.x, x.up(gpu));
    let prepared;
    let inputs = match shape.inline {
        true => x,
        false => {
            let x_rows = count / shape.share;
            prepared = gpu.empty(x_rows * row_words);
            let text = Text { function: "prepare", threads: PREPARE, defines: shape };
            let blocks = (first.units.div_ceil(PREPARE as usize) as u32, x_rows as u32);
            text.launch(gpu, blocks, &[x, up, &prepared], 0);
            &prepared
        }
    };
    let outs: Vec<Buffer> =
        matrices.iter().map(|(m, _)| gpu.empty(count * m.out_features)).collect();
    let part = |part: usize| -> [&Buffer; MOST_MATRICES] {
        std::array::from_fn(|i| matrices.get(i).map_or(none, |(m, _)| &m.parts[part]))
    };
    let biases: [&Buffer; MOST_MATRICES] =
        std::array::from_fn(|i| matrices.get(i).and_then(|(_, bias)| *bias).unwrap_or(none));
    let tiles = grouped.map_or(count.div_ceil(m), |g| g.count);
    let (table, order, slots) = match entries {
        Some(e) => {
            (grouped.map_or(&e.ids, |g| &g.tiles), grouped.map_or(none, |g| &g.order), &e.slots)
        }
        None => (none, none, none),
    };
    let mut arrays: Vec<&Buffer> = [part(0), part(1), part(2), part(3), biases].concat();
    arrays.extend([inputs, up, table, order, slots]);
    arrays.extend((0..MOST_MATRICES).map(|i| outs.get(i).unwrap_or(none)));
    let sets: usize = matrices.iter().map(|(m, _)| m.out_features.div_ceil(together)).sum();
    // Entries share the device; rows of one matrix take it one tile after the other.
    let most = multiprocessors * resident / entries.map_or(1, |_| tiles.max(1));
    let blocks = sets.div_ceil(warps).min(most.max(1));
    let text = Text { function: "multiply", threads: 32 * warps as u32, defines: shape };
    text.launch(gpu, (blocks as u32, tiles as u32), &arrays, count as u64);
    outs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tune::is_integer;

    #[test]
    fn tuning_knows_which_formats_these_are() {
        for format in marlin_quant::formats() {
            let own = Format::from_id(format.id());
            assert_eq!(
                is_integer(format.id()),
                own.is_some_and(|f| coding(f).is_some()),
                "{}",
                format.id()
            );
        }
    }
}
