//! Stored tensors of an EXL3 linear layer, and the scalar decode.
//!
//! | tensor | type | shape | |
//! |---|---|---|---|
//! | `KEY.trellis` | I16 | `[k/16, n/16, 16·K]` | one ring per 16×16 tile |
//! | `KEY.suh` | F16 | `[k]` | input scales with signs |
//! | `KEY.svh` | F16 | `[n]` | output scales with signs |
//! | `KEY.su`, `KEY.sv` | I16 | `[k/16]`, `[n/16]` | instead: one sign bit per channel, 1 = −1 |
//! | `KEY.mcg`, `KEY.mul1` | I32 | `[]` | codebook marker holding its multiplier |
//!
//! `k` and `n` are the layer's widths rounded up to 128; the surplus rows and columns are dropped
//! when decoding. `KEY.bias` belongs to whoever loads the layer. Packed signs become `suh` and
//! `svh` when loading, so a [`Weight`] always has the parts `trellis`, `suh`, `svh` and at most
//! one of `mcg` and `mul1`.

use super::codebook::Codebook;
use super::hadamard::{BLOCK, BLOCK_SCALE, rotate, rotate_rows, sign};
use super::ring::{Rate, Ring, TILE, TILE_COLUMN, TILE_ROW, TILE_SIDE};
use crate::parts::check_rows;
use crate::{Description, QuantError, WeightFormat};
use bytes::Bytes;
use half::f16;
use marlin_checkpoint::{Checkpoint, CheckpointError, Encoding, StoredTensor};
use marlin_tensor::{DType, HostTensor, Weight};
use std::ops::Range;

/// Trellis-coded linear layers.
pub struct Exl3;

/// The format as listed in [`formats`](crate::formats).
pub static EXL3: Exl3 = Exl3;

const ID: &str = "exl3";

/// The parts of an EXL3 weight, checked and ready for a kernel.
#[derive(Debug, Clone)]
pub struct Exl3Parts {
    /// Padded inputs, a multiple of 128.
    pub padded_in: usize,
    /// Padded outputs, a multiple of 128.
    pub padded_out: usize,
    /// Bits per weight.
    pub rate: Rate,
    /// Value generator.
    pub codebook: Codebook,
    /// Tiles `[padded_in / 16, padded_out / 16]`, each [`Rate::tile_bytes`] long.
    pub trellis: Bytes,
    /// Input scales `[padded_in]`.
    pub suh: Vec<f32>,
    /// Output scales `[padded_out]`.
    pub svh: Vec<f32>,
}

impl Exl3Parts {
    /// Reads the parts of a weight whose format is `"exl3"`.
    ///
    /// # Errors
    /// When a part is missing or contradicts the others, or the weight has another format.
    pub fn of(weight: &Weight) -> Result<Self, QuantError> {
        let part = |name: &str| {
            weight.part(name).ok_or_else(|| invalid(name, format!("missing from a {ID} weight")))
        };
        if weight.format != ID {
            return Err(invalid("trellis", format!("weight is {}, not {ID}", weight.format)));
        }
        let trellis = part("trellis")?;
        let (padded_in, padded_out, rate) = trellis_dimensions("trellis", trellis.shape())?;
        let codebook = match (weight.part("mcg"), weight.part("mul1")) {
            (None, None) => Codebook::ThreeInst,
            (Some(m), None) => Codebook::Mcg(multiplier("mcg", m)?),
            (None, Some(m)) => Codebook::Mul1(multiplier("mul1", m)?),
            (Some(_), Some(_)) => return Err(both_markers("trellis")),
        };
        let scales = |name: &str, channels: usize| {
            let values = part(name)?.to_f32()?;
            if values.len() != channels {
                let found = values.len();
                return Err(invalid(name, format!("expected {channels} scales, found {found}")));
            }
            Ok(values)
        };
        check_rate("trellis", rate, codebook)?;
        check_padding("trellis", weight.in_features, padded_in)?;
        check_padding("trellis", weight.out_features, padded_out)?;
        Ok(Self {
            padded_in,
            padded_out,
            rate,
            codebook,
            trellis: trellis.bytes().clone(),
            suh: scales("suh", padded_in)?,
            svh: scales("svh", padded_out)?,
        })
    }

    /// Bytes of the tile at input block `row` and output block `column`, both in tiles.
    pub fn tile(&self, row: usize, column: usize) -> &[u8] {
        let bytes = self.rate.tile_bytes();
        let start = (row * (self.padded_out / TILE_SIDE) + column) * bytes;
        &self.trellis[start..start + bytes]
    }

    /// Output channels `columns` (in tiles of 16) of `Ŵ`, transposed: `out: [columns, padded_in]`.
    /// Every value is exactly an fp16.
    ///
    /// # Panics
    /// When `out` has another size: a bug of the caller.
    pub fn decode_inner(&self, columns: Range<usize>, out: &mut [f32]) {
        assert_eq!(out.len(), columns.len() * TILE_SIDE * self.padded_in);
        let (ring, table) = (Ring::new(self.rate), self.codebook.table());
        for kb in 0..self.padded_in / TILE_SIDE {
            for (i, nb) in columns.clone().enumerate() {
                let states = ring.states(self.tile(kb, nb));
                for (p, &state) in states.iter().enumerate() {
                    let row = i * TILE_SIDE + usize::from(TILE_COLUMN[p]);
                    let column = kb * TILE_SIDE + usize::from(TILE_ROW[p]);
                    out[row * self.padded_in + column] = table[usize::from(state)];
                }
            }
        }
    }

    /// 128 output channels of the matrix in its original basis, starting at `128 * band`:
    /// `out: [128, padded_in]`.
    ///
    /// # Panics
    /// When `out` has another size: a bug of the caller.
    pub fn decode_band(&self, band: usize, out: &mut [f32]) {
        const TILES: usize = BLOCK / TILE_SIDE;
        self.decode_inner(band * TILES..(band + 1) * TILES, out);
        for row in out.chunks_exact_mut(self.padded_in) {
            rotate(row);
            row.iter_mut().zip(&self.suh).for_each(|(v, s)| *v *= s);
        }
        rotate_rows(out, self.padded_in);
        for (row, s) in out.chunks_exact_mut(self.padded_in).zip(&self.svh[band * BLOCK..]) {
            row.iter_mut().for_each(|v| *v *= s);
        }
    }

    /// Output channel `row` of the matrix in its original basis, as many inputs as `out` has: the signed sum of the 128
    /// channels that its rotation mixes, instead of all their rotations.
    ///
    /// # Panics
    /// When there is no such row, or `out` is longer than `padded_in`: a bug of the caller.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        const TILES: usize = BLOCK / TILE_SIDE;
        assert!(row < self.padded_out && out.len() <= self.padded_in, "a row of the matrix");
        let (ring, table) = (Ring::new(self.rate), self.codebook.table());
        let (band, place) = (row / BLOCK, row % BLOCK);
        let mut sums = vec![0.0f32; self.padded_in];
        for (kb, sums) in sums.chunks_exact_mut(TILE_SIDE).enumerate() {
            // Of every position of the tiles; the sign of a channel is that of its tile times that inside it.
            let mut places = [0.0f32; TILE];
            for nb in 0..TILES {
                let states = ring.states(self.tile(kb, band * TILES + nb));
                let sign = sign(nb * TILE_SIDE, place);
                for (sum, &state) in places.iter_mut().zip(&states) {
                    *sum += sign * table[usize::from(state)];
                }
            }
            for (p, v) in places.iter().enumerate() {
                sums[usize::from(TILE_ROW[p])] += sign(usize::from(TILE_COLUMN[p]), place) * v;
            }
        }
        self.finish_row(row, &mut sums, out);
    }

    /// The end of [`decode_row`](Self::decode_row), from the signed sums `[padded_in]`, which are overwritten.
    pub fn finish_row(&self, row: usize, sums: &mut [f32], out: &mut [f32]) {
        rotate(sums);
        let scale = BLOCK_SCALE * self.svh[row];
        for ((out, sum), suh) in out.iter_mut().zip(sums).zip(&self.suh) {
            *out = *sum * suh * scale;
        }
    }
}

impl WeightFormat for Exl3 {
    fn id(&self) -> &'static str {
        ID
    }

    fn describe(&self) -> Description {
        Description {
            bits_per_weight: "1 to 8, also 1.5, 2.5 and 3.5".to_owned(),
            detected_by: "`KEY.trellis`, `KEY.suh` (or `.su`) and `KEY.svh` (or `.sv`)".to_owned(),
        }
    }

    fn detect(&self, checkpoint: &Checkpoint, key: &str) -> bool {
        let has = |part: &str| checkpoint.get(&format!("{key}.{part}")).is_some();
        has("trellis") && (has("suh") || has("su")) && (has("svh") || has("sv"))
    }

    fn load(
        &self,
        checkpoint: &Checkpoint,
        key: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError> {
        let name = format!("{key}.trellis");
        let stored = find(checkpoint, &name)?;
        let (padded_in, padded_out, rate) = trellis_dimensions(&name, &stored.shape)?;
        check_padding(&name, in_features, padded_in)?;
        check_padding(&name, out_features, padded_out)?;
        let trellis = plain(stored, DType::I16)?;
        let name_of_scale = format!("{key}.scale");
        if checkpoint.get(&name_of_scale).is_some() {
            let reason = "a pre-release EXL3 file; quantize the model again".to_owned();
            return Err(invalid(&name_of_scale, reason));
        }

        let marker = |name: &'static str| {
            let full = format!("{key}.{name}");
            let Some(stored) = checkpoint.get(&full) else { return Ok(None) };
            let tensor = plain(stored, DType::I32)?;
            Ok::<_, QuantError>(Some((name, multiplier(&full, &tensor)?, tensor)))
        };
        let (codebook, marker) = match (marker("mcg")?, marker("mul1")?) {
            (None, None) => (Codebook::ThreeInst, None),
            (Some((name, m, tensor)), None) => (Codebook::Mcg(m), Some((name, tensor))),
            (None, Some((name, m, tensor))) => (Codebook::Mul1(m), Some((name, tensor))),
            (Some(_), Some(_)) => return Err(both_markers(key)),
        };
        check_rate(&name, rate, codebook)?;

        let mut parts = vec![
            ("trellis", trellis),
            ("suh", scales(checkpoint, key, "suh", "su", padded_in)?),
            ("svh", scales(checkpoint, key, "svh", "sv", padded_out)?),
        ];
        parts.extend(marker);
        Ok(Weight { format: ID, out_features, in_features, parts })
    }

    fn decode_rows(
        &self,
        weight: &Weight,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), QuantError> {
        check_rows(weight, &rows, out)?;
        let parts = Exl3Parts::of(weight)?;
        let width = weight.in_features;
        let mut band = vec![0.0; BLOCK * parts.padded_in];
        let mut out = out.chunks_exact_mut(width);
        for b in rows.start / BLOCK..rows.end.div_ceil(BLOCK) {
            parts.decode_band(b, &mut band);
            let first = rows.start.max(b * BLOCK) - b * BLOCK;
            let last = rows.end.min((b + 1) * BLOCK) - b * BLOCK;
            for row in band.chunks_exact(parts.padded_in).take(last).skip(first) {
                let out = out.next().expect("as many rows as asked for");
                out.copy_from_slice(&row[..width]);
            }
        }
        Ok(())
    }

    fn decode_row(&self, weight: &Weight, row: usize, out: &mut [f32]) -> Result<(), QuantError> {
        check_rows(weight, &(row..row + 1), out)?;
        Exl3Parts::of(weight)?.decode_row(row, out);
        Ok(())
    }

    fn row_granularity(&self) -> usize {
        BLOCK
    }

    fn slice_rows(&self, weight: &Weight, rows: Range<usize>) -> Result<Weight, QuantError> {
        let whole = rows.end == weight.out_features;
        if rows.is_empty()
            || rows.end > weight.out_features
            || !rows.start.is_multiple_of(BLOCK)
            || !(whole || rows.end.is_multiple_of(BLOCK))
        {
            let reason = format!("rows {rows:?} cannot be cut out: not on multiples of {BLOCK}");
            return Err(invalid("trellis", reason));
        }
        let parts = Exl3Parts::of(weight)?;
        let padded = rows.start..rows.end.next_multiple_of(BLOCK);
        let columns = padded.start / TILE_SIDE..padded.end / TILE_SIDE;
        // Outputs are the middle dimension of the trellis, so a slice of them is not contiguous.
        let all = parts.padded_out / TILE_SIDE * parts.rate.tile_bytes();
        let some = columns.start * parts.rate.tile_bytes()..columns.end * parts.rate.tile_bytes();
        let bytes: Vec<u8> =
            parts.trellis.chunks_exact(all).flat_map(|row| &row[some.clone()]).copied().collect();
        let shape = vec![parts.padded_in / TILE_SIDE, columns.len(), parts.rate.half_words()];
        let trellis = HostTensor::new(DType::I16, shape, bytes.into())?;
        let cut = |(name, tensor): &(&'static str, HostTensor)| match *name {
            "trellis" => (*name, trellis.clone()),
            "svh" => (*name, tensor.slice_rows(padded.clone())),
            _ => (*name, tensor.clone()),
        };
        Ok(Weight {
            format: ID,
            out_features: rows.len(),
            in_features: weight.in_features,
            parts: weight.parts.iter().map(cut).collect(),
        })
    }
}

/// Inputs, outputs and rate of a trellis shaped `[k/16, n/16, 16·K]`.
fn trellis_dimensions(name: &str, shape: &[usize]) -> Result<(usize, usize, Rate), QuantError> {
    let &[k, n, words] = shape else {
        return Err(invalid(name, format!("expected three dimensions, found shape {shape:?}")));
    };
    let rate = Rate::from_half_words(words).ok_or_else(|| {
        let reason = "is no rate; 16·K with K = 1 … 8 or 1.5, 2.5, 3.5 is expected";
        invalid(name, format!("last dimension {words} {reason}"))
    })?;
    for (what, tiles) in [("inputs", k), ("outputs", n)] {
        if tiles == 0 || !tiles.is_multiple_of(BLOCK / TILE_SIDE) {
            let channels = tiles.saturating_mul(TILE_SIDE);
            return Err(invalid(name, format!("{channels} {what} are not a multiple of {BLOCK}")));
        }
    }
    Ok((k * TILE_SIDE, n * TILE_SIDE, rate))
}

fn check_padding(name: &str, features: usize, padded: usize) -> Result<(), QuantError> {
    if features.checked_next_multiple_of(BLOCK) == Some(padded) {
        return Ok(());
    }
    let reason = format!("{padded} channels are stored where the model has {features}");
    Err(invalid(
        name,
        format!("{reason} (only padding to the next multiple of {BLOCK} is allowed)"),
    ))
}

fn check_rate(name: &str, rate: Rate, codebook: Codebook) -> Result<(), QuantError> {
    if rate.is_half() && !matches!(codebook, Codebook::Mul1(_)) {
        let (bits, codebook) = (rate.bits(), codebook.name());
        let reason = format!("{bits} bits exist for codebook mul1 only, this is {codebook}");
        return Err(invalid(name, reason));
    }
    Ok(())
}

fn multiplier(name: &str, marker: &HostTensor) -> Result<u32, QuantError> {
    match (marker.dtype(), <[u8; 4]>::try_from(&marker.bytes()[..])) {
        (DType::I32, Ok(bytes)) => Ok(u32::from_le_bytes(bytes)),
        _ => Err(invalid(name, "a codebook marker is one I32".to_owned())),
    }
}

/// Scales of one side as F16: stored as such, or expanded from packed signs.
fn scales(
    checkpoint: &Checkpoint,
    key: &str,
    name: &str,
    packed: &str,
    channels: usize,
) -> Result<HostTensor, QuantError> {
    let full = format!("{key}.{name}");
    if checkpoint.get(&full).is_none() {
        let packed =
            plain(checkpoint.require(&format!("{key}.{packed}"), &[channels / 16])?, DType::I16)?;
        let sign = |bit: u16| if bit == 0 { f16::ONE } else { f16::NEG_ONE };
        let words = packed.to_u16_bits()?;
        let signs = words.iter().flat_map(|w| (0..16).map(move |b| sign(w >> b & 1)));
        let bytes: Vec<u8> = signs.flat_map(f16::to_le_bytes).collect();
        return Ok(HostTensor::new(DType::F16, vec![channels], bytes.into())?);
    }
    let tensor = plain(checkpoint.require(&full, &[channels])?, DType::F16)?;
    if let Some(i) = tensor.to_f32()?.iter().position(|v| !v.is_finite()) {
        return Err(invalid(&full, format!("element {i} is not finite; the file is damaged")));
    }
    Ok(tensor)
}

fn find<'a>(checkpoint: &'a Checkpoint, name: &str) -> Result<&'a StoredTensor, QuantError> {
    checkpoint.get(name).ok_or_else(|| {
        let path = checkpoint.path.clone();
        CheckpointError::Missing { path, key: name.to_owned() }.into()
    })
}

/// The tensor's elements, which must be plain and of `dtype`.
pub(super) fn plain(stored: &StoredTensor, dtype: DType) -> Result<HostTensor, QuantError> {
    if stored.encoding != Encoding::Plain(dtype) {
        let reason = format!("expected element type {dtype}, found {:?}", stored.encoding);
        return Err(invalid(&stored.name, reason));
    }
    Ok(HostTensor::new(dtype, stored.shape.clone(), stored.data.clone())?)
}

fn both_markers(key: &str) -> QuantError {
    invalid(key, "both .mcg and .mul1 are stored; a layer has one codebook".to_owned())
}

pub(super) fn invalid(key: &str, reason: String) -> QuantError {
    QuantError::Invalid { key: key.to_owned(), reason }
}
