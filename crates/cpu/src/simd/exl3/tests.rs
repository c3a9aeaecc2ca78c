//! Every level, rate and codebook against the scalar decode.

use super::*;
use crate::kernel::RowKind;
use marlin_quant::exl3::Rate;
use marlin_quant::exl3::codebook::{MCG_MULTIPLIER, MUL1_MULTIPLIER};
use marlin_tensor::{DType, HostTensor};
use marlin_testkit::Noise;

/// A weight of random rings and scales.
fn weight(
    noise: &mut Noise,
    rate: Rate,
    codebook: Codebook,
    out_features: usize,
    in_features: usize,
) -> Weight {
    let [k, n] = [in_features, out_features].map(|f| f.next_multiple_of(128));
    let shape = vec![k / 16, n / 16, rate.half_words()];
    let words: usize = shape.iter().product();
    let bytes: Vec<u8> = (0..words).flat_map(|_| (noise.bits() as u16).to_le_bytes()).collect();
    let mut scales = |n: usize| {
        let value = (0..n).map(|_| half::f16::from_f32(noise.uniform() * 0.1));
        let bytes: Vec<u8> = value.flat_map(half::f16::to_le_bytes).collect();
        HostTensor::new(DType::F16, vec![n], bytes.into()).unwrap()
    };
    let mut parts = vec![("suh", scales(k)), ("svh", scales(n))];
    parts.push(("trellis", HostTensor::new(DType::I16, shape, bytes.into()).unwrap()));
    let marker =
        |m: u32| HostTensor::new(DType::I32, vec![], m.to_le_bytes().to_vec().into()).unwrap();
    match codebook {
        Codebook::ThreeInst => {}
        Codebook::Mcg(m) => parts.push(("mcg", marker(m))),
        Codebook::Mul1(m) => parts.push(("mul1", marker(m))),
    }
    Weight { format: "exl3", out_features, in_features, parts }
}

fn product(x: &[f32], w: &[f32], n: usize, k: usize) -> Vec<f64> {
    let row = |x: &[f32], w: &[f32]| -> f64 {
        x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum()
    };
    x.chunks_exact(k)
        .flat_map(|x| w.chunks_exact(k).map(move |w| row(x, w)))
        .collect::<Vec<_>>()
        .into_iter()
        .take(x.len() / k * n)
        .collect()
}

/// Root mean square of the difference over that of the expected values.
fn relative_error(found: &[f32], expected: &[f64]) -> f64 {
    let error: f64 = found.iter().zip(expected).map(|(&f, e)| (f64::from(f) - e).powi(2)).sum();
    (error / expected.iter().map(|e| e * e).sum::<f64>()).sqrt()
}

/// All kernels this machine can run: every tier at its own level, the best one at every level.
fn kernels(weight: &Weight, float: bool) -> Vec<((Tier, Level), Box<dyn Kernel>)> {
    let parts = Exl3Parts::of(weight).unwrap();
    let tiers = Tier::ALL.into_iter().filter(|t| t.is_supported()).map(|t| (t, t.level()));
    let levels = Level::ALL.into_iter().filter(|level| level.is_supported());
    let mut cases: Vec<(Tier, Level)> =
        tiers.chain(levels.filter_map(|level| Some((Tier::best(level)?, level)))).collect();
    cases.sort_by_key(|&(tier, level)| (tier as u8, level));
    cases.dedup();
    let load = |(tier, level): (Tier, Level)| {
        let load = Load { level, weight, parts: &parts, float };
        ((tier, level), tier.visit(load))
    };
    cases.into_iter().map(load).collect()
}

const CODEBOOKS: [Codebook; 4] = [
    Codebook::ThreeInst,
    Codebook::Mcg(MCG_MULTIPLIER),
    Codebook::Mul1(MUL1_MULTIPLIER),
    Codebook::Mul1(0xad39_4c1d),
];

/// Every codebook at every rate it has: halves are for `mul1` alone.
fn rates_and_codebooks() -> impl Iterator<Item = (Rate, Codebook)> {
    let pairs = Rate::ALL.into_iter().flat_map(|rate| CODEBOOKS.map(|codebook| (rate, codebook)));
    pairs.filter(|(rate, codebook)| !rate.is_half() || matches!(codebook, Codebook::Mul1(_)))
}

/// Whether rows of this kind go to bf16 tiles.
fn rounds((_, level): (Tier, Level), float: bool, kind: RowKind) -> bool {
    tiles(level, float).is_some() && !float && kind == RowKind::Prompt
}

const KINDS: [RowKind; 2] = [RowKind::Decode, RowKind::Prompt];

/// Tolerances: f32 sums in another order; fp16 rounding of the value and 15-bit activations.
#[test]
fn every_level_rate_and_codebook_is_the_matrix_product() {
    let mut noise = Noise(1);
    let pools = [Pool::new(1), Pool::new(3)];
    for (rate, codebook) in rates_and_codebooks() {
        let (n, k) = (200, 300);
        let weight = weight(&mut noise, rate, codebook, n, k);
        let w = marlin_quant::decode(&weight).unwrap();
        for rows in [1, 3] {
            let x: Vec<f32> = (0..rows * k).map(|_| noise.uniform()).collect();
            let expected = product(&x, &w, n, k);
            for (float, bound) in [(true, 1e-6), (false, 8e-4)] {
                for (tier, kernel) in kernels(&weight, float) {
                    let mut out = vec![f32::NAN; rows * n];
                    kernel.matmul(&x, rows, RowKind::Decode, &mut out, &pools[rows % 2]);
                    let error = relative_error(&out, &expected);
                    let what = format!("{tier:?} {codebook:?} K={} rows {rows}", rate.bits());
                    assert!(error < bound, "{what} float {float}: {error}");
                }
            }
        }
    }
}

#[test]
fn every_level_rate_and_codebook_gives_single_rows() {
    let mut noise = Noise(12);
    for (rate, codebook) in rates_and_codebooks() {
        let (n, k) = (200, 300);
        let weight = weight(&mut noise, rate, codebook, n, k);
        let w: Vec<f64> =
            marlin_quant::decode(&weight).unwrap().iter().map(|&w| w.into()).collect();
        let parts = Exl3Parts::of(&weight).unwrap();
        for tier in Tier::ALL.into_iter().filter(|t| t.is_supported()) {
            let rows = tier.visit(parts.clone());
            for row in [0, 1, 31, 77, 127, 128, 199] {
                let mut out = vec![f32::NAN; k];
                rows.row(row, &mut out).unwrap();
                let error = relative_error(&out, &w[row * k..][..k]);
                let what = format!("{tier:?} {codebook:?} K={} row {row}", rate.bits());
                assert!(error < 1e-6, "{what}: {error}");
            }
        }
    }
}

#[test]
fn every_number_of_rows_and_ragged_shape() {
    let mut noise = Noise(2);
    let pool = Pool::new(2);
    let rate = Rate::from_bits(3.0).unwrap();
    for (n, k, codebook) in [
        (1, 1, CODEBOOKS[2]),
        (128, 128, CODEBOOKS[1]),
        (129, 127, CODEBOOKS[2]),
        (384, 640, CODEBOOKS[2]),
        (257, 130, CODEBOOKS[0]),
    ] {
        let weight = weight(&mut noise, rate, codebook, n, k);
        let w = marlin_quant::decode(&weight).unwrap();
        let x: Vec<f32> = (0..40 * k).map(|_| noise.uniform()).collect();
        let expected = product(&x, &w, n, k);
        for (float, bound) in [(true, 1e-6), (false, 1e-3)] {
            for (tier, kernel) in kernels(&weight, float) {
                for (rows, kind) in (1..=40).flat_map(|rows| KINDS.map(|kind| (rows, kind))) {
                    let mut out = vec![f32::NAN; rows * n];
                    kernel.matmul(&x[..rows * k], rows, kind, &mut out, &pool);
                    let error = relative_error(&out, &expected[..rows * n]);
                    // A single weight is a cancelling sum over its whole 128×128 block.
                    let bound = if rounds(tier, float, kind) { 5e-3 } else { bound };
                    let bound = if n * k == 1 { 10.0 * bound } else { bound };
                    assert!(
                        error < bound,
                        "{tier:?} [{n}, {k}] rows {rows} {kind:?} float {float}: {error}"
                    );
                }
            }
        }
    }
}

/// More rows than one pass takes, each equal to the row alone: no row sees another.
#[test]
fn long_prompts_equal_single_rows() {
    let mut noise = Noise(3);
    let pool = Pool::new(2);
    let (n, k, rows) = (130, 256, MAX_ROWS + 5);
    let weight = weight(&mut noise, Rate::from_bits(2.5).unwrap(), CODEBOOKS[2], n, k);
    let x: Vec<f32> = (0..rows * k).map(|_| noise.uniform()).collect();
    for float in [true, false] {
        for ((tier, kernel), kind) in
            kernels(&weight, float).iter().flat_map(|k| KINDS.map(|kind| (k, kind)))
        {
            let mut all = vec![f32::NAN; rows * n];
            kernel.matmul(&x, rows, kind, &mut all, &pool);
            for row in [0, 100, MAX_ROWS - 1, MAX_ROWS, rows - 1] {
                let mut one = vec![f32::NAN; n];
                kernel.matmul(&x[row * k..][..k], 1, kind, &mut one, &pool);
                assert_eq!(all[row * n..][..n], one, "{tier:?} row {row} {kind:?} float {float}");
            }
            for few in [2, 3, 8, 20] {
                let mut some = vec![f32::NAN; few * n];
                kernel.matmul(&x[..few * k], few, kind, &mut some, &pool);
                assert_eq!(all[..few * n], some, "{tier:?} {few} rows {kind:?} float {float}");
            }
        }
    }
}

/// Extremes of the integer range: the largest block sums, zeros, subnormals, and NaN that shows.
#[test]
fn activations_of_any_size() {
    let mut noise = Noise(4);
    let pool = Pool::new(1);
    let (n, k) = (128, 256);
    for codebook in [CODEBOOKS[1], CODEBOOKS[2]] {
        let weight = weight(&mut noise, Rate::from_bits(4.0).unwrap(), codebook, n, k);
        let w = marlin_quant::decode(&weight).unwrap();
        let suh = Exl3Parts::of(&weight).unwrap().suh;
        let ones: Vec<f32> = suh.iter().map(|s| if *s == 0.0 { 0.0 } else { 1.0 / s }).collect();
        let big: Vec<f32> = ones.iter().map(|v| v * 1e30).collect();
        let one_hot: Vec<f32> = (0..k).map(|i| if i == 77 { 3.0 } else { 0.0 }).collect();
        for (tier, kernel) in kernels(&weight, false) {
            for x in [&ones, &big, &one_hot] {
                let mut out = vec![0.0; n];
                kernel.matmul(x, 1, RowKind::Decode, &mut out, &pool);
                let error = relative_error(&out, &product(x, &w, n, k));
                assert!(error < 6e-4, "{tier:?}: {error}");
            }
            for (value, expected) in [(0.0, 0.0), (1e-44, 0.0)] {
                let mut out = vec![1.0; n];
                kernel.matmul(&vec![value; k], 1, RowKind::Decode, &mut out, &pool);
                assert!(out.iter().all(|y: &f32| (y - expected).abs() < 1e-40), "{tier:?} {value}");
            }
            let mut x = one_hot.clone();
            for bad in [f32::NAN, f32::INFINITY] {
                x[3] = bad;
                let mut out = vec![0.0; n];
                kernel.matmul(&x, 1, RowKind::Decode, &mut out, &pool);
                assert!(out.iter().all(|y| !y.is_finite()), "{tier:?} {bad}");
            }
        }
    }
}
