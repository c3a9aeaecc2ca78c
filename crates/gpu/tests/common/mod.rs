//! The devices that tests run on, and matrices for them.
#![allow(dead_code, reason = "each test program uses a part")]

use marlin_gpu::GpuDevice;
use marlin_quant::decode;
use marlin_tensor::{DType, HostTensor, Weight};
use marlin_testkit::Noise;

/// Every device that this build finds, where they are built also the emulated ones: their texts are left in
/// `tmp/kernels` of the target folder.
pub fn devices() -> Vec<GpuDevice> {
    marlin_gpu::emulate(marlin_gpu::Emulation {
        folder: std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels"),
        compiler: std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned()),
    });
    let devices = marlin_gpu::devices();
    if devices.is_empty() {
        eprintln!("skipped: no GPU, or no runtime in this build");
    }
    devices
}

/// Whether the search for states runs on the device: for the instruction in it nothing stands on an emulated NVIDIA GPU.
pub fn searches(device: &GpuDevice) -> bool {
    device.name != "CUDA text on the processor"
}

/// Numbers in ±1.
pub fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut noise = Noise(seed);
    (0..len).map(|_| noise.uniform()).collect()
}

/// Any bytes.
pub fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut noise = Noise(seed);
    (0..len).map(|_| noise.bits() as u8).collect()
}

/// A trellis of random rings: every string of bits is one.
pub fn exl3(n: usize, k: usize, twice_bits: usize, marker: Option<(&'static str, u32)>) -> Weight {
    let (padded_in, padded_out) = (k.next_multiple_of(128), n.next_multiple_of(128));
    let shape = vec![padded_in / 16, padded_out / 16, 8 * twice_bits];
    let rings = bytes(shape.iter().product::<usize>() * 2, (n * k + twice_bits) as u64);
    let scales = |len: usize, seed| {
        let halves = values(len, seed).into_iter().flat_map(|v| {
            let v = if v < 0.0 { v - 0.5 } else { v + 0.5 };
            half::f16::from_f32(v).to_le_bytes()
        });
        HostTensor::new(DType::F16, vec![len], halves.collect::<Vec<u8>>().into()).unwrap()
    };
    let mut parts = vec![
        ("trellis", HostTensor::new(DType::I16, shape, rings.into()).unwrap()),
        ("suh", scales(padded_in, 1)),
        ("svh", scales(padded_out, 2)),
    ];
    if let Some((name, value)) = marker {
        let bytes = value.to_le_bytes().to_vec();
        parts.push((name, HostTensor::new(DType::I32, vec![], bytes.into()).unwrap()));
    }
    Weight { format: "exl3", out_features: n, in_features: k, parts }
}

/// Bytes and weights of a block, and where its f16 scale lies, of the types of GGUF that have no encoder.
const BLOCKS: [(&str, usize, usize, Option<usize>); 10] = [
    ("nvfp4", 36, 64, None),
    ("iq1_s", 50, 256, Some(0)),
    ("iq1_m", 56, 256, None),
    ("iq2_xxs", 66, 256, Some(0)),
    ("iq2_xs", 74, 256, Some(0)),
    ("iq2_s", 82, 256, Some(0)),
    ("iq3_xxs", 98, 256, Some(0)),
    ("iq3_s", 110, 256, Some(0)),
    ("iq4_nl", 18, 32, Some(0)),
    ("iq4_xs", 136, 256, Some(0)),
];

/// A matrix of any format but EXL3: by its encoder, or where it has none any codes under scales of ordinary size.
pub fn matrix(format: &str, n: usize, k: usize, seed: u64) -> Option<Weight> {
    let found = marlin_quant::format(format);
    if let Some(plain) = format.strip_suffix("_scaled") {
        let mut weight = matrix(plain, n, k, seed)?;
        weight.format = found.id();
        weight.parts.push(("scale", HostTensor::from_f32(vec![n], &values(n, seed + 1))));
        return Some(weight);
    }
    let Some((_, size, columns, half)) = BLOCKS.iter().find(|b| b.0 == format).copied() else {
        return found.pack(&values(n * k, seed), n, k).ok();
    };
    let mut data = bytes(n * k / columns * size, seed);
    for (block, d) in data.chunks_exact_mut(size).zip(values(n * k / columns, seed + 2)) {
        match half {
            Some(at) => block[at..at + 2].copy_from_slice(&half::f16::from_f32(d).to_le_bytes()),
            // The exponent of its scale is spread over the words at its end.
            None if format == "iq1_m" => block[55] = block[55] & 15 | 0x30,
            None => {}
        }
    }
    let blocks = HostTensor::new(DType::U8, vec![n, k / columns * size], data.into()).unwrap();
    Some(Weight {
        format: found.id(),
        out_features: n,
        in_features: k,
        parts: vec![("blocks", blocks)],
    })
}

/// Outputs of `rows` rows in f64, from decoded weights.
pub fn product(weight: &Weight, x: &[f32]) -> Vec<f64> {
    let dense = decode(weight).unwrap();
    let k = weight.in_features;
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    x.chunks(k).flat_map(|x| dense.chunks(k).map(|w| dot(x, w)).collect::<Vec<_>>()).collect()
}

/// Panics when a value is more than `tolerance` of the largest off.
pub fn close(what: &str, found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let difference = (f64::from(*f) - e).abs();
        assert!(difference <= tolerance * largest, "{what}: [{i}] {f} for {e}");
    }
}
