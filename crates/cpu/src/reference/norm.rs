//! Root-mean-square normalisation.

/// `x / sqrt(mean(x²) + eps) * weight` over each consecutive group of `weight.len()` values.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let squares: f64 = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        let scale = (1.0 / (squares / x.len() as f64 + f64::from(eps)).sqrt()) as f32;
        for ((y, x), w) in out.iter_mut().zip(x).zip(weight) {
            *y = x * scale * w;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_group_has_the_weights_as_its_root_mean_square() {
        let x = [3.0, 4.0, -0.5, 0.25];
        let mut out = [0.0; 4];
        rms_norm(&x, &[2.0, 2.0], 0.0, &mut out);
        for group in out.chunks(2) {
            let mean = group.iter().map(|v| v * v).sum::<f32>() / 2.0;
            assert!((mean.sqrt() - 2.0).abs() < 1e-6);
        }
        assert!((out[0] / out[1] - 0.75).abs() < 1e-6);
        rms_norm(&[0.0, 0.0], &[1.0, 1.0], 1e-5, &mut out[..2]);
        assert_eq!(out[..2], [0.0, 0.0]);
    }
}
