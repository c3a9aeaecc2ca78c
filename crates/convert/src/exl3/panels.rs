//! A matrix as panels of outputs. Only the panel at work is in memory as floats: a large output projection
//! takes what one panel takes, and its codes. A matrix of one panel stays in memory from step to step.

use super::feedback::{Coder, Tiles};
use crate::error::ConvertError;
use crate::matrix::Matrix;
use crate::metric::Metric;
use crate::quantizer::LinearInput;
use marlin_tensor::BackendError;
use std::ops::Range;

/// Outputs of a panel. Sums over outputs are cut here, so this is no option: results are the same bytes
/// whatever memory there is.
pub const PANEL: usize = 4096;

/// What is in memory of a panel at work.
pub struct Open {
    /// Weights, padded, `[rows, k]`.
    pub w: Matrix,
    /// `W · H`, when there are moments.
    pub wh: Option<Matrix>,
    /// What was chosen for it.
    pub tiles: Tiles,
}

/// Outputs `rows` of the padded matrix.
struct Panel {
    rows: Range<usize>,
    /// Codes; none while the panel is kept open.
    trellis: Vec<u16>,
    kept: Option<Open>,
}

/// All panels of one matrix.
pub struct Panels<'a> {
    input: &'a LinearInput<'a>,
    k: usize,
    n: usize,
    whole: Option<Matrix>,
    encoded: Vec<Panel>,
}

impl<'a> Panels<'a> {
    /// Of `input`, padded to `[n, k]`.
    ///
    /// # Errors
    /// When the weights cannot be read or are not finite.
    pub fn new(input: &'a LinearInput<'a>, n: usize, k: usize) -> Result<Self, ConvertError> {
        let mut panels = Self { input, k, n, whole: None, encoded: Vec::new() };
        if n <= PANEL {
            panels.whole = Some(panels.read(0..n)?);
        }
        Ok(panels)
    }

    fn read(&self, rows: Range<usize>) -> Result<Matrix, ConvertError> {
        let last = rows.end.min(self.input.shape[0]);
        let w = (self.input.rows)(rows.start.min(last)..last)?;
        if w.data.iter().any(|v| !v.is_finite()) {
            return Err(ConvertError::Tensor {
                key: self.input.key.to_owned(),
                reason: "the weights hold NaN or infinity; the source is damaged".to_owned(),
            });
        }
        Ok(match (w.rows, w.columns) == (rows.len(), self.k) {
            true => w,
            false => w.padded(rows.len(), self.k),
        })
    }

    /// The weights of some outputs, before they are encoded.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn rows(&self, rows: Range<usize>) -> Result<Matrix, ConvertError> {
        match &self.whole {
            Some(whole) => Ok(whole.part(rows)),
            None => self.read(rows),
        }
    }

    fn ranges(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let n = self.n;
        (0..n).step_by(PANEL).map(move |first| first..(first + PANEL).min(n))
    }

    /// Shows the weights of every panel, with the number of its first output.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn weights(&self, each: &mut dyn FnMut(usize, &Matrix)) -> Result<(), ConvertError> {
        if let Some(whole) = &self.whole {
            each(0, whole);
            return Ok(());
        }
        for rows in self.ranges() {
            each(rows.start, &self.read(rows)?);
        }
        Ok(())
    }

    /// Encodes every panel as `encode` says; `h` are the moments to multiply weights with later.
    ///
    /// # Errors
    /// When the weights cannot be read, or the device fails.
    pub fn encode(
        &mut self,
        h: Option<&Metric>,
        encode: impl Fn(Range<usize>, &Matrix) -> Result<Tiles, BackendError>,
    ) -> Result<(), ConvertError> {
        if let Some(w) = self.whole.take() {
            let tiles = encode(0..self.n, &w)?;
            let wh = h.map(|h| h.times(&w)).transpose()?;
            let open = Open { wh, w, tiles };
            self.encoded = vec![Panel { rows: 0..self.n, trellis: Vec::new(), kept: Some(open) }];
            return Ok(());
        }
        for rows in self.ranges() {
            let trellis = encode(rows.clone(), &self.read(rows.clone())?)?.pack();
            self.encoded.push(Panel { rows, trellis, kept: None });
        }
        Ok(())
    }

    /// Opens every encoded panel in turn. What `each` does to the tiles is kept when it returns true.
    ///
    /// # Errors
    /// When the weights cannot be read, the device fails, or `each` does.
    pub fn visit(
        &mut self,
        coder: &Coder,
        h: Option<&Metric>,
        mut each: impl FnMut(Range<usize>, &mut Open) -> Result<bool, BackendError>,
    ) -> Result<(), ConvertError> {
        for i in 0..self.encoded.len() {
            let rows = self.encoded[i].rows.clone();
            if let Some(open) = &mut self.encoded[i].kept {
                each(rows, open)?;
                continue;
            }
            let w = self.read(rows.clone())?;
            let trellis = &self.encoded[i].trellis;
            let tiles = Tiles::unpack(trellis, coder.rate, coder.table, rows.len(), self.k);
            let wh = h.map(|h| h.times(&w)).transpose()?;
            let mut open = Open { wh, w, tiles };
            if each(rows, &mut open)? {
                self.encoded[i].trellis = open.tiles.pack();
            }
        }
        Ok(())
    }

    /// The stored trellis of the whole matrix, `[k / 16, n / 16, words]`.
    pub fn pack(self) -> Vec<u16> {
        let mut parts: Vec<Vec<u16>> = self
            .encoded
            .into_iter()
            .map(|p| p.kept.map_or(p.trellis, |open| open.tiles.pack()))
            .collect();
        if parts.len() == 1 {
            return parts.swap_remove(0);
        }
        let groups = self.k / 16;
        let mut out = Vec::with_capacity(parts.iter().map(Vec::len).sum());
        for group in 0..groups {
            for part in &parts {
                let size = part.len() / groups;
                out.extend_from_slice(&part[group * size..][..size]);
            }
        }
        out
    }
}
