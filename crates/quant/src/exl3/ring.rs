//! One tile of 256 weights as a tail-biting ring of bits.
//!
//! Position `i` (0 … 255) adds `D(i)` new bits, most significant first; its state is the 16 bits
//! of the ring that end with them, at bit `S(i) = D(0) + … + D(i)`, cyclically. `D` is `K` for
//! whole rates; for `K = ⌊K⌋ + ½` it alternates `⌊K⌋, ⌊K⌋ + 1`, so `S(i) = ⌊(i + 1)·2K / 2⌋`
//! holds for all rates.
//!
//! In memory a tile is `8·K` little-endian 32-bit words; ring bit `t` is bit `31 − t mod 32` of
//! word `t / 32`. Ring position `p` is the weight at row (input) [`TILE_ROW`]`[p]` and column
//! (output) [`TILE_COLUMN`]`[p]` of the 16×16 tile: the operand order of a 16×8×16 tensor-core
//! instruction, eight consecutive positions per lane.

/// Weights of one tile.
pub const TILE: usize = 256;
/// Rows (inputs) and columns (outputs) of one tile.
pub const TILE_SIDE: usize = 16;

/// Input index inside the tile of every ring position.
pub const TILE_ROW: [u8; TILE] = {
    let mut rows = [0; TILE];
    let mut p = 0;
    while p < TILE {
        rows[p] = (2 * ((p >> 3) & 3) + (p & 1) + 8 * ((p >> 1) & 1)) as u8;
        p += 1;
    }
    rows
};

/// Output index inside the tile of every ring position.
pub const TILE_COLUMN: [u8; TILE] = {
    let mut columns = [0; TILE];
    let mut p = 0;
    while p < TILE {
        columns[p] = ((p >> 5) + 8 * ((p >> 2) & 1)) as u8;
        p += 1;
    }
    columns
};

/// Bits per weight of a tile: 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7 or 8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate {
    twice: u8,
}

impl Rate {
    /// Every rate, ascending.
    pub const ALL: [Self; 11] = [
        Self { twice: 2 },
        Self { twice: 3 },
        Self { twice: 4 },
        Self { twice: 5 },
        Self { twice: 6 },
        Self { twice: 7 },
        Self { twice: 8 },
        Self { twice: 10 },
        Self { twice: 12 },
        Self { twice: 14 },
        Self { twice: 16 },
    ];

    /// The rate of a tile stored in `half_words` 16-bit words (the last dimension of a trellis).
    pub fn from_half_words(half_words: usize) -> Option<Self> {
        Self::ALL.into_iter().find(|r| r.half_words() == half_words)
    }

    /// The rate of `bits` per weight.
    pub fn from_bits(bits: f64) -> Option<Self> {
        Self::ALL.into_iter().find(|r| r.bits() == bits)
    }

    /// Bits per weight.
    pub fn bits(self) -> f64 {
        f64::from(self.twice) / 2.0
    }

    /// Twice the bits per weight, a whole number.
    pub fn twice_bits(self) -> usize {
        usize::from(self.twice)
    }

    /// Whether the rate is 1.5, 2.5 or 3.5.
    pub fn is_half(self) -> bool {
        self.twice % 2 == 1
    }

    /// 16-bit words of one tile.
    pub fn half_words(self) -> usize {
        8 * self.twice_bits()
    }

    /// Bytes of one tile.
    pub fn tile_bytes(self) -> usize {
        16 * self.twice_bits()
    }

    /// Bits of the ring that end at position `i`, `S(i)`.
    pub fn end(self, i: usize) -> usize {
        (i + 1) * self.twice_bits() / 2
    }

    /// New bits at position `i`, `D(i)`.
    pub fn new_bits(self, i: usize) -> usize {
        self.end(i) - i * self.twice_bits() / 2
    }
}

/// Where the state of one position lies: `((words[high] : words[low]) >> shift) & 0xffff`.
#[derive(Debug, Clone, Copy)]
struct Window {
    high: u8,
    low: u8,
    shift: u8,
}

/// Reads the states of tiles of one rate.
#[derive(Debug, Clone)]
pub struct Ring {
    rate: Rate,
    windows: [Window; TILE],
}

impl Ring {
    /// A reader for `rate`.
    pub fn new(rate: Rate) -> Self {
        let words = rate.tile_bytes() / 4;
        let windows = std::array::from_fn(|i| {
            let end = rate.end(i) + words * 32;
            Window {
                high: (((end - 16) / 32) % words) as u8,
                low: (((end - 1) / 32) % words) as u8,
                shift: ((32 - end % 32) % 32) as u8,
            }
        });
        Self { rate, windows }
    }

    /// The rate it reads.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// States of all 256 positions of `tile`, the [`Rate::tile_bytes`] bytes as stored.
    pub fn states(&self, tile: &[u8]) -> [u16; TILE] {
        let mut words = [0u64; 64];
        for (word, &bytes) in words.iter_mut().zip(tile.as_chunks().0) {
            *word = u64::from(u32::from_le_bytes(bytes));
        }
        // Masks only tell the compiler what the constructor ensures: no bounds check remains.
        self.windows.map(|w| {
            let pair = words[usize::from(w.high & 63)] << 32 | words[usize::from(w.low & 63)];
            (pair >> (w.shift & 31)) as u16
        })
    }
}

/// Packs the states of a tail-biting ring into the 16-bit words of a stored tile.
///
/// Only the new bits of every position are written, so `states` must be a ring: the rest of
/// state `i` has to equal the low bits of state `i − 1`, and state 0 has to follow state 255.
pub fn pack_ring(states: &[u16; TILE], rate: Rate) -> Vec<u16> {
    let mut words = vec![0u32; rate.half_words() / 2];
    for (i, &state) in states.iter().enumerate() {
        let new = rate.new_bits(i);
        for bit in 0..new {
            let t = rate.end(i) - 1 - bit;
            words[t / 32] |= u32::from(state >> bit & 1) << (31 - t % 32);
        }
    }
    words.iter().flat_map(|w| [*w as u16, (*w >> 16) as u16]).collect()
}
