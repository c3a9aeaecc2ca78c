//! One position of the ring: the costs of all nodes before it to those of all nodes after it.
//!
//! With `E` new bits at the position and `C` at the next one, node `n` (`16 − C` bits) is reached
//! by the `2^C` states `c·2^(16 − C) + n`, of which state `c` leaves node
//! `c·2^(16 − C − E) + ⌊n / 2^E⌋`. A register therefore holds the costs of `LANES >> E`
//! consecutive nodes `h = ⌊n / 2^E⌋` for each of the `2^E` low parts `l`, in the order `[l][h]`: the
//! costs before the position are then one load that repeats a few numbers, and every new
//! cost is put in its place once per `2^C` states.

use super::isa::{Isa, Job};
use super::square::{Square, cost, settled};

/// Tiles that share one pass over the values.
pub(super) const GROUP: usize = 2;
/// Registers of one tile that are filled at a time where `2^E` exceeds the lanes.
const MAX_PARTS: usize = 4;

/// Where the value of a state stands in the order that [`Step`] reads them.
pub(super) fn place(state: usize, lanes: usize, e: usize, c: usize) -> usize {
    let (choice, n) = (state >> (16 - c), state & ((1 << (16 - c)) - 1));
    let (h, l) = (n >> e, n & ((1 << e) - 1));
    let repeats = lanes.min(1 << e);
    let together = lanes / repeats;
    let parts = ((1 << e) / lanes).clamp(1, MAX_PARTS);
    let (part, l) = (l / repeats, l % repeats);
    let lane = l * together + h % together;
    let block = (h / together) * ((1 << e) / repeats / parts) + part / parts;
    ((block * (1 << c) + choice) * parts + part % parts) * lanes + lane
}

/// A step of [`GROUP`] tiles.
pub(super) struct Step<'a> {
    /// `E` and `C`.
    pub(super) bits: (usize, usize),
    pub(super) square: Square,
    /// Values of all states, ordered by [`place`].
    pub(super) values: &'a [i16],
    pub(super) targets: [i16; GROUP],
    /// Smallest cost before the step, which is taken off.
    pub(super) floors: [u16; GROUP],
    /// Costs before, `2^(16 − E)` of each tile.
    pub(super) old: [&'a [u16]; GROUP],
    /// Costs after, `2^(16 − C)` of each tile.
    pub(super) new: [&'a mut [u16]; GROUP],
}

/// [`step`] for the bits of `$job`.
macro_rules! by_bits {
    ($s:ident, $job:ident, $half:literal) => {
        match $job.bits {
            (1, 1) => step::<S, 1, 1, $half>($s, $job),
            (1, 2) => step::<S, 1, 2, $half>($s, $job),
            (2, 1) => step::<S, 2, 1, $half>($s, $job),
            (2, 2) => step::<S, 2, 2, $half>($s, $job),
            (2, 3) => step::<S, 2, 3, $half>($s, $job),
            (3, 2) => step::<S, 3, 2, $half>($s, $job),
            (3, 3) => step::<S, 3, 3, $half>($s, $job),
            (3, 4) => step::<S, 3, 4, $half>($s, $job),
            (4, 3) => step::<S, 4, 3, $half>($s, $job),
            (4, 4) => step::<S, 4, 4, $half>($s, $job),
            (5, 5) => step::<S, 5, 5, $half>($s, $job),
            (6, 6) => step::<S, 6, 6, $half>($s, $job),
            (7, 7) => step::<S, 7, 7, $half>($s, $job),
            (8, 8) => step::<S, 8, 8, $half>($s, $job),
            (e, c) => unreachable!("no rate has {e} bits followed by {c}"),
        }
    };
}

impl Job for Step<'_> {
    /// Smallest new cost of each tile.
    type Output = [u16; GROUP];

    #[inline(always)]
    fn run<S: Isa>(self, s: S) -> [u16; GROUP] {
        let (e, c) = self.bits;
        assert_eq!(self.values.len(), 1 << 16);
        assert!(self.old.iter().all(|old| old.len() == 1 << (16 - e)));
        assert!(self.new.iter().all(|new| new.len() == 1 << (16 - c)));
        // SAFETY: the lengths are those of `e` and `c`, which choose the body.
        unsafe {
            if S::HALF && self.square == Square::Half {
                by_bits!(s, self, true)
            } else {
                by_bits!(s, self, false)
            }
        }
    }
}

/// # Safety
/// The slices of `job` must have the lengths that `E` and `C` ask for.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // two arrays of registers share each index
unsafe fn step<S: Isa, const E: usize, const C: usize, const HALF: bool>(
    s: S,
    job: Step,
) -> [u16; GROUP] {
    let square = if HALF { Square::Half } else { Square::of_integers(E, C) };
    let parts = ((1 << E) / S::LANES).max(1);
    let block = parts.min(MAX_PARTS);
    let together = (S::LANES >> E).max(1);
    let groups = (1usize << (16 - C - E)) / together;
    let targets = job.targets.map(|t| s.splat(t as u16));
    let floors = job.floors.map(|f| s.splat(f));
    let old = job.old.map(<[u16]>::as_ptr);
    let new = job.new.map(<[u16]>::as_mut_ptr);
    let mut smallest = [s.splat(u16::MAX); GROUP];
    let mut values = job.values.as_ptr().cast::<u16>();
    for group in 0..groups {
        for first in (0..parts).step_by(block) {
            let mut best = [[s.splat(u16::MAX); MAX_PARTS]; GROUP];
            for c in 0..1 << C {
                let from = (c << (16 - C - E)) + group * together;
                // SAFETY: `from + together` is at most `2^(16 - E)`.
                let old = old.map(|old| unsafe { s.repeat::<E>(old.add(from)) });
                for part in 0..block {
                    // SAFETY: all these loads together read every state's value once.
                    let value = unsafe { s.load(values) };
                    values = values.wrapping_add(S::LANES);
                    for g in 0..GROUP {
                        let cost = cost(s, square, old[g], value, targets[g]);
                        best[g][part] = s.min(best[g][part], cost);
                    }
                }
            }
            for part in 0..block {
                let to = (group * parts + first + part) * S::LANES;
                for g in 0..GROUP {
                    let cost = settled(s, square, best[g][part], floors[g]);
                    smallest[g] = s.min(smallest[g], cost);
                    // SAFETY: all these stores together write every new cost once.
                    unsafe { s.store(new[g].add(to), s.interleave::<E>(cost)) };
                }
            }
        }
    }
    smallest.map(|v| s.min_lane(v))
}
