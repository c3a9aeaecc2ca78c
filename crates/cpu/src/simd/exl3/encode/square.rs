//! How errors are counted: costs of 16 bits, integers or fp16, which order as unsigned integers do.

use super::isa::Isa;
use half::f16;

/// Largest integer cost that is kept: with one more error it still fits 16 bits.
pub(super) const MAX_COST: u16 = 1 << 15;
/// Largest difference of [`Square::Fine`], whose square is below [`MAX_COST`].
pub(super) const MAX_FINE: u16 = 181;

/// How squared errors are made of differences `d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Square {
    /// `d² / 2¹⁵`, rounded: cheap, and coarse when errors are small beside the codebook. `|d|` is
    /// below 2¹⁵.
    Coarse,
    /// `min(|d|, 181)²`.
    Fine,
    /// Numbers and costs are fp16, sums are rounded once.
    Half,
}

impl Square {
    /// Of integers, what suits `e` new bits and then `c`.
    pub(super) const fn of_integers(e: usize, c: usize) -> Self {
        if e + c < 7 { Self::Coarse } else { Self::Fine }
    }

    /// Largest magnitude of a number: what two differ by has a square.
    pub(super) fn max_number(self) -> f32 {
        match self {
            Self::Coarse | Self::Fine => 16383.0,
            Self::Half => 127.0,
        }
    }

    /// A cost of `units`.
    pub(super) fn bits(self, units: f32) -> u16 {
        match self {
            Self::Coarse | Self::Fine => units as u16,
            Self::Half => f16::from_f32(units).to_bits(),
        }
    }

    /// `v` as a number.
    pub(super) fn number(self, v: f32) -> i16 {
        match self {
            Self::Coarse | Self::Fine => v.round() as i16,
            Self::Half => f16::from_f32(v).to_bits() as i16,
        }
    }

    /// The cost of a difference of `d`, were there room for any.
    pub(super) fn units(self, d: f32) -> f32 {
        match self {
            Self::Coarse => d * d / 32768.0,
            Self::Fine | Self::Half => d * d,
        }
    }

    /// What orders states as their costs do: a node's cost `old` and a state's error. Of integers the
    /// cost itself, as the kernels compute it.
    pub(super) fn order(self, old: u16, value: i16, target: i16) -> u32 {
        let d = i32::from(value) - i32::from(target);
        match self {
            Self::Coarse => u32::from(old) + ((d * d + (1 << 14)) >> 15) as u32,
            Self::Fine => u32::from(old) + d.unsigned_abs().min(u32::from(MAX_FINE)).pow(2),
            // The bits of a number that is not negative; rounding to fp16 would add nothing but
            // ties.
            Self::Half => {
                let d = widened(value as u16) - widened(target as u16);
                (d * d + widened(old)).to_bits()
            }
        }
    }

    /// As much as can be said.
    pub(super) fn highest(self) -> u16 {
        match self {
            Self::Coarse | Self::Fine => MAX_COST,
            Self::Half => f16::INFINITY.to_bits(),
        }
    }
}

/// The value of fp16 `bits`, of infinity 65536.
fn widened(bits: u16) -> f32 {
    let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    f32::from_bits(magnitude.to_bits() | u32::from(bits & 0x8000) << 16)
}

/// A register of costs of states after nodes of costs `old`; `square` is a constant.
#[inline(always)]
pub(super) fn cost<S: Isa>(s: S, square: Square, old: S::V, value: S::V, target: S::V) -> S::V {
    match square {
        Square::Coarse => s.add(old, s.square_high(s.sub(value, target))),
        Square::Fine => s.add(old, s.square_fine(s.sub(value, target))),
        Square::Half => s.half_add_square(old, s.half_sub(value, target)),
    }
}

/// A register of costs less the smallest ones before them; `square` is a constant.
#[inline(always)]
pub(super) fn settled<S: Isa>(s: S, square: Square, cost: S::V, floor: S::V) -> S::V {
    match square {
        Square::Coarse | Square::Fine => s.min(s.sub(cost, floor), s.splat(MAX_COST)),
        Square::Half => s.half_sub(cost, floor),
    }
}
