//! Every level, rate and codebook against the definition and against exllamav3.

use super::square::{MAX_COST, Square};
use super::step::{Step, place};
use super::*;
use crate::CpuEncoder;
use half::f16;
use marlin_quant::exl3::codebook::{MCG_MULTIPLIER, MUL1_MULTIPLIER};
use marlin_quant::exl3::{Ring, TileEncoder, pack_ring};
use marlin_testkit::Noise;

const MUL1: Codebook = Codebook::Mul1(MUL1_MULTIPLIER);
const CODEBOOKS: [Codebook; 4] =
    [Codebook::ThreeInst, Codebook::Mcg(MCG_MULTIPLIER), MUL1, Codebook::Mul1(0xad39_4c1d)];

/// Sixteen tiles of random weights with the states that exllamav3 1.6.5 chose, as bytes of a
/// safetensors file whose layout `exl3_cut.py` fixes.
const UPSTREAM: &[u8] = include_bytes!("../../../../../quant/fixtures/exl3_tiles.safetensors");

fn tiles(noise: &mut Noise, n: usize) -> Vec<f32> {
    (0..n * TILE).map(|_| noise.normal()).collect()
}

fn levels() -> impl Iterator<Item = Level> {
    Level::ALL.into_iter().filter(|level| level.is_supported())
}

fn rate(bits: f64) -> Rate {
    Rate::from_bits(bits).unwrap()
}

fn rings(encoder: &dyn TileEncoder, tiles: &[f32], rate: Rate, codebook: Codebook) -> Vec<u16> {
    let mut states = vec![0; tiles.len()];
    encoder.encode(tiles, rate, codebook, &mut states).unwrap();
    let ring = Ring::new(rate);
    for states in states.as_chunks().0 {
        let packed: Vec<u8> =
            pack_ring(states, rate).iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(ring.states(&packed), *states, "{} K={}", encoder.name(), rate.bits());
    }
    states
}

/// Mean squared error.
fn distortion(states: &[u16], tiles: &[f32], codebook: Codebook) -> f64 {
    let table = codebook.table();
    let error = |(&s, &v): (&u16, &f32)| f64::from(table[usize::from(s)] - v).powi(2);
    states.iter().zip(tiles).map(error).sum::<f64>() / tiles.len() as f64
}

/// The fixture's tensor `name`.
fn upstream(name: &str) -> &'static [u8] {
    let (size, body) = UPSTREAM.split_first_chunk().unwrap();
    let (header, data) = body.split_at(u64::from_le_bytes(*size) as usize);
    let header = std::str::from_utf8(header).unwrap();
    let entry = &header[header.find(&format!("\"{name}\": ")).unwrap()..];
    let offsets = &entry[entry.find("offsets\": [").unwrap() + 11..];
    let offsets = &offsets[..offsets.find(']').unwrap()];
    let (start, end) = offsets.split_once(", ").unwrap();
    &data[start.parse().unwrap()..end.parse().unwrap()]
}

/// On the tiles for which exllamav3 printed its choice, within 1 %.
#[test]
fn every_level_matches_upstream_distortion() {
    let (tiles, _) = upstream("tiles").as_chunks();
    let tiles: Vec<f32> = tiles.iter().map(|v| f32::from_le_bytes(*v)).collect();
    for bits in [2.0, 2.5, 3.0, 4.0] {
        let (states, _) = upstream(&format!("{bits}.states")).as_chunks();
        let states: Vec<u16> = states.iter().map(|s| u16::from_le_bytes(*s)).collect();
        // The scalar level is the reference, which `quant` tests on all of them.
        for level in levels().filter(|&level| level > Level::Scalar) {
            let ours = rings(&CpuEncoder::new(level, 2), &tiles, rate(bits), MUL1);
            let [ours, theirs] = [&ours, &states].map(|s| distortion(s, &tiles, MUL1));
            assert!(ours < 1.01 * theirs, "{level} K={bits}: ours {ours}, upstream {theirs}");
        }
    }
}

/// What is done to Gaussian tiles.
type Change = fn(&mut [f32]);

/// Distortions of single tiles differ by some percent either way, as other rings are found; their
/// geometric mean must not.
fn check(rows: &[(&str, Change)], rates: &[f64], codebooks: &[Codebook]) {
    let mut logarithms = Vec::new();
    for (&bits, &codebook) in rates.iter().flat_map(|b| codebooks.iter().map(move |c| (b, c))) {
        for (i, (name, change)) in rows.iter().enumerate() {
            let mut tiles = tiles(&mut Noise((bits * 100.0) as u64 + i as u64), 1);
            change(&mut tiles);
            let reference = CpuEncoder::new(Level::Scalar, 2);
            let reference = rings(&reference, &tiles, rate(bits), codebook);
            let reference = distortion(&reference, &tiles, codebook);
            for level in levels().filter(|&level| level > Level::Scalar) {
                let found = rings(&CpuEncoder::new(level, 2), &tiles, rate(bits), codebook);
                let ratio = distortion(&found, &tiles, codebook) / reference;
                assert!(ratio < 1.05, "{level} {codebook:?} K={bits} {name}: {ratio}");
                logarithms.push(ratio.ln());
            }
        }
    }
    let mean = (logarithms.iter().sum::<f64>() / logarithms.len().max(1) as f64).exp();
    assert!(mean <= 1.005, "{mean} times the distortion of the definition");
}

#[test]
fn every_rate_and_codebook_is_as_near_as_the_definition() {
    let rates = Rate::ALL.map(Rate::bits);
    check(&[("gaussian", |_| ())], &rates, &CODEBOOKS);
}

#[test]
fn unusual_tiles_are_as_near_as_by_the_definition() {
    let rows: &[(&str, Change)] = &[
        ("small", |tiles| tiles.iter_mut().for_each(|v| *v *= 0.05)),
        ("large", |tiles| tiles.iter_mut().for_each(|v| *v *= 4.0)),
        ("outlier", |tiles| tiles.iter_mut().step_by(TILE).for_each(|v| *v = -300.0)),
        ("near outlier", |tiles| tiles.iter_mut().step_by(100).for_each(|v| *v = 6.0)),
        ("zeros", |tiles| tiles.fill(0.0)),
    ];
    check(rows, &[1.0, 3.5, 4.0, 8.0], &[CODEBOOKS[0], MUL1]);
}

#[test]
fn a_tile_depends_on_nothing_but_itself() {
    let mut tiles = tiles(&mut Noise(5), 7);
    // One that has to be encoded at a coarser level than the others of its group.
    tiles[2 * TILE + 9] = 11.0;
    for bits in [2.5, 6.0] {
        for level in levels().filter(|&level| level > Level::Scalar) {
            let mut found = Vec::new();
            for threads in [1, 3] {
                found.push(rings(&CpuEncoder::new(level, threads), &tiles, rate(bits), MUL1));
            }
            let encoder = CpuEncoder::new(level, 1);
            let alone = tiles.chunks(TILE).map(|tile| rings(&encoder, tile, rate(bits), MUL1));
            found.push(alone.collect::<Vec<_>>().concat());
            assert!(found.windows(2).all(|pair| pair[0] == pair[1]), "{level} K={bits}");
        }
    }
}

#[test]
fn values_that_are_no_numbers() {
    for level in levels() {
        let encoder = CpuEncoder::new(level, 1);
        for (bad, good) in [(f32::NAN, 0.0), (f32::INFINITY, 65504.0), (-f32::MAX, -65504.0)] {
            let states = [bad, good].map(|value| {
                let mut tile = tiles(&mut Noise(6), 1);
                tile[40..43].fill(value);
                rings(&encoder, &tile, rate(7.0), MUL1)
            });
            assert_eq!(states[0], states[1], "{level} {bad}");
        }
        assert!(rings(&encoder, &[], rate(7.0), MUL1).is_empty());
    }
    assert_eq!(CpuEncoder::new(Level::Scalar, 2).name(), "scalar, 2 threads");
}

/// Costs of any size: the kernels are exact, and what is too much stays too much.
#[test]
fn steps_are_exact() {
    let rates = Rate::ALL.into_iter().flat_map(|r| [(r, 0), (r, 1)]);
    for ((rate, i), half) in rates.flat_map(|r| [(r, false), (r, true)]) {
        for level in levels().filter(|&level| level > Level::Scalar) {
            if let Some(compiled) = compiled(level, half) {
                let (e, c) = (rate.new_bits(i), rate.new_bits(i + 1));
                let square = if half { Square::Half } else { Square::of_integers(e, c) };
                compiled.check_step((e, c), square);
            }
        }
    }
}

/// The cost of a state after a node of cost `old`, as the kernels compute it.
fn cost(square: Square, old: u16, value: i16, target: i16) -> u16 {
    if square != Square::Half {
        return square.order(old, value, target).try_into().unwrap();
    }
    let number = |bits: i16| f16::from_bits(bits as u16).to_f32();
    let d = f16::from_f32(number(value) - number(target)).to_f64();
    nearest_half(d * d + f16::from_bits(old).to_f64()).to_bits()
}

/// `v`, which is not negative, rounded once.
fn nearest_half(v: f64) -> f16 {
    // By way of an f32 that is cut off: its last bit says whether anything followed.
    let single = v as f32;
    let cut = single.to_bits() - u32::from(f64::from(single) > v);
    f16::from_f32(f32::from_bits(cut | u32::from(f64::from(single) != v)))
}

/// A cost less the smallest one before it, as the kernels compute it.
fn settled(square: Square, cost: u16, floor: u16) -> u16 {
    match square {
        Square::Coarse | Square::Fine => (cost - floor).min(MAX_COST),
        Square::Half => (f16::from_bits(cost) - f16::from_bits(floor)).to_bits(),
    }
}

/// A step of `S` against one state after another.
pub(super) fn check_step<S: Isa>(s: S, (e, c): (usize, usize), square: Square) {
    if square == Square::Half && !S::HALF {
        return;
    }
    let mut noise = Noise(7);
    let most = square.max_number();
    let values: Vec<i16> = (0..1 << 16)
        .map(|_| square.number((noise.bits() as i16 as f32 / 32768.0) * most / 4.0))
        .collect();
    let mut ordered = vec![0; 1 << 16];
    for (state, &value) in values.iter().enumerate() {
        ordered[place(state, S::LANES, e, c)] = value;
    }
    let highest = square.highest();
    let mut costs = |n: usize| {
        let mut costs: Vec<_> = (0..n).map(|_| noise.bits() as u16 % highest).collect();
        costs[n / 2] = highest;
        costs
    };
    let old: [Vec<u16>; GROUP] = std::array::from_fn(|_| costs(1 << (16 - e)));
    let targets = [-0.2, 1.0].map(|t| square.number(t * most));
    let floors = old.each_ref().map(|old| *old.iter().min().unwrap());
    let expected: [Vec<u16>; GROUP] = std::array::from_fn(|g| {
        let cost = |state: usize| cost(square, old[g][state >> e], values[state], targets[g]);
        let best = |n: usize| (0..1 << c).map(|choice| cost(choice << (16 - c) | n)).min().unwrap();
        (0..1 << (16 - c)).map(|n| settled(square, best(n), floors[g])).collect()
    });
    let mut found = expected.clone().map(|costs| vec![0; costs.len()]);
    let tops = s.enter(Step {
        bits: (e, c),
        square,
        values: &ordered,
        targets,
        floors,
        old: old.each_ref().map(|old| &old[..]),
        new: found.each_mut().map(|new| &mut new[..]),
    });
    assert!(found == expected, "{} lanes, {e} {c} {square:?}", S::LANES);
    assert_eq!(tops, expected.each_ref().map(|costs| *costs.iter().min().unwrap()));
}
