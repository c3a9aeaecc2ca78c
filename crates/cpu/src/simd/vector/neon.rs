//! NEON: two registers of four lanes used as one of eight, which leaves sixteen of them.

use super::{Lanes, Work};
use std::arch::aarch64::*;

/// Runs `work` with NEON.
///
/// # Safety
/// The processor must have it.
#[target_feature(enable = "neon")]
pub(super) unsafe fn enter<W: Work>(work: W) {
    // SAFETY: the caller's.
    unsafe { work.vector::<Neon>() }
}

/// Eight lanes.
struct Neon;

/// A register.
type V = [float32x4_t; 2];

/// Methods of one expression.
macro_rules! lanes {
    ($($name:ident($($arg:ident: $ty:ty),*) $(-> $out:ty)? = $body:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $ty),*) $(-> $out)? {
            // SAFETY: the caller has the instructions and vouches for the pointer.
            unsafe { $body }
        }
    )*};
}

/// The first `n` of four lanes, zeros behind them.
///
/// # Safety
/// They must be readable.
#[inline(always)]
unsafe fn load_part(p: *const f32, n: usize) -> float32x4_t {
    // SAFETY: the caller's.
    unsafe {
        let pair = || vcombine_f32(vld1_f32(p), vdup_n_f32(0.0));
        match n {
            0 => vdupq_n_f32(0.0),
            1 => vsetq_lane_f32::<0>(*p, vdupq_n_f32(0.0)),
            2 => pair(),
            3 => vsetq_lane_f32::<2>(*p.add(2), pair()),
            _ => vld1q_f32(p),
        }
    }
}

/// Writes the first `n` of four lanes.
///
/// # Safety
/// They must be writable.
#[inline(always)]
unsafe fn store_part(p: *mut f32, v: float32x4_t, n: usize) {
    // SAFETY: the caller's.
    unsafe {
        match n {
            0 => {}
            1 => *p = vgetq_lane_f32::<0>(v),
            2 => vst1_f32(p, vget_low_f32(v)),
            3 => {
                vst1_f32(p, vget_low_f32(v));
                *p.add(2) = vgetq_lane_f32::<2>(v);
            }
            _ => vst1q_f32(p, v),
        }
    }
}

/// `v * 2^n`.
///
/// # Safety
/// The processor must have NEON.
#[inline(always)]
unsafe fn scaled(v: float32x4_t, n: float32x4_t) -> float32x4_t {
    // SAFETY: the caller's; registers only.
    unsafe {
        let exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
        vmulq_f32(v, vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent)))
    }
}

impl Lanes for Neon {
    const N: usize = 8;
    type V = V;

    lanes! {
        splat(v: f32) -> V = [vdupq_n_f32(v); 2];
        load(p: *const f32) -> V = [vld1q_f32(p), vld1q_f32(p.add(4))];
        store(p: *mut f32, v: V) = {
            vst1q_f32(p, v[0]);
            vst1q_f32(p.add(4), v[1]);
        };
        load_first(p: *const f32, n: usize) -> V = match n {
            ..4 => [load_part(p, n), vdupq_n_f32(0.0)],
            _ => [vld1q_f32(p), load_part(p.add(4), n - 4)],
        };
        store_first(p: *mut f32, v: V, n: usize) = match n {
            ..4 => store_part(p, v[0], n),
            _ => {
                vst1q_f32(p, v[0]);
                store_part(p.add(4), v[1], n - 4);
            }
        };
        load_f16(p: *const u16) -> V = {
            let v = vreinterpretq_f16_u16(vld1q_u16(p));
            [vcvt_f32_f16(vget_low_f16(v)), vcvt_high_f32_f16(v)]
        };
        load_bf16(p: *const u16) -> V = {
            let v = vld1q_u16(p);
            let (low, high) = (vshll_n_u16::<16>(vget_low_u16(v)), vshll_high_n_u16::<16>(v));
            [vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high)]
        };
        load_i8(p: *const i8) -> V = {
            let v = vmovl_s8(vld1_s8(p));
            let (low, high) = (vmovl_s16(vget_low_s16(v)), vmovl_high_s16(v));
            [vcvtq_f32_s32(low), vcvtq_f32_s32(high)]
        };
        load_u4(p: *const u8) -> [V; 2] = {
            let bytes = vld1_u8(p);
            let low = vmovl_u8(vand_u8(bytes, vdup_n_u8(15)));
            let high = vmovl_u8(vshr_n_u8::<4>(bytes));
            [low, high].map(|v| {
                let (a, b) = (vmovl_u16(vget_low_u16(v)), vmovl_high_u16(v));
                [vcvtq_f32_u32(a), vcvtq_f32_u32(b)]
            })
        };
        store_f16(p: *mut u16, v: V) = {
            let halves = vcvt_high_f16_f32(vcvt_f16_f32(v[0]), v[1]);
            vst1q_u16(p, vreinterpretq_u16_f16(halves));
        };
        add(a: V, b: V) -> V = [vaddq_f32(a[0], b[0]), vaddq_f32(a[1], b[1])];
        sub(a: V, b: V) -> V = [vsubq_f32(a[0], b[0]), vsubq_f32(a[1], b[1])];
        mul(a: V, b: V) -> V = [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1])];
        div(a: V, b: V) -> V = [vdivq_f32(a[0], b[0]), vdivq_f32(a[1], b[1])];
        min(a: V, b: V) -> V = [vminq_f32(a[0], b[0]), vminq_f32(a[1], b[1])];
        max(a: V, b: V) -> V = [vmaxq_f32(a[0], b[0]), vmaxq_f32(a[1], b[1])];
        fma(a: V, b: V, c: V) -> V = [vfmaq_f32(c[0], a[0], b[0]), vfmaq_f32(c[1], a[1], b[1])];
        round(v: V) -> V = [vrndnq_f32(v[0]), vrndnq_f32(v[1])];
        scale(v: V, n: V) -> V = [scaled(v[0], n[0]), scaled(v[1], n[1])];
        sum(v: V) -> f32 = vaddvq_f32(vaddq_f32(v[0], v[1]));
        sum4(v: [V; 4]) -> [f32; 4] = {
            let [a, b, c, d] = v.map(|v| vaddq_f32(v[0], v[1]));
            let mut out = [0.0; 4];
            vst1q_f32(out.as_mut_ptr(), vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
            out
        };
        largest(v: V) -> f32 = vmaxvq_f32(vmaxq_f32(v[0], v[1]));
    }
}
