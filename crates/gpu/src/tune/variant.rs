//! Variants of kernels, and which of them a shape may have.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Rows up to which rows times a trellis-coded matrix have one kernel on devices with tensor cores, whose sums depend on the class of rows.
pub const EXL3_ROWS: usize = 8;
/// Rows up to which planes that multiply matrices leave the work to kernels for few.
pub const SIMDGROUP_ROWS: usize = 16;
/// Rows up to which that is so for row formats on devices with products of warpgroups.
pub const PLAIN_ROWS: usize = 4;
/// Rows up to which that is so for row formats on other devices with tensor cores.
pub const MMA_ROWS: usize = 16;
/// The same for row formats whose weights are small integers.
pub const INTEGER_ROWS: usize = 16;
/// Rows of the last class; it holds all that are more.
pub const MOST_ROWS: usize = 4096;

/// What a choice is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "kernel", rename_all = "snake_case", deny_unknown_fields)]
pub enum Shape {
    /// Rows times a matrix, for all rows the same one.
    Linear {
        /// As kernels read it: `"q4_k"`, `"exl3 4.0 mul1"`; `"f16"` for what is held so.
        format: String,
        /// Rows of the matrix.
        out_features: usize,
        /// Columns of the matrix.
        in_features: usize,
    },
    /// Attention of tokens one by one.
    Attention {
        /// Query heads.
        num_heads: usize,
        /// Heads of the cache.
        num_kv_heads: usize,
        /// Columns of a query or key head.
        key_head_dim: usize,
        /// Columns of a value head.
        value_head_dim: usize,
        /// Element type of the cache.
        cache_type: String,
        /// Whether values are a prefix of the keys.
        latent: bool,
        /// Whether old keys are hidden.
        windowed: bool,
    },
}

/// A way to compute what a shape says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Variant {
    /// Row formats: weights are decoded in registers, once for every tile of rows. No sum depends on either number.
    Decode {
        /// Planes of a cube, each with an output of its own.
        planes: u32,
        /// Most rows of a tile.
        tile: u32,
    },
    /// Row formats whose weights are small integers: their bytes are multiplied with those of rows, on NVIDIA's GPUs. No sum depends on the number of rows.
    Bytes,
    /// Row formats: weights are decoded to halves, which warpgroups multiply.
    Halves,
    /// EXL3 in f32: planes that share a column of tiles.
    Planes {
        /// Planes of a cube.
        planes: u32,
    },
    /// EXL3 in f32: most rows of a tile.
    Tile {
        /// Most rows of a tile.
        tile: u32,
    },
    /// EXL3 on tensor cores, the kernel for few rows: into how many parts it cuts a matrix.
    Resident {
        /// Blocks that a multiprocessor holds.
        blocks: u32,
    },
    /// EXL3: the kernel for few rows, however many there are.
    Few,
    /// EXL3: the kernel of warpgroups for many rows.
    Many,
    /// As [`Many`](Self::Many) and [`Halves`](Self::Halves), by warps that multiply each by itself.
    Mma,
    /// EXL3: the one for every device.
    Portable,
    /// Attention: how a sequence is cut.
    Parts {
        /// Keys of a part.
        keys: u32,
        /// Planes of a cube that share a part.
        planes: u32,
    },
}

/// What of a device decides which variants it can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Lanes of a plane.
    pub plane: u32,
    /// Most units of a cube.
    pub most_units: u32,
    /// Whether there are NVIDIA's tensor-core instructions.
    pub tensor_cores: bool,
    /// Whether they multiply for four planes at once.
    pub warpgroups: bool,
    /// Whether planes multiply matrices of 8 by 8 by 8, which take more than a few rows.
    pub simdgroup_matrices: bool,
}

impl Facts {
    /// A device that can run everything: what no device can run is not in a sound cache.
    pub const ANY: [Self; 2] = [
        Self {
            plane: 4,
            most_units: u32::MAX,
            tensor_cores: true,
            warpgroups: true,
            simdgroup_matrices: false,
        },
        Self {
            plane: 4,
            most_units: u32::MAX,
            tensor_cores: false,
            warpgroups: false,
            simdgroup_matrices: false,
        },
    ];
}

impl Variant {
    /// Whether every row is the same bits as in all other variants of its class that keep them.
    pub fn keeps_bits(self) -> bool {
        matches!(self, Self::Decode { .. } | Self::Bytes | Self::Tile { .. })
    }

    /// Whether inputs or weights are rounded to halves.
    pub fn rounds(self) -> bool {
        matches!(self, Self::Halves | Self::Many | Self::Mma)
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Decode { planes, tile } => write!(f, "decode, {planes} planes, tiles of {tile}"),
            Self::Bytes => f.write_str("bytes"),
            Self::Halves => f.write_str("halves"),
            Self::Planes { planes } => write!(f, "{planes} planes"),
            Self::Tile { tile } => write!(f, "tiles of {tile}"),
            Self::Resident { blocks } => write!(f, "{blocks} blocks resident"),
            Self::Few => f.write_str("few rows"),
            Self::Many => f.write_str("many rows"),
            Self::Mma => f.write_str("many rows by single warps"),
            Self::Portable => f.write_str("portable"),
            Self::Parts { keys, planes } => write!(f, "parts of {keys}, {planes} planes"),
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Linear { format, out_features, in_features } => {
                write!(f, "{format} {out_features}x{in_features}")
            }
            Self::Attention {
                num_heads,
                num_kv_heads,
                key_head_dim,
                value_head_dim,
                cache_type,
                latent,
                windowed,
            } => {
                let latent = if *latent { ", latent" } else { "" };
                let windowed = if *windowed { ", windowed" } else { "" };
                write!(
                    f,
                    "attention {num_heads}/{num_kv_heads} heads of {key_head_dim}/{value_head_dim}, {cache_type}{latent}{windowed}"
                )
            }
        }
    }
}

/// The class that holds `rows`: the power of two from there on.
pub fn class(rows: usize) -> usize {
    rows.clamp(1, MOST_ROWS).next_power_of_two()
}

/// Variants that `shape` may have with `rows` rows, a class, or with every number of rows. One or none is no choice.
pub fn candidates(shape: &Shape, rows: Option<usize>, facts: &Facts) -> Vec<Variant> {
    let fits = |planes: &u32| planes * facts.plane <= facts.most_units;
    let tiles = |most: u32, rows: usize| {
        let sizes = [4, 8, 16, 32].into_iter().filter(move |tile| *tile <= most);
        let few = (rows < 4).then_some(rows as u32);
        few.into_iter().chain(sizes.filter(move |tile| *tile as usize <= rows))
    };
    let exl3 =
        |shape: &Shape| matches!(shape, Shape::Linear { format, .. } if format.starts_with("exl3"));
    match (shape, rows) {
        (Shape::Attention { .. }, None) => {
            let planes = [4, 8].into_iter().filter(fits);
            planes
                .flat_map(|planes| [64, 128, 256, 512].map(|keys| Variant::Parts { keys, planes }))
                .collect()
        }
        (Shape::Attention { .. }, Some(_)) => Vec::new(),
        (_, Some(rows)) if facts.simdgroup_matrices && rows > SIMDGROUP_ROWS => Vec::new(),
        (shape, None) if exl3(shape) => match facts.tensor_cores {
            true => [1, 2].map(|blocks| Variant::Resident { blocks }).to_vec(),
            false => {
                let planes = [4, 8, 16].into_iter().filter(fits);
                planes.map(|planes| Variant::Planes { planes }).collect()
            }
        },
        (shape, Some(rows)) if exl3(shape) => match facts.tensor_cores {
            true if rows <= EXL3_ROWS => Vec::new(),
            true => {
                let many = facts.warpgroups.then_some(Variant::Many);
                let all = [Variant::Few, Variant::Portable, Variant::Mma];
                all.into_iter().chain(many).collect()
            }
            false => tiles(16, rows).map(|tile| Variant::Tile { tile }).collect(),
        },
        (_, None) => Vec::new(),
        (Shape::Linear { format, .. }, Some(rows)) if facts.tensor_cores && is_integer(format) => {
            let many = rows > INTEGER_ROWS;
            let halves = (many && facts.warpgroups).then_some(Variant::Halves);
            let mma = many.then_some(Variant::Mma);
            [Variant::Bytes].into_iter().chain(halves).chain(mma).collect()
        }
        (Shape::Linear { format, .. }, Some(rows)) => {
            let planes = [2, 4, 8].into_iter().filter(fits);
            let decode = planes.flat_map(|planes| {
                tiles(32, rows).map(move |tile| Variant::Decode { planes, tile })
            });
            // Halves are too coarse for f32.
            let halves = (facts.warpgroups && rows > PLAIN_ROWS).then_some(Variant::Halves);
            let mma = (facts.tensor_cores && rows > MMA_ROWS).then_some(Variant::Mma);
            let rounded = halves.into_iter().chain(mma).filter(|_| format != "f32");
            decode.chain(rounded).collect()
        }
    }
}

/// Whether weights of `format` are small integers with scales, which `ops/integer.rs` takes on NVIDIA's GPUs.
pub fn is_integer(format: &str) -> bool {
    let formats = "q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k q4_k q5_k q6_k int4_g128 int4_g64 int4_g32 int8_g128 int8_g32";
    let format = format.strip_suffix("_ordered").unwrap_or(format);
    formats.split(' ').any(|f| f == format)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOFTWARE: Facts = Facts {
        plane: 8,
        most_units: 1024,
        tensor_cores: false,
        warpgroups: false,
        simdgroup_matrices: false,
    };
    const AMPERE: Facts = Facts { warpgroups: false, ..HOPPER };
    const HOPPER: Facts = Facts {
        plane: 32,
        most_units: 1024,
        tensor_cores: true,
        warpgroups: true,
        simdgroup_matrices: false,
    };

    fn linear(format: &str) -> Shape {
        Shape::Linear { format: format.to_owned(), out_features: 64, in_features: 128 }
    }

    #[test]
    fn classes_are_powers_of_two() {
        for (rows, expected) in
            [(0, 1), (1, 1), (3, 4), (4, 4), (5, 8), (512, 512), (1 << 20, 4096)]
        {
            assert_eq!(class(rows), expected, "{rows} rows");
        }
    }

    #[test]
    fn promised_rows_have_no_variant_with_other_bits() {
        for facts in [SOFTWARE, AMPERE, HOPPER] {
            let classes = (0..=12).map(|power| 1usize << power);
            for rows in classes {
                for (shape, promised) in [
                    (linear("q4_0"), if facts.tensor_cores { INTEGER_ROWS } else { MOST_ROWS }),
                    (
                        linear("bf16"),
                        match facts.tensor_cores {
                            true if facts.warpgroups => PLAIN_ROWS,
                            true => MMA_ROWS,
                            false => MOST_ROWS,
                        },
                    ),
                    (linear("f32"), MOST_ROWS),
                    (
                        linear("exl3 4.0 mul1"),
                        if facts.tensor_cores { EXL3_ROWS } else { MOST_ROWS },
                    ),
                ] {
                    let all = candidates(&shape, Some(rows), &facts);
                    if rows <= promised {
                        assert!(
                            all.iter().all(|v| v.keeps_bits()),
                            "{shape}, {rows} rows: {all:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_cube_holds_the_planes_of_every_variant() {
        let small = Facts { plane: 64, most_units: 256, ..SOFTWARE };
        let all = candidates(&linear("q8_0"), Some(1), &small);
        assert_eq!(all, [2, 4].map(|planes| Variant::Decode { planes, tile: 1 }));
    }
}
