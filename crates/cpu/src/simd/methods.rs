//! Methods of an instruction set that are one expression of intrinsics each.

/// Value-only methods.
macro_rules! values {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) -> $out:ty = $body:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $ty),*) -> $out {
            // SAFETY: `self` proves the features; registers only, no memory.
            unsafe { $body }
        }
    )*};
}

/// Methods that touch memory: the caller vouches for the pointer.
macro_rules! accesses {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) -> $out:ty = $body:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name(self, $($arg: $ty),*) -> $out {
            // SAFETY: `self` proves the features; the caller vouches for the pointer.
            unsafe { $body }
        }
    )*};
}
