//! What threads do while they wait: bring the weights of the next region into their caches. Decoding
//! is bound by memory, which would otherwise rest whenever threads wait for each other.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Matrices that one call reads at most.
const AHEAD: usize = 4;
/// Bytes a waiting thread fetches between two looks at the gate.
const AHEAD_STEP: usize = 2048;
/// Most bytes it fetches for one call: a part of a second-level cache.
const AHEAD_BYTES: usize = 512 << 10;

/// Memory that the next region will probably read, as addresses and lengths. Only ever prefetched,
/// which cannot fail, so it need not exist any more.
#[derive(Default)]
pub(super) struct Ahead {
    turn: AtomicUsize,
    ranges: [(AtomicUsize, AtomicUsize); AHEAD],
}

/// What one thread has fetched of it.
#[derive(Default)]
pub(super) struct Fetched {
    turn: usize,
    bytes: usize,
}

impl Ahead {
    /// What will be read: address and length of each matrix.
    pub(super) fn set(&self, matrices: &[(usize, usize)]) {
        let none = std::iter::repeat(&(0, 0));
        for (to, (start, len)) in self.ranges.iter().zip(matrices.iter().chain(none)) {
            to.0.store(*start, Ordering::Relaxed);
            to.1.store(*len, Ordering::Relaxed);
        }
        self.turn.fetch_add(1, Ordering::Release);
    }

    /// Fetches a little of the share of `thread`; `false` when all of it is.
    pub(super) fn fetch(&self, fetched: &mut Fetched, thread: usize, threads: usize) -> bool {
        let turn = self.turn.load(Ordering::Acquire);
        if turn != fetched.turn {
            *fetched = Fetched { turn, bytes: 0 };
        }
        let len = |i: usize| self.ranges[i].1.load(Ordering::Relaxed);
        let total: usize = (0..AHEAD).map(len).sum();
        let share = total / threads;
        if fetched.bytes >= share.min(AHEAD_BYTES) {
            return false;
        }
        let mut at = thread * share + fetched.bytes;
        fetched.bytes += AHEAD_STEP;
        for (start, len) in &self.ranges {
            let len = len.load(Ordering::Relaxed);
            if at < len {
                prefetch(start.load(Ordering::Relaxed) + at);
                break;
            }
            at -= len;
        }
        true
    }
}

/// Starts to bring [`AHEAD_STEP`] bytes at `address` into the second-level cache.
fn prefetch(address: usize) {
    (0..AHEAD_STEP).step_by(64).for_each(|line| fetch(address + line));
}

/// Bytes from what a kernel reads to what it has fetched meanwhile: what memory delivers to a core while it waits for the first
/// of it, and as much again. More would push out what comes first.
const DISTANCE: usize = 16 << 10;

/// Starts to bring `bytes` bytes that lie some way behind `address` into the second-level cache, for a kernel that reads on.
/// The processor's own guesses end at a page and come too late for more than one row.
#[inline(always)]
pub(crate) fn read_on(address: *const u8, bytes: usize) {
    (0..bytes).step_by(64).for_each(|line| fetch(address as usize + DISTANCE + line));
}

/// Starts to bring the line at `address`, whatever it is, into the second-level cache.
#[inline(always)]
fn fetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let line = std::ptr::without_provenance::<i8>(address);
        // SAFETY: a hint that reads nothing, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line) };
    }
    let _ = address;
}
