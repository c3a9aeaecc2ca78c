//! What each group of matrices costs at the logits: the group alone is quantized at a rate, everything else
//! stays as it was, and the divergence from the source is taken over the probe's positions.
//!
//! The source is held in memory for this; a probe is short (a few thousand tokens), and a group in
//! layer `l` only makes the layers from `l` on run again. Groups of the prediction layer do not reach the
//! logits and are not measured. Every measurement is handed out as soon as it is made, and what an earlier run
//! handed out is not made again.

use crate::allocate::Sensitivity;
use crate::calibration::Calibration;
use crate::error::ConvertError;
use crate::hessian::Hessians;
use crate::origin::{Named, Origin, view};
use crate::plan::{Plan, Role, Target, in_order};
use crate::pooling::{MomentsRule, Pools, prepare};
use crate::quantizer::{Quantizer, quantize_linear};
use crate::store::named;
use crate::stream::{Stream, batch, cache};
use marlin_models::{Block, Loader, Model, Step};
use marlin_tensor::{Backend, Tensor};
use rayon::prelude::*;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

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
    /// What an earlier run of the same probe found; hidden states that it left in `directory` are gone on from.
    pub known: Vec<Sensitivity>,
    /// Shown all that is known after every measurement, to be kept for the next run.
    pub keep: &'a (dyn Fn(&[Sensitivity]) -> Result<()> + Sync),
    /// Told how many of how many measurements are done; fails when the user stops.
    pub tick: &'a (dyn Fn(usize, usize) -> Result<()> + Sync),
}

/// Groups of `plan` that are measured: those that reach the logits, the head apart.
pub fn measured_groups(plan: &Plan) -> Vec<usize> {
    let reaches = |g: &usize| !matches!(plan.groups[*g].role, Role::Head | Role::Prediction);
    (0..plan.groups.len()).filter(reaches).collect()
}

/// Whether `known` has every group of `plan` at each of `rates`.
pub fn is_complete(plan: &Plan, rates: &[f64], known: &[Sensitivity]) -> bool {
    measured_groups(plan)
        .iter()
        .all(|&g| rates.iter().all(|r| has(known, &plan.groups[g].name, *r)))
}

fn has(known: &[Sensitivity], group: &str, rate: f64) -> bool {
    let of_group = known.iter().filter(|s| s.group == group);
    of_group.flat_map(|s| &s.divergence).any(|d| d.0 == rate)
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
        let mut found = self.known.clone();
        let groups = &self.plan.groups;
        let is_open = |found: &[Sensitivity], g: usize| {
            self.rates.iter().any(|r| !has(found, &groups[g].name, *r))
        };
        let wanted = measured_groups(self.plan);
        let Some(first) = wanted.iter().find(|g| is_open(&found, **g)).map(|g| groups[*g].layer)
        else {
            return Ok(found);
        };
        let total = wanted.len() * self.rates.len();
        let done = AtomicUsize::new(found.iter().map(|s| s.divergence.len()).sum());
        let tick = || (self.tick)(done.load(Ordering::Relaxed), total);
        let source = self.load()?;
        let embed = |tokens: &Vec<u32>| Ok(source.embed(&batch(tokens, self.columns()))?);
        let mut inputs = self.rows.iter().map(embed).collect::<Result<Vec<Tensor>>>()?;
        let reference = self.logits_from(&source, 0, &inputs)?;
        let of_row = |_| tick();
        let stream = Stream {
            origin: self.origin,
            backend: self.backend.clone(),
            calibration: self.calibration,
            directory: self.directory,
            tick: &of_row,
        };
        let start = match (0..=first).rev().find(|layer| stream.has(*layer)) {
            Some(kept) => kept,
            None => {
                stream.embed(None)?;
                0
            }
        };
        for layer in 0..self.plan.layers {
            let targets = self.plan.targets_of(layer);
            let mut of_layer: Vec<usize> = targets.iter().map(|t| t.group).collect();
            of_layer.dedup();
            of_layer.retain(|g| is_open(&found, *g));
            if !of_layer.is_empty() {
                let labels: BTreeSet<String> =
                    targets.iter().map(|t| t.spec.label.clone()).collect();
                let mut hessians = stream.capture(layer, labels.clone())?;
                let mut pools = Pools::default();
                pools.add(&hessians, in_order(&targets));
                prepare(MomentsRule::Own, &mut hessians, &labels, &pools);
                for group in of_layer {
                    for &rate in self.rates {
                        let name = &groups[group].name;
                        if has(&found, name, rate) {
                            continue;
                        }
                        tick()?;
                        let block = self.with_group(layer, group, rate, &hessians)?;
                        let outputs = self.pass(layer, &block, &inputs)?;
                        let logits = self.logits_from(&source, layer + 1, &outputs)?;
                        let divergence = mean_divergence(&reference, &logits, self.vocab());
                        add(&mut found, name, rate, divergence);
                        (self.keep)(&found)?;
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
            inputs = self.pass(layer, source.block(layer), &inputs)?;
            // Nothing is measured after the last block: no states are needed there.
            if layer >= start && layer + 1 < self.plan.layers {
                stream.advance(layer, self.origin.source_tensors(self.plan, layer, None)?)?;
            }
            if layer >= start {
                stream.states(layer).remove();
            }
        }
        Ok(found)
    }

    fn vocab(&self) -> usize {
        self.origin.output.vocab_size
    }

    fn columns(&self) -> usize {
        self.rows.iter().map(Vec::len).max().unwrap_or(0)
    }

    fn load(&self) -> Result<Model> {
        let (checkpoint, spec) = (self.origin.source.checkpoint(), self.origin.spec.clone());
        Ok(Model::load(checkpoint, spec, self.backend.clone(), &mut |_| {})?)
    }

    /// Every row through `block`, which is or stands for block `layer`.
    fn pass(&self, layer: usize, block: &Block, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let backend = self.backend.as_ref();
        let cache = cache(backend, &self.origin.spec.blocks[layer], self.columns())?;
        let run = |(tokens, x): (&Vec<u32>, &Tensor)| {
            let batch = batch(tokens, self.columns());
            let step = Step { backend, batch: &batch, cache: &cache };
            Ok(block.forward(&step, 0, x.clone(), &mut None)?)
        };
        self.rows.iter().zip(inputs).map(run).collect()
    }

    /// Log-probabilities of every row from the inputs of block `first` on, `[positions, vocab]`.
    fn logits_from(&self, source: &Model, first: usize, inputs: &[Tensor]) -> Result<Vec<f32>> {
        let mut states = inputs.to_vec();
        for layer in first..self.plan.layers {
            states = self.pass(layer, source.block(layer), &states)?;
        }
        let mut out = Vec::new();
        for x in states {
            // The second half of a row has context enough.
            let rows: Vec<u32> = (x.rows as u32 / 2..x.rows as u32).collect();
            out.extend(self.backend.download(&source.logits_of(&x, &rows)?)?);
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
        hessians: &Hessians,
    ) -> Result<Block> {
        let members: Vec<&Target> = self.plan.targets.iter().filter(|t| t.group == group).collect();
        let quantized: Vec<Vec<Named>> = members
            .par_iter()
            .map(|target| {
                let hessian = hessians.get(&target.spec.label);
                let (packed, report) = quantize_linear(
                    self.quantizer,
                    self.origin,
                    &target.spec,
                    hessian,
                    self.seed,
                    rate,
                    &|_| {},
                )?;
                Ok(named(&report.key, packed.parts, None))
            })
            .collect::<Result<_>>()?;
        let replaced = (group, quantized.concat());
        let tensors = self.origin.source_tensors(self.plan, layer, Some(replaced))?;
        let view = view(self.directory, &self.origin.config, tensors);
        let mut progress = |_| {};
        let mut loader = Loader::new(&view, self.backend.clone(), &mut progress);
        Ok(Block::load(&mut loader, &self.origin.output.blocks[layer])?)
    }
}

/// Adds a measurement, as a value that survives being written as text and read back.
fn add(found: &mut Vec<Sensitivity>, group: &str, rate: f64, divergence: f64) {
    let measured = (rate, f64::from(divergence as f32));
    match found.iter_mut().find(|s| s.group == group) {
        Some(of_group) => of_group.divergence.push(measured),
        None => {
            let group = group.to_owned();
            found.push(Sensitivity { group, divergence: vec![measured] });
        }
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
