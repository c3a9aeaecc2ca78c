//! The search for rings on every device, against its definition.

mod common;

use marlin_cpu::{CpuEncoder, Level};
use marlin_gpu::encoder;
use marlin_quant::exl3::codebook::{MCG_MULTIPLIER, MUL1_MULTIPLIER};
use marlin_quant::exl3::encode::LdlqMatrix;
use marlin_quant::exl3::ring::{TILE_COLUMN, TILE_ROW};
use marlin_quant::exl3::{Codebook, Rate, ReferenceEncoder, Ring, TileEncoder, pack_ring};
use marlin_testkit::Noise;
use std::cell::Cell;

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
            if !common::searches(device) {
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

/// What LDLQ makes small: `‖(W − Q) L‖²`, with the identity for `D`.
fn error_under(states: &[u16], matrix: &LdlqMatrix, codebook: Codebook) -> f64 {
    let k = matrix.k;
    let rows = matrix.weights.len() / k;
    let table = codebook.table();
    let mut errors = matrix.weights.to_vec();
    for (at, &state) in states.iter().enumerate() {
        let (tile, p) = (at / 256, at % 256);
        let row = tile % (rows / 16) * 16 + usize::from(TILE_COLUMN[p]);
        let column = tile / (rows / 16) * 16 + usize::from(TILE_ROW[p]);
        errors[row * k + column] -= table[usize::from(state)];
    }
    let through = |row: &[f32], j: usize| -> f64 {
        (0..k).map(|i| f64::from(row[i]) * f64::from(matrix.factor[i * k + j])).sum()
    };
    errors.chunks(k).flat_map(|row| (0..k).map(|j| through(row, j).powi(2))).sum()
}

/// LDLQ by its definition, in f64, with `encoder` for the tiles.
fn ldlq_by_definition(
    matrix: &LdlqMatrix,
    rate: Rate,
    codebook: Codebook,
    encoder: &dyn TileEncoder,
) -> Vec<u16> {
    let k = matrix.k;
    let rows = matrix.weights.len() / k;
    let table = codebook.table();
    let (mut states, mut errors) = (vec![0; rows * k], vec![0.0f64; rows * k]);
    for group in (0..k).step_by(16).rev() {
        let place = |at: usize| {
            let (tile, p) = (at / 256, at % 256);
            let row = tile * 16 + usize::from(TILE_COLUMN[p]);
            (row, group + usize::from(TILE_ROW[p]))
        };
        let target = |at: usize| {
            let (row, column) = place(at);
            let carried = |j| errors[row * k + j] * f64::from(matrix.factor[j * k + column]);
            let carried: f64 = (group + 16..k).map(carried).sum();
            (f64::from(matrix.weights[row * k + column]) + carried) as f32
        };
        let targets: Vec<f32> = (0..rows * 16).map(target).collect();
        let own = &mut states[group * rows..][..rows * 16];
        encoder.encode(&targets, rate, codebook, own).unwrap();
        for (at, &state) in own.iter().enumerate() {
            let (row, column) = place(at);
            let value = f64::from(table[usize::from(state)]);
            errors[row * k + column] = f64::from(matrix.weights[row * k + column]) - value;
        }
    }
    states
}

#[test]
fn ldlq_loses_as_little_as_by_its_definition() {
    let cpu = CpuEncoder::new(Level::Scalar, 2);
    for device in &common::devices() {
        let encoder = encoder(device).unwrap();
        for (rows, k, bits, codebook) in [
            (32, 160, 4.0, Codebook::Mul1(MUL1_MULTIPLIER)),
            (16, 272, 8.0, Codebook::Mul1(MUL1_MULTIPLIER)),
            (48, 16, 6.0, Codebook::Mcg(MCG_MULTIPLIER)),
        ] {
            let rate = Rate::from_bits(bits).unwrap();
            let what = format!("{} {rows}x{k} K={bits}", encoder.name());
            let mut noise = Noise(11);
            let weights: Vec<f32> =
                (0..rows * k).map(|_| (0..4).map(|_| noise.uniform()).sum::<f32>() * 0.8).collect();
            let mut factor = vec![0.0; k * k];
            for i in 0..k {
                for j in 0..i / 16 * 16 {
                    factor[i * k + j] = noise.uniform() * 0.15;
                }
                factor[i * k + i] = 1.0;
            }
            let matrix = LdlqMatrix { weights: &weights, factor: &factor, k };
            let done = Cell::new(0);
            let progress = |tiles| done.set(done.get() + tiles);
            let found = encoder.ldlq(&matrix, rate, codebook, &progress).unwrap().unwrap();
            assert_eq!(done.get(), rows * k / 256, "{what}: tiles told of");
            if !common::searches(device) {
                continue;
            }
            let best = ldlq_by_definition(&matrix, rate, codebook, &cpu);
            let alone: Vec<u16> = {
                let mut identity = vec![0.0; k * k];
                (0..k).for_each(|i| identity[i * k + i] = 1.0);
                let alone = LdlqMatrix { factor: &identity, ..matrix };
                ldlq_by_definition(&alone, rate, codebook, &cpu)
            };
            let [found, best, alone] =
                [&found, &best, &alone].map(|states| error_under(states, &matrix, codebook));
            assert!(found <= 1.03 * best, "{what}: {found} against {best}");
            assert!(k == 16 || best < 0.9 * alone, "{what}: feedback {best} against {alone} alone");
            println!("{what}: {found:.5} of {best:.5}, without feedback {alone:.5}");
        }
    }
}
