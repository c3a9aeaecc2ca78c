//! The instruction sets that a kernel is compiled for.

#[cfg(target_arch = "x86_64")]
use super::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::avx512::{Avx512, BASE, EXTENDED, HALF, ROUNDED};
use super::isa::Isa;
#[cfg(target_arch = "aarch64")]
use super::neon::Neon;
use crate::Level;

/// What the code may use; each tier includes the ones before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg(target_arch = "x86_64")]
pub(super) enum Tier {
    Avx2,
    Avx512,
    /// VNNI and VBMI2.
    Extended,
    /// BF16.
    Rounded,
    /// FP16.
    Half,
}

/// What the code may use; each tier includes the ones before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg(target_arch = "aarch64")]
pub(super) enum Tier {
    Neon,
    /// FP16.
    Half,
}

#[cfg(target_arch = "x86_64")]
impl Tier {
    pub(super) const ALL: [Self; 5] =
        [Self::Avx2, Self::Avx512, Self::Extended, Self::Rounded, Self::Half];

    /// The lowest level that may use it.
    pub(super) fn level(self) -> Level {
        match self {
            Self::Avx2 => Level::Avx2,
            Self::Avx512 => Level::Avx512,
            Self::Extended | Self::Half => Level::Avx512Vnni,
            Self::Rounded => Level::Avx512Bf16,
        }
    }

    pub(super) fn is_supported(self) -> bool {
        let extended = || is_x86_feature_detected!("avx512vbmi2");
        let rounded = || is_x86_feature_detected!("avx512bf16");
        let half = || is_x86_feature_detected!("avx512fp16");
        self.level().is_supported()
            && match self {
                Self::Avx2 | Self::Avx512 => true,
                Self::Extended => extended(),
                Self::Rounded => extended() && rounded(),
                Self::Half => extended() && rounded() && half(),
            }
    }
}

#[cfg(target_arch = "aarch64")]
impl Tier {
    pub(super) const ALL: [Self; 2] = [Self::Neon, Self::Half];

    /// The lowest level that may use it.
    pub(super) fn level(self) -> Level {
        Level::Neon
    }

    pub(super) fn is_supported(self) -> bool {
        let half = || std::arch::is_aarch64_feature_detected!("fp16");
        self.level().is_supported() && (self == Self::Neon || half())
    }
}

/// What is made of an instruction set.
pub(super) trait Visitor {
    type Output;
    fn visit<S: Isa>(self, s: S) -> Self::Output;
}

impl Tier {
    /// The best one that `level` allows.
    pub(super) fn best(level: Level) -> Option<Self> {
        Self::ALL.into_iter().rfind(|t| t.level() <= level && t.is_supported())
    }

    /// What `visitor` makes of a supported tier.
    pub(super) fn visit<V: Visitor>(self, visitor: V) -> V::Output {
        assert!(self.is_supported(), "{self:?} was not detected");
        // SAFETY: the features of a supported tier are present.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            match self {
                Self::Avx2 => visitor.visit(Avx2::new()),
                Self::Avx512 => visitor.visit(Avx512::<BASE>::new()),
                Self::Extended => visitor.visit(Avx512::<EXTENDED>::new()),
                Self::Rounded => visitor.visit(Avx512::<ROUNDED>::new()),
                Self::Half => visitor.visit(Avx512::<HALF>::new()),
            }
        }
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        unsafe {
            match self {
                Self::Neon => visitor.visit(Neon::<false>::new()),
                Self::Half => visitor.visit(Neon::<true>::new()),
            }
        }
    }
}
