//! NEON: two registers used as one of 16 costs.

use super::isa::{Isa, Job};
use super::square::MAX_FINE;
use std::arch::aarch64::*;

/// Proof of NEON, and of FP16 where `HALF`.
#[derive(Clone, Copy)]
pub(super) struct Neon<const HALF: bool>(());

impl<const HALF: bool> Neon<HALF> {
    /// A proof.
    ///
    /// # Safety
    /// The processor must have the features.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

#[target_feature(enable = "neon")]
fn enter<S: Isa, J: Job>(s: S, job: J) -> J::Output {
    job.run(s)
}

#[target_feature(enable = "neon,fp16")]
fn enter_half<S: Isa, J: Job>(s: S, job: J) -> J::Output {
    job.run(s)
}

#[inline]
#[target_feature(enable = "neon,fp16")]
fn half_sub(a: uint16x8_t, b: uint16x8_t) -> uint16x8_t {
    vreinterpretq_u16_f16(vsubq_f16(vreinterpretq_f16_u16(a), vreinterpretq_f16_u16(b)))
}

#[inline]
#[target_feature(enable = "neon,fp16")]
fn half_add_square(sum: uint16x8_t, a: uint16x8_t) -> uint16x8_t {
    let a = vreinterpretq_f16_u16(a);
    vreinterpretq_u16_f16(vfmaq_f16(vreinterpretq_f16_u16(sum), a, a))
}

/// A register.
type V = [uint16x8_t; 2];

impl<const HALF: bool> Isa for Neon<HALF> {
    const LANES: usize = 16;
    const HALF: bool = HALF;
    type V = V;

    #[inline(always)]
    fn enter<J: Job>(self, job: J) -> J::Output {
        // SAFETY: `self` proves the features.
        unsafe { if HALF { enter_half(self, job) } else { enter(self, job) } }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const u16) -> V {
        // SAFETY: the caller vouches for the pointer.
        unsafe { [vld1q_u16(p), vld1q_u16(p.add(8))] }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut u16, v: V) {
        // SAFETY: the caller vouches for the pointer.
        unsafe {
            vst1q_u16(p, v[0]);
            vst1q_u16(p.add(8), v[1]);
        }
    }

    #[inline(always)]
    unsafe fn repeat<const E: usize>(self, p: *const u16) -> V {
        // SAFETY: the caller vouches for `16 >> E` numbers, at least one.
        let v = unsafe {
            match E {
                1 => vld1q_u16(p),
                2 => vreinterpretq_u16_u64(vdupq_n_u64(p.cast::<u64>().read_unaligned())),
                3 => vreinterpretq_u16_u32(vdupq_n_u32(p.cast::<u32>().read_unaligned())),
                _ => vdupq_n_u16(p.read()),
            }
        };
        [v; 2]
    }

    #[inline(always)]
    fn interleave<const E: usize>(self, v: V) -> V {
        // SAFETY: `self` proves the features; registers only, no memory.
        unsafe {
            match E {
                1 => [vzip1q_u16(v[0], v[1]), vzip2q_u16(v[0], v[1])],
                2 => {
                    let (low, high) = (vzip1q_u16(v[0], v[1]), vzip2q_u16(v[0], v[1]));
                    [vzip1q_u16(low, high), vzip2q_u16(low, high)]
                }
                3 => [vuzp1q_u16(v[0], v[1]), vuzp2q_u16(v[0], v[1])],
                _ => v,
            }
        }
    }

    values! {
        fn splat(v: u16) -> V = [vdupq_n_u16(v); 2];
        fn sub(a: V, b: V) -> V = [vsubq_u16(a[0], b[0]), vsubq_u16(a[1], b[1])];
        fn add(a: V, b: V) -> V = [vaddq_u16(a[0], b[0]), vaddq_u16(a[1], b[1])];
        fn square_high(a: V) -> V = a.map(|a| {
            let a = vreinterpretq_s16_u16(a);
            vreinterpretq_u16_s16(vqrdmulhq_s16(a, a))
        });
        fn square_fine(a: V) -> V = a.map(|a| {
            let a = vreinterpretq_u16_s16(vabsq_s16(vreinterpretq_s16_u16(a)));
            let a = vminq_u16(a, vdupq_n_u16(MAX_FINE));
            vmulq_u16(a, a)
        });
        fn half_sub(a: V, b: V) -> V = {
            assert!(HALF, "no fp16 arithmetic");
            [half_sub(a[0], b[0]), half_sub(a[1], b[1])]
        };
        fn half_add_square(sum: V, a: V) -> V = {
            assert!(HALF, "no fp16 arithmetic");
            [half_add_square(sum[0], a[0]), half_add_square(sum[1], a[1])]
        };
        fn min(a: V, b: V) -> V = [vminq_u16(a[0], b[0]), vminq_u16(a[1], b[1])];
        fn min_lane(v: V) -> u16 = vminvq_u16(vminq_u16(v[0], v[1]));
    }
}
