//! Every kernel at every level this machine has, against the scalar decode of its format.
//!
//! Tolerances: f32 activations 1e-5 of `Σ|x||w|`. Quantized activations that and the rounding of
//! the activations, `Σ_groups max|x| / 254 * Σ|w|` (of a group with an outlier `/ 254²`), which no correct kernel exceeds.

use super::{Kernel, Level, kernel_name, load};
use crate::Pool;
use crate::kernel::RowKind;
use marlin_tensor::{DType, HostTensor, Weight};

/// Most activation rows tried.
const ROWS: usize = 37;

/// How to make a random matrix of a format.
struct Row {
    format: &'static str,
    /// Inputs and bytes per block.
    block: (usize, usize),
    /// Offsets of half-precision numbers in a block.
    halves: &'static [usize],
    /// Offset of an exponent byte.
    exponent: Option<usize>,
}

const fn row(format: &'static str, block: (usize, usize), halves: &'static [usize]) -> Row {
    Row { format, block, halves, exponent: None }
}

const FORMATS: [Row; 39] = [
    row("f32", (1, 4), &[]),
    row("f16", (1, 2), &[]),
    row("bf16", (1, 2), &[]),
    row("q4_0", (32, 18), &[0]),
    row("q4_1", (32, 20), &[0, 2]),
    row("q5_0", (32, 22), &[0]),
    row("q5_1", (32, 24), &[0, 2]),
    row("q8_0", (32, 34), &[0]),
    row("q2_k", (256, 84), &[80, 82]),
    row("q3_k", (256, 110), &[108]),
    row("q4_k", (256, 144), &[0, 2]),
    row("q5_k", (256, 176), &[0, 2]),
    row("q6_k", (256, 210), &[208]),
    row("iq4_nl", (32, 18), &[0]),
    row("iq4_xs", (256, 136), &[0]),
    Row { format: "mxfp4", block: (32, 17), halves: &[], exponent: Some(0) },
    row("nvfp4", (64, 36), &[]),
    row("nvfp4_scaled", (64, 36), &[]),
    row("tq1_0", (256, 54), &[52]),
    row("tq1_0_scaled", (256, 54), &[52]),
    row("tq2_0", (256, 66), &[64]),
    row("tq2_0_scaled", (256, 66), &[64]),
    row("int4_g128", (128, 68), &[]),
    row("int4_g64", (64, 36), &[]),
    row("int4_g32", (32, 20), &[]),
    row("int8_g128", (128, 132), &[]),
    row("int8_g32", (32, 36), &[]),
    row("int4_g128_ordered", (128, 68), &[]),
    row("int8_g32_ordered", (32, 36), &[]),
    row("iq1_s", (256, 50), &[0]),
    row("iq1_m", (256, 56), &[]),
    row("iq2_xxs", (256, 66), &[0]),
    row("iq2_xs", (256, 74), &[0]),
    row("iq2_s", (256, 82), &[0]),
    row("iq3_xxs", (256, 98), &[0]),
    row("iq3_s", (256, 110), &[0]),
    // Parts of their own, from their encoders.
    row("int", (1, 1), &[]),
    row("fp8", (1, 1), &[]),
    row("fp8_block128", (1, 1), &[]),
];

/// A small generator; tests must not depend on a seed from outside.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Roughly normal, a few values larger, as activations are.
    fn float(&mut self) -> f32 {
        let sum: f32 = (0..4).map(|_| (self.next() >> 40) as f32 / (1 << 24) as f32 - 0.5).sum();
        if self.next().is_multiple_of(61) { sum * 20.0 } else { sum }
    }
}

impl Row {
    /// Random bytes with scales of ordinary size.
    fn weight(&self, out_features: usize, in_features: usize, random: &mut Random) -> Weight {
        let (block, bytes) = self.block;
        if matches!(self.format, "int" | "fp8" | "fp8_block128") {
            let values: Vec<f32> =
                (0..out_features * in_features).map(|_| random.float()).collect();
            let format = marlin_quant::format(self.format);
            return format.pack(&values, out_features, in_features).unwrap();
        }
        let mut data = Vec::new();
        if block == 1 {
            for _ in 0..out_features * in_features {
                let v = random.float();
                match self.format {
                    "f32" => data.extend(v.to_le_bytes()),
                    "f16" => data.extend(half::f16::from_f32(v).to_le_bytes()),
                    _ => data.extend(half::bf16::from_f32(v).to_le_bytes()),
                }
            }
        } else {
            for _ in 0..out_features * in_features / block {
                let mut b: Vec<u8> = (0..bytes).map(|_| (random.next() >> 30) as u8).collect();
                for &at in self.halves {
                    let d = half::f16::from_f32(random.float() / 64.0);
                    b[at..at + 2].copy_from_slice(&d.to_le_bytes());
                }
                if self.format.starts_with("int") {
                    // A zero point, and three bytes of a scale above it.
                    b[1..4].copy_from_slice(&(random.float() / 64.0).to_le_bytes()[1..]);
                }
                if self.format == "iq1_m" {
                    // Four bits of the scale each; of them exponents far from infinity.
                    b[55] &= 0xbf;
                }
                if let Some(at) = self.exponent {
                    // The subnormal ones too.
                    b[at] =
                        if random.next().is_multiple_of(9) { b[at] % 3 } else { 120 + b[at] % 8 };
                }
                data.extend(b);
            }
        }
        let (name, dtype, width) = match (block, self.format) {
            (1, "f32") => ("weight", DType::F32, in_features),
            (1, "f16") => ("weight", DType::F16, in_features),
            (1, _) => ("weight", DType::BF16, in_features),
            _ => ("blocks", DType::U8, in_features / block * bytes),
        };
        let tensor = HostTensor::new(dtype, vec![out_features, width], data.into()).unwrap();
        let mut parts = vec![(name, tensor)];
        if self.format.ends_with("_scaled") {
            let scale: Vec<f32> = (0..out_features).map(|_| random.float()).collect();
            parts.push(("scale", HostTensor::from_f32(vec![out_features], &scale)));
        }
        if self.format.ends_with("_ordered") {
            let mut order: Vec<i32> = (0..in_features as i32).collect();
            order.sort_by_cached_key(|_| random.next());
            let bytes: Vec<u8> = order.iter().flat_map(|i| i.to_le_bytes()).collect();
            let order = HostTensor::new(DType::I32, vec![in_features], bytes.into()).unwrap();
            parts.push(("order", order));
        }
        Weight { format: self.format, out_features, in_features, parts }
    }

    /// Input widths tried: ragged for floats, one and several blocks, more than a panel or chunk.
    fn widths(&self) -> &'static [usize] {
        match self.block.0 {
            1 => &[1, 15, 33, 259],
            32 => &[32, 96, 544],
            64 | 128 => &[128, 384, 640],
            _ => &[256, 768],
        }
    }
}

/// Product in f64 and the tolerances, each `[rows, out_features]`.
struct Expected {
    product: Vec<f64>,
    float: Vec<f64>,
    quantized: Vec<f64>,
    /// Both factors rounded to bf16.
    rounded: Vec<f64>,
}

impl Expected {
    /// What the name of a path promises for rows of this kind.
    fn tolerance(&self, path: &str, kind: RowKind) -> &[f64] {
        match path.contains("bf16 for prompts") && kind == RowKind::Prompt {
            true => &self.rounded,
            false if path.contains(" int8") => &self.quantized,
            false => &self.float,
        }
    }
}

fn expected(weight: &Weight, x: &[f32]) -> Expected {
    let k = weight.in_features;
    // Where inputs are reordered they are rounded in that order.
    let order = weight.part("order").map(|order| order.to_i64().unwrap());
    let sorted = |values: &[f32]| match &order {
        Some(order) => {
            values.chunks_exact(k).flat_map(|row| order.iter().map(|&i| row[i as usize])).collect()
        }
        None => values.to_vec(),
    };
    let (w, x) = (sorted(&marlin_quant::decode(weight).unwrap()), sorted(x));
    let mut e = Expected { product: vec![], float: vec![], quantized: vec![], rounded: vec![] };
    for x in x.chunks_exact(k) {
        for w in w.chunks_exact(k) {
            let (mut product, mut size, mut rounding) = (0.0, 0.0, 0.0);
            let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
            for (x, w) in x.chunks(32).zip(w.chunks(32)) {
                let pairs = || x.iter().map(|&x| f64::from(x)).zip(w.iter().map(|&w| f64::from(w)));
                product += pairs().map(|(x, w)| x * w).sum::<f64>();
                size += pairs().map(|(x, w)| (x * w).abs()).sum::<f64>();
                let largest = pairs().fold(0.0, |m: f64, (x, _)| m.max(x.abs()));
                // A group with an outlier is rounded twice; a thousandth is for sums in other orders.
                let steps =
                    if largest * largest > 1.001 * squares / 9.0 { 254.0 * 254.0 } else { 254.0 };
                rounding += largest / steps * pairs().map(|(_, w)| w.abs()).sum::<f64>();
            }
            e.product.push(product);
            e.float.push(1e-5 * size + 1e-30);
            e.quantized.push(1.001 * rounding + 2e-5 * size + 1e-30);
            e.rounded.push(1.01 / 128.0 * size + 1e-5 * size + 1e-30);
        }
    }
    e
}

fn levels() -> impl Iterator<Item = Level> {
    Level::ALL.into_iter().filter(|l| *l > Level::Scalar && l.is_supported())
}

const KINDS: [RowKind; 2] = [RowKind::Decode, RowKind::Prompt];

fn check(kernel: &dyn Kernel, x: &[f32], rows: usize, kind: RowKind, e: &Expected) {
    let (n, k) = (kernel.out_features(), kernel.in_features());
    let (product, tolerance) = (&e.product, e.tolerance(&kernel.name(), kind));
    for threads in [1, 3] {
        let mut out = vec![f32::NAN; rows * n];
        kernel.matmul(&x[..rows * k], rows, kind, &mut out, &Pool::new(threads));
        for (i, &found) in out.iter().enumerate() {
            let (row, column) = (i / n, i % n);
            let error = (f64::from(found) - product[i]).abs();
            assert!(
                error <= tolerance[i],
                "{} [{n}, {k}] rows {rows} threads {threads} at ({row}, {column}): {found}, expected {} ± {}",
                kernel.name(),
                product[i],
                tolerance[i],
            );
        }
        assert_eq!(kernel.failure(), None);
    }
}

#[test]
fn kernels_are_the_product_with_the_decoded_matrix() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for format in &FORMATS {
        for &k in format.widths() {
            for n in [1, 7, 33, 130] {
                let weight = format.weight(n, k, &mut random);
                let x: Vec<f32> = (0..ROWS * k).map(|_| random.float()).collect();
                let e = expected(&weight, &x);
                for level in levels() {
                    for float in [true, false] {
                        let kernel = load(&weight, level, float).expect(format.format);
                        assert_eq!(Some(kernel.name()), kernel_name(format.format, level, float));
                        let planned =
                            super::bytes(&weight, level).map_or(weight.bytes(), |b| b as u64);
                        assert_eq!(kernel.bytes(), planned, "{}", kernel.name());
                        for rows in [1, 2, 3, 5, 8, 9, 16, ROWS] {
                            KINDS.iter().for_each(|kind| check(&*kernel, &x, rows, *kind, &e));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn long_prompts_are_taken_in_blocks_of_rows() {
    let mut random = Random(11);
    // Rows of 8192 quantized activations: about 70 fit the cache block.
    let (rows, k) = (150, 8192);
    let x: Vec<f32> = (0..rows * k).map(|_| random.float()).collect();
    for format in [&FORMATS[3], &FORMATS[12]] {
        let weight = format.weight(33, k, &mut random);
        let e = expected(&weight, &x);
        for level in levels() {
            for float in [true, false] {
                let kernel = load(&weight, level, float).expect(format.format);
                KINDS.iter().for_each(|kind| check(&*kernel, &x, rows, *kind, &e));
            }
        }
    }
}

/// A row has the same bits alone, in any company, on any number of threads, and in a product of parts.
#[test]
fn company_does_not_change_a_row() {
    let mut random = Random(5);
    let pools = [Pool::new(1), Pool::new(3)];
    for format in &FORMATS {
        let k = *format.widths().last().expect("a width");
        for n in [33, 130] {
            let weight = format.weight(n, k, &mut random);
            let x: Vec<f32> = (0..ROWS * k).map(|_| random.float()).collect();
            for (level, float) in levels().flat_map(|l| [(l, true), (l, false)]) {
                let kernel = load(&weight, level, float).expect(format.format);
                for kind in KINDS {
                    let product = |x: &[f32], rows: usize| {
                        let mut out = vec![f32::NAN; rows * n];
                        kernel.matmul(x, rows, kind, &mut out, &pools[rows % 2]);
                        out
                    };
                    let alone: Vec<f32> = x.chunks(k).flat_map(|x| product(x, 1)).collect();
                    for rows in [2, 3, 5, 8, 9, 16, ROWS] {
                        let found = product(&x[..rows * k], rows);
                        let same =
                            found.iter().zip(&alone).position(|(a, b)| a.to_bits() != b.to_bits());
                        let path = kernel.name();
                        assert_eq!(same, None, "{path} [{n}, {k}] {kind:?} rows {rows}");
                    }
                }
            }
        }
    }
}

#[test]
fn every_e4m3_byte_is_read_and_what_is_no_number_stays_so() {
    let codes: Vec<u8> = (0..=255).flat_map(|code| [code, 0x38]).collect();
    for (format, scales) in [("fp8", vec![256, 1]), ("fp8_block128", vec![2, 1])] {
        let (codes, count) = (codes.clone().into(), scales[0]);
        let parts = vec![
            ("weight", HostTensor::new(DType::F8E4M3, vec![256, 2], codes).unwrap()),
            ("scale", HostTensor::from_f32(scales, &vec![0.5; count])),
        ];
        let weight = Weight { format, out_features: 256, in_features: 2, parts };
        for level in levels() {
            let kernel = load(&weight, level, false).expect(format);
            for kind in KINDS {
                let mut out = vec![0.0; 256];
                kernel.matmul(&[2.0, 0.0], 1, kind, &mut out, &Pool::new(1));
                for (value, expected) in out.iter().zip(marlin_quant::fp8::E4M3) {
                    let same = *value == expected || value.is_nan() && expected.is_nan();
                    assert!(same, "{format} {level} {kind:?}: {value}, expected {expected}");
                }
            }
        }
    }
}

#[test]
fn zeros_and_tiny_activations_do_not_divide_by_zero() {
    let mut random = Random(7);
    let weight = FORMATS[3].weight(16, 64, &mut random);
    for level in levels() {
        let kernel = load(&weight, level, false).expect("a kernel");
        for value in [0.0, f32::MIN_POSITIVE, 1e-44] {
            let mut out = vec![f32::NAN; 16];
            kernel.matmul(&[value; 64], 1, RowKind::Decode, &mut out, &Pool::new(1));
            assert!(out.iter().all(|v| v.abs() < 1e-30), "{level} {value}: {out:?}");
        }
    }
}

#[test]
fn parts_of_another_shape_are_refused() {
    let mut random = Random(7);
    let mut weight = FORMATS[3].weight(16, 64, &mut random);
    weight.in_features = 48;
    assert!(levels().all(|level| load(&weight, level, false).is_none()));
}

#[test]
fn the_reference_level_has_no_kernels_here() {
    let weight = FORMATS[0].weight(2, 2, &mut Random(7));
    assert!(load(&weight, Level::Scalar, true).is_none());
    assert_eq!(kernel_name("q4_0", Level::Scalar, false), None);
}
