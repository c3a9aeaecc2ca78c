//! Instruction sets the kernels are written for.

use std::fmt;
use std::str::FromStr;

/// What the code may use; each level includes the ones before it that are of the same architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// The reference operators, no intrinsics.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with VNNI (`vpdpbusd`).
    Avx512Vnni,
    /// The same with AVX-512 BF16 (`vdpbf16ps`).
    Avx512Bf16,
    /// The same with AVX-512 VBMI, and AMX tiles of bf16 and int8.
    Amx,
    /// NEON, which every 64-bit Arm processor has.
    Neon,
    /// NEON with products of bytes (`sdot`).
    NeonDotprod,
}

/// A level name that does not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownLevel(String);

impl fmt::Display for UnknownLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown CPU level {:?}; choose one of", self.0)?;
        Level::ALL.iter().try_for_each(|level| write!(f, " {level}"))
    }
}

impl std::error::Error for UnknownLevel {}

impl Level {
    /// Every level, lowest first.
    pub const ALL: [Self; 8] = [
        Self::Scalar,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Vnni,
        Self::Avx512Bf16,
        Self::Amx,
        Self::Neon,
        Self::NeonDotprod,
    ];

    /// The highest level this machine supports.
    pub fn detect() -> Self {
        Self::ALL.into_iter().rfind(|level| level.is_supported()).unwrap_or(Self::Scalar)
    }

    /// Whether this machine can run the level.
    pub fn is_supported(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = || {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            };
            let avx512 = || {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            };
            let vnni = || avx2() && avx512() && is_x86_feature_detected!("avx512vnni");
            match self {
                Self::Scalar => true,
                Self::Avx2 => avx2(),
                Self::Avx512 => avx2() && avx512(),
                Self::Avx512Vnni => vnni(),
                Self::Avx512Bf16 => vnni() && is_x86_feature_detected!("avx512bf16"),
                Self::Amx => vnni() && crate::simd::amx::is_supported(),
                Self::Neon | Self::NeonDotprod => false,
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            use std::arch::is_aarch64_feature_detected as detected;
            match self {
                Self::Scalar => true,
                Self::Neon => detected!("neon"),
                Self::NeonDotprod => detected!("neon") && detected!("dotprod"),
                _ => false,
            }
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        {
            self == Self::Scalar
        }
    }

    /// What this machine lacks for the level, in words of `/proc/cpuinfo` where it has any; nothing where it is supported.
    pub fn missing(self) -> Vec<&'static str> {
        if self.is_supported() {
            return Vec::new();
        }
        #[cfg(target_arch = "x86_64")]
        {
            let features = [
                (Self::Avx2, "avx2", is_x86_feature_detected!("avx2")),
                (Self::Avx2, "fma", is_x86_feature_detected!("fma")),
                (Self::Avx2, "f16c", is_x86_feature_detected!("f16c")),
                (Self::Avx512, "avx512f", is_x86_feature_detected!("avx512f")),
                (Self::Avx512, "avx512bw", is_x86_feature_detected!("avx512bw")),
                (Self::Avx512, "avx512dq", is_x86_feature_detected!("avx512dq")),
                (Self::Avx512, "avx512vl", is_x86_feature_detected!("avx512vl")),
                (Self::Avx512Vnni, "avx512_vnni", is_x86_feature_detected!("avx512vnni")),
                (Self::Avx512Bf16, "avx512_bf16", is_x86_feature_detected!("avx512bf16")),
                (Self::Amx, "avx512_vbmi", is_x86_feature_detected!("avx512vbmi")),
            ];
            if self >= Self::Neon {
                return vec!["a 64-bit Arm processor"];
            }
            let lacks = features.iter().filter(|(level, _, here)| *level <= self && !here);
            let mut missing: Vec<&str> = lacks.map(|(_, name, _)| *name).collect();
            if self == Self::Amx {
                missing.extend(crate::simd::amx::missing());
            }
            missing
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            vec![match self {
                Self::Scalar => "nothing",
                Self::Neon => "asimd",
                Self::NeonDotprod => "asimddp",
                _ => "an x86-64 processor",
            }]
        }
    }

    /// The level without products of bf16, which few rows do not use.
    pub(crate) fn without_tiles(self) -> Self {
        if [Self::Avx512Bf16, Self::Amx].contains(&self) { Self::Avx512Vnni } else { self }
    }

    /// The level without what only products of integers use.
    pub(crate) fn float(self) -> Self {
        self.min(if self >= Self::Neon { Self::Neon } else { Self::Avx512 })
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Amx => "amx",
            Self::Neon => "neon",
            Self::NeonDotprod => "neon-dotprod",
        })
    }
}

impl FromStr for Level {
    type Err = UnknownLevel;

    fn from_str(name: &str) -> Result<Self, UnknownLevel> {
        Self::ALL
            .into_iter()
            .find(|level| level.to_string() == name)
            .ok_or_else(|| UnknownLevel(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_unknown_ones_list_the_choices() {
        for level in Level::ALL {
            assert_eq!(level.to_string().parse(), Ok(level));
        }
        let error = "sse9".parse::<Level>().unwrap_err().to_string();
        assert!(error.contains("sse9") && error.contains("avx512-vnni"), "{error}");
        assert!(Level::detect().is_supported());
        for level in Level::ALL {
            assert_eq!(
                level.missing().is_empty(),
                level.is_supported(),
                "{level}: {:?}",
                level.missing()
            );
        }
    }
}
