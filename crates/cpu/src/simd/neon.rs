//! NEON: two registers of four lanes are used as one of eight, half a tile column. Its 32
//! registers are then sixteen, for which the kernels are shaped, as on AVX2; and sums that wait
//! for each other come in twos.

use super::isa::{Isa, Job};
use crate::Level;
use std::arch::aarch64::*;
use std::arch::asm;

/// What a float kernel runs on. A value proves that the processor supports it.
#[derive(Clone, Copy)]
pub(crate) struct FloatIsa(Neon<false>);

impl FloatIsa {
    /// The one for `level`; `None` for the scalar level and where the processor lacks it.
    pub(crate) fn new(level: Level) -> Option<Self> {
        if level == Level::Scalar || !level.is_supported() {
            return None;
        }
        // SAFETY: the level is supported, and all but the scalar one have NEON.
        Some(Self(unsafe { Neon::new() }))
    }

    /// Level it is named after.
    pub(crate) fn level(level: Level) -> Level {
        level.float()
    }

    /// Runs `job`.
    pub(crate) fn enter<J: Job>(self, job: J) -> J::Output {
        self.0.enter(job)
    }

    /// Lanes of a register.
    pub(crate) fn lanes(self) -> usize {
        Neon::<false>::LANES
    }
}

/// What an integer kernel runs on. A value proves that the processor supports it.
#[derive(Clone, Copy)]
pub(crate) enum IntegerIsa {
    Plain(Neon<false>),
    Dotprod(Neon<true>),
}

impl IntegerIsa {
    /// The one for `level`; `None` for the scalar level and where the processor lacks it.
    pub(crate) fn new(level: Level) -> Option<Self> {
        if !level.is_supported() {
            return None;
        }
        // SAFETY: the level is supported.
        unsafe {
            match level {
                Level::Neon => Some(Self::Plain(Neon::new())),
                Level::NeonDotprod => Some(Self::Dotprod(Neon::new())),
                _ => None,
            }
        }
    }

    /// Level it is named after.
    pub(crate) fn level(level: Level) -> Level {
        level
    }

    /// Runs `job`.
    pub(crate) fn enter<J: Job>(self, job: J) -> J::Output {
        match self {
            Self::Plain(s) => s.enter(job),
            Self::Dotprod(s) => s.enter(job),
        }
    }

    /// Whether [`Isa::dot`] multiplies 8-bit quants as signed numbers.
    pub(crate) fn signed_bytes(self) -> bool {
        Neon::<false>::SIGNED_BYTES
    }
}

/// Proof of NEON, and of `sdot` when `DOTPROD`.
#[derive(Clone, Copy)]
pub(crate) struct Neon<const DOTPROD: bool>(());

impl<const DOTPROD: bool> Neon<DOTPROD> {
    /// A proof.
    ///
    /// # Safety
    /// The processor must have the features.
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

#[target_feature(enable = "neon")]
fn enter_plain<J: Job>(s: Neon<false>, job: J) -> J::Output {
    job.run(s)
}

#[target_feature(enable = "neon,dotprod")]
fn enter_dotprod<J: Job>(s: Neon<true>, job: J) -> J::Output {
    job.run(s)
}

/// What differs with `sdot`.
trait Dot: Copy {
    fn enter_level<J: Job>(self, job: J) -> J::Output;
    /// [`Isa::dot`] of signed weights below `2^bits` (within ±128 for 8).
    ///
    /// # Safety
    /// `4 * weights.len()` bytes must be readable.
    unsafe fn dot_signed(self, bits: u32, acc: I, weights: &[I], activations: *const i8) -> I;
}

impl Dot for Neon<false> {
    #[inline(always)]
    fn enter_level<J: Job>(self, job: J) -> J::Output {
        // SAFETY: `self` proves the features.
        unsafe { enter_plain(self, job) }
    }

    /// Products of bytes are added in 16 bits, as many as cannot overflow, then in pairs.
    #[inline(always)]
    unsafe fn dot_signed(self, bits: u32, acc: I, weights: &[I], activations: *const i8) -> I {
        let together = match bits {
            ..=4 => 8,
            5 => 8,
            6 => 4,
            _ => 2,
        };
        // SAFETY: `self` proves the features; the caller vouches for the pointer.
        unsafe {
            // Per register of weights, its low and its high half.
            let mut sums = [[vdupq_n_s32(0); 2]; 2];
            let mut words = [[vdupq_n_s16(0); 2]; 2];
            for (j, w) in weights.iter().enumerate() {
                let a = activations.cast::<i32>().add(j).read_unaligned();
                let a = vreinterpretq_s8_s32(vdupq_n_s32(a));
                for (words, &w) in words.iter_mut().zip(w) {
                    let w = vreinterpretq_s8_u8(w);
                    let (low, low_a) = (vget_low_s8(w), vget_low_s8(a));
                    *words = match j % together {
                        0 => [vmull_s8(low, low_a), vmull_high_s8(w, a)],
                        _ => [vmlal_s8(words[0], low, low_a), vmlal_high_s8(words[1], w, a)],
                    };
                }
                if j % together == together - 1 || j + 1 == weights.len() {
                    for (sums, words) in sums.iter_mut().zip(words) {
                        sums[0] = vpadalq_s16(sums[0], words[0]);
                        sums[1] = vpadalq_s16(sums[1], words[1]);
                    }
                }
            }
            let add = |acc, [low, high]: [int32x4_t; 2]| {
                let acc = vreinterpretq_s32_u8(acc);
                vreinterpretq_u8_s32(vaddq_s32(acc, vpaddq_s32(low, high)))
            };
            [add(acc[0], sums[0]), add(acc[1], sums[1])]
        }
    }
}

impl Dot for Neon<true> {
    #[inline(always)]
    fn enter_level<J: Job>(self, job: J) -> J::Output {
        // SAFETY: `self` proves the features.
        unsafe { enter_dotprod(self, job) }
    }

    #[inline(always)]
    unsafe fn dot_signed(self, _bits: u32, mut acc: I, weights: &[I], a: *const i8) -> I {
        let (fours, rest) = weights.as_chunks::<4>();
        // SAFETY: `self` proves the features; the caller vouches for the pointer.
        unsafe {
            for (i, w) in fours.iter().enumerate() {
                let a = vld1q_s8(a.add(16 * i));
                for half in 0..2 {
                    acc[half] = sdot::<0>(acc[half], w[0][half], a);
                    acc[half] = sdot::<1>(acc[half], w[1][half], a);
                    acc[half] = sdot::<2>(acc[half], w[2][half], a);
                    acc[half] = sdot::<3>(acc[half], w[3][half], a);
                }
            }
            for (j, w) in rest.iter().enumerate() {
                let a = a.cast::<i32>().add(4 * fours.len() + j).read_unaligned();
                let a = vreinterpretq_s8_s32(vdupq_n_s32(a));
                acc = [sdot::<0>(acc[0], w[0], a), sdot::<0>(acc[1], w[1], a)];
            }
        }
        acc
    }
}

/// `acc` plus the products of signed bytes of `w` with the four of word `LANE` of `a`. As assembly,
/// because the intrinsic is not stable.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn sdot<const LANE: i32>(mut acc: uint8x16_t, w: uint8x16_t, a: int8x16_t) -> uint8x16_t {
    // SAFETY: one instruction on registers, of a feature this function has.
    unsafe {
        asm!("sdot {acc:v}.4s, {w:v}.16b, {a:v}.4b[{lane}]",
            acc = inlateout(vreg) acc, w = in(vreg) w, a = in(vreg) a, lane = const LANE,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// A register of integers.
type I = [uint8x16_t; 2];
/// A register of f32.
type F = [float32x4_t; 2];

#[allow(private_bounds)]
impl<const DOTPROD: bool> Isa for Neon<DOTPROD>
where
    Self: Dot,
{
    const LANES: usize = 8;
    const ROWS: usize = 4;
    const WHOLE_ROWS: usize = 2;
    const SIGNED_BYTES: bool = true;
    const PAIRS: bool = false;
    type I = I;
    type F = F;

    #[inline(always)]
    fn enter<J: Job>(self, job: J) -> J::Output {
        self.enter_level(job)
    }

    accesses! {
        fn load(p: *const u8) -> I = [vld1q_u8(p), vld1q_u8(p.add(16))];
        fn store(p: *mut u8, v: I) -> () = {
            vst1q_u8(p, v[0]);
            vst1q_u8(p.add(16), v[1]);
        };
        fn load_f32(p: *const f32) -> F = [vld1q_f32(p), vld1q_f32(p.add(4))];
        fn store_f32(p: *mut f32, v: F) -> () = {
            vst1q_f32(p, v[0]);
            vst1q_f32(p.add(4), v[1]);
        };
        fn load_f16(p: *const u8) -> F = {
            let v = vreinterpretq_f16_u8(vld1q_u8(p));
            [vcvt_f32_f16(vget_low_f16(v)), vcvt_high_f32_f16(v)]
        };
        fn load_bf16(p: *const u8) -> F = {
            let v = vreinterpretq_u16_u8(vld1q_u8(p));
            [
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(v))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(v)),
            ]
        };
        fn load_e4m3(p: *const u8) -> F = {
            let half = vreinterpretq_u16_s16(vshlq_n_s16::<7>(vmovl_s8(vld1_s8(p.cast()))));
            let largest = vdupq_n_u16(0x3f80);
            // Seven ones are not a number in either.
            let nan = vceqq_u16(vandq_u16(half, largest), largest);
            let half = vorrq_u16(vbicq_u16(half, vdupq_n_u16(0x4000)), nan);
            let half = vreinterpretq_f16_u16(half);
            [vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)]
        };
        fn load_ue4m3(p: *const u8) -> F = {
            let half = vreinterpretq_f16_u16(vshlq_n_u16::<7>(vmovl_u8(vld1_u8(p))));
            [vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)]
        };
        fn load_u8(p: *const u8) -> F = words_to_f32(vmovl_u8(vld1_u8(p)));
        fn load_scale_zero(p: *const u8) -> (F, F) = {
            let low = vdupq_n_u32(255);
            let words = [vld1q_u32(p.cast()), vld1q_u32(p.add(16).cast())];
            let scale = words.map(|w| vreinterpretq_f32_u32(vbicq_u32(w, low)));
            (scale, words.map(|w| vcvtq_f32_u32(vandq_u32(w, low))))
        };
        fn load_i8(p: *const u8) -> F = {
            let v = vmovl_s8(vld1_s8(p.cast()));
            let (low, high) = (vmovl_s16(vget_low_s16(v)), vmovl_high_s16(v));
            [vcvtq_f32_s32(low), vcvtq_f32_s32(high)]
        };
        fn load_nibbles(p: *const u8) -> (F, F) = {
            let v = vld1_u8(p);
            let (low, high) = (vand_u8(v, vdup_n_u8(15)), vshr_n_u8::<4>(v));
            (words_to_f32(vmovl_u8(low)), words_to_f32(vmovl_u8(high)))
        };
        fn load_e8m0(p: *const u8) -> F = {
            let v = vmovl_u8(vld1_u8(p));
            [power(vmovl_u16(vget_low_u16(v))), power(vmovl_high_u16(v))]
        };
        fn store_i8(p: *mut i8, v: F) -> I = {
            let [low, high] = [vcvtnq_s32_f32(v[0]), vcvtnq_s32_f32(v[1])];
            let words = vcombine_s16(vqmovn_s32(low), vqmovn_s32(high));
            vst1_s8(p, vqmovn_s16(words));
            [vreinterpretq_u8_s32(low), vreinterpretq_u8_s32(high)]
        };
    }

    #[inline(always)]
    unsafe fn dot(self, bits: u32, acc: I, weights: &[I], activations: *const i8) -> I {
        if bits < 8 {
            // SAFETY: the caller's.
            return unsafe { self.dot_signed(bits, acc, weights, activations) };
        }
        let mut signed = [[self.splat_u8(0)[0]; 2]; 8];
        for (signed, &w) in signed.iter_mut().zip(weights) {
            // SAFETY: `self` proves the features; registers only, no memory.
            *signed = w.map(|w| unsafe { veorq_u8(w, vdupq_n_u8(0x80)) });
        }
        // SAFETY: the caller's; a group has eight columns.
        unsafe { self.dot_signed(bits, acc, &signed[..weights.len()], activations) }
    }

    values! {
        fn splat_u8(v: u8) -> I = [vdupq_n_u8(v); 2];
        fn splat_i32(v: i32) -> I = [vreinterpretq_u8_s32(vdupq_n_s32(v)); 2];
        fn and(a: I, b: I) -> I = [vandq_u8(a[0], b[0]), vandq_u8(a[1], b[1])];
        fn or(a: I, b: I) -> I = [vorrq_u8(a[0], b[0]), vorrq_u8(a[1], b[1])];
        fn shift16(v: I, n: i32) -> I = if n == 0 {
            v
        } else {
            v.map(|v| {
                let v = vshlq_u16(vreinterpretq_u16_u8(v), vdupq_n_s16(-n as i16));
                vreinterpretq_u8_u16(v)
            })
        };
        fn lookup(table: &[u8; 16], v: I) -> I = {
            let table = vld1q_u8(table.as_ptr());
            v.map(|v| vqtbl1q_u8(table, v))
        };
        fn shuffle(v: I, bytes: &[u8; 4]) -> I = {
            let bytes = vreinterpretq_u8_u32(vdupq_n_u32(u32::from_le_bytes(*bytes)));
            let lanes = [0u8, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12];
            let bytes = vaddq_u8(bytes, vld1q_u8(lanes.as_ptr()));
            v.map(|v| vqtbl1q_u8(v, bytes))
        };
        fn to_f32(v: I) -> F = v.map(|v| vcvtq_f32_s32(vreinterpretq_s32_u8(v)));
        fn byte_to_f32(v: I, b: i32) -> F = v.map(|v| {
            let low = vshlq_u32(vreinterpretq_u32_u8(v), vdupq_n_s32(-8 * b));
            vcvtq_f32_u32(vandq_u32(low, vdupq_n_u32(255)))
        });
        fn zero() -> F = [vdupq_n_f32(0.0); 2];
        fn splat(v: f32) -> F = [vdupq_n_f32(v); 2];
        fn fma(a: F, b: F, c: F) -> F = [vfmaq_f32(c[0], a[0], b[0]), vfmaq_f32(c[1], a[1], b[1])];
        fn add(a: F, b: F) -> F = [vaddq_f32(a[0], b[0]), vaddq_f32(a[1], b[1])];
        fn sub(a: F, b: F) -> F = [vsubq_f32(a[0], b[0]), vsubq_f32(a[1], b[1])];
        fn mul(a: F, b: F) -> F = [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1])];
        fn max_abs(a: F, b: F) -> F =
            [vmaxq_f32(vabsq_f32(a[0]), b[0]), vmaxq_f32(vabsq_f32(a[1]), b[1])];
        fn add_i32(a: I, b: I) -> I = {
            let add = |a, b| vaddq_s32(vreinterpretq_s32_u8(a), vreinterpretq_s32_u8(b));
            [vreinterpretq_u8_s32(add(a[0], b[0])), vreinterpretq_u8_s32(add(a[1], b[1]))]
        };
        fn sum_i32(v: I) -> i32 =
            vaddvq_s32(vaddq_s32(vreinterpretq_s32_u8(v[0]), vreinterpretq_s32_u8(v[1])));
        // Halves are added to each other, as everywhere.
        fn sum(v: F) -> f32 = {
            let v = vaddq_f32(v[0], v[1]);
            let v = vadd_f32(vget_low_f32(v), vget_high_f32(v));
            vget_lane_f32::<0>(v) + vget_lane_f32::<1>(v)
        };
        fn max(v: F) -> f32 = vmaxvq_f32(vmaxq_f32(v[0], v[1]));
        fn transpose(rows: &mut [F]) -> () = {
            let r: &mut [F; 8] = rows.try_into().expect("eight rows");
            transpose8(r)
        };
    }
}

/// Unsigned 16-bit numbers to f32.
///
/// # Safety
/// The processor must have NEON.
#[inline(always)]
unsafe fn words_to_f32(v: uint16x8_t) -> F {
    // SAFETY: the caller's; registers only.
    unsafe { [vcvtq_f32_u32(vmovl_u16(vget_low_u16(v))), vcvtq_f32_u32(vmovl_high_u16(v))] }
}

/// `2^(e - 128)` of bytes `e`.
///
/// # Safety
/// The processor must have NEON.
#[inline(always)]
unsafe fn power(e: uint32x4_t) -> float32x4_t {
    // SAFETY: the caller's; registers only.
    unsafe {
        let bits = vshlq_n_u32::<23>(vsubq_u32(e, vdupq_n_u32(1)));
        let tiny = vcltq_u32(e, vdupq_n_u32(2));
        let subnormal = vshlq_u32(vdupq_n_u32(0x0020_0000), vreinterpretq_s32_u32(e));
        vreinterpretq_f32_u32(vbslq_u32(tiny, subnormal, bits))
    }
}

/// The quarters transposed, and the outer two exchanged.
///
/// # Safety
/// The processor must have NEON.
#[inline(always)]
unsafe fn transpose8(r: &mut [F; 8]) {
    // SAFETY: the caller's; registers only.
    unsafe {
        let quarter = |row: usize, half: usize| {
            transpose4([r[row][half], r[row + 1][half], r[row + 2][half], r[row + 3][half]])
        };
        let (a, b) = (quarter(0, 0), quarter(0, 1));
        let (c, d) = (quarter(4, 0), quarter(4, 1));
        for i in 0..4 {
            (r[i], r[4 + i]) = ([a[i], c[i]], [b[i], d[i]]);
        }
    }
}

/// # Safety
/// The processor must have NEON.
#[inline(always)]
unsafe fn transpose4(r: [float32x4_t; 4]) -> [float32x4_t; 4] {
    // SAFETY: the caller's; registers only.
    unsafe {
        let pairs = |a, b| {
            let (even, odd) = (vtrn1q_f32(a, b), vtrn2q_f32(a, b));
            (vreinterpretq_f64_f32(even), vreinterpretq_f64_f32(odd))
        };
        let ((a, b), (c, d)) = (pairs(r[0], r[1]), pairs(r[2], r[3]));
        [vtrn1q_f64(a, c), vtrn1q_f64(b, d), vtrn2q_f64(a, c), vtrn2q_f64(b, d)]
            .map(|v| vreinterpretq_f32_f64(v))
    }
}
