//! Procedural codebooks: a 16-bit state to an fp16 value, all integer arithmetic modulo 2³².
//!
//! * `3inst` (no marker tensor): `x = 89226354·s + 64248484`, `y = (x & 0x8fff8fff) ^ 0x3b603b60`,
//!   value = fp16 sum of the two halves of `y`.
//! * `mcg`: the same with `x = 0xcbac1fed·s`.
//! * `mul1`: `x = 0x83dcd12d·s`, `t` = sum of the four bytes of `x`, value = fp16 of
//!   `(1024 + t)·0x1eee + 0xc931` (both constants are fp16 bit patterns) rounded once.
//!
//! In every case the exact result fits an f32, so computing in f32 and rounding to nearest even
//! equals the fp16 hardware instruction. Files of May to October 2025 may hold another multiplier
//! in the marker; those take the same formulas with the stored value.

use half::f16;
use std::borrow::Cow;
use std::sync::LazyLock;

/// Multiplier of the `mcg` codebook in all released files.
pub const MCG_MULTIPLIER: u32 = 0xcbac_1fed;
/// Multiplier of the `mul1` codebook in all released files.
pub const MUL1_MULTIPLIER: u32 = 0x83dc_d12d;
/// Multiplier of the `3inst` codebook.
pub const THREE_INST_MULTIPLIER: u32 = 89_226_354;
/// Addend of the `3inst` codebook.
pub const THREE_INST_ADDEND: u32 = 64_248_484;
/// Slope of `mul1`: 1774·2⁻¹⁸, exactly the fp16 `0x1eee`.
pub const MUL1_SLOPE: f32 = 1774.0 / 262_144.0;
/// Value of `mul1` at byte sum 0 before rounding: 1024·slope plus the fp16 `0xc931`.
pub const MUL1_OFFSET: f32 = 1024.0 * MUL1_SLOPE - 10.382_812_5;

/// Which generator a matrix uses, with the multiplier its marker tensor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codebook {
    /// No marker tensor.
    ThreeInst,
    /// Marker `.mcg`.
    Mcg(u32),
    /// Marker `.mul1`.
    Mul1(u32),
}

impl Codebook {
    /// Number of states.
    pub const STATES: usize = 1 << 16;

    /// Name as `quantization_config.json` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::ThreeInst => "3inst",
            Self::Mcg(_) => "mcg",
            Self::Mul1(_) => "mul1",
        }
    }

    /// Whether the multiplier is one that kernels may have as a constant.
    pub fn is_standard(self) -> bool {
        matches!(self, Self::ThreeInst | Self::Mcg(MCG_MULTIPLIER) | Self::Mul1(MUL1_MULTIPLIER))
    }

    /// Value of `state`.
    pub fn value(self, state: u16) -> f16 {
        let s = u32::from(state);
        match self {
            Self::ThreeInst => {
                let x = s.wrapping_mul(THREE_INST_MULTIPLIER).wrapping_add(THREE_INST_ADDEND);
                sum_of_halves(x)
            }
            Self::Mcg(multiplier) => sum_of_halves(s.wrapping_mul(multiplier)),
            Self::Mul1(multiplier) => {
                let bytes = s.wrapping_mul(multiplier).to_le_bytes();
                let sum: u32 = bytes.iter().map(|&b| u32::from(b)).sum();
                f16::from_f32(sum as f32 * MUL1_SLOPE + MUL1_OFFSET)
            }
        }
    }

    /// All values by state, widened to f32 (exact). Shared for the standard multipliers.
    pub fn table(self) -> Cow<'static, [f32]> {
        static THREE_INST: LazyLock<Vec<f32>> = LazyLock::new(|| Codebook::ThreeInst.values());
        static MCG: LazyLock<Vec<f32>> = LazyLock::new(|| Codebook::Mcg(MCG_MULTIPLIER).values());
        static MUL1: LazyLock<Vec<f32>> =
            LazyLock::new(|| Codebook::Mul1(MUL1_MULTIPLIER).values());
        match self {
            Self::ThreeInst => Cow::Borrowed(&THREE_INST[..]),
            Self::Mcg(MCG_MULTIPLIER) => Cow::Borrowed(&MCG[..]),
            Self::Mul1(MUL1_MULTIPLIER) => Cow::Borrowed(&MUL1[..]),
            Self::Mcg(_) | Self::Mul1(_) => Cow::Owned(self.values()),
        }
    }

    fn values(self) -> Vec<f32> {
        (0..=u16::MAX).map(|s| self.value(s).to_f32()).collect()
    }
}

fn sum_of_halves(x: u32) -> f16 {
    let y = (x & 0x8fff_8fff) ^ 0x3b60_3b60;
    let half = |bits: u32| f16::from_bits(bits as u16).to_f32();
    f16::from_f32(half(y & 0xffff) + half(y >> 16))
}
