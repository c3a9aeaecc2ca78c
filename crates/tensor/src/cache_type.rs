//! How cached keys and values are stored.

use std::fmt;

/// Columns that share a scale in [`CacheType::Q8`] and [`CacheType::Q4`].
pub const CACHE_GROUP: usize = 32;

/// Element type of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CacheType {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// 8 bits, and 40 more for each group of [`CACHE_GROUP`] columns.
    Q8,
    /// 4 bits, and 40 more for each group of [`CACHE_GROUP`] columns.
    Q4,
    /// Keys as in [`Q8`](Self::Q8), values as in [`Q4`](Self::Q4).
    K8V4,
}

impl CacheType {
    /// Every type.
    pub const ALL: [Self; 6] = [Self::F32, Self::F16, Self::Bf16, Self::Q8, Self::Q4, Self::K8V4];

    /// Type of the keys.
    pub const fn keys(self) -> Self {
        if let Self::K8V4 = self { Self::Q8 } else { self }
    }

    /// Type of the values.
    pub const fn values(self) -> Self {
        if let Self::K8V4 = self { Self::Q4 } else { self }
    }

    /// Bytes of one head's key and value of so many columns.
    pub const fn bytes_per_head(self, key_columns: usize, value_columns: usize) -> usize {
        self.keys().row_bytes(key_columns) + self.values().row_bytes(value_columns)
    }

    /// Bytes of `columns` columns of a type that stores keys and values alike.
    pub const fn row_bytes(self, columns: usize) -> usize {
        // A scale, and the value and place of the largest column.
        let groups = 5 * columns.div_ceil(CACHE_GROUP);
        match self {
            Self::F32 => 4 * columns,
            Self::F16 | Self::Bf16 => 2 * columns,
            Self::Q8 | Self::K8V4 => columns + groups,
            Self::Q4 => columns.div_ceil(2) + groups,
        }
    }

    /// Name in options and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
            Self::K8V4 => "k8v4",
        }
    }
}

impl fmt::Display for CacheType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
