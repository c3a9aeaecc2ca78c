//! What the host does whatever the device: weights as floats, conversions, sampling.

use super::cases::{Case, Visit};
use super::weights::{self, BAND, Random};
use anyhow::Result;
use marlin_engine::{SampleContext, Sampler, SamplingOptions, SamplingParams, TokenCounts};
use marlin_quant::formats;

/// Inputs of the matrices that are decoded.
const COLUMNS: usize = 2048;
const NARROW: &str = "f32 to bf16";
const WIDEN: &str = "bf16 to f32";

/// Ways to sample.
fn samplings() -> [(&'static str, SamplingOptions); 3] {
    let filtered = SamplingOptions { top_k: Some(40), top_p: 0.95, ..Default::default() };
    [
        ("sample greedy", SamplingOptions::greedy()),
        ("sample temperature", SamplingOptions::default()),
        ("sample top_k top_p", filtered),
    ]
}

/// Every name there is.
pub fn names() -> Vec<String> {
    let decoded = formats().iter().map(|format| format!("dequantize {}", format.id()));
    let others = [WIDEN, NARROW].into_iter().chain(samplings().map(|(name, _)| name));
    decoded.chain(others.map(str::to_owned)).collect()
}

/// Calls `visit` with every case that is wanted.
pub fn each(
    wants: &dyn Fn(&str) -> bool,
    vocab: &[usize],
    random: &mut Random,
    visit: &mut Visit<'_>,
) -> Result<()> {
    dequantization(wants, random, visit)?;
    conversion(wants, random, visit)?;
    sampling(wants, vocab, random, visit)
}

/// Each format's definition, which serves where it has no kernel, and converters read by. One thread.
fn dequantization(
    wants: &dyn Fn(&str) -> bool,
    random: &mut Random,
    visit: &mut Visit<'_>,
) -> Result<()> {
    for format in formats() {
        let name = format!("dequantize {}", format.id());
        if !wants(&name) {
            continue;
        }
        let Some(weight) = weights::random(*format, BAND, COLUMNS, random) else { continue };
        let mut out = vec![0.0; BAND * COLUMNS];
        let bytes = weight.bytes() as usize + 4 * out.len();
        let case = Case::new(name, format!("[{BAND},{COLUMNS}]"), bytes, 0, |_| {
            Ok(format.decode_rows(&weight, 0..BAND, &mut out)?)
        });
        visit(Case { kernel: Some("scalar, one thread".to_owned()), ..case })?;
    }
    Ok(())
}

fn conversion(
    wants: &dyn Fn(&str) -> bool,
    random: &mut Random,
    visit: &mut Visit<'_>,
) -> Result<()> {
    let format = marlin_quant::format("bf16");
    let values = random.floats(BAND * COLUMNS);
    let (shape, bytes) = (format!("[{BAND},{COLUMNS}]"), 6 * values.len());
    if wants(WIDEN) {
        let weight = format.pack(&values, BAND, COLUMNS)?;
        visit(Case::new(WIDEN, shape.clone(), bytes, 0, |_| {
            marlin_quant::decode(&weight)?;
            Ok(())
        }))?;
    }
    if wants(NARROW) {
        visit(Case::new(NARROW, shape, bytes, 0, |_| {
            format.pack(&values, BAND, COLUMNS)?;
            Ok(())
        }))?;
    }
    Ok(())
}

fn sampling(
    wants: &dyn Fn(&str) -> bool,
    vocab: &[usize],
    random: &mut Random,
    visit: &mut Visit<'_>,
) -> Result<()> {
    for (name, options) in samplings() {
        if !wants(name) {
            continue;
        }
        let params = SamplingParams::new(options)?;
        for &vocab in vocab {
            // About as wide as a model's.
            let logits: Vec<f32> = random.floats(vocab).iter().map(|v| 8.0 * v).collect();
            let counts = TokenCounts::default();
            let mut sampler = Sampler::new();
            visit(Case::new(name, format!("[{vocab}]"), 4 * vocab, 0, |_| {
                let context =
                    SampleContext { tokens: &[], prompt_len: 0, counts: &counts, banned: &[] };
                sampler.sample(&logits, &params, &context)?;
                Ok(())
            }))?;
        }
    }
    Ok(())
}
