//! Memory of repacked weights: cut from large regions for which the system is asked to use huge
//! pages, since a decode step walks through all weights and would otherwise miss the address
//! translation buffers every 4 kB.

use crate::memory::no_room;
use crate::memory::pages::{self, HUGE_PAGE};
use std::alloc::{Layout, alloc, dealloc};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, Weak};

/// Bytes of a region, unless a single matrix needs more. What a region does not use is never
/// touched and costs only addresses, but for a part of one page.
const REGION: usize = 64 << 20;
/// Alignment of a piece: a cache line, and the widest register.
const ALIGNMENT: usize = 64;

/// One allocation.
struct Region {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a region owns its memory like a box; pieces of it are disjoint.
unsafe impl Send for Region {}
// SAFETY: the region itself gives no access to its memory.
unsafe impl Sync for Region {}

impl Region {
    /// At least `bytes` in one piece; `None` when there is no room.
    fn new(bytes: usize) -> Option<Self> {
        let layout = Layout::from_size_align(bytes.next_multiple_of(HUGE_PAGE), HUGE_PAGE)
            .expect("a matrix fits the address space");
        // SAFETY: the layout is not empty.
        let start = NonNull::new(unsafe { alloc(layout) })?;
        pages::ask(start.as_ptr(), layout.size());
        Some(Self { start, layout })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and no piece is left.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

/// The region that pieces are cut from, while any piece of it lives, and its used bytes.
static CURRENT: Mutex<(Weak<Region>, usize)> = Mutex::new((Weak::new(), 0));

/// Bytes aligned to a cache line.
pub(crate) struct Piece {
    _region: Arc<Region>,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a piece owns its bytes, which no other piece shares.
unsafe impl Send for Piece {}
// SAFETY: shared access is read-only.
unsafe impl Sync for Piece {}

impl Piece {
    /// `len` zeros.
    pub(crate) fn zeroed(len: usize) -> Self {
        let bytes = len.next_multiple_of(ALIGNMENT).max(ALIGNMENT);
        let (region, offset) = {
            let mut current = CURRENT.lock().unwrap_or_else(|e| e.into_inner());
            let (region, used) = match current.0.upgrade() {
                Some(region) if region.layout.size() - current.1 >= bytes => (region, current.1),
                _ => {
                    // Where addresses are few, a piece by itself.
                    let region = Region::new(bytes.max(REGION)).or_else(|| Region::new(bytes));
                    (Arc::new(region.unwrap_or_else(|| no_room("a matrix", bytes))), 0)
                }
            };
            *current = (Arc::downgrade(&region), used + bytes);
            (region, used)
        };
        // SAFETY: `offset .. offset + bytes` is inside the region and was handed out to no other.
        let start = unsafe {
            let start = region.start.add(offset);
            start.write_bytes(0, bytes);
            start
        };
        Self { _region: region, start, len }
    }
}

impl std::ops::Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes that this piece owns.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: `len` initialised bytes that this piece owns, borrowed uniquely.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_zeroed_aligned_and_disjoint() {
        let sizes = [1, 64, 65, 3 << 20, REGION + 1, 100];
        let mut pieces: Vec<Piece> = sizes.map(Piece::zeroed).into();
        for (i, piece) in pieces.iter_mut().enumerate() {
            assert!(piece.as_ptr().addr().is_multiple_of(ALIGNMENT));
            assert!(piece.iter().all(|&b| b == 0));
            piece.fill(i as u8 + 1);
        }
        for (i, piece) in pieces.iter().enumerate() {
            assert_eq!(piece.len(), sizes[i]);
            assert!(piece.iter().all(|&b| b == i as u8 + 1));
        }
    }
}
