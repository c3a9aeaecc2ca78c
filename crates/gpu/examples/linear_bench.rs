//! Times products with one matrix on a GPU: `linear_bench [DEVICE] [REPEATS]`.
//!
//! Each product reads another copy of the matrix, more of them than caches hold, and hundreds are launched as one
//! recording; what is printed is the wall time of a recording over its products, median and spread of the repeats. It
//! holds the launch of the recording and the copy of one row.

use marlin_quant::exl3::codebook::{MCG_MULTIPLIER, MUL1_MULTIPLIER};
use marlin_quant::format;
use marlin_tensor::{
    Backend, Batch, CacheLayerSpec, CacheSpec, CacheType, DType, HostTensor, Linear, LinearOptions,
    Weight,
};
use marlin_testkit::Noise;
use std::time::Instant;

/// Bytes of all copies together.
const COPIES_BYTES: u64 = 400 << 20;
/// Products of a recording, at least.
const PRODUCTS: usize = 512;

fn bytes(len: usize) -> Vec<u8> {
    let mut noise = Noise(len as u64);
    (0..len.div_ceil(8)).flat_map(|_| noise.bits().to_le_bytes()).take(len).collect()
}

fn exl3(n: usize, k: usize, twice_bits: usize, marker: &'static str, multiplier: u32) -> Weight {
    let ones = |len: usize| {
        let ones = half::f16::ONE.to_le_bytes().repeat(len);
        HostTensor::new(DType::F16, vec![len], ones.into()).unwrap()
    };
    let shape = vec![k / 16, n / 16, 8 * twice_bits];
    let rings = bytes(2 * shape.iter().product::<usize>());
    let parts = vec![
        ("trellis", HostTensor::new(DType::I16, shape, rings.into()).unwrap()),
        ("suh", ones(k)),
        ("svh", ones(n)),
        (
            marker,
            HostTensor::new(DType::I32, vec![], multiplier.to_le_bytes().to_vec().into()).unwrap(),
        ),
    ];
    Weight { format: "exl3", out_features: n, in_features: k, parts }
}

fn time(b: &dyn Backend, weight: &Weight, what: &str, rows: usize, repeats: usize) {
    let (n, k) = (weight.out_features, weight.in_features);
    let copies = (COPIES_BYTES / weight.bytes()).clamp(2, 64);
    let products = PRODUCTS.next_multiple_of(copies as usize);
    let load = || b.load_linear(weight, None, LinearOptions::default()).unwrap();
    let linears: Vec<Linear> = (0..copies).map(|_| load()).collect();
    let x = b.upload(rows, k, vec![0.01; rows * k]).unwrap();
    // A pass that repeats is one over sequences of one row each.
    let layers = vec![CacheLayerSpec { num_kv_heads: 1, key_head_dim: 8, value_head_dim: 8 }];
    let spec = CacheSpec { layers, block_size: 4, num_blocks: rows, cache_type: CacheType::F16 };
    let cache = b.create_cache(&spec).unwrap();
    let mut batch = Batch::new(4);
    (0..rows).for_each(|row| batch.push(&[0], 0, &[row as u32], 4, 1));
    let mut pass = || {
        let mut last = None;
        for linear in linears.iter().cycle().take(products) {
            last = Some(b.linear(&x, linear)?);
        }
        Ok(last.expect("at least one copy"))
    };
    let owner = Instant::now().elapsed().as_nanos() as u64 ^ weight.bytes() << 20 ^ rows as u64;
    let mut run = || {
        let start = Instant::now();
        let out = b.run_pass(owner, &batch, &cache, &mut pass).unwrap();
        b.download(&b.gather_rows(&out, &[0]).unwrap()).unwrap();
        start.elapsed().as_secs_f64() * 1e6 / products as f64
    };
    (0..3).for_each(|_| {
        run();
    });
    let mut times: Vec<f64> = (0..repeats).map(|_| run()).collect();
    times.sort_by(f64::total_cmp);
    let median = times[repeats / 2];
    println!(
        "{what:<16} {k:>6} x {n:<6} m={rows:<3} {median:>8.2} us  ({:.2} to {:.2})  {:>7.1} GB/s",
        times[repeats / 10],
        times[repeats * 9 / 10],
        weight.bytes() as f64 / median / 1e3
    );
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let wanted = arguments.next().unwrap_or_default();
    let repeats = arguments.next().map_or(50, |n| n.parse().expect("a number of repeats"));
    let device = marlin_gpu::devices().into_iter().find(|d| d.runtime.name().starts_with(&wanted));
    let device = device.expect("a device of a runtime of this build");
    let b = marlin_gpu::open(&device).unwrap();
    println!("{}", b.name());
    let small = device.is_software;
    let shapes: &[(usize, usize)] =
        if small { &[(512, 512)] } else { &[(4096, 14336), (4096, 4096), (2048, 1536)] };
    for &(k, n) in shapes {
        for (what, twice_bits, marker, multiplier) in [
            ("exl3 2.0 mul1", 4, "mul1", MUL1_MULTIPLIER),
            ("exl3 3.0 mul1", 6, "mul1", MUL1_MULTIPLIER),
            ("exl3 4.0 mul1", 8, "mul1", MUL1_MULTIPLIER),
            ("exl3 4.0 mcg", 8, "mcg", MCG_MULTIPLIER),
        ] {
            let weight = exl3(n, k, twice_bits, marker, multiplier);
            time(&*b, &weight, what, 1, repeats);
            if twice_bits == 8 {
                [8, 16, 64].into_iter().for_each(|rows| time(&*b, &weight, what, rows, repeats));
            }
        }
        for id in ["q4_0", "q4_k", "q8_0", "int4_g128", "bf16"] {
            let row: Vec<f32> = (0..k).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
            let one = format(id).pack(&row, 1, k).unwrap();
            let (name, tensor) = &one.parts[0];
            let mut shape = tensor.shape().to_vec();
            shape[0] = n;
            let data = tensor.bytes().repeat(n);
            let parts = vec![(*name, HostTensor::new(tensor.dtype(), shape, data.into()).unwrap())];
            let weight = Weight { format: one.format, out_features: n, in_features: k, parts };
            [1, 8].into_iter().for_each(|rows| time(&*b, &weight, id, rows, repeats));
        }
    }
}
