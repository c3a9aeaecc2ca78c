//! Choosing the tiles: LDLQ, then passes of block coordinate descent.
//!
//! Rows of `Ŵ: [n, k]` (outputs) do not interact, so a band of rows goes through all inputs by itself; it is as
//! high as the encoder asks for. Both algorithms visit the inputs in groups of sixteen from last
//! to first and quantize a target that already compensates for the errors made elsewhere:
//!
//! ```text
//! LDLQ      T_g = W_g + Σ_{j>g} E_j L[j,g]            E = W − Q,  H = L D Lᵀ
//! descent   T_g = W_g + Σ_{j≠g} E_j H[j,g] H[g,g]⁻¹     the exact optimum given all other groups
//! ```
//!
//! Descent keeps a new tile only where it lowers the error. An encoder may do all of LDLQ itself, on its device.

use super::ldl::BLOCK;
use crate::matrix::{BAND, Matrix, View, product};
use marlin_quant::exl3::encode::LdlqMatrix;
use marlin_quant::exl3::ring::{Ring, TILE, TILE_COLUMN, TILE_ROW};
use marlin_quant::exl3::{Codebook, Rate, TileEncoder, pack_ring};
use marlin_tensor::BackendError;
use rayon::prelude::*;

/// Inputs whose feedback from later inputs is gathered in one product.
const SPAN: usize = 128;

/// Tiles of a matrix and what they decode to.
pub struct Tiles {
    rate: Rate,
    k: usize,
    /// Outputs of a band, all but the last.
    height: usize,
    /// Per band: `[k / 16, height / 16, 256]` states.
    states: Vec<Vec<u16>>,
    /// `Ŵ` as decoded, `[n, k]`.
    pub decoded: Matrix,
}

/// What encodes tiles.
pub struct Coder<'a> {
    /// Finds rings.
    pub encoder: &'a dyn TileEncoder,
    /// Bits per weight.
    pub rate: Rate,
    /// Value generator.
    pub codebook: Codebook,
    /// Its values by state.
    pub table: &'a [f32],
}

impl Coder<'_> {
    /// Encodes `targets: [rows, 16]`, outputs by inputs, into `states: [rows / 16, 256]` and
    /// `decoded: [rows, 16]`.
    ///
    /// # Errors
    /// When the encoder's device fails.
    pub fn encode(
        &self,
        targets: &[f32],
        states: &mut [u16],
        decoded: &mut [f32],
    ) -> Result<(), BackendError> {
        let at = |tile: usize, p: usize| {
            (tile * BLOCK + usize::from(TILE_COLUMN[p])) * BLOCK + usize::from(TILE_ROW[p])
        };
        let tiles = targets.len() / TILE;
        let ring = (0..tiles * TILE).map(|i| targets[at(i / TILE, i % TILE)]).collect::<Vec<_>>();
        self.encoder.encode(&ring, self.rate, self.codebook, states)?;
        for (i, &state) in states.iter().enumerate() {
            decoded[at(i / TILE, i % TILE)] = self.table[usize::from(state)];
        }
        Ok(())
    }

    /// Outputs of a band.
    fn height(&self) -> usize {
        (self.encoder.together() * BLOCK).next_multiple_of(BAND)
    }

    /// Quantizes `w: [n, k]` with feedback through `l: [k, k]`, or tile by tile without.
    ///
    /// # Errors
    /// When the encoder's device fails.
    pub fn feedback(&self, w: &Matrix, l: Option<&Matrix>) -> Result<Tiles, BackendError> {
        if let Some(l) = l
            && let Some(tiles) = self.elsewhere(w, l)?
        {
            return Ok(tiles);
        }
        let (k, height) = (w.columns, self.height());
        let mut decoded = Matrix::zeros(w.rows, k);
        let states = decoded
            .data
            .par_chunks_mut(height * k)
            .zip(w.data.par_chunks(height * k))
            .map(|(decoded, w)| self.feedback_band(w, k, l, decoded))
            .collect::<Result<_, _>>()?;
        Ok(Tiles { rate: self.rate, k, height, states, decoded })
    }

    /// The same where the encoder does it all.
    fn elsewhere(&self, w: &Matrix, l: &Matrix) -> Result<Option<Tiles>, BackendError> {
        let (rows, k) = (w.rows, w.columns);
        let matrix = LdlqMatrix { weights: &w.data, factor: &l.data, k };
        let found = self.encoder.ldlq(&matrix, self.rate, self.codebook, &|_| ())?;
        let Some(states) = found else { return Ok(None) };
        let mut decoded = Matrix::zeros(rows, k);
        decoded.data.par_chunks_mut(BLOCK * k).enumerate().for_each(|(tile, decoded)| {
            for group in 0..k / BLOCK {
                let own = &states[(group * (rows / BLOCK) + tile) * TILE..][..TILE];
                for (p, &state) in own.iter().enumerate() {
                    let (output, input) = (usize::from(TILE_COLUMN[p]), usize::from(TILE_ROW[p]));
                    decoded[output * k + group * BLOCK + input] = self.table[usize::from(state)];
                }
            }
        });
        Ok(Some(Tiles { rate: self.rate, k, height: rows, states: vec![states], decoded }))
    }

    fn feedback_band(
        &self,
        w: &[f32],
        k: usize,
        l: Option<&Matrix>,
        decoded: &mut [f32],
    ) -> Result<Vec<u16>, BackendError> {
        let rows = w.len() / k;
        let mut states = vec![0; rows * k];
        let mut errors = vec![0.0; rows * k];
        let mut base = vec![0.0; rows * SPAN];
        let (mut target, mut value) = (vec![0.0; rows * BLOCK], vec![0.0; rows * BLOCK]);
        for span in (0..k).step_by(SPAN).rev() {
            let end = (span + SPAN).min(k);
            base.fill(0.0);
            if let Some(l) = l.filter(|_| end < k) {
                let e = View { data: &errors[end..], rows, columns: k - end, stride: k };
                let columns = end - span;
                let l = View { data: &l.data[end * k + span..], rows: k - end, columns, stride: k };
                products(&mut base, SPAN, e, l);
            }
            for group in (span..end).step_by(BLOCK).rev() {
                for o in 0..rows {
                    for i in 0..BLOCK {
                        target[o * BLOCK + i] =
                            w[o * k + group + i] + base[o * SPAN + group - span + i];
                    }
                }
                let next = group + BLOCK;
                if let Some(l) = l.filter(|_| next < end) {
                    let e = View { data: &errors[next..], rows, columns: end - next, stride: k };
                    let data = &l.data[next * k + group..];
                    let l = View { data, rows: end - next, columns: BLOCK, stride: k };
                    products(&mut target, BLOCK, e, l);
                }
                let states = &mut states[group / BLOCK * rows * BLOCK..][..rows * BLOCK];
                self.encode(&target, states, &mut value)?;
                for o in 0..rows {
                    for i in 0..BLOCK {
                        let (at, v) = (o * k + group + i, value[o * BLOCK + i]);
                        decoded[at] = v;
                        errors[at] = w[at] - v;
                    }
                }
            }
        }
        Ok(states)
    }

    /// One pass of block coordinate descent over `tiles` towards `w` under `h`; `inverse` holds the
    /// inverses of its diagonal blocks. Returns how many tiles changed.
    ///
    /// # Errors
    /// When the encoder's device fails.
    pub fn descend(
        &self,
        w: &Matrix,
        h: &Matrix,
        inverse: &[f32],
        tiles: &mut Tiles,
    ) -> Result<usize, BackendError> {
        let k = w.columns;
        let Tiles { states, decoded, height, .. } = tiles;
        decoded
            .data
            .par_chunks_mut(*height * k)
            .zip(w.data.par_chunks(*height * k))
            .zip(states.par_iter_mut())
            .map(|((decoded, w), states)| self.descend_band(w, h, inverse, states, decoded))
            .try_reduce(|| 0, |a, b| Ok(a + b))
    }

    fn descend_band(
        &self,
        w: &[f32],
        h: &Matrix,
        inverse: &[f32],
        states: &mut [u16],
        decoded: &mut [f32],
    ) -> Result<usize, BackendError> {
        let k = h.rows;
        let rows = w.len() / k;
        let mut errors: Vec<f32> = w.iter().zip(decoded.iter()).map(|(w, q)| w - q).collect();
        let mut pull = vec![0.0; rows * BLOCK];
        let (mut target, mut value) = (vec![0.0; rows * BLOCK], vec![0.0; rows * BLOCK]);
        let mut proposal = vec![0; rows * BLOCK];
        let mut changed = 0;
        for group in (0..k).step_by(BLOCK).rev() {
            let own: Vec<f32> = (0..BLOCK)
                .flat_map(|i| h.data[(group + i) * k + group..][..BLOCK].iter().copied())
                .collect();
            // All other groups' errors, as seen by this one.
            pull.fill(0.0);
            let column = View { data: &h.data[group..], rows: k, columns: BLOCK, stride: k };
            products(&mut pull, BLOCK, View::whole(&errors, rows, k), column);
            let negative: Vec<f32> = (0..rows)
                .flat_map(|o| errors[o * k + group..][..BLOCK].iter().map(|e| -e))
                .collect();
            product(
                &mut pull,
                BLOCK,
                View::whole(&negative, rows, BLOCK),
                View::whole(&own, BLOCK, BLOCK),
            );
            for o in 0..rows {
                target[o * BLOCK..][..BLOCK].copy_from_slice(&w[o * k + group..][..BLOCK]);
            }
            let inverse = &inverse[group * BLOCK..][..BLOCK * BLOCK];
            product(
                &mut target,
                BLOCK,
                View::whole(&pull, rows, BLOCK),
                View::whole(inverse, BLOCK, BLOCK),
            );
            self.encode(&target, &mut proposal, &mut value)?;
            let first = group * rows;
            changed += decoded
                .par_chunks_mut(BLOCK * k)
                .zip(errors.par_chunks_mut(BLOCK * k))
                .zip(states[first..first + rows * BLOCK].par_chunks_mut(TILE))
                .zip(w.par_chunks(BLOCK * k))
                .enumerate()
                .with_min_len(BAND / BLOCK)
                .filter_map(|(tile, (((decoded, errors), states), w))| {
                    let (target, value) = (&target[tile * TILE..], &value[tile * TILE..]);
                    let cost = |q: &dyn Fn(usize, usize) -> f32| -> f64 {
                        let row = |o: usize| {
                            let d: [f32; BLOCK] =
                                std::array::from_fn(|i| target[o * BLOCK + i] - q(o, i));
                            let hd = |i: usize| -> f32 {
                                (0..BLOCK).map(|j| own[i * BLOCK + j] * d[j]).sum()
                            };
                            (0..BLOCK).map(|i| f64::from(d[i] * hd(i))).sum::<f64>()
                        };
                        (0..BLOCK).map(row).sum()
                    };
                    let before = cost(&|o, i| decoded[o * k + group + i]);
                    if cost(&|o, i| value[o * BLOCK + i]) >= before {
                        return None;
                    }
                    states.copy_from_slice(&proposal[tile * TILE..][..TILE]);
                    for o in 0..BLOCK {
                        for i in 0..BLOCK {
                            let (at, v) = (o * k + group + i, value[o * BLOCK + i]);
                            decoded[at] = v;
                            errors[at] = w[at] - v;
                        }
                    }
                    Some(())
                })
                .count();
        }
        Ok(changed)
    }
}

/// `out ← out + a · b`, the bands of `a`'s rows on several threads; `out` has `stride` elements a row.
fn products(out: &mut [f32], stride: usize, a: View, b: View) {
    out.par_chunks_mut(BAND * stride).enumerate().for_each(|(band, out)| {
        let rows = (a.rows - band * BAND).min(BAND);
        product(out, stride, View { data: &a.data[band * BAND * a.stride..], rows, ..a }, b);
    });
}

impl Tiles {
    /// The opposite of [`pack`](Self::pack), for `[rows, k]` weights.
    pub fn unpack(trellis: &[u16], rate: Rate, table: &[f32], rows: usize, k: usize) -> Self {
        let ring = Ring::new(rate);
        let words = rate.half_words();
        let mut decoded = Matrix::zeros(rows, k);
        let states = decoded.data.par_chunks_mut(BAND * k).enumerate().map(|(band, decoded)| {
            let tiles = decoded.len() / k / BLOCK;
            let mut states = vec![0; decoded.len()];
            for (i, own) in states.chunks_exact_mut(TILE).enumerate() {
                let (group, nb) = (i / tiles, i % tiles);
                let tile = group * (rows / BLOCK) + band * (BAND / BLOCK) + nb;
                let stored = trellis[tile * words..][..words].iter();
                let bytes: Vec<u8> = stored.flat_map(|w| w.to_le_bytes()).collect();
                own.copy_from_slice(&ring.states(&bytes));
                for (p, &state) in own.iter().enumerate() {
                    let output = nb * BLOCK + usize::from(TILE_COLUMN[p]);
                    let input = group * BLOCK + usize::from(TILE_ROW[p]);
                    decoded[output * k + input] = table[usize::from(state)];
                }
            }
            states
        });
        let states = states.collect();
        Self { rate, k, height: BAND, states, decoded }
    }

    /// The stored trellis, `[k / 16, n / 16, 16·K]` words.
    pub fn pack(&self) -> Vec<u16> {
        let (rows, columns) = (self.k / BLOCK, self.decoded.rows / BLOCK);
        let in_band = self.height / BLOCK;
        let words = self.rate.half_words();
        let mut out = vec![0; rows * columns * words];
        out.par_chunks_mut(columns * words).enumerate().for_each(|(kb, out)| {
            for (nb, out) in out.chunks_exact_mut(words).enumerate() {
                let states = &self.states[nb / in_band];
                let tiles = states.len() / TILE / rows;
                let at = (kb * tiles + nb % in_band) * TILE;
                let states: &[u16; TILE] = states[at..at + TILE].try_into().expect("one tile");
                out.copy_from_slice(&pack_ring(states, self.rate));
            }
        });
        out
    }
}
