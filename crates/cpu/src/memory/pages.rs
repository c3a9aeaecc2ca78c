//! Huge pages for what is large. The system hands memory out when it is first written, by default 4 KiB at a time, and that
//! takes longer than a copy of as much.

use std::alloc::{GlobalAlloc, Layout, System};

/// A huge page on the processors this is for.
pub(crate) const HUGE_PAGE: usize = 2 << 20;
/// Fewest bytes of an allocation worth a call to the system.
const WORTH_ASKING: usize = 2 * HUGE_PAGE;

/// Asks the system to back the whole huge pages of `bytes` from `start` on as such. Advice only: one that refuses it is as right.
pub(crate) fn ask(start: *mut u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        let skipped = start.addr().next_multiple_of(HUGE_PAGE) - start.addr();
        let whole = bytes.saturating_sub(skipped) / HUGE_PAGE * HUGE_PAGE;
        if whole > 0 {
            // SAFETY: no memory is read, written or given back, whatever lies there.
            unsafe {
                libc::madvise(start.wrapping_add(skipped).cast(), whole, libc::MADV_HUGEPAGE)
            };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, bytes);
}

/// The system's allocator, which asks for huge pages for what is large. What is to be zeros is left as it is: caches are, of
/// which most may never be written.
pub struct HugePages;

/// `start`, once they were asked for.
fn asked(start: *mut u8, bytes: usize) -> *mut u8 {
    if bytes >= WORTH_ASKING && !start.is_null() {
        ask(start, bytes);
    }
    start
}

// SAFETY: all memory is the system allocator's, as it gives it.
unsafe impl GlobalAlloc for HugePages {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's.
        asked(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(start, layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: the caller's.
        asked(unsafe { System.realloc(start, layout, bytes) }, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_the_systems_at_every_size() {
        for size in [1, HUGE_PAGE, WORTH_ASKING, 3 * WORTH_ASKING + 5] {
            let layout = Layout::from_size_align(size, 64).unwrap();
            // SAFETY: layouts are not empty, and every pointer is used as the functions before it say.
            unsafe {
                let start = HugePages.alloc(layout);
                start.write_bytes(7, size);
                let grown = HugePages.realloc(start, layout, 2 * size);
                assert!((0..size).step_by(4096).all(|i| *grown.add(i) == 7));
                let layout = Layout::from_size_align(2 * size, 64).unwrap();
                HugePages.dealloc(grown, layout);
                let zeros = HugePages.alloc_zeroed(layout);
                assert!((0..2 * size).step_by(4096).all(|i| *zeros.add(i) == 0));
                HugePages.dealloc(zeros, layout);
            }
        }
    }
}
