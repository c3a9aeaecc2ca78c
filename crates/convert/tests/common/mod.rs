//! What the tests of the converter share.
#![allow(dead_code, reason = "each test program uses a part")]

use marlin_checkpoint::{Checkpoint, read_safetensors};
use marlin_convert::{
    Calibration, ConvertError, Event, Exl3Options, Exl3Quantizer, JobOptions, JobReport, Origin,
    Plan, allocate,
};
use marlin_cpu::{Activations, CpuBackend, CpuOptions};
use marlin_engine::evaluate::{PerplexityOptions, perplexity};
use marlin_models::Model;
use marlin_quant::exl3::codebook::MUL1_MULTIPLIER;
use marlin_quant::exl3::ring::TILE;
use marlin_quant::exl3::{Codebook, Rate, TileEncoder};
use marlin_tensor::{Backend, BackendError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

pub const MUL1: Codebook = Codebook::Mul1(MUL1_MULTIPLIER);

/// A quick encoder of poor quality: at every position the nearest of the values within reach, and
/// zero bits at the end, so that the ring closes on node 0.
pub struct Greedy;

impl TileEncoder for Greedy {
    fn name(&self) -> String {
        "greedy".to_owned()
    }

    fn encode(
        &self,
        tiles: &[f32],
        rate: Rate,
        codebook: Codebook,
        states: &mut [u16],
    ) -> Result<(), BackendError> {
        let table = codebook.table();
        for (tile, states) in tiles.chunks_exact(TILE).zip(states.chunks_exact_mut(TILE)) {
            let mut state = 0u16;
            let mut left = rate.tile_bytes() * 8;
            for (p, (target, out)) in tile.iter().zip(states).enumerate() {
                let new = rate.new_bits(p);
                let free = left > 16;
                left -= new;
                let candidates = (0..if free { 1u32 << new } else { 1 })
                    .map(|bits| ((u32::from(state) << new) | bits) as u16);
                let cost = |s: &u16| (table[usize::from(*s)] - target).abs();
                state = candidates.min_by(|a, b| cost(a).total_cmp(&cost(b))).unwrap();
                *out = state;
            }
        }
        Ok(())
    }
}

/// KL divergence of `made` from `original` on the calibration text of `family`.
pub fn divergence(original: &Model, made: &Model, family: &str) -> f64 {
    let tokens: Vec<u32> = calibration(family).rows.concat();
    let windows = PerplexityOptions {
        window: 48,
        score_from: 8,
        windows: Some(2),
        ..PerplexityOptions::default()
    };
    let found = perplexity(made, &tokens, &windows, Some(original), &mut |_| {}).unwrap();
    found.kl_divergence.unwrap()
}

pub fn backend(threads: usize) -> Arc<dyn Backend> {
    let options = CpuOptions { threads, activations: Activations::Float, ..CpuOptions::default() };
    Arc::new(CpuBackend::new(options).unwrap())
}

pub fn quantizer(encoder: Arc<dyn TileEncoder>) -> Exl3Quantizer {
    Exl3Quantizer { encoder, backend: backend(1), codebook: MUL1, options: Exl3Options::default() }
}

/// The reference inputs of a tiny model, repeated.
pub fn calibration(family: &str) -> Calibration {
    let file = marlin_testkit::tiny_model(family).join("ref.safetensors");
    let reference = read_safetensors(&file).unwrap();
    let ids = reference.tensors.iter().find(|t| t.name == "input_ids").unwrap();
    let ids: Vec<u32> =
        ids.plain().unwrap().to_i64().unwrap().into_iter().map(|t| t as u32).collect();
    let row = |shift: usize| ids.iter().cycle().skip(shift).take(48).copied().collect();
    Calibration { rows: (0..6).map(|i| row(i * 7)).collect() }
}

pub fn options(checkpoint: &Checkpoint, family: &str, output: &Path, bits: f64) -> JobOptions {
    let origin = Origin::open(checkpoint).unwrap();
    let plan = Plan::new(&origin.output, origin.mtp);
    JobOptions {
        output: output.to_owned(),
        bits: allocate::rule(&plan, &allocate::rates(MUL1), bits, 6.0).unwrap(),
        embedding_bits: None,
        tied: false,
        calibration: calibration(family),
        seed: 1,
        jobs: 2,
        threads: 2,
        max_memory: None,
        fresh: false,
        files: Vec::new(),
    }
}

pub fn convert(
    checkpoint: &Checkpoint,
    options: &JobOptions,
    events: &(dyn Fn(Event) + Sync),
    stop: &AtomicBool,
) -> Result<JobReport, ConvertError> {
    convert_with(Arc::new(Greedy), checkpoint, options, events, stop)
}

pub fn convert_with(
    encoder: Arc<dyn TileEncoder>,
    checkpoint: &Checkpoint,
    options: &JobOptions,
    events: &(dyn Fn(Event) + Sync),
    stop: &AtomicBool,
) -> Result<JobReport, ConvertError> {
    let quantizer = quantizer(encoder);
    marlin_convert::run(checkpoint, backend(options.threads), &quantizer, options, events, stop)
}

/// Every file of a directory with its bytes, by name.
pub fn files(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|e| e.unwrap().path())
        .map(|p| (PathBuf::from(p.file_name().unwrap()), std::fs::read(&p).unwrap()))
        .collect();
    files.sort();
    files
}

pub fn load(path: &Path) -> Model {
    let checkpoint = Checkpoint::open(path).unwrap();
    let spec = marlin_models::spec(&checkpoint).unwrap();
    Model::load(&checkpoint, spec, backend(1), &mut |_| {}).unwrap()
}
