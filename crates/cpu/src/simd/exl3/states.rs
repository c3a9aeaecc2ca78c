//! States of a block of a strip, out of the repacked trellis: one funnel shift of two half-word
//! vectors per 32 states, with constants that depend on the rate and the position alone.

use super::isa::{Isa, Job};
use super::layout::{GROUPS, STRIP};
use marlin_quant::exl3::Rate;

/// Writes the states of one block, `[pair of inputs: 64][half of the columns: 2][lane: 32]`.
///
/// A job of its own, and not inlined into the products: it is long, and needed by all of them.
pub(super) struct States {
    rate: Rate,
    words: *const u16,
    out: *mut u16,
}

impl States {
    /// # Safety
    /// While it runs `words` must hold `GROUPS · 2·K` vectors, and `out` have room for
    /// [`BLOCK_STATES`](super::layout::BLOCK_STATES).
    pub(super) unsafe fn new(rate: Rate, words: *const u16, out: *mut u16) -> Self {
        Self { rate, words, out }
    }
}

impl Job for States {
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let Self { rate, words, out } = self;
        // SAFETY: promised to `new`; the constant is the depth `words` has.
        unsafe {
            match rate.twice_bits() {
                2 => extract::<S, 2>(s, words, out),
                3 => extract::<S, 3>(s, words, out),
                4 => extract::<S, 4>(s, words, out),
                5 => extract::<S, 5>(s, words, out),
                6 => extract::<S, 6>(s, words, out),
                7 => extract::<S, 7>(s, words, out),
                8 => extract::<S, 8>(s, words, out),
                10 => extract::<S, 10>(s, words, out),
                12 => extract::<S, 12>(s, words, out),
                14 => extract::<S, 14>(s, words, out),
                _ => extract::<S, 16>(s, words, out),
            }
        }
    }
}

/// Calls [`position`] for every listed position, unrolled so that all shifts are constants.
macro_rules! positions {
    ($s:ident $words:ident $before:ident $out:ident: $($c:literal)*) => {
        $(position::<S, TWICE, $c>($s, $words, $before, $out);)*
    };
}

#[inline(always)]
unsafe fn extract<S: Isa, const TWICE: usize>(s: S, words: *const u16, out: *mut u16) {
    for group in 0..GROUPS {
        for part in 0..STRIP / (2 * S::LANES) {
            // SAFETY: `group` and `part` stay inside what the caller vouches for.
            unsafe {
                let words = words.add(group * TWICE * STRIP + part * 2 * S::LANES);
                let out = out.add(group * 32 * STRIP + part * 2 * S::LANES);
                // Segment j begins with the last bits of segment j - 1 of the same ring.
                let before = s.rotate8(s.load(words.add((TWICE - 1) * STRIP)));
                positions! { s words before out:
                    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
                    16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
                }
            }
        }
    }
}

/// States of position `C` of every segment.
#[inline(always)]
unsafe fn position<S: Isa, const TWICE: usize, const C: usize>(
    s: S,
    words: *const u16,
    before: S::I,
    out: *mut u16,
) {
    let end = const { (C + 1) * TWICE / 2 };
    let row = const { 2 * (C >> 3) + (C & 1) + 8 * ((C >> 1) & 1) };
    let half = const { (C >> 2) & 1 };
    // SAFETY: `end / 16` is below `TWICE` unless `end` is a multiple of 16; `row` is below 16.
    unsafe {
        let load = |q: usize| s.load(words.add(q * STRIP));
        let state = if end % 16 == 0 {
            load(end / 16 - 1)
        } else {
            let high = if end < 16 { before } else { load(end / 16 - 1) };
            s.funnel(high, load(end / 16), 16 - end as u32 % 16)
        };
        s.store(out.add((row * 2 + half) * STRIP), state);
    }
}
