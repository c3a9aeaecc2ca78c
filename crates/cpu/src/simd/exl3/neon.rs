//! NEON: two registers used as one of 16 lanes of 16 bits.

use super::isa::{Isa, Job};
use marlin_quant::exl3::codebook::{MUL1_OFFSET, MUL1_SLOPE};
use std::arch::aarch64::*;

/// Proof of NEON, and of FP16 when `HALF`.
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
fn enter_plain<J: Job>(s: Neon<false>, job: J) {
    job.run(s)
}

#[target_feature(enable = "neon,fp16")]
fn enter_half<J: Job>(s: Neon<true>, job: J) {
    job.run(s)
}

/// A register of integers.
type I = [uint16x8_t; 2];
/// A register of f32.
type F = [float32x4_t; 2];

/// Both halves of an operation on 32-bit lanes.
macro_rules! words {
    ($f:ident($a:ident, $b:ident)) => {{
        let [a, b] = [$a, $b].map(|v| v.map(|v| vreinterpretq_s32_u16(v)));
        [vreinterpretq_u16_s32($f(a[0], b[0])), vreinterpretq_u16_s32($f(a[1], b[1]))]
    }};
}

/// `(high : low) >> shift` of 16-bit lanes.
///
/// # Safety
/// The processor must have NEON.
#[inline(always)]
unsafe fn funnel(high: uint16x8_t, low: uint16x8_t, shift: u32) -> uint16x8_t {
    macro_rules! shifts {
        ($($n:literal)*) => {
            match shift {
                $($n => vsliq_n_u16::<{ 16 - $n }>(vshrq_n_u16::<$n>(low), high),)*
                _ => unreachable!("shifts are 1 to 15"),
            }
        };
    }
    // SAFETY: the caller's; registers only.
    unsafe { shifts!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15) }
}

/// Unsigned products, high halves.
///
/// # Safety
/// The processor must have NEON.
#[inline(always)]
unsafe fn mul_high(a: uint16x8_t, b: uint16x8_t) -> uint16x8_t {
    // SAFETY: the caller's; registers only.
    unsafe {
        let low = vmull_u16(vget_low_u16(a), vget_low_u16(b));
        let high = vmull_high_u16(a, b);
        vuzp2q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high))
    }
}

/// Sums of two adjacent signed products.
///
/// # Safety
/// The processor must have NEON.
#[inline(always)]
unsafe fn pair_products(a: uint16x8_t, b: uint16x8_t) -> int32x4_t {
    // SAFETY: the caller's; registers only.
    unsafe {
        let (a, b) = (vreinterpretq_s16_u16(a), vreinterpretq_s16_u16(b));
        vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b))
    }
}

/// fp16 lanes to f32.
///
/// # Safety
/// The processor must have NEON.
#[inline(always)]
unsafe fn widen(v: uint16x8_t) -> F {
    // SAFETY: the caller's; registers only.
    unsafe {
        let v = vreinterpretq_f16_u16(v);
        [vcvt_f32_f16(vget_low_f16(v)), vcvt_high_f32_f16(v)]
    }
}

/// fp16 rounding of every lane.
///
/// # Safety
/// The processor must have NEON.
#[inline(always)]
unsafe fn round_to_half(v: F) -> F {
    // SAFETY: the caller's; registers only.
    unsafe { v.map(|v| vcvt_f32_f16(vcvt_f16_f32(v))) }
}

/// fp16 sums.
///
/// # Safety
/// The processor must have FP16.
#[target_feature(enable = "neon,fp16")]
#[inline]
unsafe fn add_halves(a: uint16x8_t, b: uint16x8_t) -> uint16x8_t {
    vreinterpretq_u16_f16(vaddq_f16(vreinterpretq_f16_u16(a), vreinterpretq_f16_u16(b)))
}

/// fp16 lanes times 8192 to integers.
///
/// # Safety
/// The processor must have FP16.
#[target_feature(enable = "neon,fp16")]
#[inline]
unsafe fn halves_8192(v: uint16x8_t) -> uint16x8_t {
    let scale = vreinterpretq_f16_u16(vdupq_n_u16(0x7000));
    vreinterpretq_u16_s16(vcvtnq_s16_f16(vmulq_f16(vreinterpretq_f16_u16(v), scale)))
}

/// Byte sums to fp16 values of `mul1`, as it is defined: fp16(1024 + t) * 0x1eee + 0xc931, rounded
/// once.
///
/// # Safety
/// The processor must have FP16.
#[target_feature(enable = "neon,fp16")]
#[inline]
unsafe fn mul1_halves(sums: uint16x8_t) -> uint16x8_t {
    let [slope, offset] = [0x1eee, 0xc931].map(|v| vreinterpretq_f16_u16(vdupq_n_u16(v)));
    let t = vcvtq_f16_u16(vaddq_u16(sums, vdupq_n_u16(1024)));
    vreinterpretq_u16_f16(vfmaq_f16(offset, t, slope))
}

/// The same by arithmetic in f32.
///
/// # Safety
/// The processor must have NEON.
#[inline(always)]
unsafe fn mul1_floats(sums: uint16x8_t) -> F {
    // SAFETY: the caller's; registers only.
    unsafe {
        let (slope, offset) = (vdupq_n_f32(MUL1_SLOPE), vdupq_n_f32(MUL1_OFFSET));
        let t = [vmovl_u16(vget_low_u16(sums)), vmovl_high_u16(sums)];
        round_to_half(t.map(|t| vfmaq_f32(offset, vcvtq_f32_u32(t), slope)))
    }
}

impl<const HALF: bool> Isa for Neon<HALF> {
    const LANES: usize = 8;
    const HALF_ARITHMETIC: bool = HALF;
    type I = I;
    type F = F;

    #[inline(always)]
    fn enter<J: Job>(self, job: J) {
        // SAFETY: `self` proves the features.
        unsafe { if HALF { enter_half(Neon(()), job) } else { enter_plain(Neon(()), job) } }
    }

    accesses! {
        fn load(p: *const u16) -> I = [vld1q_u16(p), vld1q_u16(p.add(8))];
        fn store(p: *mut u16, v: I) -> () = {
            vst1q_u16(p, v[0]);
            vst1q_u16(p.add(8), v[1]);
        };
        fn load_f32(p: *const f32) -> F = [vld1q_f32(p), vld1q_f32(p.add(4))];
        fn store_f32(p: *mut f32, v: F) -> () = {
            vst1q_f32(p, v[0]);
            vst1q_f32(p.add(4), v[1]);
        };
        fn splat_pair(p: *const f32) -> F = {
            let pair = vld1_f32(p);
            [vcombine_f32(pair, pair); 2]
        };
    }

    values! {
        fn splat16(v: u16) -> I = [vdupq_n_u16(v); 2];
        fn splat32(v: i32) -> I = [vreinterpretq_u16_s32(vdupq_n_s32(v)); 2];
        fn rotate8(v: I) -> I = [vextq_u16::<6>(v[1], v[0]), vextq_u16::<6>(v[0], v[1])];
        fn funnel(high: I, low: I, shift: u32) -> I =
            [funnel(high[0], low[0], shift), funnel(high[1], low[1], shift)];
        fn mul_low(a: I, b: I) -> I = [vmulq_u16(a[0], b[0]), vmulq_u16(a[1], b[1])];
        fn mul_high(a: I, b: I) -> I = [mul_high(a[0], b[0]), mul_high(a[1], b[1])];
        fn add16(a: I, b: I) -> I = [vaddq_u16(a[0], b[0]), vaddq_u16(a[1], b[1])];
        fn add_carry(a: I, sum: I, addend: I) -> I = [
            vsubq_u16(a[0], vcltq_u16(sum[0], addend[0])),
            vsubq_u16(a[1], vcltq_u16(sum[1], addend[1])),
        ];
        fn add_bytes(v: I) -> I = v.map(|v| vpaddlq_u8(vreinterpretq_u8_u16(v)));
        fn mask_flip(v: I, mask: I, flip: I) -> I = [
            veorq_u16(vandq_u16(v[0], mask[0]), flip[0]),
            veorq_u16(vandq_u16(v[1], mask[1]), flip[1]),
        ];
        fn dot(acc: I, a: I, b: I) -> I = {
            let products = [pair_products(a[0], b[0]), pair_products(a[1], b[1])];
            let products = products.map(|v| vreinterpretq_u16_s32(v));
            words!(vaddq_s32(acc, products))
        };
        fn add32(a: I, b: I) -> I = words!(vaddq_s32(a, b));
        fn pair(low: I, high: I) -> I =
            [vtrn1q_u16(low[0], high[0]), vtrn1q_u16(low[1], high[1])];
        fn sum32(v: I) -> i32 = {
            let [a, b] = v.map(|v| vreinterpretq_s32_u16(v));
            vaddvq_s32(vaddq_s32(a, b))
        };

        fn mul1_values(sums: I) -> [F; 2] = sums.map(|sums| match HALF {
            true => widen(mul1_halves(sums)),
            false => mul1_floats(sums),
        });
        fn sum_halves(a: I, b: I) -> [F; 2] = [0, 1].map(|i| match HALF {
            true => widen(add_halves(a[i], b[i])),
            false => {
                let (a, b) = (widen(a[i]), widen(b[i]));
                round_to_half([vaddq_f32(a[0], b[0]), vaddq_f32(a[1], b[1])])
            }
        });
        fn sum_halves_8192(a: I, b: I) -> I = match HALF {
            true => [0, 1].map(|i| halves_8192(add_halves(a[i], b[i]))),
            false => unreachable!("no fp16 arithmetic at this level"),
        };

        fn splat(v: f32) -> F = [vdupq_n_f32(v); 2];
        fn fma(a: F, b: F, c: F) -> F = [vfmaq_f32(c[0], a[0], b[0]), vfmaq_f32(c[1], a[1], b[1])];
        fn add(a: F, b: F) -> F = [vaddq_f32(a[0], b[0]), vaddq_f32(a[1], b[1])];
        fn sub(a: F, b: F) -> F = [vsubq_f32(a[0], b[0]), vsubq_f32(a[1], b[1])];
        fn mul(a: F, b: F) -> F = [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1])];
        fn max_abs(a: F, b: F) -> F =
            [vmaxq_f32(vabsq_f32(a[0]), b[0]), vmaxq_f32(vabsq_f32(a[1]), b[1])];
        fn max(v: F) -> f32 = vmaxvq_f32(vmaxq_f32(v[0], v[1]));
        fn butterfly(v: F, h: usize) -> F = match h {
            1 => v.map(|v| {
                let (even, odd) = (vtrn1q_f32(v, v), vtrn2q_f32(v, v));
                vfmaq_f32(even, odd, vld1q_f32([1.0, -1.0, 1.0, -1.0].as_ptr()))
            }),
            2 => v.map(|v| {
                let (low, high) = (vget_low_f32(v), vget_high_f32(v));
                let (low, high) = (vcombine_f32(low, low), vcombine_f32(high, high));
                vfmaq_f32(low, high, vld1q_f32([1.0, 1.0, -1.0, -1.0].as_ptr()))
            }),
            _ => [vaddq_f32(v[0], v[1]), vsubq_f32(v[0], v[1])],
        };
        fn to_f32(v: I) -> F = v.map(|v| vcvtq_f32_s32(vreinterpretq_s32_u16(v)));
        fn round(v: F) -> I = v.map(|v| vreinterpretq_u16_s32(vcvtnq_s32_f32(v)));
    }
}
