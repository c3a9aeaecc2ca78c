//! Operators that treat every element alike.

use crate::gpu::{Buffer, Gpu};
use cubecl::prelude::*;
use marlin_tensor::Activation;

/// `x += y`.
pub(crate) fn add(gpu: &Gpu, x: &Buffer, y: &Buffer, len: usize) {
    let (count, dim) = gpu.each(len);
    // SAFETY: units past `len` do nothing.
    unsafe { add_kernel::launch_unchecked(&gpu.client, count, dim, x.arg(), y.arg(), len as u32) }
}

/// `x = cap * tanh(x / cap)`.
pub(crate) fn softcap(gpu: &Gpu, x: &Buffer, cap: f32, len: usize) {
    let (count, dim) = gpu.each(len);
    // SAFETY: units past `len` do nothing.
    unsafe { softcap_kernel::launch_unchecked(&gpu.client, count, dim, x.arg(), cap, len as u32) }
}

/// `gate = activation(gate) * up`.
pub(crate) fn gated(gpu: &Gpu, gate: &Buffer, up: &Buffer, activation: Activation, len: usize) {
    let (count, dim) = gpu.each(len);
    let activation = match activation {
        Activation::Silu => 0u32,
        Activation::GeluTanh => 1,
        Activation::Gelu => 2,
    };
    let (gate, up) = (gate.arg(), up.arg());
    // SAFETY: units past `len` do nothing.
    unsafe {
        gated_kernel::launch_unchecked(&gpu.client, count, dim, gate, up, len as u32, activation);
    }
}

/// Copies `len` words from word `from` of `x` to word `to` of `out`.
pub(crate) fn copy(gpu: &Gpu, x: &Buffer, from: usize, out: &Buffer, to: usize, len: usize) {
    let (count, dim) = gpu.each(len);
    let (from, to, len) = (from as u32, to as u32, len as u32);
    // SAFETY: units past `len` do nothing.
    unsafe {
        copy_kernel::launch_unchecked(&gpu.client, count, dim, x.arg(), out.arg(), from, to, len);
    }
}

/// A copy of `x`.
pub(crate) fn copy_of(gpu: &Gpu, x: &Buffer, len: usize) -> Buffer {
    let out = gpu.empty(len);
    copy(gpu, x, 0, &out, 0, len);
    out
}

/// `out = 0`.
pub(crate) fn fill(gpu: &Gpu, out: &Buffer) {
    let (count, dim) = gpu.each(out.len);
    // SAFETY: units past the end do nothing.
    unsafe { fill_kernel::launch_unchecked(&gpu.client, count, dim, out.arg(), out.len as u32) }
}

#[cube(launch_unchecked)]
fn add_kernel(x: &mut [f32], y: &[f32], len: u32) {
    if ABSOLUTE_POS < len as usize {
        x[ABSOLUTE_POS] = x[ABSOLUTE_POS] + y[ABSOLUTE_POS];
    }
}

#[cube(launch_unchecked)]
fn softcap_kernel(x: &mut [f32], cap: f32, len: u32) {
    if ABSOLUTE_POS < len as usize {
        x[ABSOLUTE_POS] = capped(x[ABSOLUTE_POS], cap);
    }
}

#[cube(launch_unchecked)]
fn gated_kernel(gate: &mut [f32], up: &[f32], len: u32, #[comptime] activation: u32) {
    if ABSOLUTE_POS < len as usize {
        gate[ABSOLUTE_POS] = activate(gate[ABSOLUTE_POS], activation) * up[ABSOLUTE_POS];
    }
}

#[cube(launch_unchecked)]
fn copy_kernel(x: &[u32], out: &mut [u32], from: u32, to: u32, len: u32) {
    if ABSOLUTE_POS < len as usize {
        out[ABSOLUTE_POS + to as usize] = x[ABSOLUTE_POS + from as usize];
    }
}

#[cube(launch_unchecked)]
fn fill_kernel(out: &mut [u32], len: u32) {
    if ABSOLUTE_POS < len as usize {
        out[ABSOLUTE_POS] = 0u32;
    }
}

/// `cap * tanh(x / cap)`.
#[cube]
pub(crate) fn capped(x: f32, cap: f32) -> f32 {
    cap * tanh(x / cap)
}

/// By `exp`, whose argument is never positive; a runtime's own `tanh` may be far less precise.
#[cube]
fn tanh(x: f32) -> f32 {
    let a = x.abs();
    let e = (-(a + a)).exp();
    let far = (1.0 - e) / (1.0 + e);
    // Near zero the difference loses digits; the series does not.
    let s = x * x;
    let p = s * 0.021869489 - 0.053968254;
    let p = p * s + 0.133333333;
    let p = p * s - 0.333333333;
    let near = a * (p * s + 1.0);
    let y = select(a < 0.25, near, far);
    select(x < 0.0, -y, y)
}

/// One value of an activation function: 0 SiLU, 1 GELU by tanh, 2 GELU.
#[cube]
pub(crate) fn activate(x: f32, #[comptime] activation: u32) -> f32 {
    if comptime!(activation == 0) {
        // exp of a large number is infinite, and so its reciprocal 0.
        let bounded = max(x, -80.0);
        x / (1.0 + (-bounded).exp())
    } else if comptime!(activation == 1) {
        let inner = 0.7978845608 * (x + 0.044715 * x * x * x);
        0.5 * x * (1.0 + tanh(inner))
    } else {
        0.5 * x * (1.0 + erf(x * 0.7071067812))
    }
}

/// Error function: the series `2/√π Σ (-1)ⁿ x^(2n+1) / (n! (2n+1))` up to 1, and beyond it 1 less the
/// rational approximation of its complement by Abramowitz and Stegun (7.1.26), error 1.5e-7.
#[cube]
fn erf(x: f32) -> f32 {
    let a = min(x.abs(), 6.0);
    let s = a * a;
    let p = s * 0.00000145892 - 0.0000132275;
    let p = p * s + 0.000106838;
    let p = p * s - 0.000757576;
    let p = p * s + 0.00462963;
    let p = p * s - 0.023809524;
    let p = p * s + 0.1;
    let p = p * s - 0.333333333;
    let near = a * (p * s + 1.0) * 1.128379167;
    let t = 1.0 / (a * 0.3275911 + 1.0);
    let q = t * 1.061405429 - 1.453152027;
    let q = q * t + 1.421413741;
    let q = q * t - 0.284496736;
    let q = q * t + 0.254829592;
    let tail = q * t * (-s).exp();
    let y = select(a < 1.0, near, 1.0 - tail);
    select(x < 0.0, -y, y)
}
