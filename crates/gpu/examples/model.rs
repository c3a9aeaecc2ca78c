//! A model on a GPU beside the CPU: `model MODEL [DEVICE] [REPEATS] [alone]`.
//!
//! Without `alone`, logits of one prompt, and of tokens decoded one by one after it (the same on both), are compared: the largest difference, the mean
//! of KL(cpu ‖ gpu) and how often both prefer the same token. Then the GPU is timed: reading 512 tokens,
//! and decoding greedily, with the best token found on the device at every step; the median of the repeats. With no repeats nothing is timed,
//! which is right for emulated Metal (`--features emulated`).

use marlin_checkpoint::Checkpoint;
use marlin_cpu::{Activations, CpuBackend, CpuOptions};
use marlin_models::Model;
use marlin_tensor::{Batch, Cache, CacheType, Draw, Tensor};
use marlin_testkit::Noise;
use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

const BLOCK: usize = 16;
/// Tokens of the prompt that is compared, and of those decoded after it.
const PROMPT: usize = 96;
const DECODED: usize = 40;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A model with room for `sequences` of `tokens` each, blocks in order.
struct Session<'a> {
    model: &'a Model,
    cache: Cache,
    blocks: usize,
}

impl<'a> Session<'a> {
    fn new(model: &'a Model, sequences: usize, tokens: usize) -> Result<Self> {
        let blocks = tokens.div_ceil(BLOCK);
        let spec = model.cache_spec(sequences * blocks, BLOCK, CacheType::F16);
        let cache = model.backend().create_cache(&spec)?;
        Ok(Self { model, cache, blocks })
    }

    /// Logits of the last `outputs` of `tokens` of every sequence, which have `start` tokens behind them.
    fn forward(&self, tokens: &[Vec<u32>], start: usize, outputs: usize) -> Result<Vec<f32>> {
        let logits = self.run(tokens, start, outputs)?;
        Ok(self.model.backend().download(&logits)?)
    }

    /// The likeliest token after each sequence.
    fn next(&self, tokens: &[Vec<u32>], start: usize) -> Result<Vec<u32>> {
        let logits = self.run(tokens, start, 1)?;
        let draws: Vec<Draw> = (0..tokens.len()).map(Draw::greedy).collect();
        let found = self.model.backend().draw(&logits, &draws)?;
        let found = found.ok_or("a device that does not draw tokens")?;
        let tokens: Option<Vec<u32>> = found.into_iter().map(|d| Some(d?.token)).collect();
        Ok(tokens.ok_or("logits that are not finite")?)
    }

    fn run(&self, tokens: &[Vec<u32>], start: usize, outputs: usize) -> Result<Tensor> {
        let mut batch = Batch::new(BLOCK);
        for (s, tokens) in tokens.iter().enumerate() {
            let push = if tokens.len() == 1 { Batch::push_decode } else { Batch::push };
            let first = s * self.blocks;
            let used = (start + tokens.len()).div_ceil(BLOCK);
            let table: Vec<u32> = (first..first + used).map(|b| b as u32).collect();
            push(&mut batch, tokens, start, &table, (self.blocks * BLOCK) as u32, outputs);
        }
        Ok(self.model.forward(&batch, &self.cache)?)
    }
}

fn best(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0) as u32
}

/// Probabilities in f64.
fn softmax(logits: &[f32]) -> Vec<f64> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exps: Vec<f64> = logits.iter().map(|l| f64::from(l - top).exp()).collect();
    let total: f64 = exps.iter().sum();
    exps.into_iter().map(|e| e / total).collect()
}

fn compare(what: &str, expected: &[f32], found: &[f32], vocab: usize) {
    let rows = || expected.chunks(vocab).zip(found.chunks(vocab));
    let largest = expected.iter().zip(found).fold(0.0f32, |m, (e, f)| m.max((e - f).abs()));
    let span = expected.iter().fold(0.0f32, |m, e| m.max(e.abs()));
    let same = rows().filter(|(e, f)| best(e) == best(f)).count();
    let kl = rows().map(|(e, f)| {
        let (p, q) = (softmax(e), softmax(f));
        p.iter().zip(&q).filter(|(p, _)| **p > 0.0).map(|(p, q)| p * (p / q).ln()).sum::<f64>()
    });
    let count = rows().count();
    println!(
        "{what:<8} {count:>4} rows: largest difference {largest:.2e} of {span:.1}, KL {:.2e}, same best token {same}/{count}",
        kl.sum::<f64>() / count as f64
    );
}

fn median(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[0], values[values.len() - 1])
}

/// Compares the logits of `model` with those of the CPU.
fn beside_cpu(checkpoint: &Checkpoint, model: &Model) -> Result<()> {
    let options = CpuOptions { activations: Activations::Float, ..CpuOptions::default() };
    let spec = marlin_models::spec(checkpoint)?;
    let cpu_model =
        Model::load(checkpoint, spec, Arc::new(CpuBackend::new(options)?), &mut |_| {})?;
    let cpu = Session::new(&cpu_model, 1, PROMPT + DECODED)?;
    let one = Session::new(model, 1, PROMPT + DECODED)?;
    let vocab = model.spec().vocab_size;
    let mut noise = Noise(7);
    let mut random =
        |n: usize| -> Vec<u32> { (0..n).map(|_| (noise.bits() % vocab as u64) as u32).collect() };

    let prompt = random(PROMPT);
    let expected = cpu.forward(std::slice::from_ref(&prompt), 0, PROMPT)?;
    let start = Instant::now();
    let found = one.forward(&[prompt], 0, PROMPT)?;
    println!("first pass, kernels compiled: {:.2} s", start.elapsed().as_secs_f64());
    compare("prompt", &expected, &found, vocab);
    let mut token = best(&expected[expected.len() - vocab..]);
    let (mut all, mut others) = (Vec::new(), Vec::new());
    for i in 0..DECODED {
        let logits = cpu.forward(&[vec![token]], PROMPT + i, 1)?;
        others.extend(one.forward(&[vec![token]], PROMPT + i, 1)?);
        token = best(&logits);
        all.extend(logits);
    }
    compare("decoded", &all, &others, vocab);
    Ok(())
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let path = args.first().ok_or("usage: model MODEL [DEVICE] [REPEATS] [alone]")?;
    let wanted = args.get(1).map_or("", String::as_str);
    let repeats: usize = args.get(2).map_or(Ok(5), |n| n.parse())?;
    marlin_gpu::emulate(marlin_gpu::Emulation {
        folder: std::env::temp_dir().join("marlin-metal-text"),
        compiler: std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned()),
    });
    let device = marlin_gpu::devices().into_iter().find(|d| d.runtime.name().starts_with(wanted));
    let device = device.ok_or("no device of a runtime of this build")?;
    let gpu = marlin_gpu::open(&device)?;
    println!("{path} on {}", gpu.name());

    let checkpoint = Checkpoint::open(path.as_ref())?;
    let start = Instant::now();
    let spec = marlin_models::spec(&checkpoint)?;
    let model = Model::load(&checkpoint, spec, gpu.clone(), &mut |_| {})?;
    println!("loaded in {:.2} s", start.elapsed().as_secs_f64());
    if args.get(3).is_none_or(|word| word != "alone") {
        beside_cpu(&checkpoint, &model)?;
    }
    if repeats == 0 {
        return Ok(());
    }
    let vocab = model.spec().vocab_size;
    let mut noise = Noise(7);
    let mut random =
        |n: usize| -> Vec<u32> { (0..n).map(|_| (noise.bits() % vocab as u64) as u32).collect() };

    for (length, sequences) in [(512, 1), (128, 1), (128, 8), (128, 32)] {
        let session = Session::new(&model, sequences, 512 + BLOCK)?;
        let rates = (0..repeats + 1).map(|_| -> Result<f64> {
            if length == 512 {
                let start = Instant::now();
                session.forward(&[random(length)], 0, 1)?;
                return Ok(length as f64 / start.elapsed().as_secs_f64());
            }
            let mut tokens: Vec<Vec<u32>> = (0..sequences).map(|_| random(1)).collect();
            let start = Instant::now();
            for i in 0..length {
                tokens = session.next(&tokens, i)?.into_iter().map(|token| vec![token]).collect();
            }
            Ok((length * sequences) as f64 / start.elapsed().as_secs_f64())
        });
        // The first compiles kernels and records the pass.
        let rates = rates.skip(1).collect::<Result<Vec<f64>>>()?;
        let (rate, low, high) = median(rates);
        let what = if length == 512 { "pp512" } else { "tg128" };
        println!("{what} batch {sequences:<3} {rate:>9.1} tokens/s  ({low:.1} to {high:.1})");
    }
    Ok(())
}
