//! Matrices of every format on every device, against the scalar decode.
//!
//! `tolerance` is relative to the largest output: sums are in f32, and formats without a kernel are held as f16. Tensor cores add up the bytes that weights
//! of `mul1` are sums of, which the format rounds to f16 before.

mod common;

use common::{bytes, close, exl3, matrix, product, values};
use marlin_gpu::tune::is_integer;
use marlin_quant::{decode, formats};
use marlin_tensor::{
    Activation, Backend, Batch, DType, Experts, GatedLinears, HostTensor, Linear, LinearOptions,
    Role, Router, Scoring, Weight,
};
use std::sync::Arc;

fn backends() -> Vec<Arc<dyn Backend>> {
    common::devices().iter().map(|device| marlin_gpu::open(device).unwrap()).collect()
}

/// Every number of rows has kernels of its own, and compiling them is what takes the time.
const ROWS: &[usize] = &[1, 2, 5, 19];

/// Rows up to which a row is the same bits in any company, and as precise as f32 sums: many have kernels of their own on Hopper and on
/// Apple's GPUs, which round weights and inputs to halves; how EXL3 is parted on NVIDIA GPUs depends on the number of rows.
fn few(b: &dyn Backend, format: &str) -> usize {
    let name = b.name();
    match (name.split(' ').next(), format) {
        (_, "f32") => usize::MAX,
        (Some("cuda"), "exl3") => 1,
        (Some("metal"), _) => 16,
        (Some("cuda"), id) if is_integer(id) => 16,
        (Some("cuda"), _) => 4,
        _ => usize::MAX,
    }
}

/// Of products with row formats: where weights are integers, CUDA gives inputs 16 bits.
fn rows_tolerance(b: &dyn Backend, format: &str) -> f64 {
    if b.name().starts_with("cuda") && is_integer(format) { 1e-4 } else { 2e-6 }
}

/// Of products with EXL3 of the codebook `mul1`.
fn mul1_tolerance(b: &dyn Backend) -> f64 {
    if b.name().starts_with("cuda") { 1e-3 } else { 3e-6 }
}

fn check_linear(b: &dyn Backend, weight: &Weight, rows: &[usize], tolerance: f64, what: &str) {
    let (n, k) = (weight.out_features, weight.in_features);
    let bias = HostTensor::from_f32(vec![n], &values(n, 3));
    let linear = b.load_linear(weight, Some(&bias), LinearOptions::default()).unwrap();
    let planned = b.placed(weight, Role::Linear(LinearOptions::default())).bytes;
    assert_eq!(linear.bytes, planned + 4 * n as u64, "{what}: bytes known before it is placed");
    let mut first: Option<Vec<f32>> = None;
    let more: &[usize] = if few(b, weight.format) < usize::MAX { &[33, 70, 200] } else { &[] };
    for &rows in rows.iter().chain(more) {
        let x = values(rows * k, 4);
        let mut expected = product(weight, &x);
        let bias = bias.to_f32().unwrap();
        expected
            .chunks_mut(n)
            .for_each(|y| y.iter_mut().zip(&bias).for_each(|(y, b)| *y += f64::from(*b)));
        let x = b.upload(rows, k, x).unwrap();
        let found = b.download(&b.linear(&x, &linear).unwrap()).unwrap();
        let what = format!("{what}, {rows} rows on {}", b.name());
        let many = rows > few(b, weight.format);
        let coarse = if rows > 32 { 1e-2 } else { 2e-3 };
        close(&what, &found, &expected, if many { tolerance.max(coarse) } else { tolerance });
        if !many {
            let first = first.get_or_insert_with(|| found[..n].to_vec());
            assert_eq!(found[..n], first[..], "{what}: a row is the same in any company");
        }
    }
}

#[test]
fn every_format_multiplies() {
    for b in backends() {
        for format in formats() {
            let Some(weight) = matrix(format.id(), 40, 512, 5) else { continue };
            let own = !b.kernel(format.id(), LinearOptions::default()).contains("held");
            let tolerance = if own { rows_tolerance(&*b, format.id()) } else { 1e-3 };
            let rows = if format.id() == "q4_k" { ROWS } else { &[1, 5] };
            check_linear(&*b, &weight, rows, tolerance, format.id());
        }
    }
}

#[test]
fn every_rate_and_codebook_multiplies() {
    use marlin_quant::exl3::codebook::{MCG_MULTIPLIER, MUL1_MULTIPLIER};
    for b in backends() {
        let mul1 = Some(("mul1", MUL1_MULTIPLIER));
        for twice_bits in [2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16] {
            let weight = exl3(128, 256, twice_bits, mul1);
            let rows = if twice_bits == 6 { ROWS } else { &[1] };
            let what = format!("mul1 {twice_bits}/2 bits");
            check_linear(&*b, &weight, rows, mul1_tolerance(&*b), &what);
        }
        for (name, marker) in [
            ("3inst", None),
            ("mcg", Some(("mcg", MCG_MULTIPLIER))),
            ("odd", Some(("mul1", 12345))),
        ] {
            let is_mul1 = marker.is_some_and(|(kind, _)| kind == "mul1");
            let tolerance = if is_mul1 { mul1_tolerance(&*b) } else { 3e-6 };
            check_linear(&*b, &exl3(128, 128, 6, marker), &[1], tolerance, name);
        }
        // Neither width is whole.
        check_linear(&*b, &exl3(200, 130, 8, mul1), &[1], mul1_tolerance(&*b), "padded");
    }
}

fn check_embedding(b: &dyn Backend, weight: &Weight, tokens: &[u32], tolerance: f64, what: &str) {
    let mut batch = Batch::new(4);
    batch.push(tokens, 0, &[0], 4, 1);
    let (dense, columns) = (decode(weight).unwrap(), weight.in_features);
    let row = |t: &u32| &dense[*t as usize * columns..][..columns];
    let expected: Vec<f64> = tokens.iter().flat_map(row).map(|v| f64::from(*v) * 0.5).collect();
    let table = b.load_embedding(weight).unwrap();
    let found = b.download(&b.embed(&table, &batch, 0.5).unwrap()).unwrap();
    close(&format!("{what} on {}", b.name()), &found, &expected, tolerance);
}

#[test]
fn every_format_embeds() {
    use marlin_quant::exl3::codebook::{MCG_MULTIPLIER, MUL1_MULTIPLIER};
    for b in backends() {
        for format in formats() {
            let Some(weight) = matrix(format.id(), 11, 256, 6) else { continue };
            check_embedding(&*b, &weight, &[3, 10, 0, 3], 1e-7, format.id());
        }
        // Neither width of the first is whole.
        let mul1 = exl3(300, 130, 12, Some(("mul1", MUL1_MULTIPLIER)));
        check_embedding(&*b, &mul1, &[0, 127, 128, 299], 3e-6, "mul1");
        let mcg = exl3(128, 384, 6, Some(("mcg", MCG_MULTIPLIER)));
        check_embedding(&*b, &mcg, &[77], 3e-6, "mcg");
    }
}

/// Formats whose weights are products only are read as they decode, bit by bit; but for numbers that are subnormal, which devices may take for zero.
#[test]
fn products_are_the_same_bits() {
    // Every byte and every scale, and rows that are no whole blocks of 128.
    let all: Vec<u8> = (0..=255).collect();
    let fp8 = |k: usize, scale: HostTensor, format| {
        let codes: Vec<u8> = all.iter().copied().cycle().take(300 * k).collect();
        let codes = HostTensor::new(DType::F8E4M3, vec![300, k], codes.into()).unwrap();
        let parts = vec![("weight", codes), ("scale", scale)];
        Weight { format, out_features: 300, in_features: k, parts }
    };
    let blocks = all.iter().flat_map(|&e| [e].into_iter().chain(bytes(16, u64::from(e))));
    let mxfp4 = HostTensor::new(DType::U8, vec![32, 8 * 17], blocks.collect()).unwrap();
    let mut weights = vec![
        fp8(200, HostTensor::from_f32(vec![300], &values(300, 1)), "fp8"),
        fp8(257, HostTensor::from_f32(vec![3, 3], &values(9, 2)), "fp8_block128"),
        Weight {
            format: "mxfp4",
            out_features: 32,
            in_features: 256,
            parts: vec![("blocks", mxfp4)],
        },
    ];
    let blocks = all.chunks(4).flat_map(|s| s.iter().copied().chain(bytes(32, u64::from(s[0]))));
    let nvfp4 = HostTensor::new(DType::U8, vec![16, 4 * 36], blocks.collect()).unwrap();
    let parts = vec![("blocks", nvfp4)];
    weights.push(Weight { format: "nvfp4", out_features: 16, in_features: 256, parts });
    weights.extend(matrix("nvfp4_scaled", 9, 192, 4));
    let rest =
        ["iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl", "iq4_xs"];
    let ternary = ["tq1_0", "tq2_0", "tq1_0_scaled", "tq2_0_scaled"];
    weights.extend(rest.iter().chain(&ternary).filter_map(|id| matrix(id, 7, 512, 5)));
    for b in backends() {
        for weight in &weights {
            let name = b.kernel(weight.format, LinearOptions::default());
            assert!(!name.contains("held"), "{name}");
            let mut batch = Batch::new(4);
            let tokens: Vec<u32> = (0..weight.out_features as u32).collect();
            batch.push(&tokens, 0, &vec![0; tokens.len().div_ceil(4)], 4, 1);
            let table = b.load_embedding(weight).unwrap();
            let found = b.download(&b.embed(&table, &batch, 1.0).unwrap()).unwrap();
            for (i, (f, e)) in found.iter().zip(decode(weight).unwrap()).enumerate() {
                let small = e.is_subnormal() && *f == 0.0;
                assert!(*f == e || f.is_nan() && e.is_nan() || small, "{name}: [{i}] {f} for {e}");
            }
        }
    }
}

/// Experts, gate, up and down of each, for tokens that choose two; and one of their matrices by itself.
fn check_experts(b: &dyn Backend, weights: &[[Weight; 3]], tolerance: f64, what: &str) {
    let (count, top_k) = (weights.len(), 2);
    let hidden = weights[0][0].in_features;
    let load = |i: usize| -> Vec<Linear> {
        let options = LinearOptions::default();
        weights.iter().map(|w| b.load_linear(&w[i], None, options).unwrap()).collect()
    };
    let experts = Experts { gate: load(0), up: load(1), down: load(2) };
    let router = Router {
        scoring: Scoring::Softmax,
        num_experts: count,
        top_k,
        num_groups: 1,
        top_k_groups: 1,
        group_score_experts: 1,
        normalize: true,
        scaling_factor: 1.0,
    };
    for rows in [1, 3, 40] {
        let logits = b.upload(rows, count, values(rows * count, 7)).unwrap();
        let routing = b.route(&logits, None, &router).unwrap();
        let (ids, shares) = b.download_routing(&routing).unwrap();
        // Keep the products of three matrices small.
        let scaled: Vec<f32> = values(rows * hidden, 8).iter().map(|v| v * 1e-2).collect();
        let mut expected = vec![0.0; rows * hidden];
        for (entry, (&id, &share)) in ids.iter().zip(&shares).enumerate() {
            let x = &scaled[entry / top_k * hidden..][..hidden];
            let [gate, up, down] = &weights[id as usize];
            let inner: Vec<f32> = product(gate, x)
                .iter()
                .zip(product(up, x))
                .map(|(g, u)| (g / (1.0 + (-g).exp()) * u) as f32)
                .collect();
            let y = &mut expected[entry / top_k * hidden..][..hidden];
            y.iter_mut().zip(product(down, &inner)).for_each(|(y, d)| *y += f64::from(share) * d);
        }
        let x = b.upload(rows, hidden, scaled).unwrap();
        let found = b.experts(&x, &routing, &experts, Activation::Silu).unwrap();
        let what = format!("experts of {what}, {rows} rows on {}", b.name());
        let found = b.download(&found).unwrap();
        // Sorted entries are many, for devices that round those.
        let coarse = rows > few(b, weights[0][0].format);
        close(&what, &found, &expected, if coarse { tolerance.max(2e-3) } else { tolerance });
    }
    // A matrix of a stack is still a matrix.
    let x = values(3 * hidden, 9);
    let expected = product(&weights[3][0], &x);
    let found = b.linear(&b.upload(3, hidden, x).unwrap(), &experts.gate[3]).unwrap();
    let found = b.download(&found).unwrap();
    close("one expert", &found, &expected, tolerance);
}

/// Experts of one format, and of two rates: those lie in two stacks.
#[test]
fn experts_of_trellises_are_stacked() {
    use marlin_quant::exl3::codebook::MUL1_MULTIPLIER;
    for b in backends() {
        for rates in [[6, 6], [6, 8]] {
            let make = |n, k, e: usize, salt: usize| {
                let mut weight = exl3(n, k, rates[e % 2], Some(("mul1", MUL1_MULTIPLIER)));
                let shape = weight.parts[0].1.shape().to_vec();
                let rings = bytes(shape.iter().product::<usize>() * 2, (17 * e + salt) as u64);
                weight.parts[0].1 = HostTensor::new(DType::I16, shape, rings.into()).unwrap();
                weight
            };
            let weights: Vec<[Weight; 3]> = (0..5)
                .map(|e| [make(256, 128, e, 1), make(256, 128, e, 2), make(128, 256, e, 3)])
                .collect();
            let tolerance = mul1_tolerance(&*b).max(2e-5);
            check_experts(&*b, &weights, tolerance, &format!("{rates:?}"));
        }
    }
}

/// Blocks of four-bit floats, squares of eight-bit ones whose rows are padded, points that a table brings along.
#[test]
fn experts_of_floats_and_points_are_stacked() {
    for format in ["mxfp4", "nvfp4_scaled", "fp8", "iq2_xs", "iq4_xs"] {
        let (inner, hidden) = if format.starts_with("iq") { (512, 256) } else { (128, 192) };
        let make = |n, k, seed| matrix(format, n, k, seed).unwrap();
        let expert = |e: u64| {
            [make(inner, hidden, e), make(inner, hidden, 100 + e), make(hidden, inner, 200 + e)]
        };
        let weights: Vec<[Weight; 3]> = (10..15).map(expert).collect();
        for b in backends() {
            check_experts(&*b, &weights, 2e-5, format);
        }
    }
}

/// Every expert's inputs stand in an order of their own.
#[test]
fn experts_of_other_orders_are_stacked() {
    let format = marlin_quant::format("int4_g32_ordered");
    let make = |n, k, seed| format.pack(&values(n * k, seed), n, k).unwrap();
    let expert = |e: u64| [make(96, 64, 3 * e), make(96, 64, 3 * e + 1), make(64, 96, 3 * e + 2)];
    let weights: Vec<[Weight; 3]> = (10..15).map(expert).collect();
    for b in backends() {
        let tolerance = rows_tolerance(&*b, format.id()).max(2e-5);
        check_experts(&*b, &weights, tolerance, "other orders");
    }
}

/// One kernel may make the inputs of the last matrix from what the first two gave.
#[test]
fn feed_forwards_are_those_of_their_products() {
    use marlin_quant::exl3::codebook::MUL1_MULTIPLIER;
    let mul1 = Some(("mul1", MUL1_MULTIPLIER));
    let packed = |n, k, seed| {
        let format = marlin_quant::format("q4_0");
        format.pack(&values(n * k, seed), n, k).unwrap()
    };
    for b in backends() {
        for [gate, up, down] in [
            [exl3(256, 128, 6, mul1), exl3(256, 128, 6, mul1), exl3(128, 256, 8, mul1)],
            [packed(96, 64, 30), packed(96, 64, 31), packed(64, 96, 32)],
        ] {
            let load = |w: &Weight| b.load_linear(w, None, LinearOptions::default()).unwrap();
            let linears = GatedLinears { gate: load(&gate), up: load(&up), down: load(&down) };
            for rows in [1, 5, 20] {
                for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
                    let hidden = gate.in_features;
                    let x: Vec<f32> = values(rows * hidden, 33).iter().map(|v| v * 1e-2).collect();
                    let x = b.upload(rows, hidden, x).unwrap();
                    let left = b.linear(&x, &linears.gate).unwrap();
                    let right = b.linear(&x, &linears.up).unwrap();
                    let gated = b.gated(left, &right, activation).unwrap();
                    let expected = b.download(&b.linear(&gated, &linears.down).unwrap()).unwrap();
                    let found = b.feed_forward(&x, &linears, activation).unwrap();
                    let found = b.download(&found).unwrap();
                    let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
                    let what = format!("{} {rows} rows, {activation:?}", down.format);
                    close(&what, &found, &expected, 1e-4);
                }
            }
        }
    }
}
