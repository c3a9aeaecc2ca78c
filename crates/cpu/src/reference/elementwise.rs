//! Operators that treat every element alike, and rearrangements of columns.

use marlin_tensor::{Activation, Heads};

/// One value of an activation function.
pub(crate) fn activate(x: f32, activation: Activation) -> f32 {
    let x64 = f64::from(x);
    (match activation {
        Activation::Silu => x64 / (1.0 + (-x64).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x64 + 0.044715 * x64.powi(3));
            0.5 * x64 * (1.0 + inner.tanh())
        }
        Activation::Gelu => 0.5 * x64 * (1.0 + erf(x64 * std::f64::consts::FRAC_1_SQRT_2)),
    }) as f32
}

/// Error function by its series `2/√π e^(-x²) Σ 2ⁿ x^(2n+1) / (2n+1)!!`, whose terms all have
/// one sign; beyond 6 it is 1 to double precision.
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > 1e-17 * sum.abs() {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp()
}

/// `gate = activation(gate) * up`.
pub(crate) fn gated(gate: &mut [f32], up: &[f32], activation: Activation) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = activate(*g, activation) * u;
    }
}

/// `x += y`.
pub(crate) fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// `x = cap * tanh(x / cap)`.
pub(crate) fn softcap(x: &mut [f32], cap: f32) {
    x.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
}

/// Columns `start .. start + len` of every head.
pub(crate) fn slice_heads(x: &[f32], heads: Heads, start: usize, len: usize, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(heads.head_dim).zip(out.chunks_exact_mut(len)) {
        out.copy_from_slice(&x[start..start + len]);
    }
}

/// Heads of `m` and of `n` columns side by side.
pub(crate) fn concat_heads(a: &[f32], m: usize, b: &[f32], n: usize, out: &mut [f32]) {
    let parts = a.chunks_exact(m).zip(b.chunks_exact(n));
    for ((a, b), out) in parts.zip(out.chunks_exact_mut(m + n)) {
        out[..m].copy_from_slice(a);
        out[m..].copy_from_slice(b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        // erf: Abramowitz and Stegun, table 7.1; activations: torch 2 in double precision.
        for (x, expected) in
            [(0.0, 0.0), (0.5, 0.5204998778), (1.0, 0.8427007929), (2.0, 0.9953222650)]
        {
            assert!((erf(x) - expected).abs() < 1e-10);
            assert!((erf(-x) + expected).abs() < 1e-10);
        }
        assert!((erf(5.9) - 1.0).abs() < 1e-12 && erf(7.0) == 1.0);
        for (activation, x, expected) in [
            (Activation::Silu, 1.0, 0.731_058_6),
            (Activation::Silu, -200.0, 0.0),
            (Activation::GeluTanh, 1.0, 0.841_192),
            (Activation::Gelu, 1.0, 0.841_344_7),
            (Activation::Gelu, -1.0, -0.158_655_3),
        ] {
            assert!((activate(x, activation) - expected).abs() < 1e-6, "{activation:?} {x}");
        }
    }

    #[test]
    fn elementwise_and_columns() {
        let mut x = [1.0, -2.0, 30.0];
        add(&mut x, &[1.0, 1.0, 0.0]);
        assert_eq!(x, [2.0, -1.0, 30.0]);
        softcap(&mut x, 5.0);
        assert!((x[0] - 5.0 * 0.4f32.tanh()).abs() < 1e-6 && x[2] > 4.99 && x[2] <= 5.0);
        let mut gate = [1.0, -1.0];
        gated(&mut gate, &[2.0, 3.0], Activation::Silu);
        assert!((gate[0] - 1.462_117).abs() < 1e-5 && (gate[1] + 0.806_824).abs() < 1e-5);

        let heads = Heads { heads: 2, head_dim: 3 };
        let x = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11.];
        let (mut head, mut tail, mut both) = ([0.; 4], [0.; 8], [0.; 12]);
        slice_heads(&x, heads, 0, 1, &mut head);
        slice_heads(&x, heads, 1, 2, &mut tail);
        assert_eq!(head, [0., 3., 6., 9.]);
        assert_eq!(tail, [1., 2., 4., 5., 7., 8., 10., 11.]);
        concat_heads(&head, 1, &tail, 2, &mut both);
        assert_eq!(both, x);
    }
}
