//! Sums in memory, from one chunk of the depth to the next.

use crate::simd::isa::Isa;

/// Where sums go.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    /// The first row's, of whole bands.
    pub at: *mut f32,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Whether they are added to what is there.
    pub add: bool,
}

impl Sums {
    /// Those of a later row and column.
    ///
    /// # Safety
    /// They must be there.
    #[inline(always)]
    pub(super) unsafe fn from(self, row: usize, column: usize) -> Self {
        // SAFETY: the caller's.
        Self { at: unsafe { self.at.add(row * self.stride + column) }, ..self }
    }

    /// What the sums of a register begin with.
    ///
    /// # Safety
    /// They must be there.
    #[inline(always)]
    pub(super) unsafe fn begin<S: Isa>(self, s: S, row: usize) -> S::F {
        match self.add {
            // SAFETY: the caller's.
            true => unsafe { s.load_f32(self.at.add(row * self.stride)) },
            false => s.zero(),
        }
    }

    /// Puts them there.
    ///
    /// # Safety
    /// There must be room.
    #[inline(always)]
    pub(super) unsafe fn end<S: Isa>(self, s: S, row: usize, sums: S::F) {
        // SAFETY: the caller's.
        unsafe { s.store_f32(self.at.add(row * self.stride), sums) };
    }
}
