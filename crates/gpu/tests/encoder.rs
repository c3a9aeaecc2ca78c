//! The search for rings on every device, against its definition.

mod common;

use marlin_gpu::encoder;
use marlin_quant::exl3::codebook::{MCG_MULTIPLIER, MUL1_MULTIPLIER};
use marlin_quant::exl3::{Codebook, Rate, ReferenceEncoder, Ring, TileEncoder, pack_ring};
use marlin_testkit::Noise;

/// Mean squared error of the values that states stand for.
fn distortion(states: &[u16], values: &[f32], codebook: Codebook) -> f64 {
    let table = codebook.table();
    let error = |(&s, &v): (&u16, &f32)| f64::from(table[usize::from(s)] - v).powi(2);
    states.iter().zip(values).map(error).sum::<f64>() / values.len() as f64
}

#[test]
fn rings_are_as_near_as_those_of_the_definition() {
    let mut noise = Noise(7);
    // Roughly normal, and one value that no state is near.
    let mut values: Vec<f32> =
        (0..3 * 256).map(|_| (0..4).map(|_| noise.uniform()).sum::<f32>() * 0.8).collect();
    values[300] = 1e6;
    values[600] = f32::NAN;
    let targets: Vec<f32> = values.iter().map(|&v| marlin_quant::exl3::encode::target(v)).collect();
    for device in &common::devices() {
        let encoder = encoder(device).unwrap();
        for (bits, codebook) in [
            (1.0, Codebook::Mul1(MUL1_MULTIPLIER)),
            (2.0, Codebook::Mcg(MCG_MULTIPLIER)),
            (2.5, Codebook::Mul1(MUL1_MULTIPLIER)),
            (3.0, Codebook::Mul1(MUL1_MULTIPLIER)),
            (3.0, Codebook::ThreeInst),
            (4.5, Codebook::Mul1(MUL1_MULTIPLIER)),
            (6.0, Codebook::Mul1(MUL1_MULTIPLIER)),
            (8.0, Codebook::Mul1(MUL1_MULTIPLIER)),
        ] {
            let Some(rate) = Rate::from_bits(bits) else { continue };
            let what = format!("{} {} K={bits}", encoder.name(), codebook.name());
            let mut states = vec![0; values.len()];
            encoder.encode(&values, rate, codebook, &mut states).unwrap();
            if !common::runs_everything(&device.name) {
                // The search there is in NVIDIA's own instructions too: its text is all there is.
                continue;
            }
            let mut best = vec![0; values.len()];
            ReferenceEncoder.encode(&values, rate, codebook, &mut best).unwrap();
            let ring = Ring::new(rate);
            for tile in 0..3 {
                let own: &[u16; 256] = states[tile * 256..][..256].try_into().unwrap();
                let packed: Vec<u8> =
                    pack_ring(own, rate).iter().flat_map(|w| w.to_le_bytes()).collect();
                assert_eq!(ring.states(&packed), *own, "{what}: tile {tile} is no ring");
                let target = &targets[tile * 256..][..256];
                let found = distortion(own, target, codebook);
                let least = distortion(&best[tile * 256..][..256], target, codebook);
                assert!(found <= 1.01 * least, "{what}: {found} against {least}");
            }
        }
    }
}
