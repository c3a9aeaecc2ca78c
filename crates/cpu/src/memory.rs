//! Activation buffers: f32, aligned to a cache line, recycled so that a decode step allocates
//! nothing once the first one has run. And zeroed arrays for caches, whose pages the system maps
//! when they are first written.
//!
//! An allocation that finds no room unwinds to the operator that wanted it ([`no_room`], [`catch`]), which fails: a server goes on, and a
//! program says what it lacked. Small ones, of a few rows or names, end the process, as they do everywhere in Rust.

pub(crate) mod pages;
pub mod system;

use marlin_tensor::BackendError;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

/// Bytes; a cache line, and the widest vector.
const ALIGNMENT: usize = 64;
/// Free blocks kept per size; more than a forward pass has alive at once.
const KEEP: usize = 64;
/// Blocks of more than `2^LARGEST_KEPT` elements go back to the system (64 MiB).
const LARGEST_KEPT: usize = 24;

/// An allocation that found no room, on its way to [`catch`].
struct NoRoom {
    what: &'static str,
    bytes: usize,
}

/// Ends the operator that needs `bytes` for `what`.
pub(crate) fn no_room(what: &'static str, bytes: usize) -> ! {
    // Unlike a panic it says nothing by itself: it is no bug.
    resume_unwind(Box::new(NoRoom { what, bytes }))
}

/// What `work` comes to, with an allocation that found no room as an error.
///
/// # Errors
/// As `work`, and when there was no room.
pub(crate) fn catch<T>(work: impl FnOnce() -> Result<T, BackendError>) -> Result<T, BackendError> {
    let cause = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => return done,
        Err(cause) => cause,
    };
    match cause.downcast::<NoRoom>() {
        Ok(no_room) => Err(BackendError::OutOfMemory {
            what: no_room.what.to_owned(),
            needed_bytes: no_room.bytes as u64,
            available_bytes: system::free().map_or(0, |free| free.bytes),
        }),
        Err(bug) => resume_unwind(bug),
    }
}

/// An aligned allocation of `capacity` f32, all initialised.
struct Block {
    start: NonNull<f32>,
    capacity: usize,
}

// SAFETY: a block owns its memory like a `Box<[f32]>`.
unsafe impl Send for Block {}
// SAFETY: shared access is read-only, like `&[f32]`.
unsafe impl Sync for Block {}

impl Block {
    fn layout(capacity: usize) -> Layout {
        Layout::array::<f32>(capacity)
            .and_then(|l| l.align_to(ALIGNMENT))
            .expect("an activation fits the address space")
    }

    fn new(capacity: usize) -> Self {
        let layout = Self::layout(capacity);
        // SAFETY: capacities are powers of two, so the layout is not empty.
        let start = unsafe { alloc_zeroed(layout) }.cast::<f32>();
        let Some(start) = NonNull::new(start) else { no_room("a forward pass", layout.size()) };
        Self { start, capacity }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.start.as_ptr().cast(), Self::layout(self.capacity)) }
    }
}

/// Free blocks by the binary logarithm of their capacity.
#[derive(Default)]
struct Free {
    sizes: [Vec<Block>; LARGEST_KEPT + 1],
}

/// Where buffers come from and return to.
#[derive(Clone, Default)]
pub(crate) struct Arena {
    free: Arc<Mutex<Free>>,
}

impl Arena {
    /// `len` elements of unspecified (old) values.
    pub(crate) fn take(&self, len: usize) -> Buffer {
        let size = len.max(16).next_power_of_two().trailing_zeros() as usize;
        let kept = match self.free.lock().unwrap_or_else(|e| e.into_inner()).sizes.get_mut(size) {
            Some(blocks) => blocks.pop(),
            None => None,
        };
        let block = kept.unwrap_or_else(|| Block::new(1 << size));
        Buffer { block: Some(block), len, arena: self.clone() }
    }

    /// `len` zeros.
    pub(crate) fn zeros(&self, len: usize) -> Buffer {
        let mut buffer = self.take(len);
        buffer.fill(0.0);
        buffer
    }

    /// A copy of `values`.
    pub(crate) fn copy_of(&self, values: &[f32]) -> Buffer {
        let mut buffer = self.take(values.len());
        buffer.copy_from_slice(values);
        buffer
    }
}

/// A slice of f32 that returns to its arena when dropped.
pub(crate) struct Buffer {
    block: Option<Block>,
    len: usize,
    arena: Arena,
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        let block = self.block.as_ref().expect("only drop takes the block");
        // SAFETY: `len <= capacity` initialised elements, borrowed with `self`.
        unsafe { std::slice::from_raw_parts(block.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        let block = self.block.as_ref().expect("only drop takes the block");
        // SAFETY: as in `deref`, and `&mut self` makes the access unique.
        unsafe { std::slice::from_raw_parts_mut(block.start.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(block) = self.block.take() else { return };
        let size = block.capacity.trailing_zeros() as usize;
        let mut free = self.arena.free.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(blocks) = free.sizes.get_mut(size)
            && blocks.len() < KEEP
        {
            blocks.push(block);
        }
    }
}

/// The first `len` elements of a buffer that is kept between calls; it grows when it has to, by `value`.
pub(crate) fn grown<T: Clone>(buffer: &mut Vec<T>, len: usize, value: T) -> &mut [T] {
    if buffer.len() < len {
        let more = len - buffer.len();
        if buffer.try_reserve(more).is_err() {
            no_room("a forward pass", more * size_of::<T>());
        }
        buffer.resize(len, value);
    }
    &mut buffer[..len]
}

/// Elements whose zero is all bits zero and every bit pattern of which is valid.
pub(crate) trait Plain: Copy {}

impl Plain for f32 {}
impl Plain for u16 {}
impl Plain for u8 {}

/// `len` zeros, or `None` when there is no room.
pub(crate) fn zeroed<T: Plain>(len: usize) -> Option<Vec<T>> {
    let layout = Layout::array::<T>(len).ok()?;
    if layout.size() == 0 {
        return Some(Vec::new());
    }
    // SAFETY: the layout is not empty; the vector gets the allocation it would have made itself,
    // full of valid elements.
    unsafe {
        let start = alloc_zeroed(layout).cast::<T>();
        (!start.is_null()).then(|| Vec::from_raw_parts(start, len, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_recycled() {
        let arena = Arena::default();
        for len in [0, 1, 15, 16, 17, 1000, 4096] {
            let mut buffer = arena.zeros(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_ptr() as usize % ALIGNMENT, 0);
            assert!(buffer.iter().all(|&v| v == 0.0));
            buffer.fill(7.0);
            let address = buffer.as_ptr();
            drop(buffer);
            let again = arena.take(len);
            assert_eq!(again.as_ptr(), address);
        }
        assert_eq!(&arena.copy_of(&[1.0, 2.0])[..], [1.0, 2.0]);
    }

    #[test]
    fn arrays_are_zero_or_refused() {
        assert!(zeroed::<u16>(1001).unwrap().iter().all(|&v| v == 0));
        assert!(zeroed::<f32>(0).unwrap().is_empty());
        assert!(zeroed::<f32>(usize::MAX / 4).is_none());
    }

    #[test]
    fn what_finds_no_room_is_an_error_and_a_bug_stays_a_panic() {
        let error = catch(|| {
            Arena::default().take(1 << 58);
            Ok(())
        });
        let Err(BackendError::OutOfMemory { needed_bytes, .. }) = error else {
            panic!("{error:?}");
        };
        assert_eq!(needed_bytes, 4 << 58);
        let mut few = vec![0u8; 3];
        let error = catch(|| Ok(grown(&mut few, 1 << 62, 0).len()));
        assert!(matches!(error, Err(BackendError::OutOfMemory { .. })), "{error:?}");
        assert!(catch_unwind(|| catch::<()>(|| resume_unwind(Box::new("a bug")))).is_err());
    }

    #[test]
    fn live_buffers_do_not_overlap() {
        let arena = Arena::default();
        let mut a = arena.take(100);
        let mut b = arena.take(100);
        a.fill(1.0);
        b.fill(2.0);
        assert!(a.iter().all(|&v| v == 1.0));
    }
}
