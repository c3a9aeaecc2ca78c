//! Linear passes over a vocabulary, written so that the compiler vectorises them: independent
//! lanes, no early exit, no library calls. A vocabulary of 150,000 tokens is read several times for
//! every token chosen, which is what a small model's whole forward pass is measured against.

const LANES: usize = 16;

/// Index of the first NaN or infinity.
pub(crate) fn first_not_finite(logits: &[f32]) -> Option<usize> {
    const EXPONENT: u32 = 0x7f80_0000;
    let bad = |x: &f32| x.to_bits() & EXPONENT == EXPONENT;
    let chunk = logits.chunks(1024).position(|c| c.iter().fold(false, |any, x| any | bad(x)))?;
    logits[chunk * 1024..].iter().position(bad).map(|i| chunk * 1024 + i)
}

/// Index of the largest logit, the first among equals.
pub(crate) fn argmax(logits: &[f32]) -> usize {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, x);
        }
    }
    let max = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| larger(a, b));
    logits.iter().position(|&x| x == max).unwrap_or(0)
}

/// Fills `weights` with `exp((l - max) / temperature)`, 1 for the largest logit.
pub(super) fn weigh(logits: &[f32], max: f32, temperature: f32, weights: &mut Vec<f32>) {
    weights.clear();
    weights.extend(logits.iter().map(|&l| exp((l - max) / temperature)));
}

/// Sum in f64.
pub(super) fn sum(weights: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (chunks, rest) = weights.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &w) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(w);
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|&w| f64::from(w)).sum::<f64>()
}

/// `e^x` for `x <= 0`, zero below -87, where f32 would lose its precision; relative error below
/// 2e-7. `x = n ln 2 + f` with `n` rounded by adding and subtracting 1.5 * 2^23, then the Taylor
/// series of `e^f` to the seventh power, then `n` added to the exponent bits.
pub(super) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > -87.0 { x } else { -87.0 };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let f = clamped - n * LN_2_HIGH - n * LN_2_LOW;
    let mut series = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = series * f + c;
    }
    let scale = f32::from_bits((shifted.to_bits().wrapping_sub(ROUND.to_bits() - 127)) << 23);
    if x < -87.0 { 0.0 } else { series * scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_to_the_last_bits() {
        let mut x = 0.0f32;
        while x >= -87.0 {
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) - expected).abs() / expected;
            assert!(error < 2e-7, "{x}: {error}");
            x -= 0.000_37 * (1.0 - x);
        }
        assert_eq!(exp(0.0), 1.0);
        for x in [-87.1, -1e30, f32::MIN, f32::NEG_INFINITY] {
            assert_eq!(exp(x), 0.0);
        }
    }

    #[test]
    fn argmax_and_sum_for_every_length() {
        for len in 1..70 {
            for at in 0..len {
                let mut values = vec![1.0; len];
                values[at] = 2.0;
                assert_eq!(argmax(&values), at);
                values[len - 1] = 2.0;
                assert_eq!(argmax(&values), at, "the first among equals");
            }
            let values: Vec<f32> = (0..len).map(|i| i as f32).collect();
            assert_eq!(sum(&values), (len * (len - 1) / 2) as f64);
        }
        assert_eq!(argmax(&[f32::NEG_INFINITY; 40]), 0);
    }

    #[test]
    fn bad_logits_are_found_wherever_they_are() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 1023, 1024, 2999] {
                let mut logits = vec![0.5; 3000];
                assert_eq!(first_not_finite(&logits), None);
                logits[at] = bad;
                assert_eq!(first_not_finite(&logits), Some(at));
            }
        }
    }
}
