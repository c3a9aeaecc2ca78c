//! Encoders of the K-quants: round to nearest under scales found by a small search.
//!
//! Each group tries a handful of step sizes around the one that spans its range; for the codes
//! a step size gives, the best scale (and minimum) is a least-squares solution, and the candidate
//! with the smallest squared error wins. Group scales are then rounded to integers under the
//! super-scale, and codes chosen anew for what was actually stored. All errors count alike: there
//! is no importance matrix here.

use super::put_f16;
use half::f16;

/// Step sizes tried: the spanning one times `1 + 0.1 k / levels`, `k` in this range.
const SEARCH: std::ops::RangeInclusive<i32> = -9..=9;

/// More than any half-precision super-scale reaches (65504 times the largest scale and code), and
/// small enough that squares stay finite. Beyond it a fit is infinite, which `pack` reports.
const UNREACHABLE: f32 = 1e9;

pub fn q2_k(values: &[f32; 256], block: &mut [u8; 84]) {
    let a = Affine::<16>::fit(values, 3, 15);
    block.fill(0);
    for (byte, (s, m)) in block.iter_mut().zip(a.scales.iter().zip(a.minimums)) {
        *byte = s | m << 4;
    }
    put_two_bits(&mut block[16..80], &a.codes);
    put_f16(block, 80, a.d);
    put_f16(block, 82, a.dmin);
}

pub fn q3_k(values: &[f32; 256], block: &mut [u8; 110]) {
    let s = Symmetric::fit(values, 4, 32);
    block.fill(0);
    put_high_bits(&mut block[..32], &s.codes, 2);
    put_two_bits(&mut block[32..96], &s.codes);
    for (group, scale) in s.scales.iter().enumerate() {
        let biased = (scale + 32) as u8;
        block[96 + group % 8] |= (biased & 15) << (4 * (group / 8));
        block[104 + group % 4] |= (biased >> 4) << (2 * (group / 4));
    }
    put_f16(block, 108, s.d);
}

pub fn q4_k(values: &[f32; 256], block: &mut [u8; 144]) {
    let a = Affine::<8>::fit(values, 15, 63);
    put_affine_header(&a, &mut block[..16]);
    put_nibble_pairs(&mut block[16..], &a.codes);
}

pub fn q5_k(values: &[f32; 256], block: &mut [u8; 176]) {
    let a = Affine::<8>::fit(values, 31, 63);
    put_affine_header(&a, &mut block[..16]);
    block[16..48].fill(0);
    put_high_bits(&mut block[16..48], &a.codes, 4);
    put_nibble_pairs(&mut block[48..], &a.codes);
}

pub fn q6_k(values: &[f32; 256], block: &mut [u8; 210]) {
    let s = Symmetric::fit(values, 32, 128);
    block.fill(0);
    for (n, q) in s.codes.iter().enumerate() {
        block[n / 128 * 64 + n % 64] |= (q & 15) << (4 * (n / 64 % 2));
    }
    put_two_bits(&mut block[128..192], &s.codes.map(|q| q >> 4));
    for (byte, scale) in block[192..208].iter_mut().zip(s.scales) {
        *byte = scale as i8 as u8;
    }
    put_f16(block, 208, s.d);
}

/// `d scale q - dmin minimum` per group.
struct Affine<const GROUPS: usize> {
    d: f32,
    dmin: f32,
    scales: [u8; GROUPS],
    minimums: [u8; GROUPS],
    codes: [u8; 256],
}

impl<const GROUPS: usize> Affine<GROUPS> {
    /// Codes up to `levels`, group scales and minimums up to `scale_levels`.
    fn fit(values: &[f32; 256], levels: u8, scale_levels: u8) -> Self {
        let size = 256 / GROUPS;
        let fits: [(f32, f32); GROUPS] =
            std::array::from_fn(|g| fit_affine(&values[g * size..][..size], levels));
        let (d, scales) = integers(fits.map(|f| f.0), scale_levels);
        let (dmin, minimums) = integers(fits.map(|f| f.1), scale_levels);
        let codes = std::array::from_fn(|n| {
            let step = d * f32::from(scales[n / size]);
            let offset = dmin * f32::from(minimums[n / size]);
            nearest((values[n] + offset) / step, 0, levels.into()) as u8
        });
        Self { d, dmin, scales, minimums, codes }
    }
}

/// `d scale (q - half)` per group of 16.
struct Symmetric {
    d: f32,
    scales: [i32; 16],
    codes: [u8; 256],
}

impl Symmetric {
    /// Codes in `-half .. half` (stored plus `half`), group scales in `-scale_half .. scale_half`.
    fn fit(values: &[f32; 256], half: i32, scale_half: i32) -> Self {
        let fits: [f32; 16] = std::array::from_fn(|g| fit_symmetric(&values[g * 16..][..16], half));
        // Sign chosen so that the largest scale takes the end with one more step.
        let d = stored(largest(&fits) / -(scale_half as f32));
        let scales = fits.map(|s| nearest(s / d, -scale_half, scale_half - 1));
        let codes = std::array::from_fn(|n| {
            let step = d * scales[n / 16] as f32;
            (nearest(values[n] / step, -half, half - 1) + half) as u8
        });
        Self { d, scales, codes }
    }
}

/// Step and offset `(s, m)`, both at least 0, with `s q - m` close to `values` for `q <= levels`.
fn fit_affine(values: &[f32], levels: u8) -> (f32, f32) {
    // Offsets are not negative, so the range includes zero.
    let low = values.iter().copied().fold(0.0, f32::min);
    let high = values.iter().copied().fold(0.0, f32::max);
    if high == low {
        return (0.0, 0.0);
    }
    if high - low > UNREACHABLE {
        return (f32::INFINITY, 0.0);
    }
    let count = values.len() as f32;
    let mut best = (f32::INFINITY, 0.0, -low);
    for k in SEARCH {
        let inverse = (f32::from(levels) + 0.1 * k as f32) / (high - low);
        let code = |x: f32| nearest((x - low) * inverse, 0, levels.into()) as f32;
        let (mut q1, mut q2, mut x1, mut qx) = (0.0, 0.0, 0.0, 0.0);
        for &x in values {
            let q = code(x);
            (q1, q2, x1, qx) = (q1 + q, q2 + q * q, x1 + x, qx + q * x);
        }
        let determinant = count * q2 - q1 * q1;
        if determinant <= 0.0 {
            continue;
        }
        let mut step = (count * qx - q1 * x1) / determinant;
        let mut offset = (q1 * qx - q2 * x1) / determinant;
        if offset < 0.0 {
            (step, offset) = (qx / q2, 0.0);
        }
        let error: f32 = values.iter().map(|&x| (step * code(x) - offset - x).powi(2)).sum();
        if error < best.0 && step > 0.0 {
            best = (error, step, offset);
        }
    }
    (best.1, best.2)
}

/// Step `s` with `s q` close to `values` for `q` in `-half .. half`; either sign.
fn fit_symmetric(values: &[f32], half: i32) -> f32 {
    let largest = largest(values);
    if largest == 0.0 {
        return 0.0;
    }
    if largest.abs() > UNREACHABLE {
        return f32::INFINITY;
    }
    let (mut best_gain, mut best) = (0.0, 0.0);
    for k in SEARCH {
        let inverse = -(half as f32 + 0.1 * k as f32) / largest;
        let (mut q2, mut qx) = (0.0f32, 0.0f32);
        for &x in values {
            let q = nearest(x * inverse, -half, half - 1) as f32;
            (q2, qx) = (q2 + q * q, qx + q * x);
        }
        // The least-squares step lowers the squared error by this much.
        let gain = qx * qx / q2;
        if gain > best_gain {
            (best_gain, best) = (gain, qx / q2);
        }
    }
    best
}

/// Super-scale and nearest integers up to `levels` of non-negative `values`.
fn integers<const N: usize>(values: [f32; N], levels: u8) -> (f32, [u8; N]) {
    let d = stored(largest(&values) / f32::from(levels));
    (d, values.map(|v| nearest(v / d, 0, levels.into()) as u8))
}

/// `x` rounded into `low ..= high`, ties to even; 0 for the quotient of two zeros.
fn nearest(x: f32, low: i32, high: i32) -> i32 {
    // Beyond 2^23 there are no fraction bits. `f32::round` would be a library call per value.
    const SHIFT: f32 = 1.5 * (1 << 23) as f32;
    ((x.clamp(low as f32, high as f32) + SHIFT) - SHIFT) as i32
}

/// What a half-precision field will read back as.
fn stored(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m })
}

/// d, dmin and the twelve bytes of six-bit scales and minimums of Q4_K and Q5_K.
fn put_affine_header(a: &Affine<8>, header: &mut [u8]) {
    put_f16(header, 0, a.d);
    put_f16(header, 2, a.dmin);
    let packed = &mut header[4..16];
    for g in 0..4 {
        let (s, m) = (a.scales[g + 4], a.minimums[g + 4]);
        packed[g] = a.scales[g] | (s >> 4) << 6;
        packed[g + 4] = a.minimums[g] | (m >> 4) << 6;
        packed[g + 8] = (s & 15) | (m & 15) << 4;
    }
}

/// Low nibbles, weights 32 apart in one byte.
fn put_nibble_pairs(bytes: &mut [u8], codes: &[u8; 256]) {
    for (i, b) in bytes.iter_mut().enumerate() {
        let n = i / 32 * 64 + i % 32;
        *b = (codes[n] & 15) | (codes[n + 32] & 15) << 4;
    }
}

/// Low pairs of bits into zeroed bytes.
fn put_two_bits(bytes: &mut [u8], codes: &[u8; 256]) {
    for (n, q) in codes.iter().enumerate() {
        bytes[n / 128 * 32 + n % 32] |= (q & 3) << (2 * (n / 32 % 4));
    }
}

/// Bit `bit` of every code into zeroed bytes.
fn put_high_bits(bytes: &mut [u8], codes: &[u8; 256], bit: u32) {
    for (n, q) in codes.iter().enumerate() {
        bytes[n % 32] |= (q >> bit & 1) << (n / 32);
    }
}
