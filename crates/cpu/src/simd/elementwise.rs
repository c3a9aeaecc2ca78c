//! Vectorised norms, activations, sums and conversions.
// Other processors run the scalar bodies until someone writes their registers.
#![cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code))]

use super::vector::{Binary, Lanes, Work, exp, map, run};
use crate::{Level, reference};
use half::{bf16, f16};
use marlin_tensor::{Activation, Heads, RopeStyle};

/// [`reference::rms_norm`] with sums in f32: relative error below `columns * 6e-8`.
pub(crate) fn rms_norm(level: Level, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "output of the input's shape");
    run(level, RmsNorm { x, weight, eps, out });
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Work for RmsNorm<'_> {
    fn scalar(self) {
        reference::rms_norm(self.x, self.weight, self.eps, self.out);
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(self) {
        let n = self.weight.len();
        let (whole, rest) = (n / L::N * L::N, n % L::N);
        let w = self.weight.as_ptr();
        for (x, out) in self.x.chunks_exact(n).zip(self.out.chunks_exact_mut(n)) {
            let (x, out) = (x.as_ptr(), out.as_mut_ptr());
            // SAFETY: `x`, `out` and `w` have `n` elements; the rest is masked.
            unsafe {
                let mut sums = [L::splat(0.0); 4];
                let unrolled = whole / (4 * L::N) * (4 * L::N);
                for i in (0..unrolled).step_by(4 * L::N) {
                    for (j, sum) in sums.iter_mut().enumerate() {
                        let v = L::load(x.add(i + j * L::N));
                        *sum = L::fma(v, v, *sum);
                    }
                }
                for i in (unrolled..whole).step_by(L::N) {
                    let v = L::load(x.add(i));
                    sums[0] = L::fma(v, v, sums[0]);
                }
                if rest > 0 {
                    let v = L::load_first(x.add(whole), rest);
                    sums[0] = L::fma(v, v, sums[0]);
                }
                let sum = L::sum(L::add(L::add(sums[0], sums[1]), L::add(sums[2], sums[3])));
                let scale = L::splat(1.0 / (sum / n as f32 + self.eps).sqrt());
                for i in (0..whole).step_by(L::N) {
                    let v = L::mul(L::mul(L::load(x.add(i)), scale), L::load(w.add(i)));
                    L::store(out.add(i), v);
                }
                if rest > 0 {
                    let v = L::mul(L::load_first(x.add(whole), rest), scale);
                    let v = L::mul(v, L::load_first(w.add(whole), rest));
                    L::store_first(out.add(whole), v, rest);
                }
            }
        }
    }
}

/// [`reference::gated`]; the activation's error is below 3e-7 times `1 + |gate|`.
pub(crate) fn gated(level: Level, gate: &mut [f32], up: &[f32], activation: Activation) {
    run(level, Gated { gate, up, activation });
}

struct Gated<'a> {
    gate: &'a mut [f32],
    up: &'a [f32],
    activation: Activation,
}

impl Work for Gated<'_> {
    fn scalar(self) {
        reference::gated(self.gate, self.up, self.activation);
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(self) {
        // SAFETY: the caller has the instructions of `L`.
        unsafe {
            match self.activation {
                Activation::Silu => map::<L>(self.gate, self.up, Silu),
                Activation::GeluTanh => map::<L>(self.gate, self.up, GeluTanh),
                Activation::Gelu => map::<L>(self.gate, self.up, Gelu),
            }
        }
    }
}

/// `x sigmoid(x) y`.
#[derive(Clone, Copy)]
struct Silu;

impl Binary for Silu {
    #[inline(always)]
    unsafe fn apply<L: Lanes>(self, x: L::V, y: L::V) -> L::V {
        // SAFETY: the caller's.
        unsafe { L::mul(L::mul(x, sigmoid::<L>(x)), y) }
    }
}

/// `x (1 + tanh z) / 2 y = x sigmoid(2 z) y` with `z = sqrt(2 / pi) (x + 0.044715 x^3)`.
#[derive(Clone, Copy)]
struct GeluTanh;

impl Binary for GeluTanh {
    #[inline(always)]
    unsafe fn apply<L: Lanes>(self, x: L::V, y: L::V) -> L::V {
        const SCALE: f32 = 1.595_769;
        // SAFETY: the caller's.
        unsafe {
            let cubic = L::fma(L::mul(x, x), L::splat(0.044_715 * SCALE), L::splat(SCALE));
            L::mul(L::mul(x, sigmoid::<L>(L::mul(x, cubic))), y)
        }
    }
}

/// `x Φ(x) y`.
#[derive(Clone, Copy)]
struct Gelu;

impl Binary for Gelu {
    #[inline(always)]
    unsafe fn apply<L: Lanes>(self, x: L::V, y: L::V) -> L::V {
        // SAFETY: the caller's.
        unsafe { L::mul(L::mul(x, normal_distribution::<L>(x)), y) }
    }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
unsafe fn sigmoid<L: Lanes>(x: L::V) -> L::V {
    // SAFETY: the caller's.
    unsafe {
        let one = L::splat(1.0);
        L::div(one, L::add(one, exp::<L>(L::sub(L::splat(0.0), x))))
    }
}

/// `(1 + erf(x / √2)) / 2`, absolute error below 2e-7 (Abramowitz and Stegun 7.1.26).
#[inline(always)]
unsafe fn normal_distribution<L: Lanes>(x: L::V) -> L::V {
    // SAFETY: the caller's.
    unsafe {
        let (zero, one) = (L::splat(0.0), L::splat(1.0));
        let z = L::mul(L::max(x, L::sub(zero, x)), L::splat(std::f32::consts::FRAC_1_SQRT_2));
        let t = L::div(one, L::fma(z, L::splat(0.327_591_1), one));
        let mut p = L::splat(1.061_405_4);
        for c in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
            p = L::fma(p, t, L::splat(c));
        }
        let tail =
            L::mul(L::splat(0.5), L::mul(L::mul(p, t), exp::<L>(L::sub(zero, L::mul(z, z)))));
        // `tail` is the distribution at -|x|; the sign picks it or its complement without a
        // comparison: step(x) = (x + |x|) / (2 |x|) would divide by zero, so use copies.
        let positive = L::min(L::max(L::mul(x, L::splat(f32::MAX)), zero), one);
        L::fma(positive, L::sub(one, L::add(tail, tail)), tail)
    }
}

/// `x += y`.
pub(crate) fn add(level: Level, x: &mut [f32], y: &[f32]) {
    run(level, Scaled { x, y, factor: 1.0 });
}

/// `x += factor * y`.
pub(crate) fn add_scaled(level: Level, x: &mut [f32], y: &[f32], factor: f32) {
    run(level, Scaled { x, y, factor });
}

struct Scaled<'a> {
    x: &'a mut [f32],
    y: &'a [f32],
    factor: f32,
}

impl Work for Scaled<'_> {
    fn scalar(self) {
        self.x.iter_mut().zip(self.y).for_each(|(x, y)| *x += self.factor * y);
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(self) {
        // SAFETY: the caller has the instructions of `L`.
        unsafe {
            map::<L>(self.x, self.y, AddScaled(self.factor));
        }
    }
}

/// `x + factor y`.
#[derive(Clone, Copy)]
struct AddScaled(f32);

impl Binary for AddScaled {
    #[inline(always)]
    unsafe fn apply<L: Lanes>(self, x: L::V, y: L::V) -> L::V {
        // SAFETY: the caller's.
        unsafe { L::fma(L::splat(self.0), y, x) }
    }
}

/// [`reference::softcap`]; absolute error below `cap * 3e-7`.
pub(crate) fn softcap(level: Level, x: &mut [f32], cap: f32) {
    run(level, Softcap { x, cap });
}

struct Softcap<'a> {
    x: &'a mut [f32],
    cap: f32,
}

impl Work for Softcap<'_> {
    fn scalar(self) {
        reference::softcap(self.x, self.cap);
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(self) {
        let len = self.x.len();
        let p = self.x.as_mut_ptr();
        // SAFETY: whole registers and then `len - i` lanes of `x`.
        unsafe {
            let mut i = 0;
            while len - i >= L::N {
                L::store(p.add(i), capped::<L>(L::load(p.add(i)), self.cap));
                i += L::N;
            }
            if i < len {
                let v = capped::<L>(L::load_first(p.add(i), len - i), self.cap);
                L::store_first(p.add(i), v, len - i);
            }
        }
    }
}

/// `cap tanh(v / cap) = cap - 2 cap / (1 + e^(2 v / cap))`.
#[inline(always)]
unsafe fn capped<L: Lanes>(v: L::V, cap: f32) -> L::V {
    // SAFETY: the caller's.
    unsafe {
        let e = exp::<L>(L::mul(v, L::splat(2.0 / cap)));
        let ratio = L::div(L::splat(2.0 * cap), L::add(e, L::splat(1.0)));
        L::sub(L::splat(cap), ratio)
    }
}

/// [`reference::rope`], compiled for the level.
pub(crate) fn rope<'a>(
    level: Level,
    x: &mut [f32],
    heads: Heads,
    style: RopeStyle,
    table: impl Fn(usize) -> (&'a [f32], &'a [f32]),
) {
    run(level, Rotation { x, heads, style, table });
}

struct Rotation<'x, T> {
    x: &'x mut [f32],
    heads: Heads,
    style: RopeStyle,
    table: T,
}

impl<'a, T: Fn(usize) -> (&'a [f32], &'a [f32])> Work for Rotation<'_, T> {
    fn scalar(self) {
        reference::rope(self.x, self.heads, self.style, self.table);
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(self) {
        // Plain loops, which the compiler vectorises.
        reference::rope(self.x, self.heads, self.style, self.table);
    }
}

/// Softmax numerators of one row of scores: replaces `scores` by `e^(score - max)` and returns
/// their sum, where `max` is the larger of `floor` and the row's maximum, returned second.
pub(crate) fn exponentials(level: Level, scores: &mut [f32], floor: f32) -> (f32, f32) {
    let (mut total, mut max) = (0.0, floor);
    run(level, Exponentials { scores, total: &mut total, max: &mut max });
    (total, max)
}

struct Exponentials<'a> {
    scores: &'a mut [f32],
    total: &'a mut f32,
    max: &'a mut f32,
}

impl Work for Exponentials<'_> {
    fn scalar(self) {
        let max = self.scores.iter().copied().fold(*self.max, f32::max);
        self.scores.iter_mut().for_each(|s| *s = (*s - max).exp());
        *self.total = self.scores.iter().map(|&s| f64::from(s)).sum::<f64>() as f32;
        *self.max = max;
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(self) {
        let len = self.scores.len();
        let (whole, rest) = (len / L::N * L::N, len % L::N);
        let p = self.scores.as_mut_ptr();
        // SAFETY: whole registers and then `rest` lanes of `scores`.
        unsafe {
            let mut max = L::splat(*self.max);
            for i in (0..whole).step_by(L::N) {
                max = L::max(max, L::load(p.add(i)));
            }
            let mut max = L::largest(max);
            for &score in &self.scores[whole..] {
                max = max.max(score);
            }
            let (shift, mut total) = (L::splat(max), L::splat(0.0));
            for i in (0..whole).step_by(L::N) {
                let e = exp::<L>(L::sub(L::load(p.add(i)), shift));
                L::store(p.add(i), e);
                total = L::add(total, e);
            }
            let mut sum = L::sum(total);
            if rest > 0 {
                let e = exp::<L>(L::sub(L::load_first(p.add(whole), rest), shift));
                L::store_first(p.add(whole), e, rest);
                sum += self.scores[whole..].iter().sum::<f32>();
            }
            (*self.total, *self.max) = (sum, max);
        }
    }
}

/// Widens half-precision bit patterns.
pub(crate) fn widen_f16(level: Level, from: &[u16], to: &mut [f32]) {
    run(level, Widen::<true> { from, to });
}

/// Widens bfloat16 bit patterns.
pub(crate) fn widen_bf16(level: Level, from: &[u16], to: &mut [f32]) {
    run(level, Widen::<false> { from, to });
}

struct Widen<'a, const HALF: bool> {
    from: &'a [u16],
    to: &'a mut [f32],
}

fn widen<const HALF: bool>(from: &[u16], to: &mut [f32]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = if HALF { f16::from_bits(from).to_f32() } else { bf16::from_bits(from).to_f32() };
    }
}

impl<const HALF: bool> Work for Widen<'_, HALF> {
    fn scalar(self) {
        widen::<HALF>(self.from, self.to);
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(self) {
        let len = self.from.len().min(self.to.len());
        let whole = len / L::N * L::N;
        for i in (0..whole).step_by(L::N) {
            // SAFETY: `i + N <= len`.
            unsafe {
                let from = self.from.as_ptr().add(i);
                let v = if HALF { L::load_f16(from) } else { L::load_bf16(from) };
                L::store(self.to.as_mut_ptr().add(i), v);
            }
        }
        widen::<HALF>(&self.from[whole..len], &mut self.to[whole..len]);
    }
}

/// Rounds to half precision.
pub(crate) fn narrow_f16(level: Level, from: &[f32], to: &mut [u16]) {
    run(level, Narrow { from, to });
}

struct Narrow<'a> {
    from: &'a [f32],
    to: &'a mut [u16],
}

impl Work for Narrow<'_> {
    fn scalar(self) {
        self.to.iter_mut().zip(self.from).for_each(|(t, f)| *t = f16::from_f32(*f).to_bits());
    }

    #[inline(always)]
    unsafe fn vector<L: Lanes>(self) {
        let len = self.from.len().min(self.to.len());
        let whole = len / L::N * L::N;
        for i in (0..whole).step_by(L::N) {
            // SAFETY: `i + N <= len`.
            unsafe {
                L::store_f16(self.to.as_mut_ptr().add(i), L::load(self.from.as_ptr().add(i)));
            }
        }
        Narrow { from: &self.from[whole..len], to: &mut self.to[whole..len] }.scalar();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_exact_to_a_few_units_in_the_last_place() {
        for level in Level::ALL.into_iter().filter(|l| l.is_supported()) {
            let x: Vec<f32> = (0..40_013).map(|i| -i as f32 * 0.002).collect();
            let mut e = x.clone();
            let (sum, max) = exponentials(level, &mut e, f32::NEG_INFINITY);
            assert_eq!(max, 0.0);
            let exact: Vec<f64> = x.iter().map(|&x| f64::from(x).exp()).collect();
            for (e, exact) in e.iter().zip(&exact) {
                let error = (f64::from(*e) - exact).abs() / exact;
                assert!(error < 3e-7, "{level} {e} {exact}");
            }
            let total: f64 = exact.iter().sum();
            assert!((f64::from(sum) - total).abs() < 1e-5 * total, "{level} {sum} {total}");
            let (_, floor) = exponentials(level, &mut [1.0, 2.0], 5.0);
            assert_eq!(floor, 5.0);
        }
    }

    #[test]
    fn half_precision_conversions_agree_with_the_scalar_ones() {
        let bits: Vec<u16> = (0..=u16::MAX).filter(|b| b & 0x7c00 != 0x7c00).collect();
        for level in Level::ALL.into_iter().filter(|l| l.is_supported()) {
            let mut wide = vec![0.0; bits.len()];
            widen_f16(level, &bits, &mut wide);
            assert!(wide.iter().zip(&bits).all(|(w, b)| *w == f16::from_bits(*b).to_f32()));
            let between: Vec<f32> = wide.iter().map(|w| w * 1.000_3 + 1e-9).collect();
            let mut narrow = vec![0; bits.len()];
            narrow_f16(level, &between, &mut narrow);
            assert!(narrow.iter().zip(&between).all(|(n, b)| *n == f16::from_f32(*b).to_bits()));
            widen_bf16(level, &bits, &mut wide);
            assert!(wide.iter().zip(&bits).all(|(w, b)| *w == bf16::from_bits(*b).to_f32()));
        }
    }
}
