//! Runs variants of kernels for [`tune`](crate::tune): verified against what the host computes in f64, and timed as they are launched in
//! a model, many in one recording, over more copies of a matrix than caches hold.

mod attention;
mod clock;
mod product;
#[cfg(test)]
mod tests;

use crate::gpu::Gpu;
use crate::ops::gemm::Instruction;
use crate::tune::contest::{self, Entrant, Reference};
use crate::tune::{
    INTEGER_ROWS, MMA_ROWS, Outcome, PLAIN_ROWS, Shape, Subject, Tuned, Tuner, Variant, candidates,
    class,
};
use crate::{GpuDevice, Runtime, ops, weights};
use clock::Clock;
use cubecl::prelude::Client;
use marlin_tensor::BackendError;
use product::Product;
use std::collections::BTreeSet;

type Result<T> = std::result::Result<T, BackendError>;

/// Bytes of all copies of what is read, on a GPU and on a program that plays one.
const COPIES_BYTES: u64 = 400 << 20;
const SOFTWARE_COPIES_BYTES: u64 = 4 << 20;
// The rule itself keeps what is promised of few rows.
const _: () = assert!(Instruction::Wgmma.few_plain_rows() >= PLAIN_ROWS);
const _: () = assert!(Instruction::Mma.few_plain_rows() >= MMA_ROWS);
const _: () = assert!(ops::integer::FEW_ROWS >= INTEGER_ROWS);

/// Most copies.
const MOST_COPIES: u64 = 32;
/// Most outputs of a product: every variant's recording holds some. A class with more is left to the rule.
const MOST_OUTPUTS: usize = 16 << 20;

/// Tunes kernels for one device.
pub(crate) struct GpuTuner {
    gpu: Gpu,
    name: String,
    copies_bytes: u64,
    /// The matrix that was tuned last.
    product: Option<Product>,
}

impl GpuTuner {
    pub(crate) fn new(client: Client, device: &GpuDevice) -> Self {
        let gpu = Gpu::new(client, device.runtime == Runtime::Cuda);
        let name = format!("{} ({})", device.runtime.name(), device.name);
        let copies_bytes = if device.is_software { SOFTWARE_COPIES_BYTES } else { COPIES_BYTES };
        Self { gpu, name, copies_bytes, product: None }
    }

    /// The matrix of `subject`, placed as often as it takes.
    fn product(&mut self, weight: &marlin_tensor::Weight, shape: &Shape) -> Result<()> {
        if self.product.as_ref().is_none_or(|p| p.shape != *shape) {
            // Its memory first.
            self.product = None;
            self.product = Some(Product::new(&self.gpu, weight, shape, self.copies_bytes)?);
        }
        Ok(())
    }
}

impl Tuner for GpuTuner {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn shape(&self, subject: &Subject) -> Result<Shape> {
        Ok(match subject {
            Subject::Linear(weight) => weights::shape(weight)?,
            Subject::Attention { params, cache_type, latent } => {
                ops::attention::shape(*cache_type, *latent, params)
            }
        })
    }

    fn classes(&self, shape: &Shape, rows: &[usize]) -> Vec<Option<usize>> {
        let facts = self.gpu.facts();
        let classes: BTreeSet<usize> = rows.iter().map(|rows| class(*rows)).collect();
        // Every number of rows first: classes are measured with what it chose.
        let mut all = vec![None];
        let outputs = match shape {
            Shape::Linear { out_features, .. } => *out_features,
            Shape::Attention { .. } => 1,
        };
        let held = classes.into_iter().filter(|rows| rows.saturating_mul(outputs) <= MOST_OUTPUTS);
        all.extend(held.map(Some));
        all.retain(|rows| candidates(shape, *rows, &facts).len() > 1);
        all
    }

    fn tune(&mut self, subject: &Subject, rows: Option<usize>, tuned: &Tuned) -> Result<Outcome> {
        let shape = self.shape(subject)?;
        match subject {
            Subject::Linear(weight) => {
                self.product(weight, &shape)?;
                let product = self.product.as_ref().expect("placed above");
                let runs = product.runs(&self.gpu, rows, tuned)?;
                Ok(contest::hold(shape, rows, &runs.reference, runs.entrants))
            }
            Subject::Attention { params, cache_type, latent } => {
                let parts = attention::Parts::new(
                    &self.gpu,
                    *params,
                    *cache_type,
                    *latent,
                    self.copies_bytes,
                )?;
                let runs = parts.runs(&self.gpu, &shape);
                Ok(contest::hold(shape, rows, &runs.reference, runs.entrants))
            }
        }
    }
}

/// What a contest is held of.
struct Runs<'a> {
    reference: Reference,
    entrants: Vec<Entrant<'a>>,
}

/// The rule's variant, and after it the others that `shape` may have.
fn variants(gpu: &Gpu, shape: &Shape, rows: Option<usize>, rule: Variant) -> Vec<Variant> {
    let mut all = candidates(shape, rows, &gpu.facts());
    all.retain(|variant| *variant != rule);
    all.insert(0, rule);
    all
}

/// Copies of something of so many bytes.
fn copies(gpu: &Gpu, bytes: u64, all: u64) -> u64 {
    let memory = gpu.client.properties().memory.max_memory().unwrap_or(u64::MAX);
    (all.min(memory / 4) / bytes.max(1)).clamp(1, MOST_COPIES)
}

/// Numbers in ±1, always the same for a seed.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    };
    (0..len).map(|_| (next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}
