//! Rows of the attention table, and what they are checked with.

use super::{batch, check, dot, upload, values};
use marlin_tensor::{
    AttentionParams, Backend, Batch, Cache, CacheLayerSpec, CacheSpec, CacheType, Tensor,
};

/// One row of the attention table.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Query heads and key/value heads.
    pub heads: (usize, usize),
    /// Columns of a key head and of a value head.
    pub dims: (usize, usize),
    /// Keys a query sees, itself included.
    pub window: Option<u32>,
    /// Cap of scores.
    pub softcap: Option<f32>,
    /// Whether values are a prefix of the keys.
    pub latent: bool,
    /// Element type of the cache.
    pub cache_type: CacheType,
    /// On the absolute difference.
    pub tolerance: f64,
}

/// Two heads of 16 columns, in f32.
pub const PLAIN: Row = Row {
    heads: (2, 2),
    dims: (16, 16),
    window: None,
    softcap: None,
    latent: false,
    cache_type: CacheType::F32,
    tolerance: 2e-6,
};

/// `attention` over the paged cache, `create_cache` and `copy_blocks`.
///
/// # Panics
/// When the backend computes something else.
pub fn attention(b: &dyn Backend) {
    let table = [
        PLAIN,
        Row { heads: (6, 2), dims: (20, 12), ..PLAIN },
        Row { heads: (9, 3), dims: (64, 64), window: Some(7), ..PLAIN },
        Row { heads: (4, 1), dims: (33, 7), softcap: Some(1.5), ..PLAIN },
        Row { heads: (6, 1), dims: (48, 32), latent: true, ..PLAIN },
        Row { heads: (4, 2), dims: (64, 80), cache_type: CacheType::F16, tolerance: 1e-3, ..PLAIN },
        Row {
            heads: (3, 1),
            dims: (24, 16),
            latent: true,
            cache_type: CacheType::Bf16,
            tolerance: 8e-3,
            ..PLAIN
        },
    ];
    for row in table {
        check_attention(b, &row, &[9, 1, 4], &[1, 2, 3], 4);
    }
    // Several steps of the online softmax, tiles of several tasks, a window that starts late.
    let wide = Row { heads: (4, 2), dims: (32, 32), ..PLAIN };
    check_attention(b, &wide, &[530], &[40], 32);
    check_attention(b, &Row { window: Some(100), ..wide }, &[530], &[40], 32);
    check_attention(b, &Row { latent: true, heads: (6, 1), ..wide }, &[600, 3], &[1, 1], 32);
    // Prompts over a cache of halves, of one sequence and of two whose rows are neighbours.
    let halves = Row { dims: (64, 48), cache_type: CacheType::F16, tolerance: 1e-3, ..wide };
    check_attention(b, &halves, &[0, 150], &[50, 40], 16);
    check_attention(b, &Row { window: Some(70), softcap: Some(2.0), ..halves }, &[150], &[90], 16);
    let brain = Row { dims: (128, 128), cache_type: CacheType::Bf16, tolerance: 8e-3, ..wide };
    check_attention(b, &brain, &[70], &[80], 16);
    // Values that are a prefix of the keys.
    let latent = Row { heads: (3, 1), dims: (192, 128), latent: true, ..halves };
    check_attention(b, &latent, &[0, 75], &[50, 40], 16);
    let brain = Row { cache_type: CacheType::Bf16, tolerance: 8e-3, ..latent };
    check_attention(b, &Row { window: Some(40), softcap: Some(2.0), ..brain }, &[75], &[36], 16);
    // Codes of 8 and 4 bits: groups that fill their words and that do not, single tokens and prompts, latent keys.
    for cache_type in [CacheType::Q8, CacheType::Q4, CacheType::K8V4] {
        let codes = Row { dims: (64, 96), cache_type, tolerance: 1e-3, ..wide };
        check_attention(b, &codes, &[9, 1, 4], &[1, 2, 3], 4);
        let windowed = Row { window: Some(70), softcap: Some(2.0), ..codes };
        check_attention(b, &windowed, &[150], &[90], 16);
        if cache_type != CacheType::K8V4 {
            check_attention(b, &Row { dims: (128, 128), ..codes }, &[0, 70], &[50, 40], 16);
            let latent = Row { dims: (96, 64), latent: true, heads: (6, 1), ..codes };
            check_attention(b, &latent, &[200, 3], &[1, 1], 32);
        }
    }
}

/// A value that is no number in caches of 8 and 4 bits: its column comes out as none, and no other group of columns does.
///
/// # Panics
/// When the backend hides it.
pub fn no_numbers(b: &dyn Backend) {
    let params = AttentionParams {
        num_heads: 4,
        num_kv_heads: 2,
        key_head_dim: 64,
        value_head_dim: 96,
        scale: 0.7,
        window: None,
        softcap: None,
    };
    for cache_type in [CacheType::Q8, CacheType::Q4, CacheType::K8V4] {
        for bad in [f32::NAN, f32::INFINITY] {
            let layers =
                vec![CacheLayerSpec { num_kv_heads: 2, key_head_dim: 64, value_head_dim: 96 }];
            let spec = CacheSpec { layers, block_size: 4, num_blocks: 1, cache_type };
            let cache = b.create_cache(&spec).unwrap();
            let mut v = values(2 * 96, 17);
            v[40] = bad;
            let row = |values: &[f32]| upload(b, 1, values);
            let (q, k, v) = (row(&values(4 * 64, 18)), row(&values(2 * 64, 19)), row(&v));
            let mut batch = Batch::new(4);
            batch.push(&[0], 0, &[0], 4, 1);
            let found = b.attention(&q, &k, Some(&v), &cache, 0, &batch, &params).unwrap();
            let found = b.download(&found).unwrap();
            let what = format!("{bad} in {cache_type} on {}", b.name());
            assert!(found[..32].iter().all(|v| v.is_finite()), "{what}");
            assert!(!found[40].is_finite(), "{what}");
        }
    }
}

/// Prefills `cached` tokens of each sequence, then attends with `rows` more of its prompt.
///
/// # Panics
/// When the backend computes something else.
pub fn check_attention(
    b: &dyn Backend,
    row: &Row,
    cached: &[usize],
    rows: &[usize],
    block_size: usize,
) {
    attend(b, row, cached, rows, block_size, false);
}

/// [`check_attention`] with `rows` tokens of answers.
///
/// # Panics
/// When the backend computes something else.
pub fn check_decode(
    b: &dyn Backend,
    row: &Row,
    cached: &[usize],
    rows: &[usize],
    block_size: usize,
) {
    attend(b, row, cached, rows, block_size, true);
}

fn attend(
    b: &dyn Backend,
    row: &Row,
    cached: &[usize],
    rows: &[usize],
    block_size: usize,
    decode: bool,
) {
    let ((heads, kv_heads), (dk, dv), cache_type) = (row.heads, row.dims, row.cache_type);
    let params = AttentionParams {
        num_heads: heads,
        num_kv_heads: kv_heads,
        key_head_dim: dk,
        value_head_dim: dv,
        scale: 0.7,
        window: row.window,
        softcap: row.softcap,
    };
    let lens: Vec<(usize, usize)> = cached.iter().copied().zip(rows.iter().copied()).collect();
    let (mut second, blocks) = batch(&lens, block_size);
    second.sequences.iter_mut().for_each(|sequence| sequence.decode = decode);
    let mut first = Batch::new(block_size);
    for (sequence, cached) in second.sequences.iter().zip(cached) {
        first.push(&vec![0; *cached], 0, &sequence.block_table, 64, 0);
    }
    let layer = CacheLayerSpec {
        num_kv_heads: kv_heads,
        key_head_dim: dk,
        value_head_dim: if row.latent { 0 } else { dv },
    };
    let spec = CacheSpec { layers: vec![layer; 2], block_size, num_blocks: blocks + 3, cache_type };
    let mut cache = b.create_cache(&spec).unwrap();
    // Keys and values of every position of every sequence, and queries of the second pass.
    let total: usize = lens.iter().map(|(c, r)| c + r).sum();
    let (k, v) = (values(total * kv_heads * dk, 13), values(total * kv_heads * dv, 14));
    let stored = |all: &[f32], columns: usize, cache_type: CacheType| -> Vec<f32> {
        all.chunks(columns).flat_map(|row| as_stored(row, cache_type)).collect()
    };
    let q = values(second.rows() * heads * dk, 15);
    let pick = |batch: &Batch, all: &[f32], columns: usize| -> Tensor {
        let mut out = Vec::new();
        let mut start = 0;
        for (sequence, (c, r)) in batch.sequences.iter().zip(&lens) {
            let from = start + sequence.context_len - sequence.rows;
            out.extend_from_slice(&all[from * columns..(from + sequence.rows) * columns]);
            start += c + r;
        }
        upload(b, batch.rows(), &out)
    };
    let attend = |cache: &Cache, batch: &Batch, q: &Tensor| {
        let keys = pick(batch, &k, kv_heads * dk);
        let vals = pick(batch, &v, kv_heads * dv);
        let vals = (!row.latent).then_some(&vals);
        b.attention(q, &keys, vals, cache, 1, batch, &params).unwrap()
    };
    let zeros = upload(b, first.rows(), &vec![0.0; first.rows() * heads * dk]);
    attend(&cache, &first, &zeros);
    // The blocks may move between passes.
    if blocks > 3 {
        let moved = second.sequences[0].block_table[0];
        b.copy_blocks(&cache, &[(moved, blocks as u32 + 1)]).unwrap();
        cache = Cache { spec: cache.spec.clone(), handle: cache.handle.clone() };
        second.sequences[0].block_table[0] = blocks as u32 + 1;
        for row in 0..second.sequences[0].rows {
            let position = second.positions[row] as usize;
            let block = second.sequences[0].block_table[position / block_size] as usize;
            second.slot_mapping[row] = (block * block_size + position % block_size) as u32;
        }
    }
    let found = attend(&cache, &second, &upload(b, second.rows(), &q));

    let (k, v) = (stored(&k, dk, cache_type.keys()), stored(&v, dv, cache_type.values()));
    let mut expected = Vec::new();
    let mut start = 0;
    for (sequence, (c, r)) in second.sequences.iter().zip(&lens) {
        for (i, head) in (0..*r).flat_map(|i| (0..heads).map(move |h| (i, h))) {
            let q = &q[((sequence.first_row + i) * heads + head) * dk..][..dk];
            let at = |all: &[f32], p: usize, dim: usize, len: usize| {
                let head = head / (heads / kv_heads);
                all[((start + p) * kv_heads + head) * dim..][..len].to_vec()
            };
            let position = c + i;
            let visible =
                (0..=position).filter(|p| row.window.is_none_or(|w| position - p < w as usize));
            let scores: Vec<(usize, f64)> = visible
                .map(|p| {
                    let score = dot(q, &at(&k, p, dk, dk)) * 0.7f32 as f64;
                    let cap = |c: f32| f64::from(c) * (score / f64::from(c)).tanh();
                    (p, row.softcap.map_or(score, cap).exp())
                })
                .collect();
            let total: f64 = scores.iter().map(|(_, e)| e).sum();
            let mut sums = vec![0.0; dv];
            for (p, e) in scores {
                let value = if row.latent { at(&k, p, dk, dv) } else { at(&v, p, dv, dv) };
                sums.iter_mut().zip(value).for_each(|(s, v)| *s += e / total * f64::from(v));
            }
            expected.extend(sums);
        }
        start += c + r;
    }
    let what = format!("attention {:?} {:?} {:?}", row.heads, row.dims, cache_type);
    check(b, &what, &found, &expected, row.tolerance);
}

/// A row as quantized caches give it back: groups of 32 columns without the largest, turned by the Hadamard matrix,
/// rounded to steps of a bf16 scale, and turned back. Other types are compared with what was written.
fn as_stored(row: &[f32], cache_type: CacheType) -> Vec<f32> {
    let steps = match cache_type {
        CacheType::Q8 => 127.0,
        CacheType::Q4 => -8.0,
        _ => return row.to_vec(),
    };
    let turn = |group: &[f32]| -> Vec<f32> {
        if group.len() < 32 {
            return group.to_vec();
        }
        let sign =
            |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
        let sum =
            |i| group.iter().enumerate().map(|(j, v)| sign(i, j) * f64::from(*v)).sum::<f64>();
        (0..32).map(|i| (sum(i) / 32f64.sqrt()) as f32).collect()
    };
    let group = |group: &[f32]| {
        // The largest column is kept in bf16, apart from the others.
        let mut rest = group.to_vec();
        let size = |a: &usize, b: &usize| rest[*a].abs().total_cmp(&rest[*b].abs());
        let largest = (0..rest.len()).rev().max_by(size).unwrap();
        let apart = half::bf16::from_f32(rest[largest]).to_f32();
        rest[largest] -= apart;
        let turned = turn(&rest);
        let peak = turned.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap();
        let peak = if cache_type == CacheType::Q8 { peak.abs() } else { peak };
        let scale = half::bf16::from_f32(peak / steps).to_f32();
        let least = if cache_type == CacheType::Q8 { -127.0 } else { -8.0 };
        let most = if cache_type == CacheType::Q8 { 127.0 } else { 7.0 };
        let round = |v: &f32| (v / scale).round_ties_even().clamp(least, most) * scale;
        let mut stored = turn(&turned.iter().map(round).collect::<Vec<_>>());
        stored[largest] += apart;
        stored
    };
    row.chunks(32).flat_map(group).collect()
}
