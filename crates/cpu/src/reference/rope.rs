//! Rotary position embedding.

use marlin_tensor::{Heads, RopeStyle};

/// Rotates each head of `x: [rows, heads * head_dim]` in place. `cos` and `sin` give the row's
/// table (`rotary_dim / 2` values, magnitude included); columns from
/// `rotary_dim` on pass through.
#[inline(always)] // compiled again for every level
pub(crate) fn rope<'a>(
    x: &mut [f32],
    heads: Heads,
    style: RopeStyle,
    table: impl Fn(usize) -> (&'a [f32], &'a [f32]),
) {
    for (row, x) in x.chunks_exact_mut(heads.heads * heads.head_dim).enumerate() {
        let (cos, sin) = table(row);
        for head in x.chunks_exact_mut(heads.head_dim) {
            rotate(&mut head[..2 * cos.len()], style, cos, sin);
        }
    }
}

/// Rotates the pairs of `x` by the angles of `cos` and `sin`.
#[inline(always)]
fn rotate(x: &mut [f32], style: RopeStyle, cos: &[f32], sin: &[f32]) {
    let pairs = cos.len();
    for i in 0..pairs {
        let (a, b) = match style {
            RopeStyle::HalfSplit => (i, i + pairs),
            RopeStyle::Interleaved => (2 * i, 2 * i + 1),
        };
        (x[a], x[b]) = (x[a] * cos[i] - x[b] * sin[i], x[b] * cos[i] + x[a] * sin[i]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_turn_of_each_style() {
        let heads = Heads { heads: 1, head_dim: 6 };
        let (cos, sin) = ([0.0, 0.0], [1.0, 1.0]);
        let mut x = [1.0, 2.0, 3.0, 4.0, 9.0, 8.0];
        rope(&mut x, heads, RopeStyle::HalfSplit, |_| (&cos, &sin));
        assert_eq!(x, [-3.0, -4.0, 1.0, 2.0, 9.0, 8.0]);
        let mut x = [1.0, 2.0, 3.0, 4.0, 9.0, 8.0];
        rope(&mut x, heads, RopeStyle::Interleaved, |_| (&cos, &sin));
        assert_eq!(x, [-2.0, 1.0, -4.0, 3.0, 9.0, 8.0]);
    }

    #[test]
    fn products_depend_on_the_distance_of_positions_only() {
        let heads = Heads { heads: 1, head_dim: 2 };
        let turn = |v: [f32; 2], angle: f32| {
            let (cos, sin) = ([angle.cos()], [angle.sin()]);
            let mut v = v;
            rope(&mut v, heads, RopeStyle::HalfSplit, |_| (&cos, &sin));
            v
        };
        let product = |p: f32, q: f32| {
            let (a, b) = (turn([0.3, -0.8], p * 0.7), turn([1.1, 0.2], q * 0.7));
            a[0] * b[0] + a[1] * b[1]
        };
        assert!((product(3.0, 1.0) - product(12.0, 10.0)).abs() < 1e-5);
    }
}
