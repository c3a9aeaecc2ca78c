//! Every operator at every level and thread count.

use marlin_cpu::{Activations, CpuBackend, CpuOptions, Level};
use marlin_tensor::CacheType;
use marlin_testkit::Noise;
use marlin_testkit::conformance::{
    CHECKS, PLAIN, Row, check_attention, check_decode, check_linear,
};

/// Backends of every level this machine has, on one thread and on three.
fn backends() -> Vec<CpuBackend> {
    let levels = Level::ALL.into_iter().filter(|level| {
        if !level.is_supported() {
            eprintln!("skipped level {level}: not on this machine");
        }
        level.is_supported()
    });
    let options = levels.flat_map(|level| [1, 3].map(|threads| (level, threads)));
    options
        .map(|(level, threads)| {
            CpuBackend::new(CpuOptions { threads, level, activations: Activations::Float }).unwrap()
        })
        .collect()
}

#[test]
fn operators_conform() {
    for b in backends() {
        for (_, check) in CHECKS {
            check(&b);
        }
    }
}

/// Matrices of every format that has an encoder.
#[test]
fn linears_of_every_format() {
    let mut noise = Noise(12);
    let values: Vec<f32> = (0..70 * 256).map(|_| noise.uniform()).collect();
    let packed = marlin_quant::formats().iter().filter_map(|f| f.pack(&values, 70, 256).ok());
    let weights: Vec<_> = packed.map(|w| (marlin_quant::decode(&w).unwrap(), w)).collect();
    assert!(weights.len() > 20);
    for b in backends() {
        weights.iter().for_each(|(decoded, weight)| check_linear(&b, weight, decoded));
    }
}

/// Queries, keys, values and softmax numerators in bf16: errors of 2⁻⁸ of values within ±1, and of
/// scores up to about 8.
#[test]
fn attention_on_tiles() {
    let levels = [Level::Avx512Bf16, Level::Amx].into_iter().filter(|level| {
        if !level.is_supported() {
            eprintln!("skipped level {level}: not on this machine");
        }
        level.is_supported()
    });
    let row = Row { heads: (4, 2), dims: (32, 32), tolerance: 2e-2, ..PLAIN };
    for (level, threads) in levels.flat_map(|level| [1, 3].map(|threads| (level, threads))) {
        let options = CpuOptions { threads, level, activations: Activations::Auto };
        let b = CpuBackend::new(options).unwrap();
        for cache_type in CacheType::ALL {
            let row = Row { cache_type, ..row };
            // From the start, ragged, late in a context of several steps, and beside short ones.
            check_attention(&b, &row, &[1], &[40], 16);
            check_attention(&b, &Row { heads: (9, 3), dims: (64, 64), ..row }, &[5], &[77], 32);
            check_attention(&b, &row, &[530, 3, 20], &[45, 1, 16], 32);
            check_attention(&b, &Row { window: Some(100), ..row }, &[530], &[40], 16);
            check_attention(
                &b,
                &Row { window: Some(7), softcap: Some(1.5), ..row },
                &[9],
                &[90],
                16,
            );
            let latent = Row { heads: (6, 1), dims: (48, 32), latent: true, ..row };
            check_attention(&b, &latent, &[300], &[50], 32);
            // Neither dimension is a whole number of tiles; then one that tiles cannot hold.
            check_attention(&b, &Row { dims: (50, 80), ..row }, &[30], &[33], 16);
            check_attention(&b, &Row { dims: (50, 81), ..row }, &[30], &[33], 16);
        }
    }
}

/// Tokens of answers, over caches of every type: groups of every size, ragged columns, several parts, windows.
#[test]
fn attention_of_single_tokens() {
    for b in backends() {
        for cache_type in CacheType::ALL {
            let tolerance = if cache_type == CacheType::Bf16 { 8e-3 } else { 1e-3 };
            let row = Row { cache_type, tolerance, ..PLAIN };
            for heads in [(1, 1), (2, 1), (6, 2), (4, 1), (5, 1), (14, 2), (7, 1), (70, 1)] {
                let row = Row { heads, dims: (32, 48), ..row };
                check_decode(&b, &row, &[9, 1, 40], &[1, 1, 1], 16);
            }
            check_decode(
                &b,
                &Row { dims: (33, 64), heads: (3, 1), ..row },
                &[300, 128],
                &[1, 3],
                32,
            );
            check_decode(&b, &Row { dims: (64, 20), heads: (3, 1), ..row }, &[30], &[2], 16);
            check_decode(&b, &Row { dims: (16, 16), ..row }, &[30], &[2], 4);
            let window = Row { window: Some(100), softcap: Some(1.5), heads: (4, 2), ..row };
            check_decode(&b, &window, &[530, 20], &[2, 1], 16);
            check_decode(&b, &Row { window: Some(3), ..window }, &[128], &[4], 16);
            let latent = Row { heads: (6, 1), dims: (48, 32), latent: true, ..row };
            check_decode(&b, &latent, &[300, 5], &[1, 2], 16);
        }
    }
}

#[test]
fn a_level_that_the_machine_lacks_is_an_error() {
    for level in Level::ALL {
        let options = CpuOptions { threads: 1, level, activations: Activations::Auto };
        assert_eq!(CpuBackend::new(options).is_ok(), level.is_supported());
    }
}
