//! The operators of a backend against their formulas in f64: one table for all backends.
//!
//! A tolerance is on the absolute difference for inputs within ±1 and is the same for all backends, which sum in f32
//! and approximate exponentials.

mod attention;
mod draws;
mod fused;

pub use attention::{PLAIN, Row, attention, check_attention, check_decode};

use marlin_tensor::{
    Activation, Backend, Batch, CacheLayerSpec, CacheSpec, CacheType, Experts, Heads, HostTensor,
    Linear, LinearOptions, LongRope, Rope, RopeStyle, Router, Scoring, Tensor, Weight,
};

/// Panics when a backend computes something else.
pub type Check = fn(&dyn Backend);

/// Every check of this module.
pub const CHECKS: [(&str, Check); 21] = [
    ("elementwise_operators", elementwise_operators),
    (
        "activations_far_from_zero_neither_overflow_nor_vanish",
        activations_far_from_zero_neither_overflow_nor_vanish,
    ),
    ("rms_norm_of_rows_and_of_heads", rms_norm_of_rows_and_of_heads),
    ("linear_with_bias", linear_with_bias),
    ("linear_per_head", linear_per_head),
    ("embedding_and_rows", embedding_and_rows),
    ("heads_cut_and_joined", heads_cut_and_joined),
    ("rope_by_style_width_and_sequence_length", rope_by_style_width_and_sequence_length),
    ("attention", attention),
    ("what_is_no_number_stays_visible_in_a_cache", attention::no_numbers),
    ("caches_without_end_are_refused", caches_without_end_are_refused),
    ("mixture_of_experts", mixture_of_experts),
    ("sums_and_their_norms", fused::sums_and_their_norms),
    ("inputs_of_latent_attention", fused::inputs_of_latent_attention),
    ("mixture_with_a_shared_expert", fused::mixture_with_a_shared_expert),
    ("heads_beside_others", fused::heads_beside_others),
    ("gated_feed_forwards", fused::gated_feed_forwards),
    ("draws_of_rows", draws::draws_of_rows),
    ("draws_follow_the_distribution", draws::draws_follow_the_distribution),
    ("draws_of_unusual_rows", draws::draws_of_unusual_rows),
    ("logits_of_draws", draws::logits_of_draws),
];

/// Values within ±1, the same on every machine.
fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn matrix(out_features: usize, in_features: usize, values: &[f32]) -> Weight {
    let weight = HostTensor::from_f32(vec![out_features, in_features], values);
    Weight { format: "f32", out_features, in_features, parts: vec![("weight", weight)] }
}

fn load(b: &dyn Backend, out_features: usize, in_features: usize, values: &[f32]) -> Linear {
    let weight = matrix(out_features, in_features, values);
    b.load_linear(&weight, None, LinearOptions::default()).unwrap()
}

fn upload(b: &dyn Backend, rows: usize, values: &[f32]) -> Tensor {
    b.upload(rows, values.len() / rows, values.to_vec()).unwrap()
}

#[track_caller]
fn check(b: &dyn Backend, what: &str, found: &Tensor, expected: &[f64], tolerance: f64) {
    let found = b.download(found).unwrap();
    assert_eq!(found.len(), expected.len(), "{what} on {}", b.name());
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let difference = (f64::from(*f) - e).abs();
        assert!(difference <= tolerance, "{what} on {}: [{i}] {f} for {e}", b.name());
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// A batch of one sequence per `(cached, rows)`, on blocks of `block_size` dealt out in an order
/// that is neither consecutive nor sorted.
fn batch(sequences: &[(usize, usize)], block_size: usize) -> (Batch, usize) {
    let blocks: usize = sequences.iter().map(|(c, r)| (c + r).div_ceil(block_size)).sum();
    let mut free: Vec<u32> = (0..blocks as u32).collect();
    free.sort_by_key(|b| (b * 7919) % 31);
    let mut batch = Batch::new(block_size);
    for (cached, rows) in sequences {
        let table: Vec<u32> = free.drain(..(cached + rows).div_ceil(block_size)).collect();
        let tokens: Vec<u32> = (0..*rows as u32).map(|i| (i * 5 + *cached as u32) % 11).collect();
        batch.push(&tokens, *cached, &table, 64, 1);
    }
    (batch, blocks)
}

/// `add`, `softcap` and every activation.
///
/// # Panics
/// When the backend computes something else.
pub fn elementwise_operators(b: &dyn Backend) {
    // The last shape is large enough for several tasks.
    for (rows, columns) in [(1, 1), (3, 17), (2, 64), (1, 100), (150, 300)] {
        let (x, y) = (values(rows * columns, 1), values(rows * columns, 2));
        let (tx, ty) = (upload(b, rows, &x), upload(b, rows, &y));
        let pairs = || x.iter().zip(&y).map(|(x, y)| (f64::from(*x), f64::from(*y)));

        let expected: Vec<f64> = pairs().map(|(x, y)| x + y).collect();
        check(b, "add", &b.add(tx.clone(), &ty).unwrap(), &expected, 1e-7);

        let cap = |x: f64| 0.7 * (x / 0.7).tanh();
        let expected: Vec<f64> = pairs().map(|(x, _)| cap(x)).collect();
        check(b, "softcap", &b.softcap(tx.clone(), 0.7).unwrap(), &expected, 3e-7);

        let wide: Vec<f32> = x.iter().map(|x| x * 9.0).collect();
        let tanh = |x: f64| {
            0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044715 * x * x * x)).tanh())
        };
        // The error function as an integral, by Simpson's rule.
        let erf = |z: f64| {
            let (n, f) = (400, |t: f64| (-t * t).exp());
            let h = z / n as f64;
            let inner: f64 =
                (1..n).map(|i| f(h * i as f64) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
            (f(0.0) + inner + f(z)) * h / 3.0 * std::f64::consts::FRAC_2_SQRT_PI
        };
        let gelu = |x: f64| 0.5 * x * (1.0 + erf(x / 2.0f64.sqrt()));
        let activations: [(Activation, &dyn Fn(f64) -> f64); 3] =
            [(Activation::Silu, &silu), (Activation::GeluTanh, &tanh), (Activation::Gelu, &gelu)];
        for (activation, formula) in activations {
            if rows > 100 && activation == Activation::Gelu {
                continue; // the integral is slow
            }
            let expected: Vec<f64> =
                wide.iter().zip(&y).map(|(g, u)| formula(f64::from(*g)) * f64::from(*u)).collect();
            let found = b.gated(upload(b, rows, &wide), &ty, activation).unwrap();
            check(b, &format!("{activation:?}"), &found, &expected, 3e-6);
        }
        // Operators consume a tensor without changing what others still hold.
        assert_eq!(b.download(&tx).unwrap(), x);
    }
}

/// Activations of huge values, and of what is no number.
///
/// # Panics
/// When the backend computes something else.
pub fn activations_far_from_zero_neither_overflow_nor_vanish(b: &dyn Backend) {
    let x = [-1e30f32, -200.0, -90.0, 90.0, 200.0, 1e30];
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
        let ones = upload(b, 1, &[1.0; 6]);
        let y = b.download(&b.gated(upload(b, 1, &x), &ones, activation).unwrap()).unwrap();
        for (x, y) in x.iter().zip(y).skip(1) {
            assert!((y - x.max(0.0)).abs() <= 1e-6 * x.abs(), "{activation:?} {x} {y}");
        }
    }
    let nan = upload(b, 1, &[f32::NAN]);
    let y = b.gated(nan, &upload(b, 1, &[1.0]), Activation::Silu).unwrap();
    assert!(b.download(&y).unwrap()[0].is_nan());
}

/// `rms_norm`.
///
/// # Panics
/// When the backend computes something else.
pub fn rms_norm_of_rows_and_of_heads(b: &dyn Backend) {
    for (rows, columns, group) in
        [(1, 1, 1), (3, 48, 16), (2, 33, 33), (1, 384, 384), (70, 500, 100)]
    {
        let (x, w) = (values(rows * columns, 3), values(group, 4));
        let expected: Vec<f64> = x
            .chunks(group)
            .flat_map(|g| {
                let scale = 1.0 / (dot(g, g) / group as f64 + 1e-5).sqrt();
                g.iter().zip(&w).map(move |(x, w)| f64::from(*x) * scale * f64::from(*w))
            })
            .collect();
        let w = b.load_vector(w.clone()).unwrap();
        let found = b.rms_norm(&upload(b, rows, &x), &w, 1e-5).unwrap();
        check(b, "rms_norm", &found, &expected, 2e-6);
    }
}

/// `linear` and `linear_many` of f32 matrices.
///
/// # Panics
/// When the backend computes something else.
pub fn linear_with_bias(b: &dyn Backend) {
    for (rows, n, k) in [(1, 1, 1), (1, 65, 48), (3, 7, 33), (37, 130, 64)] {
        let (x, w, bias) = (values(rows * k, 5), values(n * k, 6), values(n, 7));
        let expected: Vec<f64> = x
            .chunks(k)
            .flat_map(|x| w.chunks(k).zip(&bias).map(|(w, b)| dot(x, w) + f64::from(*b)))
            .collect();
        let bias = HostTensor::from_f32(vec![n], &bias);
        let linear =
            b.load_linear(&matrix(n, k, &w), Some(&bias), LinearOptions::default()).unwrap();
        assert!(linear.bytes > 0);
        let x = upload(b, rows, &x);
        check(b, "linear", &b.linear(&x, &linear).unwrap(), &expected, 1e-5);
        let both = b.linear_many(&x, &[&linear, &linear]).unwrap();
        check(b, "linear_many", &both[1], &expected, 1e-5);
    }
    let bias = HostTensor::from_f32(vec![3], &[0.0; 3]);
    let weight = matrix(2, 2, &[0.0; 4]);
    assert!(b.load_linear(&weight, Some(&bias), LinearOptions::default()).is_err());
}

/// `linear` and `linear_many` of a matrix in any format, which decodes to `decoded`.
///
/// # Panics
/// When the backend computes something else.
pub fn check_linear(b: &dyn Backend, weight: &Weight, decoded: &[f32]) {
    let k = weight.in_features;
    let linear = b.load_linear(weight, None, LinearOptions::default()).unwrap();
    for rows in [1, 5, 37] {
        let x = values(rows * k, 90);
        let products = x.chunks(k).flat_map(|x| decoded.chunks(k).map(|w| dot(x, w)));
        let expected: Vec<f64> = products.collect();
        let x = upload(b, rows, &x);
        check(b, &linear.kernel, &b.linear(&x, &linear).unwrap(), &expected, 3e-5);
        let both = b.linear_many(&x, &[&linear, &linear]).unwrap();
        check(b, &linear.kernel, &both[1], &expected, 3e-5);
    }
}

/// `head_linear`.
///
/// # Panics
/// When the backend computes something else.
pub fn linear_per_head(b: &dyn Backend) {
    // Weights of so many steps a unit fit halves or not; many rows of those may have kernels of their own.
    for (rows, heads, n, k, steps) in [
        (1, 1, 1, 1, f32::MAX),
        (2, 3, 5, 17, f32::MAX),
        (1, 6, 128, 64, f32::MAX),
        (2, 40, 100, 64, f32::MAX),
        (33, 4, 40, 24, f32::MAX),
        (70, 3, 48, 200, 1024.0),
        (33, 2, 272, 136, 128.0),
    ] {
        let stepped = |w: f32| if steps == f32::MAX { w } else { (w * steps).round() / steps };
        let x = values(rows * heads * k, 8);
        let w: Vec<f32> = values(heads * n * k, 9).into_iter().map(stepped).collect();
        let expected: Vec<f64> = x
            .chunks(k)
            .enumerate()
            .flat_map(|(i, x)| w[i % heads * n * k..][..n * k].chunks(k).map(|w| dot(x, w)))
            .collect();
        let linear = b.load_head_linear(heads, n, k, w.clone()).unwrap();
        let found = b.head_linear(&upload(b, rows, &x), &linear).unwrap();
        // Where bf16 is enough for weights, inputs may be two of these.
        let tolerance = if steps < 256.0 { 1e-4 } else { 1e-5 };
        check(b, "head_linear", &found, &expected, tolerance);
    }
}

/// `embed` and `gather_rows`.
///
/// # Panics
/// When the backend computes something else.
pub fn embedding_and_rows(b: &dyn Backend) {
    let table = values(11 * 48, 10);
    let embedding = b.load_embedding(&matrix(11, 48, &table)).unwrap();
    for rows in [1, 9, 1500] {
        let (batch, _) = batch(&[(0, rows)], 8);
        let expected: Vec<f64> = batch
            .tokens
            .iter()
            .flat_map(|&t| table[t as usize * 48..][..48].iter().map(|v| f64::from(*v) * 3.0))
            .collect();
        let found = b.embed(&embedding, &batch, 3.0).unwrap();
        check(b, "embed", &found, &expected, 1e-6);
        let gathered = b.gather_rows(&found, &[0, rows as u32 - 1]).unwrap();
        let ends = [&expected[..48], &expected[(rows - 1) * 48..]].concat();
        check(b, "gather_rows", &gathered, &ends, 1e-6);
    }
}

/// `slice_heads` and `concat_heads`.
///
/// # Panics
/// When the backend computes something else.
pub fn heads_cut_and_joined(b: &dyn Backend) {
    let x = values(2 * 3 * 10, 11);
    let (t, heads) = (upload(b, 2, &x), Heads { heads: 3, head_dim: 10 });
    let head = b.slice_heads(&t, heads, 0, 4).unwrap();
    let tail = b.slice_heads(&t, heads, 4, 6).unwrap();
    let expected: Vec<f64> =
        x.chunks(10).flat_map(|h| h[4..].iter().map(|v| f64::from(*v))).collect();
    check(b, "slice_heads", &tail, &expected, 0.0);
    let whole: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
    check(b, "concat_heads", &b.concat_heads(&head, &tail, 3).unwrap(), &whole, 0.0);
}

/// `rope` of both styles, with and without a table for long sequences.
///
/// # Panics
/// When the backend computes something else.
pub fn rope_by_style_width_and_sequence_length(b: &dyn Backend) {
    let long = LongRope { threshold: 64, inv_freq: vec![0.25, 0.125, 0.5], magnitude: 1.25 };
    for style in [RopeStyle::HalfSplit, RopeStyle::Interleaved] {
        for (long, max_context) in [(None, 64), (Some(&long), 64), (Some(&long), 65)] {
            let inv_freq = vec![1.0, 0.1, 0.01];
            let rope = Rope { style, inv_freq, magnitude: 0.9, long: long.cloned() };
            let table = b.load_rope(&rope).unwrap();
            let (mut batch, _) = batch(&[(5, 3), (0, 2), (40, 1)], 4);
            batch.sequences.iter_mut().for_each(|s| s.max_context = max_context);
            let x = values(6 * 2 * 8, 12);
            let mut expected: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
            let (frequencies, magnitude) = match long {
                Some(l) if max_context > l.threshold => (&l.inv_freq, l.magnitude),
                _ => (&rope.inv_freq, rope.magnitude),
            };
            for (i, head) in expected.chunks_mut(8).enumerate() {
                for (pair, f) in frequencies.iter().enumerate() {
                    let angle = f64::from(batch.positions[i / 2] as f32 * f);
                    let (c, s) = (angle.cos(), angle.sin());
                    let (i, j) = match style {
                        RopeStyle::HalfSplit => (pair, pair + 3),
                        RopeStyle::Interleaved => (2 * pair, 2 * pair + 1),
                    };
                    let (p, q, m) = (head[i], head[j], f64::from(magnitude));
                    (head[i], head[j]) = ((p * c - q * s) * m, (q * c + p * s) * m);
                }
            }
            let heads = Heads { heads: 2, head_dim: 8 };
            let found = b.rope(upload(b, 6, &x), &table, heads, &batch).unwrap();
            check(b, "rope", &found, &expected, 1e-6);
        }
    }
}

/// Caches that no memory holds.
///
/// # Panics
/// When the backend makes one.
pub fn caches_without_end_are_refused(b: &dyn Backend) {
    for cache_type in CacheType::ALL {
        for num_blocks in [1 << 40, usize::MAX] {
            let layer = CacheLayerSpec { num_kv_heads: 1, key_head_dim: 32, value_head_dim: 32 };
            let spec = CacheSpec { layers: vec![layer], block_size: 4, num_blocks, cache_type };
            let error = b.create_cache(&spec).err().unwrap().to_string();
            assert!(error.contains("bytes"), "{error}");
        }
    }
}

/// `route` and `experts`.
///
/// # Panics
/// When the backend computes something else.
pub fn mixture_of_experts(b: &dyn Backend) {
    for (rows, hidden, inner, experts, top_k) in
        [(1, 16, 24, 8, 4), (1, 8, 8, 2, 1), (7, 33, 17, 5, 2), (90, 64, 40, 6, 3)]
    {
        let weights: Vec<[Vec<f32>; 3]> = (0..experts as u64)
            .map(|e| [20, 40, 60].map(|seed| values(hidden * inner, seed + e)))
            .collect();
        let loaded = Experts {
            gate: weights.iter().map(|w| load(b, inner, hidden, &w[0])).collect(),
            up: weights.iter().map(|w| load(b, inner, hidden, &w[1])).collect(),
            down: weights.iter().map(|w| load(b, hidden, inner, &w[2])).collect(),
        };
        let router = Router {
            scoring: Scoring::Sigmoid,
            num_experts: experts,
            top_k,
            num_groups: 1,
            top_k_groups: 1,
            group_score_experts: 1,
            normalize: true,
            scaling_factor: 1.8,
        };
        let logits = upload(b, rows, &values(rows * experts, 80));
        let bias = b.load_vector(values(experts, 81)).unwrap();
        let routing = b.route(&logits, Some(&bias), &router).unwrap();
        let (ids, shares) = b.download_routing(&routing).unwrap();
        assert_eq!((ids.len(), shares.len()), (rows * top_k, rows * top_k));
        let x = values(rows * hidden, 82);
        let mut expected = vec![0.0; rows * hidden];
        for (entry, (&expert, &share)) in ids.iter().zip(&shares).enumerate() {
            let row = entry / top_k;
            let x = &x[row * hidden..][..hidden];
            let [gate, up, down] = &weights[expert as usize];
            let inner_values: Vec<f32> = gate
                .chunks(hidden)
                .zip(up.chunks(hidden))
                .map(|(g, u)| (silu(dot(x, g)) * dot(x, u)) as f32)
                .collect();
            for (y, d) in expected[row * hidden..].iter_mut().zip(down.chunks(inner)) {
                *y += f64::from(share) * dot(&inner_values, d);
            }
        }
        let x = upload(b, rows, &x);
        let found = b.experts(&x, &routing, &loaded, Activation::Silu).unwrap();
        check(b, "experts", &found, &expected, 3e-4);
    }
}
