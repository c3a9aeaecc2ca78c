//! Every variant that tuning may choose, on every device. One that a device cannot run is not chosen there: the rule is.

mod common;

use common::{close, exl3, product, values};
use marlin_gpu::tune::{Choice, Facts, Shape, Tuned, Variant, candidates, is_integer};
use marlin_quant::exl3::codebook::MUL1_MULTIPLIER;
use marlin_tensor::{Backend, LinearOptions, Weight};
use marlin_testkit::conformance::{PLAIN, Row, check_decode};

/// What some device may choose for `shape`.
fn all(shape: &Shape, rows: Option<usize>) -> Vec<Variant> {
    let mut all: Vec<Variant> =
        Facts::ANY.iter().flat_map(|facts| candidates(shape, rows, facts)).collect();
    all.sort();
    all.dedup();
    all
}

fn only(shape: &Shape, rows: Option<usize>, variant: Variant) -> Tuned {
    let mut tuned = Tuned::default();
    let shape = shape.clone();
    tuned.insert(Choice { shape, rows, variant, rule: variant, rule_us: 1.0, best_us: 1.0 });
    tuned
}

fn multiply(b: &dyn Backend, weight: &Weight, rows: usize, tolerance: f64, what: &str) -> Vec<f32> {
    let x = values(rows * weight.in_features, 4);
    let linear = b.load_linear(weight, None, LinearOptions::default()).unwrap();
    let tensor = b.upload(rows, weight.in_features, x.clone()).unwrap();
    let found = b.download(&b.linear(&tensor, &linear).unwrap()).unwrap();
    let what = format!("{what}, {rows} rows on {}", b.name());
    close(&what, &found, &product(weight, &x), tolerance);
    found[..weight.out_features].to_vec()
}

#[test]
fn every_variant_multiplies() {
    let q4_0 = marlin_quant::format("q4_0").pack(&values(40 * 512, 5), 40, 512).unwrap();
    let trellis = exl3(128, 256, 6, Some(("mul1", MUL1_MULTIPLIER)));
    let devices = common::devices();
    for (weight, format) in [(q4_0, "q4_0"), (trellis, "exl3 3.0 mul1")] {
        let (out_features, in_features) = (weight.out_features, weight.in_features);
        let shape = Shape::Linear { format: format.to_owned(), out_features, in_features };
        for rows in [None, Some(32), Some(256)] {
            // Those that round have several tiles of rows, and halves alone, from 33 rows on.
            let many = rows == Some(256);
            for variant in all(&shape, rows).into_iter().filter(|v| !many || v.rounds()) {
                let what = format!("{shape}, {variant}");
                for device in &devices {
                    let tuned = only(&shape, rows, variant);
                    let b = marlin_gpu::open_tuned(device, tuned).unwrap();
                    // Tensor cores add up the bytes that weights of `mul1` are sums of, unrounded.
                    let bytes = weight.format == "exl3" && b.name().starts_with("cuda");
                    // As the tests of formats have it, up to 32 rows.
                    let metal = b.name().starts_with("metal") && rows.is_some();
                    let rounded: f64 = if variant.rounds() || metal { 2e-3 } else { 3e-6 };
                    // Integers have one kernel up to 16 rows there, and halves from then on.
                    let integers = is_integer(weight.format) && b.name().starts_with("cuda");
                    let rounded = match integers {
                        true => rounded.max(if rows.is_some() { 2e-3 } else { 1e-4 }),
                        false => rounded,
                    };
                    let tolerance = if bytes { rounded.max(1e-3) } else { rounded };
                    if many {
                        multiply(&*b, &weight, 200, 1e-2, &what);
                        continue;
                    }
                    if rows.is_some() {
                        multiply(&*b, &weight, 19, tolerance, &what);
                        continue;
                    }
                    let one = multiply(&*b, &weight, 1, tolerance, &what);
                    let company = multiply(&*b, &weight, 7, tolerance, &what);
                    if !bytes {
                        assert_eq!(company, one, "{what}: a row is the same in any company");
                    }
                }
            }
        }
    }
}

#[test]
fn every_variant_attends() {
    let row = Row { heads: (4, 2), dims: (32, 24), ..PLAIN };
    let (num_heads, num_kv_heads) = row.heads;
    let (key_head_dim, value_head_dim) = row.dims;
    for window in [None, Some(100)] {
        let shape = Shape::Attention {
            num_heads,
            num_kv_heads,
            key_head_dim,
            value_head_dim,
            cache_type: row.cache_type.name().to_owned(),
            latent: false,
            windowed: window.is_some(),
        };
        for variant in all(&shape, None) {
            for device in common::devices() {
                let b = marlin_gpu::open_tuned(&device, only(&shape, None, variant)).unwrap();
                check_decode(&*b, &Row { window, ..row }, &[600, 3, 127], &[1, 1, 1], 32);
            }
        }
    }
}
