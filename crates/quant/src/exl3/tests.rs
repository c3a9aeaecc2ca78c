//! EXL3 against the vectors of exllamav3 1.6.5, and against encoders of our own where none exist.

use super::codebook::{MCG_MULTIPLIER, MUL1_MULTIPLIER};
use super::ring::{TILE, TILE_COLUMN, TILE_ROW};
use super::*;
use crate::{decode, format, load, slice_rows};
use half::f16;
use marlin_checkpoint::{Checkpoint, Container, Encoding, StoredTensor};
use marlin_tensor::{DType, Weight};
use marlin_testkit::Noise;
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::Path;

const FIXTURES: [(Codebook, &[u8]); 3] = [
    (Codebook::ThreeInst, include_bytes!("../../fixtures/exl3_3inst.safetensors")),
    (Codebook::Mcg(MCG_MULTIPLIER), include_bytes!("../../fixtures/exl3_mcg.safetensors")),
    (Codebook::Mul1(MUL1_MULTIPLIER), include_bytes!("../../fixtures/exl3_mul1.safetensors")),
];

fn stored(name: &str, dtype: DType, shape: &[usize], data: Vec<u8>) -> StoredTensor {
    StoredTensor {
        name: name.to_owned(),
        encoding: Encoding::Plain(dtype),
        shape: shape.to_vec(),
        data: data.into(),
        file: Path::new("test.safetensors").into(),
    }
}

fn checkpoint(tensors: Vec<StoredTensor>) -> Checkpoint {
    let container =
        Container::HuggingFace { config: serde_json::json!({}), generation_config: None };
    Checkpoint::from_parts("test".into(), container, tensors, BTreeMap::new())
}

fn tensors(file: &[u8]) -> Vec<StoredTensor> {
    let file = SafeTensors::deserialize(file).unwrap();
    file.tensors()
        .into_iter()
        .map(|(name, view)| {
            let dtype = DType::from_name(&view.dtype().to_string()).unwrap();
            stored(&name, dtype, view.shape(), view.data().to_vec())
        })
        .collect()
}

fn halves(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    checkpoint.get(name).unwrap().plain().unwrap().to_f32().unwrap()
}

/// Every stored rate of every fixture, with its key.
fn layers() -> impl Iterator<Item = (Codebook, Checkpoint, String, Rate)> {
    FIXTURES.into_iter().flat_map(|(codebook, file)| {
        let checkpoint = checkpoint(tensors(file));
        let keep = move |rate: &Rate| !rate.is_half() || matches!(codebook, Codebook::Mul1(_));
        Rate::ALL
            .into_iter()
            .filter(keep)
            .map(move |rate| (codebook, checkpoint.clone(), format!("{}", rate.bits()), rate))
    })
}

fn outputs(rate: Rate) -> usize {
    if rate.bits() == 3.0 { 256 } else { 128 }
}

#[test]
fn codebooks_are_bit_exact() {
    for (codebook, file) in FIXTURES {
        let expected = halves(&checkpoint(tensors(file)), "codebook");
        let table = codebook.table();
        for state in 0..=u16::MAX {
            let (found, expected) = (codebook.value(state).to_f32(), expected[usize::from(state)]);
            assert_eq!(found.to_bits(), expected.to_bits(), "{} state {state}", codebook.name());
            assert_eq!(table[usize::from(state)].to_bits(), found.to_bits());
        }
    }
}

#[test]
fn inner_weights_are_bit_exact() {
    let mut seen = 0;
    for (codebook, checkpoint, key, rate) in layers() {
        let n = outputs(rate);
        let weight = load(&checkpoint, &key, n, 128).unwrap();
        let parts = Exl3Parts::of(&weight).unwrap();
        assert_eq!((parts.codebook, parts.rate), (codebook, rate));
        let mut inner = vec![0.0; n * 128];
        parts.decode_inner(0..n / 16, &mut inner);
        let expected = halves(&checkpoint, &format!("{key}.inner"));
        for (i, &expected) in expected.iter().enumerate() {
            let found = inner[i % n * 128 + i / n];
            assert_eq!(found.to_bits(), expected.to_bits(), "{} K={key} {i}", codebook.name());
        }
        seen += 1;
    }
    assert_eq!(seen, 8 + 8 + 11);
}

/// exllamav3 rounds to fp16 between the transforms; we do not.
#[test]
fn reconstructed_weights_agree() {
    let mut seen = 0;
    for (codebook, checkpoint, key, rate) in layers() {
        let name = format!("{key}.reconstructed");
        if checkpoint.get(&name).is_none() {
            continue;
        }
        let (n, expected) = (outputs(rate), halves(&checkpoint, &name));
        let found = decode(&load(&checkpoint, &key, n, 128).unwrap()).unwrap();
        let (mut error, mut norm) = (0.0, 0.0);
        for (i, &expected) in expected.iter().enumerate() {
            error += f64::from(found[i % n * 128 + i / n] - expected).powi(2);
            norm += f64::from(expected).powi(2);
        }
        let relative = (error / norm).sqrt();
        assert!(relative < 1e-3, "{} K={key}: {relative}", codebook.name());
        seen += 1;
    }
    assert_eq!(seen, 4);
}

#[test]
fn padding_is_dropped_and_rows_slice() {
    let (_, file) = FIXTURES[2];
    let checkpoint = checkpoint(tensors(file));
    let padded = decode(&load(&checkpoint, "3", 256, 128).unwrap()).unwrap();
    let weight = load(&checkpoint, "3", 200, 100).unwrap();
    let whole = decode(&weight).unwrap();
    for row in 0..200 {
        assert_eq!(whole[row * 100..][..100], padded[row * 128..][..100], "row {row}");
    }
    let mut some = vec![0.0; 71 * 100];
    format("exl3").decode_rows(&weight, 99..170, &mut some).unwrap();
    assert_eq!(some, whole[99 * 100..170 * 100], "rows that cross a band");

    let largest = whole.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    for row in 0..200 {
        let mut one = vec![0.0; 100];
        format("exl3").decode_row(&weight, row, &mut one).unwrap();
        for (found, expected) in one.iter().zip(&whole[row * 100..]) {
            assert!(
                (found - expected).abs() <= 1e-6 * largest,
                "row {row}: {found} for {expected}"
            );
        }
    }

    for rows in [0..128, 128..200, 0..200] {
        let slice = slice_rows(&weight, rows.clone()).unwrap();
        assert_eq!(decode(&slice).unwrap(), whole[rows.start * 100..rows.end * 100], "{rows:?}");
    }
    for rows in [0..100, 64..200, 0..0, 128..256] {
        assert!(slice_rows(&weight, rows.clone()).is_err(), "{rows:?}");
    }
}

#[test]
fn every_bit_string_is_a_ring_and_packs_back() {
    let mut noise = Noise(1);
    for rate in Rate::ALL {
        let words: Vec<u16> = (0..rate.half_words()).map(|_| noise.bits() as u16).collect();
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let states = Ring::new(rate).states(&bytes);
        assert_eq!(pack_ring(&states, rate), words, "K={}", rate.bits());
        for i in 0..TILE {
            let kept = (u32::from(states[(i + TILE - 1) % TILE]) << rate.new_bits(i)) as u16;
            assert_eq!(states[i] >> rate.new_bits(i), kept >> rate.new_bits(i), "position {i}");
        }
    }
    let mut places: Vec<_> = (0..TILE).map(|p| (TILE_ROW[p], TILE_COLUMN[p])).collect();
    places.sort_unstable();
    places.dedup();
    assert_eq!(places.len(), TILE);
}

fn encode(tiles: &[f32], bits: f64, codebook: Codebook) -> Vec<u16> {
    let mut states = vec![0; tiles.len()];
    ReferenceEncoder.encode(tiles, Rate::from_bits(bits).unwrap(), codebook, &mut states).unwrap();
    states
}

fn squared_error(states: &[u16], values: &[f32], codebook: Codebook) -> f64 {
    let table = codebook.table();
    let error = |(&s, &v): (&u16, &f32)| f64::from(table[usize::from(s)] - v).powi(2);
    states.iter().zip(values).map(error).sum()
}

fn assert_rings(states: &[u16], bits: f64, what: &str) {
    let rate = Rate::from_bits(bits).unwrap();
    for states in states.as_chunks().0 {
        let packed: Vec<u8> =
            pack_ring(states, rate).iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(Ring::new(rate).states(&packed), *states, "{what} K={bits}: not a ring");
    }
}

/// Distortion of unit Gaussian data stays within 20 % of the rate-distortion bound.
#[test]
fn encoded_tiles_are_rings_of_low_distortion() {
    let codebook = Codebook::Mul1(MUL1_MULTIPLIER);
    for (bits, gain) in [(1.5, 1.06), (2.0, 1.0), (4.0, 0.92)] {
        let mut noise = Noise(7);
        let tile: [f32; TILE] = std::array::from_fn(|_| noise.normal() * gain);
        let states = encode(&tile, bits, codebook);
        assert_rings(&states, bits, "gaussian");
        let energy: f64 = tile.iter().map(|&v| f64::from(v * v)).sum();
        let relative = squared_error(&states, &tile, codebook) / energy;
        assert!(relative < 1.2 * 4f64.powf(-bits), "K={bits}: {relative}");
    }
}

#[test]
fn any_value_is_encoded() {
    let codebook = Codebook::Mcg(MCG_MULTIPLIER);
    for value in [0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 1e-45, -65504.0]
    {
        let states = encode(&[value; TILE], 5.0, codebook);
        assert_rings(&states, 5.0, &value.to_string());
        let far = value.abs() > 1.0;
        let side = |&s: &u16| codebook.value(s).to_f32() * value.signum() > 2.0;
        assert!(!far || states.iter().all(side), "{value}: {states:?}");
    }
    assert!(encode(&[], 3.0, codebook).is_empty());
}

/// Our encoder does as well as exllamav3's on the same tiles, within 1 %.
#[test]
fn encoder_matches_upstream_distortion() {
    let file = checkpoint(tensors(include_bytes!("../../fixtures/exl3_tiles.safetensors")));
    let codebook = Codebook::Mul1(MUL1_MULTIPLIER);
    let tiles = halves(&file, "tiles");
    // The definition is slow: all tiles at the rates that are used most.
    for (bits, n) in [(2.0, 4), (2.5, 4), (3.0, 16), (4.0, 16)] {
        let tiles = &tiles[..n * TILE];
        let upstream = file.get(&format!("{bits}.states")).unwrap().plain().unwrap();
        let upstream = upstream.to_u16_bits().unwrap();
        let upstream = &upstream[..n * TILE];
        assert_rings(upstream, bits, "upstream");
        let ours = encode(tiles, bits, codebook);
        assert_rings(&ours, bits, "ours");
        let [ours, upstream] =
            [&ours, upstream].map(|s| squared_error(s, tiles, codebook) / tiles.len() as f64);
        assert!(ours < 1.01 * upstream, "K={bits}: ours {ours}, upstream {upstream}");
    }
}

fn tensor_of(checkpoint: &Checkpoint, name: &str) -> StoredTensor {
    checkpoint.get(name).unwrap().clone()
}

/// The K = 3 layer of the `mul1` fixture under key `l`: 128 inputs, 256 outputs.
fn sample() -> Vec<StoredTensor> {
    let source = checkpoint(tensors(FIXTURES[2].1));
    ["trellis", "suh", "svh", "mul1"]
        .map(|part| StoredTensor {
            name: format!("l.{part}"),
            ..tensor_of(&source, &format!("3.{part}"))
        })
        .into()
}

fn load_sample(tensors: Vec<StoredTensor>) -> Result<Weight, String> {
    load(&checkpoint(tensors), "l", 256, 128).map_err(|e| e.to_string())
}

#[test]
fn packed_signs_become_scales() {
    let mut noise = Noise(3);
    let mut plain = sample();
    let mut packed = plain.clone();
    for (i, name, channels) in [(1, "l.su", 128), (2, "l.sv", 256)] {
        let words: Vec<u16> = (0..channels / 16).map(|_| noise.bits() as u16).collect();
        let negative = |c: usize| words[c / 16] >> (c % 16) & 1 == 1;
        let signs = (0..channels).map(|c| f16::from_f32(if negative(c) { -1.0 } else { 1.0 }));
        plain[i].data = signs.flat_map(f16::to_le_bytes).collect::<Vec<_>>().into();
        let words = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        packed[i] = stored(name, DType::I16, &[channels / 16], words);
    }
    let packed = load_sample(packed).unwrap();
    assert!(packed.part("suh").is_some() && packed.part("su").is_none());
    assert_eq!(decode(&packed).unwrap(), decode(&load_sample(plain).unwrap()).unwrap());
}

#[test]
fn other_multipliers_are_honoured() {
    for (marker, codebook) in [
        ("mul1", Codebook::Mul1(0xad39_4c1d)),
        ("mcg", Codebook::Mcg(0xad39_4c1d)),
        ("mcg", Codebook::Mcg(MCG_MULTIPLIER)),
    ] {
        let mut tensors = sample();
        let (Codebook::Mul1(m) | Codebook::Mcg(m)) = codebook else { unreachable!() };
        tensors[3] = stored(&format!("l.{marker}"), DType::I32, &[], m.to_le_bytes().to_vec());
        let weight = load_sample(tensors).unwrap();
        let parts = Exl3Parts::of(&weight).unwrap();
        assert_eq!(parts.codebook, codebook);
        assert_eq!(codebook.is_standard(), m == MCG_MULTIPLIER);
        let mut inner = vec![0.0; 256 * 128];
        parts.decode_inner(0..16, &mut inner);
        let states = Ring::new(parts.rate).states(parts.tile(5, 9));
        let p = 77;
        let (row, column) = (9 * 16 + TILE_COLUMN[p] as usize, 5 * 16 + TILE_ROW[p] as usize);
        assert_eq!(inner[row * 128 + column], codebook.value(states[p]).to_f32());
    }
}

#[test]
fn contradictions_are_named() {
    type Edit = fn(&mut Vec<StoredTensor>);
    let rows: &[(&str, Edit, &[&str])] = &[
        ("infinite scale", |t| t[1].data = [0x00, 0x7c].repeat(128).into(), &["l.suh", "finite"]),
        ("nan scale", |t| t[2].data = [0x01, 0x7e].repeat(256).into(), &["l.svh", "finite"]),
        (
            "scales too short",
            |t| {
                *t = {
                    let mut t = t.clone();
                    t[1] = stored("l.suh", DType::F16, &[64], vec![0; 128]);
                    t
                }
            },
            &["l.suh", "[128]", "[64]"],
        ),
        (
            "scales in f32",
            |t| t[1] = stored("l.suh", DType::F32, &[128], vec![0; 512]),
            &["l.suh", "F16"],
        ),
        (
            "packed signs too long",
            |t| t[1] = stored("l.su", DType::I16, &[9], vec![0; 18]),
            &["l.su", "[8]", "[9]"],
        ),
        (
            "both markers",
            |t| t.push(stored("l.mcg", DType::I32, &[], vec![0; 4])),
            &["l", "mcg", "mul1"],
        ),
        (
            "marker of two",
            |t| t[3] = stored("l.mul1", DType::I32, &[2], vec![0; 8]),
            &["l.mul1", "I32"],
        ),
        (
            "marker of another type",
            |t| t[3] = stored("l.mul1", DType::F32, &[], vec![0; 4]),
            &["l.mul1", "I32"],
        ),
        (
            "pre-release scale",
            |t| t.push(stored("l.scale", DType::F32, &[], vec![0; 4])),
            &["l.scale", "pre-release"],
        ),
        (
            "no such rate",
            |t| {
                t[0] =
                    stored("l.trellis", DType::I16, &[8, 16, 40 * 2 + 8], vec![0; 8 * 16 * 88 * 2])
            },
            &["l.trellis", "88"],
        ),
        (
            "half rate of mcg",
            |t| {
                t[0] = stored("l.trellis", DType::I16, &[8, 16, 40], vec![0; 8 * 16 * 80]);
                t[3].name = "l.mcg".into()
            },
            &["l.trellis", "2.5", "mcg"],
        ),
        (
            "flat trellis",
            |t| t[0] = stored("l.trellis", DType::I16, &[8, 16 * 48], vec![0; 8 * 16 * 96]),
            &["l.trellis", "[8, 768]"],
        ),
        (
            "empty trellis",
            |t| t[0] = stored("l.trellis", DType::I16, &[0, 16, 48], vec![]),
            &["l.trellis", "multiple of 128"],
        ),
        (
            "ragged trellis",
            |t| t[0] = stored("l.trellis", DType::I16, &[8, 15, 48], vec![0; 8 * 15 * 96]),
            &["l.trellis", "240"],
        ),
        (
            "another width",
            |t| t[0] = stored("l.trellis", DType::I16, &[16, 16, 48], vec![0; 16 * 16 * 96]),
            &["l.trellis", "256", "128"],
        ),
        (
            "trellis of bytes",
            |t| t[0] = stored("l.trellis", DType::F16, &[8, 16, 48], vec![0; 8 * 16 * 96]),
            &["l.trellis", "I16"],
        ),
    ];
    for (what, edit, words) in rows {
        let mut tensors = sample();
        edit(&mut tensors);
        let error = load_sample(tensors).expect_err(what);
        for word in *words {
            assert!(error.contains(word), "{what}: {error:?} does not say {word:?}");
        }
    }
    assert!(load(&checkpoint(sample()), "l", usize::MAX, usize::MAX).is_err());
    let surplus = load(&checkpoint(sample()), "l", 128, 128).unwrap_err().to_string();
    assert!(surplus.contains("256"), "{surplus}");
}

/// Encodes `columns` values a row: random symbols, then the documented layout and transform
/// written out directly (dense H, states from the sum).
#[test]
fn embedding_rows_follow_the_definition() {
    let (vocab, hidden) = (3, 300);
    let mut noise = Noise(11);
    for bits in 1..=8usize {
        let groups = 2;
        let mut words = Vec::new();
        let signs: Vec<f16> = (0..groups * 256)
            .map(|_| f16::from_f32(if noise.bits() & 1 == 0 { 1.0 } else { -0.5 }))
            .collect();
        let mut expected = vec![0.0f32; vocab * hidden];
        for row in 0..vocab {
            for g in 0..groups {
                let symbols: Vec<u64> = (0..256).map(|_| noise.bits() % (1 << bits)).collect();
                let scale = f16::from_f32(0.01 + row as f32);
                let mut stream = vec![0u16; 16 * bits];
                for (i, symbol) in symbols.iter().enumerate() {
                    for b in 0..bits {
                        stream[(i * bits + b) / 16] |=
                            ((symbol >> b & 1) as u16) << ((i * bits + b) % 16);
                    }
                }
                words.push(scale.to_bits());
                words.extend(stream);
                let value = |i: usize| {
                    let state: u64 = (0..16usize.div_ceil(bits))
                        .map(|j| symbols[(i + 256 - j) % 256] << (j * bits))
                        .sum();
                    let value = Codebook::Mul1(MUL1_MULTIPLIER).value(state as u16);
                    f64::from(value.to_f32()) * f64::from(scale.to_f32())
                };
                let values: Vec<f64> = (0..256).map(value).collect();
                for e in 0..256.min(hidden - g * 256) {
                    let sign =
                        |j: usize| if (e & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
                    let sum: f64 = values.iter().enumerate().map(|(j, v)| v * sign(j)).sum();
                    expected[row * hidden + g * 256 + e] =
                        (sum / 16.0 * f64::from(signs[g * 256 + e].to_f32())) as f32;
                }
            }
        }
        let width = groups * (1 + 16 * bits);
        let checkpoint = checkpoint(vec![
            stored(
                "e.trellis",
                DType::I16,
                &[vocab, width],
                words.iter().flat_map(|w| w.to_le_bytes()).collect(),
            ),
            stored(
                "e.signs",
                DType::F16,
                &[groups, 256],
                signs.iter().flat_map(|s| s.to_le_bytes()).collect(),
            ),
        ]);
        let weight = load(&checkpoint, "e", vocab, hidden).unwrap();
        assert_eq!(weight.format, "exl3_embedding");
        let found = decode(&weight).unwrap();
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let bound = 1e-5 * (1.0 + (i / hidden) as f32);
            assert!((found - expected).abs() < bound, "K={bits} {i}: {found} {expected}");
        }
        let last = slice_rows(&weight, 2..3).unwrap();
        assert_eq!(decode(&last).unwrap(), found[2 * hidden..]);
    }
}

#[test]
fn damaged_embeddings_are_named() {
    let table = |vocab: usize, width: usize, word: u16| {
        let signs = [0x00, 0x3c].repeat(256);
        checkpoint(vec![
            stored(
                "e.trellis",
                DType::I16,
                &[vocab, width],
                word.to_le_bytes().repeat(vocab * width),
            ),
            stored("e.signs", DType::F16, &[1, 256], signs),
        ])
    };
    let error = load(&table(2, 34, 0), "e", 2, 256).unwrap_err().to_string();
    assert!(error.contains("e.trellis") && error.contains("34"), "{error}");
    let error = load(&table(2, 33, 0), "e", 3, 256).unwrap_err().to_string();
    assert!(error.contains("e.trellis"), "{error}");
    let error = load(&table(2, 66, 0), "e", 2, 512).unwrap_err().to_string();
    assert!(error.contains("e.signs"), "{error}");
    assert!(load(&table(2, 0, 0), "e", 2, 0).is_err());
    let infinite = load(&table(2, 33, 0x7c00), "e", 2, 256).unwrap();
    assert!(decode(&infinite).unwrap_err().to_string().contains("finite"));
}
