//! One matrix at a time: what calibration, passes and fits are worth, and that the report tells the truth.

mod common;

use common::{Greedy, quantizer};
use marlin_convert::exl3::basis::Random;
use marlin_convert::exl3::panels::PANEL;
use marlin_convert::matrix::{Matrix, dot};
use marlin_convert::quantizer::LinearInput;
use marlin_convert::{Exl3Options, Exl3Quantizer, Quantizer, TensorReport};
use marlin_cpu::{CpuEncoder, Level};
use marlin_tensor::Weight;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

fn gaussian(rows: usize, columns: usize, seed: u64) -> Matrix {
    let mut random = Random(seed);
    let mut uniform = || ((random.draw() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    let mut normal =
        || (-2.0 * uniform().ln()).sqrt() * (2.0 * std::f64::consts::PI * uniform()).cos();
    Matrix::new(rows, columns, (0..rows * columns).map(|_| normal() as f32).collect())
}

/// Inputs that lie near a few directions, as those of language models do.
fn moments(k: usize, seed: u64) -> Matrix {
    let mixed = gaussian(600, k / 6, seed).times(&gaussian(k / 6, k, seed + 1));
    let mut x = gaussian(600, k, seed + 2);
    x.data.iter_mut().zip(&mixed.data).for_each(|(a, b)| *a = 0.5 * *a + 0.3 * b);
    let mut h = x.gram();
    h.data.iter_mut().for_each(|v| *v /= 600.0);
    h
}

/// `tr(E H Eᵀ) / tr(W H Wᵀ)` of what the packed weight decodes to.
fn error(w: &Matrix, packed: &Weight, h: &Matrix) -> f64 {
    let mut e = w.clone();
    let decoded = marlin_quant::decode(packed).unwrap();
    e.data.iter_mut().zip(&decoded).for_each(|(a, b)| *a -= b);
    dot(&e.times(h).data, &e.data) / dot(&w.times(h).data, &w.data)
}

fn fast(options: Exl3Options) -> Exl3Quantizer {
    Exl3Quantizer { options, ..quantizer(Arc::new(CpuEncoder::new(Level::detect(), 1))) }
}

fn quantize(
    q: &Exl3Quantizer,
    w: &Matrix,
    h: Option<&Matrix>,
    bits: f64,
) -> (Weight, TensorReport) {
    let input = LinearInput {
        key: "test",
        shape: [w.rows, w.columns],
        rows: &|rows| Ok(w.part(rows)),
        hessian: h,
        why_uncalibrated: "no inputs",
        calibration_rows: 600,
        seeds: (1, 2),
        progress: &|_| {},
    };
    q.quantize(&input, bits).unwrap()
}

#[test]
fn real_moments_beat_random_ones_and_none() {
    let (w, h) = (gaussian(96, 200, 1), moments(200, 5));
    let q = fast(Exl3Options { passes: 0, ..Exl3Options::default() });
    let of = |moments: Option<&Matrix>| error(&w, &quantize(&q, &w, moments, 2.5).0, &h);
    let (real, random, none) = (of(Some(&h)), of(Some(&moments(200, 99))), of(None));
    assert!(real < 0.7 * random && real < 0.7 * none, "{real} {random} {none}");
}

#[test]
fn every_step_lowers_the_error() {
    let (w, h) = (gaussian(128, 256, 3), moments(256, 7));
    let of = |passes, refit| {
        let q = fast(Exl3Options { passes, refit, ..Exl3Options::default() });
        error(&w, &quantize(&q, &w, Some(&h), 2.0).0, &h)
    };
    let (plain, fitted, once, twice) = (of(0, false), of(0, true), of(1, true), of(2, true));
    assert!(fitted < plain && once < fitted && twice < once, "{plain} {fitted} {once} {twice}");
}

/// From a root mean square that is far off, the search finds back to what the table has, on a few tiles of a
/// matrix of one panel or of several, with any number of threads.
#[test]
fn the_search_finds_the_scale_that_the_table_has() {
    for (n, k, bits) in [(256, 256, 2.0), (256, 256, 4.0), (PANEL + 128, 128, 3.0)] {
        let (w, h) = (gaussian(n, k, 23), moments(k, 29));
        let of = |gain, search, threads| {
            let q = fast(Exl3Options { gain, search, ..Exl3Options::default() });
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| quantize(&q, &w, Some(&h), bits)).0
        };
        let loss = |packed: &Weight| error(&w, packed, &h);
        let (table, off) = (loss(&of(1.0, 0, 2)), loss(&of(0.7, 0, 2)));
        let searched = of(0.7, 64, 3);
        assert!(off > 1.1 * table, "{off} {table}");
        assert!(loss(&searched) < 1.03 * table, "{} {table}", loss(&searched));
        for ((name, a), (_, b)) in searched.parts.iter().zip(&of(0.7, 64, 1).parts) {
            assert!(a.bytes() == b.bytes(), "{name} depends on threads");
        }
    }
}

#[test]
fn the_report_says_what_the_file_decodes_to() {
    let h = moments(200, 11);
    let mut last = f64::INFINITY;
    for bits in [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0] {
        let mut w = gaussian(100, 200, 13);
        w.row_mut(7).fill(0.0);
        let (packed, report) = quantize(&fast(Exl3Options::default()), &w, Some(&h), bits);
        let found = error(&w, &packed, &h);
        assert!(
            (found - report.proxy_error).abs() < 0.01 * found + 1e-7,
            "{bits}: {found} {report:?}"
        );
        assert!(found < last, "{bits} bits: {found} after {last}");
        assert!(marlin_quant::decode(&packed).unwrap()[7 * 200..8 * 200].iter().all(|v| *v == 0.0));
        last = found;
    }
    assert!(last < 1e-4, "{last}");
}

/// A matrix of several panels, read a panel at a time: as good as one in memory, and the report still tells
/// the truth.
#[test]
fn large_matrices_go_through_in_panels() {
    let (n, k) = (PANEL + 300, 128);
    let (w, h) = (gaussian(n, k, 17), moments(k, 19));
    let largest = AtomicUsize::new(0);
    let of = |passes| {
        let q = fast(Exl3Options { passes, ..Exl3Options::default() });
        let input = LinearInput {
            key: "head",
            shape: [n, k],
            rows: &|rows| {
                largest.fetch_max(rows.len(), Ordering::Relaxed);
                Ok(w.part(rows))
            },
            hessian: Some(&h),
            why_uncalibrated: "",
            calibration_rows: 600,
            seeds: (1, 2),
            progress: &|_| {},
        };
        let (packed, report) = q.quantize(&input, 3.0).unwrap();
        let found = error(&w, &packed, &h);
        assert!((found - report.proxy_error).abs() < 0.01 * found, "{found} {report:?}");
        assert!(report.encoder_seconds > 0.0);
        found
    };
    let (plain, descended) = (of(0), of(1));
    assert!(largest.load(Ordering::Relaxed) <= PANEL, "more than a panel was read");
    assert!(descended < plain, "{descended} {plain}");
    // The same outputs as a matrix of one panel.
    let part = w.part(0..PANEL);
    let (packed, _) = quantize(&fast(Exl3Options::default()), &part, Some(&h), 3.0);
    let alone = error(&part, &packed, &h);
    assert!((plain / alone - 1.0).abs() < 0.03, "{plain} in panels, {alone} alone");
}

#[test]
fn degenerate_matrices_are_kept_or_refused() {
    let q = quantizer(Arc::new(Greedy));
    let zero = Matrix::zeros(20, 30);
    let (packed, report) = quantize(&q, &zero, None, 3.0);
    assert!(marlin_quant::decode(&packed).unwrap().iter().all(|v| *v == 0.0));
    assert_eq!((report.proxy_error, report.fallback.as_deref()), (0.0, Some("no inputs")));

    let mut huge = gaussian(20, 30, 1);
    huge.data.iter_mut().for_each(|v| *v *= 1e30);
    let (packed, _) = quantize(&q, &huge, None, 3.0);
    assert!(marlin_quant::decode(&packed).unwrap().iter().all(|v| v.is_finite()));

    let mut tiny = gaussian(20, 30, 1);
    tiny.data.iter_mut().for_each(|v| *v *= 1e-7);
    let (packed, report) = quantize(&q, &tiny, None, 6.0);
    let decoded = marlin_quant::decode(&packed).unwrap();
    assert!(decoded.iter().all(|v| v.is_finite()) && report.proxy_error.is_finite(), "{report:?}");

    let mut bad = gaussian(20, 30, 1);
    bad.data[33] = f32::NAN;
    let input = LinearInput {
        key: "model.bad",
        shape: [bad.rows, bad.columns],
        rows: &|rows| Ok(bad.part(rows)),
        hessian: None,
        why_uncalibrated: "",
        calibration_rows: 0,
        seeds: (0, 0),
        progress: &|_| {},
    };
    let message = q.quantize(&input, 3.0).unwrap_err().to_string();
    assert!(message.contains("model.bad") && message.contains("NaN"), "{message}");
    assert!(q.quantize(&LinearInput { rows: &|rows| Ok(zero.part(rows)), ..input }, 2.7).is_err());
}
