//! Operators that a backend may do at once, against the ones they are made of.

use super::{batch, check, load, upload, values};
use marlin_tensor::{
    Activation, Backend, Experts, GatedLinears, Heads, Rope, RopeStyle, Router, Scoring, Tensor,
};

/// What `x` holds.
fn held(b: &dyn Backend, x: &Tensor) -> Vec<f64> {
    b.download(x).unwrap().into_iter().map(f64::from).collect()
}

/// `add_norm`, also where the rows it is given are used elsewhere.
///
/// # Panics
/// When the backend computes something else.
pub fn sums_and_their_norms(b: &dyn Backend) {
    for (rows, columns) in [(1, 33), (3, 600), (2, 2300)] {
        let [x, y] = [60, 61].map(|seed| upload(b, rows, &values(rows * columns, seed)));
        let weight = b.load_vector(values(columns, 62)).unwrap();
        let sum = b.add(x.clone(), &y).unwrap();
        let normed = b.rms_norm(&sum, &weight, 1e-5).unwrap();
        let before = held(b, &x);
        let (found, found_normed) = b.add_norm(x.clone(), &y, &weight, 1e-5).unwrap();
        check(b, "add_norm, sum", &found, &held(b, &sum), 0.0);
        check(b, "add_norm, norm", &found_normed, &held(b, &normed), 2e-6);
        check(b, "add_norm, input", &x, &before, 0.0);
    }
}

/// `latent_inputs` of both styles, also where only a part of the columns with positions rotates.
///
/// # Panics
/// When the backend computes something else.
pub fn inputs_of_latent_attention(b: &dyn Backend) {
    let (batch, _) = batch(&[(5, 3), (0, 2), (40, 1)], 4);
    for (heads, nope, rope, latent, pairs) in [(2, 24, 8, 48, 4), (3, 5, 10, 200, 3)] {
        for style in [RopeStyle::HalfSplit, RopeStyle::Interleaved] {
            let inv_freq = (0..pairs).map(|i| 0.1f32.powi(i)).collect();
            let rotary = Rope { style, inv_freq, magnitude: 0.9, long: None };
            let table = b.load_rope(&rotary).unwrap();
            let norm = b.load_vector(values(latent, 63)).unwrap();
            let wide = nope + rope;
            let q = upload(b, 6, &values(6 * heads * wide, 64));
            let kv = upload(b, 6, &values(6 * (latent + rope), 65));
            let cut = |x: &Tensor, heads, head_dim, start, len| {
                b.slice_heads(x, Heads { heads, head_dim }, start, len).unwrap()
            };
            let turn =
                |x, heads| b.rope(x, &table, Heads { heads, head_dim: rope }, &batch).unwrap();
            let key = b.rms_norm(&cut(&kv, 1, latent + rope, 0, latent), &norm, 1e-6).unwrap();
            let key_rope = turn(cut(&kv, 1, latent + rope, latent, rope), 1);
            let expected = [
                cut(&q, heads, wide, 0, nope),
                turn(cut(&q, heads, wide, nope, rope), heads),
                b.concat_heads(&key, &key_rope, 1).unwrap(),
            ];
            let found = b.latent_inputs(&q, &kv, &norm, 1e-6, &table, heads, &batch).unwrap();
            let found = [found.0, found.1, found.2];
            for (found, expected) in found.iter().zip(&expected) {
                check(b, "latent_inputs", found, &held(b, expected), 2e-6);
            }
        }
    }
}

/// `mixture`, with a shared expert of the size of the others and of another.
///
/// # Panics
/// When the backend computes something else.
pub fn mixture_with_a_shared_expert(b: &dyn Backend) {
    for (rows, hidden, inner, shared_inner, experts, top_k) in [
        (1, 16, 24, 24, 8, 4),
        (7, 33, 17, 17, 5, 2),
        (60, 64, 40, 40, 6, 3),
        (3, 16, 24, 48, 4, 2),
    ] {
        let three = |inner: usize, seed: u64| GatedLinears {
            gate: load(b, inner, hidden, &values(hidden * inner, seed)),
            up: load(b, inner, hidden, &values(hidden * inner, seed + 100)),
            down: load(b, hidden, inner, &values(hidden * inner, seed + 200)),
        };
        // Twice, because a backend may put together what it was given.
        let all = || {
            let each: Vec<_> = (0..experts as u64).map(|e| three(inner, 70 + e)).collect();
            let of = |f: fn(&GatedLinears) -> &marlin_tensor::Linear| each.iter().map(f).cloned();
            let of = |f| of(f).collect();
            (
                Experts { gate: of(|e| &e.gate), up: of(|e| &e.up), down: of(|e| &e.down) },
                three(shared_inner, 90),
            )
        };
        let router = Router {
            scoring: Scoring::Softmax,
            num_experts: experts,
            top_k,
            num_groups: 1,
            top_k_groups: 1,
            group_score_experts: 1,
            normalize: true,
            scaling_factor: 1.5,
        };
        let logits = upload(b, rows, &values(rows * experts, 66));
        let routing = b.route(&logits, None, &router).unwrap();
        let x = upload(b, rows, &values(rows * hidden, 67));
        let (loaded, shared) = all();
        let y = b.experts(&x, &routing, &loaded, Activation::Silu).unwrap();
        let gate = b.linear(&x, &shared.gate).unwrap();
        let gated = b.gated(gate, &b.linear(&x, &shared.up).unwrap(), Activation::Silu).unwrap();
        let expected = b.add(y, &b.linear(&gated, &shared.down).unwrap()).unwrap();
        let (loaded, shared) = all();
        let found = b.mixture(&x, &routing, &loaded, &shared, Activation::Silu).unwrap();
        check(b, "mixture", &found, &held(b, &expected), 3e-4);
        let again = b.mixture(&x, &routing, &loaded, &shared, Activation::Silu).unwrap();
        check(b, "mixture, again", &again, &held(b, &found), 0.0);
    }
}

/// `head_linear_beside`.
///
/// # Panics
/// When the backend computes something else.
pub fn heads_beside_others(b: &dyn Backend) {
    for (rows, heads, inputs, outputs, others) in
        [(1, 3, 24, 40, 8), (5, 2, 8, 5, 33), (18, 4, 64, 32, 16)]
    {
        let matrices = values(heads * outputs * inputs, 110);
        let weight = b.load_head_linear(heads, outputs, inputs, matrices).unwrap();
        let x = upload(b, rows, &values(rows * heads * inputs, 111));
        let beside = upload(b, rows, &values(rows * heads * others, 112));
        let alone = b.head_linear(&x, &weight).unwrap();
        let expected = b.concat_heads(&alone, &beside, heads).unwrap();
        let found = b.head_linear_beside(&x, &weight, &beside).unwrap();
        check(b, "head_linear_beside", &found, &held(b, &expected), 2e-6);
    }
}

/// `feed_forward` with every activation.
///
/// # Panics
/// When the backend computes something else.
pub fn gated_feed_forwards(b: &dyn Backend) {
    for (rows, hidden, inner) in [(1, 32, 96), (3, 16, 24), (20, 64, 160)] {
        let linears = GatedLinears {
            gate: load(b, inner, hidden, &values(hidden * inner, 113)),
            up: load(b, inner, hidden, &values(hidden * inner, 114)),
            down: load(b, hidden, inner, &values(hidden * inner, 115)),
        };
        let x = upload(b, rows, &values(rows * hidden, 116));
        for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
            let gate = b.linear(&x, &linears.gate).unwrap();
            let up = b.linear(&x, &linears.up).unwrap();
            let gated = b.gated(gate, &up, activation).unwrap();
            let expected = b.linear(&gated, &linears.down).unwrap();
            let found = b.feed_forward(&x, &linears, activation).unwrap();
            check(b, "feed_forward", &found, &held(b, &expected), 3e-4);
        }
    }
}
