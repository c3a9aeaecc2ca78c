//! Which rows a tile of a matrix product reads and writes, and with which matrix of a stack.
//!
//! A tile is up to `m` rows that share a matrix; the second dimension of a launch counts tiles.

use crate::gpu::{Buffer, Gpu};
use cubecl::prelude::*;

/// Rows of a launch.
// One at a time, on the stack.
#[allow(clippy::large_enum_variant)]
#[derive(Clone)]
pub(crate) enum Rows {
    /// Rows `0 .. rows` times the one matrix.
    Dense { rows: usize },
    /// Row `r` of head `h` is row `r * heads + h`, times matrix `h`.
    Heads { rows: usize, heads: usize },
    /// Entry `e` times the matrix of its expert; its input is row `e / divisor`.
    Entries(Entries),
}

/// Entries of a routing, each a row and an expert.
#[derive(Clone)]
pub(crate) struct Entries {
    /// Number of entries.
    pub(crate) count: usize,
    /// Expert of every entry.
    pub(crate) ids: Buffer,
    /// Place of every expert's matrix in its stack, [`ABSENT`] for those of other stacks.
    pub(crate) slots: Buffer,
    /// Entries that share an input row.
    pub(crate) divisor: usize,
    /// How entries are put together, for more than a few.
    pub(crate) grouped: Option<Grouped>,
}

/// Entries sorted by expert.
#[derive(Clone)]
pub(crate) struct Grouped {
    /// Entries in the order of their experts.
    pub(crate) order: Buffer,
    /// Expert, first place in `order` and rows of every tile; no rows past the last.
    pub(crate) tiles: Buffer,
    /// Tiles there may be.
    pub(crate) count: usize,
    /// Most rows of a tile.
    pub(crate) m: u32,
}

/// Slot of an expert that lies in another stack.
pub(crate) const ABSENT: u32 = u32::MAX;

/// Rows of a tile at most, when there are many.
pub(crate) const MOST: u32 = 16;

/// How a kernel finds its rows; comptime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Mode {
    Dense,
    Heads,
    Single,
    Grouped,
}

/// What a kernel is told of its rows.
pub(crate) struct Launch {
    pub(crate) mode: Mode,
    /// Rows of a tile.
    pub(crate) m: u32,
    /// Tiles.
    pub(crate) tiles: u32,
    /// Rows, per head where there are heads.
    pub(crate) rows: u32,
    /// Heads, or the divisor of entries.
    pub(crate) share: u32,
    /// Tiles, or experts of single entries.
    pub(crate) table: Buffer,
    pub(crate) order: Buffer,
    pub(crate) slots: Buffer,
}

impl Rows {
    /// Rows that are written.
    pub(crate) fn count(&self) -> usize {
        match self {
            Self::Dense { rows } => *rows,
            Self::Heads { rows, heads } => rows * heads,
            Self::Entries(entries) => entries.count,
        }
    }

    /// Rows that all meet the one matrix.
    pub(crate) fn dense(&self) -> Option<usize> {
        if let Self::Dense { rows } = self { Some(*rows) } else { None }
    }

    /// The launch that takes them one by one.
    pub(crate) fn one_by_one(&self, gpu: &Gpu) -> Launch {
        match self {
            Self::Entries(entries) => {
                Self::Entries(Entries { grouped: None, ..entries.clone() }).launch(gpu, 1)
            }
            _ => Launch { m: 1, tiles: self.count() as u32, ..self.launch(gpu, 1) },
        }
    }

    /// The launch that covers them in tiles of at most `most` rows.
    pub(crate) fn launch(&self, gpu: &Gpu, most: u32) -> Launch {
        let none = || gpu.none.clone();
        let m_of = |rows: usize| (rows.next_power_of_two() as u32).clamp(1, most);
        match self {
            Self::Dense { rows } => {
                let m = m_of(*rows);
                Launch {
                    mode: Mode::Dense,
                    m,
                    tiles: (*rows as u32).div_ceil(m),
                    rows: *rows as u32,
                    share: 1,
                    table: none(),
                    order: none(),
                    slots: none(),
                }
            }
            Self::Heads { rows, heads } => {
                let m = m_of(*rows);
                Launch {
                    mode: Mode::Heads,
                    m,
                    tiles: (*rows as u32).div_ceil(m) * *heads as u32,
                    rows: *rows as u32,
                    share: *heads as u32,
                    table: none(),
                    order: none(),
                    slots: none(),
                }
            }
            Self::Entries(entries) => match &entries.grouped {
                None => Launch {
                    mode: Mode::Single,
                    m: 1,
                    tiles: entries.count as u32,
                    rows: entries.count as u32,
                    share: entries.divisor as u32,
                    table: entries.ids.clone(),
                    order: none(),
                    slots: entries.slots.clone(),
                },
                Some(grouped) => Launch {
                    mode: Mode::Grouped,
                    m: grouped.m,
                    tiles: grouped.count as u32,
                    rows: entries.count as u32,
                    share: entries.divisor as u32,
                    table: grouped.tiles.clone(),
                    order: grouped.order.clone(),
                    slots: entries.slots.clone(),
                },
            },
        }
    }
}

/// Matrix of `tile`, [`ABSENT`] when there is nothing to do.
#[cube]
pub(crate) fn tile_slot(
    table: &[u32],
    slots: &[u32],
    tile: u32,
    share: u32,
    #[comptime] mode: Mode,
) -> u32 {
    match comptime!(mode) {
        Mode::Dense => 0u32.runtime(),
        Mode::Heads => tile % share,
        Mode::Single => slots[table[tile as usize] as usize],
        Mode::Grouped => {
            let slot = slots[table[(tile * 3) as usize] as usize];
            let rows = table[(tile * 3 + 2) as usize];
            select(rows == 0, comptime!(ABSENT).runtime(), slot)
        }
    }
}

/// Rows of `tile`: none for an empty one.
#[cube]
pub(crate) fn tile_rows(
    table: &[u32],
    tile: u32,
    rows: u32,
    share: u32,
    #[comptime] m: u32,
    #[comptime] mode: Mode,
) -> u32 {
    match comptime!(mode) {
        Mode::Dense => min(rows - tile * m, m.runtime()),
        Mode::Heads => min(rows - tile / share * m, m.runtime()),
        Mode::Single => 1u32.runtime(),
        Mode::Grouped => table[(tile * 3 + 2) as usize],
    }
}

/// Row that row `i` of `tile` writes.
#[cube]
pub(crate) fn tile_out(
    table: &[u32],
    order: &[u32],
    tile: u32,
    i: u32,
    share: u32,
    #[comptime] m: u32,
    #[comptime] mode: Mode,
) -> u32 {
    match comptime!(mode) {
        Mode::Dense => tile * m + i,
        Mode::Heads => (tile / share * m + i) * share + tile % share,
        Mode::Single => tile,
        Mode::Grouped => order[(table[(tile * 3 + 1) as usize] + i) as usize],
    }
}

/// Row that is read for row `out`.
#[cube]
pub(crate) fn tile_in(out: u32, share: u32, #[comptime] mode: Mode) -> u32 {
    match comptime!(mode) {
        Mode::Dense => out,
        Mode::Heads => out,
        Mode::Single => out / share,
        Mode::Grouped => out / share,
    }
}
