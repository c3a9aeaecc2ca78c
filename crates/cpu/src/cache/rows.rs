//! Rows of cached columns in 8 or 4 bits.
//!
//! A row is cut into groups of [`CACHE_GROUP`] columns. Keys have single columns of a hundred times the size of
//! the others, so the largest of each group is stored by itself, and what is left of the group is rotated by a Hadamard matrix, if it is
//! whole, and rounded. A group is a bf16 scale, the bf16 value and the index of its largest column,
//! and the quants; the byte of two 4-bit quants holds column `i` of its group low and column `i + half` high.
//! What is read stays rotated: a product of two rotated rows is that of the rows, so attention rotates
//! its queries and turns its sums back, once each.

use crate::Level;
use crate::memory::zeroed;
use crate::simd::widen_quants;
use half::bf16;
use marlin_quant::exl3::hadamard::sylvester;
use marlin_tensor::{CACHE_GROUP, CacheType};

/// Bits of a quant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bits {
    /// `-127..=127`.
    Eight,
    /// `-8..=7`, stored 8 higher.
    Four,
}

/// Bytes of a group before its quants.
pub(crate) const HEAD: usize = 5;

/// Row `i` is what one in column `i` of a group becomes when the group is rotated.
pub(crate) static HADAMARD: [[f32; CACHE_GROUP]; CACHE_GROUP] = {
    let mut rows = [[0.0; CACHE_GROUP]; CACHE_GROUP];
    let mut at = 0;
    while at < CACHE_GROUP * CACHE_GROUP {
        let (i, j) = (at / CACHE_GROUP, at % CACHE_GROUP);
        rows[i][j] = if (i & j).count_ones() % 2 == 0 { NORM } else { -NORM };
        at += 1;
    }
    rows
};

/// `1 / sqrt(32)`.
const NORM: f32 = 0.176_776_7;

impl Bits {
    fn cache_type(self) -> CacheType {
        match self {
            Self::Eight => CacheType::Q8,
            Self::Four => CacheType::Q4,
        }
    }

    /// Bytes of a group of `columns`.
    pub(crate) fn group_bytes(self, columns: usize) -> usize {
        self.cache_type().row_bytes(columns)
    }
}

/// An array of rows of `columns` columns.
pub(crate) struct Rows {
    bits: Bits,
    columns: usize,
    bytes: Vec<u8>,
}

impl Rows {
    /// `rows` rows of zeros, if there is memory for them.
    pub(crate) fn zeros(bits: Bits, rows: usize, columns: usize) -> Option<Self> {
        let len = rows.checked_mul(bits.cache_type().row_bytes(columns))?;
        Some(Self { bits, columns, bytes: zeroed(len)? })
    }

    fn row_bytes(&self) -> usize {
        self.bits.cache_type().row_bytes(self.columns)
    }

    /// Start of the bytes of the row whose first column is element `at`.
    fn byte(&self, at: usize) -> usize {
        at / self.columns.max(1) * self.row_bytes()
    }

    /// Rotates and rounds a row, and writes it from element `at` on.
    pub(crate) fn write(&mut self, at: usize, values: &[f32]) {
        assert_eq!(values.len(), self.columns, "whole rows");
        let (at, len) = (self.byte(at), self.row_bytes());
        let mut bytes = &mut self.bytes[at..at + len];
        for group in values.chunks(CACHE_GROUP) {
            let (these, rest) = bytes.split_at_mut(self.bits.group_bytes(group.len()));
            write_group(self.bits, group, these);
            bytes = rest;
        }
    }

    /// The rows from element `at` on that fill `out`, rotated as they are stored.
    pub(crate) fn read(&self, level: Level, at: usize, out: &mut [f32]) {
        if out.is_empty() {
            return;
        }
        assert!(out.len().is_multiple_of(self.columns), "whole rows");
        let bytes = &self.bytes[self.byte(at)..self.byte(at + out.len())];
        widen_quants(level, self.bits, self.columns, bytes, out);
    }

    /// Copies the rows of `len` elements.
    pub(crate) fn copy_within(&mut self, from: usize, to: usize, len: usize) {
        let (from, to) = (self.byte(from)..self.byte(from + len), self.byte(to));
        self.bytes.copy_within(from, to);
    }

    /// Columns of a row.
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }
}

fn write_group(bits: Bits, values: &[f32], bytes: &mut [u8]) {
    let mut group = [0.0f32; CACHE_GROUP];
    let x = &mut group[..values.len()];
    x.copy_from_slice(values);
    let larger = |best: usize, i: usize| if x[i].abs() > x[best].abs() { i } else { best };
    let largest = (1..x.len()).fold(0, larger);
    let value = bf16::from_f32(x[largest]);
    // What rounding left of it stays with the others.
    x[largest] -= value.to_f32();
    rotate(x);
    // The largest by size, with its sign.
    let mut peak = x.iter().fold(0.0f32, |peak, v| if v.abs() > peak.abs() { *v } else { peak });
    if !x.iter().sum::<f32>().is_finite() {
        // What is no number must stay visible.
        peak = f32::NAN;
    }
    let scale = match bits {
        Bits::Eight => peak.abs() / 127.0,
        Bits::Four => peak / -8.0,
    };
    let scale = bf16::from_f32(scale);
    bytes[..2].copy_from_slice(&scale.to_le_bytes());
    bytes[2..4].copy_from_slice(&value.to_le_bytes());
    bytes[4] = largest as u8;
    let inverse = if scale.to_f32() == 0.0 { 0.0 } else { 1.0 / scale.to_f32() };
    let quants = &mut bytes[HEAD..];
    match bits {
        Bits::Eight => {
            let rounded = x.iter().map(|v| (v * inverse).round_ties_even().clamp(-127.0, 127.0));
            quants.iter_mut().zip(rounded).for_each(|(q, v)| *q = v as i8 as u8);
        }
        Bits::Four => {
            let quant = |v: f32| ((v * inverse).round_ties_even().clamp(-8.0, 7.0) + 8.0) as u8;
            let half = quants.len();
            for (i, q) in quants.iter_mut().enumerate() {
                *q = quant(x[i]) | x.get(i + half).map_or(8, |v| quant(*v)) << 4;
            }
        }
    }
}

/// Multiplies every whole group of a row by the orthonormal Hadamard matrix, its own inverse.
pub(crate) fn rotate(row: &mut [f32]) {
    for group in row.chunks_exact_mut(CACHE_GROUP) {
        sylvester(group);
        group.iter_mut().for_each(|v| *v *= NORM);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(bits: Bits, columns: usize, values: &[f32]) -> Rows {
        let mut rows = Rows::zeros(bits, values.len() / columns, columns).unwrap();
        values.chunks_exact(columns).enumerate().for_each(|(i, row)| rows.write(i * columns, row));
        rows
    }

    #[test]
    fn rows_come_back_within_half_a_step_at_every_level() {
        for columns in [32, 64, 80, 33, 7] {
            // Some columns are far larger than the others.
            let value = |i: usize| (i as f32 * 0.7).sin() * if i % 31 == 9 { 90.0 } else { 1.0 };
            let values: Vec<f32> = (0..5 * columns).map(value).collect();
            for (bits, steps) in [(Bits::Eight, 127.0), (Bits::Four, 7.0)] {
                let stored = rows(bits, columns, &values);
                let mut scalar = vec![0.0; values.len()];
                stored.read(Level::Scalar, 0, &mut scalar);
                for (row, (found, given)) in
                    scalar.chunks(columns).zip(values.chunks(columns)).enumerate()
                {
                    let mut turned = given.to_vec();
                    rotate(&mut turned);
                    let groups = found.chunks(CACHE_GROUP).zip(given.chunks(CACHE_GROUP));
                    for ((f, g), t) in groups.zip(turned.chunks(CACHE_GROUP)) {
                        // Without the largest, the others make up the steps.
                        let mut rest = g.to_vec();
                        let largest = rest.iter_mut().max_by(|a, b| a.abs().total_cmp(&b.abs()));
                        *largest.unwrap() *= 2f32.powi(-9);
                        rotate(&mut rest);
                        let peak = rest.iter().fold(0.0f32, |peak, v| peak.max(v.abs()));
                        // A bf16 scale is up to 2^-9 too small, and four bits end a step early on one side.
                        let allowed = peak
                            * (0.51 / steps
                                + 0.004
                                + f32::from(u8::from(bits == Bits::Four)) * 0.07);
                        let worst = f.iter().zip(t).map(|(f, t)| (f - t).abs()).fold(0.0, f32::max);
                        assert!(
                            worst <= allowed,
                            "{bits:?} {columns} row {row}: {worst} over {allowed}"
                        );
                    }
                }
                for level in Level::ALL.into_iter().filter(|l| l.is_supported()) {
                    let mut read = vec![0.0; 3 * columns];
                    stored.read(level, columns, &mut read);
                    assert_eq!(read, scalar[columns..4 * columns], "{level} {bits:?} {columns}");
                }
            }
        }
    }

    #[test]
    fn rotating_twice_changes_nothing() {
        let given: Vec<f32> = (0..70).map(|i| (i as f32).cos()).collect();
        let mut turned = given.clone();
        rotate(&mut turned);
        assert!((turned[0] - given[0]).abs() > 0.1);
        rotate(&mut turned);
        assert!(turned.iter().zip(&given).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    #[test]
    fn what_is_no_number_stays_visible_and_zeros_stay_zeros() {
        for bits in [Bits::Eight, Bits::Four] {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut values = vec![1.0; 64];
                values[40] = bad;
                let mut read = vec![0.0; 64];
                rows(bits, 64, &values).read(Level::Scalar, 0, &mut read);
                assert!(read[..32].iter().all(|v| v.is_finite()));
                assert!(read[32..].iter().all(|v| v.is_nan()), "{bits:?} {bad}");
            }
            let mut read = vec![1.0; 64];
            rows(bits, 64, &[0.0; 64]).read(Level::Scalar, 0, &mut read);
            assert_eq!(read, [0.0; 64]);
        }
    }
}
