//! What each group of matrices costs at the logits: the group alone is quantized at a rate, everything else
//! stays as it was, and the divergence from the source is taken over the probe's positions.
//!
//! The source's blocks are held in memory for this; a probe is short (a few thousand tokens), and a group in
//! layer `l` only makes the layers from `l` on run again. Groups of the prediction layer do not reach the
//! logits and are not measured.

use crate::allocate::Sensitivity;
use crate::calibration::Calibration;
use crate::error::ConvertError;
use crate::hessian::Hessian;
use crate::origin::{Named, Origin, half, view};
use crate::plan::{Plan, Role, Target};
use crate::pooling::pool_starved;
use crate::quantizer::{LinearInput, Quantizer};
use crate::report::fnv;
use crate::store::named;
use crate::stream::{Stream, batch, cache};
use marlin_models::{Block, Loader, Norm, Step};
use marlin_tensor::{Backend, Cache, Linear, LinearOptions, Tensor};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

type Result<T> = std::result::Result<T, ConvertError>;

/// What is measured, and on what.
pub struct Probe<'a> {
    /// The source.
    pub origin: &'a Origin<'a>,
    /// Its groups.
    pub plan: &'a Plan,
    /// Where blocks run, with float activations.
    pub backend: Arc<dyn Backend>,
    /// Quantizes the groups.
    pub quantizer: &'a dyn Quantizer,
    /// Rows for the Hessians.
    pub calibration: &'a Calibration,
    /// Rows whose logits are compared.
    pub rows: &'a [Vec<u32>],
    /// Rates to measure, ascending.
    pub rates: &'a [f64],
    /// Holds the hidden states.
    pub directory: &'a Path,
    /// Seed of the random signs.
    pub seed: u64,
    /// Threads in all.
    pub threads: usize,
    /// Told how many of how many measurements are done; fails when the user stops.
    pub tick: &'a (dyn Fn(usize, usize) -> Result<()> + Sync),
}

/// The source from the blocks' inputs to the logits.
struct Whole {
    blocks: Vec<(Block, Cache)>,
    norm: Norm,
    head: Linear,
}

impl Probe<'_> {
    /// Measures every group that reaches the logits, the head apart.
    ///
    /// # Errors
    /// When the source cannot be read, the backend fails, or the user stops.
    pub fn run(&self) -> Result<Vec<Sensitivity>> {
        crate::job::pool(self.threads)?.install(|| self.groups())
    }

    fn groups(&self) -> Result<Vec<Sensitivity>> {
        let groups = &self.plan.groups;
        let reaches = |g: &usize| !matches!(groups[*g].role, Role::Head | Role::Prediction);
        let total = (0..groups.len()).filter(reaches).count() * self.rates.len();
        let whole = self.load()?;
        let mut inputs = self.embed()?;
        let reference = self.logits_from(&whole, 0, &inputs)?;
        let silent = |_| (self.tick)(0, total);
        let stream = Stream {
            origin: self.origin,
            backend: self.backend.clone(),
            calibration: self.calibration,
            directory: self.directory,
            tick: &silent,
        };
        stream.embed(vec![self.origin.embedding()?])?;
        let mut found = Vec::new();
        for layer in 0..self.plan.layers {
            let targets = self.plan.targets_of(layer, |r| r != Role::Head && r != Role::Prediction);
            let labels = targets.iter().map(|t| t.spec.label.clone()).collect();
            let mut hessians = stream.capture(layer, labels)?;
            pool_starved(&mut hessians);
            let mut of_layer: Vec<usize> = targets.iter().map(|t| t.group).collect();
            of_layer.dedup();
            for group in of_layer {
                let mut divergence = Vec::new();
                for &rate in self.rates {
                    (self.tick)(found.len() * self.rates.len() + divergence.len(), total)?;
                    let block = self.with_group(layer, group, rate, &hessians)?;
                    let cache = &whole.blocks[layer].1;
                    let outputs = self.pass(&block, cache, &inputs)?;
                    let logits = self.logits_from(&whole, layer + 1, &outputs)?;
                    divergence.push((rate, mean_divergence(&reference, &logits, self.vocab())));
                }
                found.push(Sensitivity { group: groups[group].name.clone(), divergence });
            }
            let (block, cache) = &whole.blocks[layer];
            inputs = self.pass(block, cache, &inputs)?;
            stream.advance(layer, self.tensors(layer, None)?)?;
            stream.states(layer).remove();
        }
        stream.states(self.plan.layers).remove();
        Ok(found)
    }

    fn vocab(&self) -> usize {
        self.origin.output.vocab_size
    }

    fn columns(&self) -> usize {
        self.rows.iter().map(Vec::len).max().unwrap_or(0)
    }

    fn load(&self) -> Result<Whole> {
        let mut progress = |_| {};
        let spec = &self.origin.spec;
        let checkpoint = self.origin.source.checkpoint();
        let mut loader = Loader::new(checkpoint, self.backend.clone(), &mut progress);
        let mut blocks = Vec::new();
        for block in &spec.blocks {
            let cache = cache(self.backend.as_ref(), block, self.columns())?;
            blocks.push((Block::load(&mut loader, block)?, cache));
        }
        let head = &spec.head.linear;
        let weight = match self.origin.source.has(&head.key) {
            true => self.origin.source.linear(head)?,
            false => self.origin.source.linear(&self.origin.embedding_spec())?,
        };
        let head = self.backend.load_linear(&weight, None, LinearOptions::default())?;
        Ok(Whole { blocks, norm: loader.norm(&spec.norm)?, head })
    }

    fn embed(&self) -> Result<Vec<Tensor>> {
        let origin = self.origin;
        let weight = origin.source.linear(&origin.embedding_spec())?;
        let table = self.backend.load_embedding(&weight)?;
        let scale = origin.spec.embedding.scale;
        let embed = |tokens: &Vec<u32>| {
            Ok(self.backend.embed(&table, &batch(tokens, self.columns()), scale)?)
        };
        self.rows.iter().map(embed).collect()
    }

    fn pass(&self, block: &Block, cache: &Cache, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let backend = self.backend.as_ref();
        let run = |(tokens, x): (&Vec<u32>, &Tensor)| {
            let batch = batch(tokens, self.columns());
            let step = Step { backend, batch: &batch, cache };
            Ok(block.forward(&step, 0, x.clone(), &mut None)?)
        };
        self.rows.iter().zip(inputs).map(run).collect()
    }

    /// Log-probabilities of every row from the inputs of block `first` on, `[positions, vocab]`.
    fn logits_from(&self, whole: &Whole, first: usize, inputs: &[Tensor]) -> Result<Vec<f32>> {
        let backend = self.backend.as_ref();
        let mut states = inputs.to_vec();
        for (block, cache) in &whole.blocks[first..] {
            states = self.pass(block, cache, &states)?;
        }
        let mut out = Vec::new();
        for x in states {
            // The second half of a row has context enough.
            let rows: Vec<u32> = (x.rows as u32 / 2..x.rows as u32).collect();
            let x = backend.gather_rows(&x, &rows)?;
            let logits = backend.linear(&whole.norm.forward(backend, &x)?, &whole.head)?;
            let logits = match self.origin.spec.head.softcap {
                Some(cap) => backend.softcap(logits, cap)?,
                None => logits,
            };
            out.extend(backend.download(&logits)?);
        }
        out.par_chunks_mut(self.vocab()).for_each(|row| {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = row.iter().map(|v| f64::from(v - max).exp()).sum();
            let norm = max + sum.ln() as f32;
            row.iter_mut().for_each(|v| *v -= norm);
        });
        Ok(out)
    }

    /// Block `layer` with the matrices of `group` quantized at `rate`.
    fn with_group(
        &self,
        layer: usize,
        group: usize,
        rate: f64,
        hessians: &BTreeMap<String, Hessian>,
    ) -> Result<Block> {
        let members: Vec<&Target> = self.plan.targets.iter().filter(|t| t.group == group).collect();
        let quantized: Vec<Vec<Named>> = members
            .par_iter()
            .map(|target| {
                let spec = &target.spec;
                let key = self.origin.output_key(spec);
                let weight = self.origin.matrix(spec)?;
                let hessian = hessians.get(&spec.label);
                let mean = hessian.and_then(Hessian::mean);
                let input = LinearInput {
                    key: &key,
                    weight: &weight,
                    hessian: mean.as_ref(),
                    why_uncalibrated: "no calibration token reached it",
                    calibration_rows: hessian.map_or(0, Hessian::rows),
                    seeds: (
                        self.seed ^ fnv(spec.label.as_bytes()),
                        self.seed ^ fnv(key.as_bytes()),
                    ),
                };
                let (packed, _) = self.quantizer.quantize(&input, rate)?;
                Ok(named(&key, packed.parts, None))
            })
            .collect::<Result<_>>()?;
        let replaced = (group, quantized.concat());
        let view = view(self.directory, &self.origin.config, self.tensors(layer, Some(replaced))?);
        let mut progress = |_| {};
        let mut loader = Loader::new(&view, self.backend.clone(), &mut progress);
        Ok(Block::load(&mut loader, &self.origin.output.blocks[layer])?)
    }

    /// All tensors of block `layer` in fp16, with those of one group replaced.
    fn tensors(&self, layer: usize, replaced: Option<(usize, Vec<Named>)>) -> Result<Vec<Named>> {
        let (ours, theirs) = (&self.origin.spec.blocks[layer], &self.origin.output.blocks[layer]);
        let mut tensors = self.origin.plain_tensors(ours, theirs)?;
        let group = replaced.as_ref().map(|r| r.0);
        for target in self.plan.targets_of(layer, |r| r != Role::Head && r != Role::Prediction) {
            let key = self.origin.output_key(&target.spec);
            if Some(target.group) != group {
                let name = format!("{key}.weight");
                tensors.push((name, half(&self.origin.matrix(&target.spec)?)));
            }
            if let Some(bias) = self.origin.bias(&target.spec)? {
                let bias = marlin_tensor::HostTensor::from_f32(vec![bias.len()], &bias);
                tensors.push((format!("{key}.bias"), bias));
            }
        }
        tensors.extend(replaced.into_iter().flat_map(|r| r.1));
        Ok(tensors)
    }
}

/// Mean of `Σ q (ln q − ln p)` over rows of log-probabilities.
fn mean_divergence(reference: &[f32], found: &[f32], vocab: usize) -> f64 {
    let rows = reference.len() / vocab.max(1);
    let sums: Vec<f64> = reference
        .par_chunks(vocab)
        .zip(found.par_chunks(vocab))
        .map(|(q, p)| {
            let term = |(q, p): (&f32, &f32)| f64::from(q.exp()) * f64::from(q - p);
            q.iter().zip(p).map(term).sum::<f64>()
        })
        .collect();
    sums.iter().sum::<f64>() / rows as f64
}
