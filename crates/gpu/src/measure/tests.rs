//! On every device that this build finds.

use super::*;
use crate::Runtime;
use crate::runtime::found::start;
use crate::tune::{self, Key};
use marlin_tensor::{AttentionParams, CacheType, DType, HostTensor, Weight};
use marlin_testkit::Noise;

fn q4_0(out_features: usize, in_features: usize) -> Weight {
    let values = noise(7, out_features * in_features);
    marlin_quant::format("q4_0").pack(&values, out_features, in_features).unwrap()
}

/// A trellis of random rings.
fn exl3(out_features: usize, in_features: usize) -> Weight {
    let shape = vec![in_features / 16, out_features / 16, 64];
    let mut noise = Noise(5);
    let words = 2 * shape.iter().product::<usize>();
    let rings: Vec<u8> = (0..words).map(|_| noise.bits() as u8).collect();
    let ones = |len: usize| {
        let ones = half::f16::ONE.to_le_bytes().repeat(len);
        HostTensor::new(DType::F16, vec![len], ones.into()).unwrap()
    };
    let parts = vec![
        ("trellis", HostTensor::new(DType::I16, shape, rings.into()).unwrap()),
        ("suh", ones(in_features)),
        ("svh", ones(out_features)),
    ];
    Weight { format: "exl3", out_features, in_features, parts }
}

fn attention(window: Option<u32>, softcap: Option<f32>, latent: bool) -> Subject {
    let params = AttentionParams {
        num_heads: 4,
        num_kv_heads: if latent { 1 } else { 2 },
        key_head_dim: 32,
        value_head_dim: 16,
        scale: 0.5,
        window,
        softcap,
    };
    Subject::Attention { params, cache_type: CacheType::F16, latent }
}

/// Devices that compute: one that only takes texts has nothing to verify.
fn devices() -> Vec<GpuDevice> {
    let devices = crate::devices();
    if devices.is_empty() {
        eprintln!("skipped: no GPU, or no runtime in this build");
    }
    devices
}

#[test]
fn two_formats_and_attention_are_tuned_and_read_back() {
    for device in devices() {
        let folder = tempfile::tempdir().unwrap();
        let key = Key::of(&device);
        let mut tuner = crate::tuner(&device).unwrap();
        let mut tuned = Tuned::default();
        let subjects = [
            Subject::Linear(q4_0(96, 256)),
            Subject::Linear(exl3(128, 256)),
            attention(None, None, false),
            attention(Some(300), Some(2.0), false),
            attention(None, None, true),
        ];
        for subject in &subjects {
            let shape = tuner.shape(subject).unwrap();
            // Small integers have one kernel for few rows on NVIDIA's GPUs.
            let is_alone = device.runtime == Runtime::Cuda && shape.to_string().starts_with("q4_0");
            let classes = tuner.classes(&shape, &[1, 7]);
            assert!(is_alone || !classes.is_empty(), "{shape}");
            for rows in classes {
                let outcome = tuner.tune(subject, rows, &tuned).unwrap();
                for c in &outcome.contestants {
                    assert!(c.verified, "{shape}, {rows:?}: {}: {:?}", c.variant, c.problem);
                    assert!(c.us.is_some_and(|us| us > 0.0), "{shape}, {rows:?}: {}", c.variant);
                }
                let choice = outcome.choice.unwrap();
                assert!(choice.best_us <= choice.rule_us);
                tuned.insert(choice);
                // As each is known.
                tune::write(folder.path(), &key, &tuned).unwrap();
            }
        }
        let read = tune::read(folder.path(), &key).unwrap().unwrap();
        assert_eq!(read, tuned);
        rows_keep_their_bits(&device, &read);
    }
}

/// With what was tuned a row is the same in any company, and in row formats what it is without.
fn rows_keep_their_bits(device: &GpuDevice, tuned: &Tuned) {
    for weight in [q4_0(96, 256), exl3(128, 256)] {
        let n = weight.out_features;
        let product = |tuned: &Tuned, rows: usize| {
            let b = crate::open_tuned(device, tuned.clone()).unwrap();
            let linear = b.load_linear(&weight, None, Default::default()).unwrap();
            let x = b.upload(rows, 256, noise(9, rows * 256)).unwrap();
            b.download(&b.linear(&x, &linear).unwrap()).unwrap()
        };
        let one = product(tuned, 1);
        // What tensor cores add up of a trellis is cut by the number of rows.
        if weight.format != "exl3" || device.runtime != Runtime::Cuda {
            assert_eq!(product(tuned, 7)[..n], one[..], "{}", weight.format);
        }
        if weight.format == "q4_0" {
            assert_eq!(product(&Tuned::default(), 1), one);
        }
    }
}

#[test]
fn a_wrong_kernel_cannot_win() {
    for device in devices() {
        let tuner = start(&device, |client| GpuTuner::new(client, &device)).unwrap();
        let GpuTuner { gpu, copies_bytes, .. } = tuner;
        let weight = q4_0(64, 128);
        let shape = weights::shape(&weight).unwrap();
        let product = Product::new(&gpu, &weight, &shape, copies_bytes).unwrap();
        let mut runs = product.runs(&gpu, Some(4), &Tuned::default()).unwrap();
        // It computes nothing, which is fast.
        let wrong = Variant::Decode { planes: 16, tile: 4 };
        let nothing = Clock::new(&gpu, 1, |_| gpu.zeros(4 * 64));
        let nothing = std::rc::Rc::new(nothing);
        let timed = nothing.clone();
        runs.entrants.push(Entrant {
            variant: wrong,
            tolerance: 2e-6,
            outputs: Box::new(move || nothing.outputs(4 * 64)),
            time: Box::new(move || timed.time().map(|us| us.min(1e-3))),
        });
        let outcome = contest::hold(shape, Some(4), &runs.reference, runs.entrants);
        assert_ne!(outcome.choice.unwrap().variant, wrong);
        let last = outcome.contestants.last().unwrap();
        assert!(last.variant == wrong && !last.verified && last.us.is_none());
        assert!(last.problem.as_deref().unwrap().contains("the reference"));
    }
}
