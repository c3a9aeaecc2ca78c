//! Kernels for EXL3, every rate and codebook.
//!
//! `y = ((x ∘ suh) · P) · Ŵ · P ∘ svh`: activations are rotated once per call ([`rotate`]),
//! multiplied by the inner matrix strip by strip ([`multiply`], on the repacked trellis of
//! [`layout`]), and the sums are rotated back. Three kinds of work, hence at most three parallel
//! regions, of which a single row needs only the middle one.
//!
//! With integer activations the inner product is exact integer arithmetic: the codebook `mul1` is
//! affine in a byte sum (only the fp16 rounding of the value is skipped, 2⁻¹² relative), and the
//! values of `mcg` and `3inst` are fixed-point numbers of 16 bits, cheap to make with arithmetic
//! in fp16. Many rows go to the tiles of AMX, rounded to bf16. Without that, and when activations
//! must stay float, values are decoded to exactly the
//! stored fp16 numbers and multiplied in f32.
//!
//! [`mod@rows`] decodes single rows, for tied embeddings; [`encode`] goes the other way, values to
//! rings.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod encode;
mod isa;
mod layout;
mod multiply;
#[cfg(target_arch = "aarch64")]
mod neon;
mod rotate;
mod rows;
mod states;
#[cfg(test)]
mod tests;
mod tier;

use super::amx::{self, Amx, Panels, Part, Tile};
use super::kernels::{multiply_amx, tiles, tiles_name};
use crate::embedding::Rows;
use crate::kernel::{Inputs, Prepared, RowKind};
use crate::memory::grown;
use crate::{ColumnBand, Kernel, Level, Pool};
use isa::Isa;
use layout::{BLOCK, STRIP, Strips};
use marlin_quant::exl3::hadamard::BLOCK_SCALE;
use marlin_quant::exl3::{Codebook, Exl3Parts};
use marlin_tensor::Weight;
use multiply::{Fill, Multiply};
use rotate::{Activations, Integers, RotateIn, RotateOut};
use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;
use tier::{Tier, Visitor};

/// Rows multiplied in one pass, enough to amortise decoding.
const MAX_ROWS: usize = 256;
/// Sums kept between the product and the rotation of a pass (64 MiB): fewer rows for huge outputs.
const MAX_SUMS: usize = 1 << 24;
/// Weights a task should have at least, a microsecond's worth, decoding counting as this many rows.
const TASK_WEIGHTS: usize = 1 << 14;
const DECODE_ROWS: usize = 8;
/// Rows one task rotates.
const ROTATE_ROWS: usize = 8;

/// The kernel for `weight` at `level`; `None` for another format or where there is none.
pub(super) fn load(weight: &Weight, level: Level, float: bool) -> Option<Box<dyn Kernel>> {
    // Parts that contradict each other have to be reported: the fallback decodes and does.
    let parts = Exl3Parts::of(weight).ok()?;
    Some(Tier::best(level)?.visit(Load { level, weight, parts: &parts, float }))
}

/// Bytes of the kernel for `weight`: every tile of the trellis once, and the scales.
pub(super) fn bytes(weight: &Weight) -> Option<usize> {
    let parts = Exl3Parts::of(weight).ok()?;
    Some(parts.trellis.len() + 4 * (parts.suh.len() + parts.svh.len()))
}

/// The rows of `weight` at `level`; `None` for another format or where there is no kernel.
pub(super) fn rows(weight: &Weight, level: Level) -> Option<Box<dyn Rows>> {
    // As above.
    let parts = Exl3Parts::of(weight).ok()?;
    Some(Tier::best(level)?.visit(parts))
}

/// Name of the kernel for a level.
pub(super) fn name(level: Level, float: bool) -> String {
    format!("exl3 {}{}", level.without_tiles(), tiles_name(level, float))
}

/// A kernel to be made.
struct Load<'a> {
    level: Level,
    weight: &'a Weight,
    parts: &'a Exl3Parts,
    float: bool,
}

impl Visitor for Load<'_> {
    type Output = Box<dyn Kernel>;

    fn visit<S: Isa>(self, s: S) -> Box<dyn Kernel> {
        let Self { level, weight, parts, float } = self;
        let activations = match parts.codebook {
            Codebook::Mul1(_) if !float => Activations::Integers(Integers::MUL1),
            Codebook::Mcg(_) | Codebook::ThreeInst if S::HALF_ARITHMETIC && !float => {
                Activations::Integers(Integers::HALVES)
            }
            _ => Activations::Floats,
        };
        Box::new(Exl3Kernel {
            s,
            name: name(level, float),
            amx: tiles(level, float),
            in_features: weight.in_features,
            out_features: weight.out_features,
            codebook: parts.codebook,
            activations,
            strips: Strips::new(parts),
            suh: parts.suh.clone(),
            svh: parts.svh.iter().map(|v| v * BLOCK_SCALE).collect(),
        })
    }
}

struct Exl3Kernel<S> {
    s: S,
    name: String,
    amx: Option<Amx>,
    in_features: usize,
    out_features: usize,
    codebook: Codebook,
    activations: Activations,
    strips: Strips,
    /// Input scales, padded.
    suh: Vec<f32>,
    /// Output scales times `1/√128`, padded.
    svh: Vec<f32>,
}

/// Memory of a call, kept by the thread so that a decode step allocates nothing.
#[derive(Default)]
struct Scratch {
    x: Vec<u32>,
    sums: Vec<f32>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

impl<S: Isa> Kernel for Exl3Kernel<S> {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn bytes(&self) -> u64 {
        (self.strips.bytes() + size_of_val(&self.suh[..]) + size_of_val(&self.svh[..])) as u64
    }

    fn in_features(&self) -> usize {
        self.in_features
    }

    fn out_features(&self) -> usize {
        self.out_features
    }

    fn matmul(&self, x: &[f32], rows: usize, kind: RowKind, out: &mut [f32], pool: &Pool) {
        assert_eq!(x.len(), rows * self.in_features, "input fills [rows, in_features]");
        assert_eq!(out.len(), rows * self.out_features, "output fills [rows, out_features]");
        let mut scratch = SCRATCH.take();
        if let Some(amx) = self.amx.filter(|_| kind == RowKind::Prompt) {
            let rows = (MAX_SUMS / self.strips.outputs).max(1);
            let x = x.chunks(rows * self.in_features);
            for (x, out) in x.zip(out.chunks_mut(rows * self.out_features)) {
                self.pass_tiles(amx, x, out, &mut scratch, pool);
            }
            return SCRATCH.set(scratch);
        }
        let row_sums = self.strips.strips() * self.activations.strip_sums();
        let rows = (MAX_SUMS / row_sums).clamp(1, MAX_ROWS);
        let x = x.chunks(rows * self.in_features);
        for (x, out) in x.zip(out.chunks_mut(rows * self.out_features)) {
            self.pass(x, out, &mut scratch, pool);
        }
        SCRATCH.set(scratch);
    }

    fn stored(&self) -> &[u8] {
        self.strips.stored()
    }

    fn part_columns(&self) -> Option<usize> {
        Some(BLOCK)
    }

    fn prepare(&self, x: &[f32], _: Option<&Prepared>, pool: &Pool) -> Prepared {
        let mut rotated = Vec::new();
        self.rotate_in(x, self.activations, &mut rotated, pool);
        Arc::new(rotated)
    }

    fn part(&self, inputs: Inputs<'_>, columns: Range<usize>, out: &mut ColumnBand<'_>) {
        let Inputs { rows, prepared, .. } = inputs;
        let rotated: &Vec<u32> = prepared.downcast_ref().expect("inputs this kernel prepared");
        let mut scratch = SCRATCH.take();
        let activations = self.activations;
        let words = activations.strip_sums();
        let width = rows * words;
        let strips = columns.start / STRIP..columns.end.div_ceil(BLOCK) * (BLOCK / STRIP);
        let sums = grown(&mut scratch.sums, strips.len() * width, 0.0);
        self.s.enter(Multiply {
            strips: &self.strips,
            codebook: self.codebook,
            activations,
            x: rotated,
            rows,
            first_strip: strips.start,
            sums,
        });
        let svh = &self.svh[columns.start..];
        for row in 0..rows {
            let job = RotateOut {
                sums,
                strides: [width, words],
                first_row: row,
                activations,
                svh,
                out_features: columns.len(),
                out: out.row(row),
            };
            self.s.enter(job);
        }
        SCRATCH.set(scratch);
    }
}

impl<S: Isa> Exl3Kernel<S> {
    /// At most [`MAX_ROWS`] rows.
    fn pass(&self, x: &[f32], out: &mut [f32], scratch: &mut Scratch, pool: &Pool) {
        let Self { s, activations, .. } = *self;
        let rows = x.len() / self.in_features;
        let Scratch { x: rotated, sums } = scratch;
        let rotated = self.rotate_in(x, activations, rotated, pool);

        let words = activations.strip_sums();
        let width = rows * words;
        let sums = grown(sums, self.strips.strips() * width, 0.0);
        let strip_weights = self.strips.inputs * STRIP * (rows + DECODE_ROWS) / (1 + DECODE_ROWS);
        let even = self.strips.strips().div_ceil(4 * pool.available_threads());
        let per_task = even.max(TASK_WEIGHTS / strip_weights);
        pool.run_chunks(sums, per_task * width, |i, sums| {
            s.enter(Multiply {
                strips: &self.strips,
                codebook: self.codebook,
                activations,
                x: rotated,
                rows,
                first_strip: i * per_task,
                sums,
            });
        });
        self.rotate_out(sums, [width, words], activations, out, pool);
    }

    /// The same on AMX: both factors of the inner product as bf16.
    fn pass_tiles(&self, amx: Amx, x: &[f32], out: &mut [f32], scratch: &mut Scratch, pool: &Pool) {
        let rows = x.len() / self.in_features;
        let Scratch { x: rotated, sums } = scratch;
        let rotated = self.rotate_in(x, Activations::Floats, rotated, pool);
        // SAFETY: the words are bits of floats.
        let rotated =
            unsafe { std::slice::from_raw_parts(rotated.as_ptr().cast::<f32>(), rotated.len()) };
        let sums = grown(sums, rows * self.strips.outputs, 0.0);
        multiply_amx(amx, &[self], rotated, self.strips.inputs, vec![sums], pool);
        let sums = &scratch.sums[..];
        // A strip's sums lie as those of integers do.
        let strides = [STRIP, self.strips.outputs];
        self.rotate_out(sums, strides, Activations::Integers(Integers::MUL1), out, pool);
    }

    /// Rotated activations, `[rows, row_words]`, in `out`.
    fn rotate_in<'a>(
        &self,
        x: &[f32],
        activations: Activations,
        out: &'a mut Vec<u32>,
        pool: &Pool,
    ) -> &'a [u32] {
        let words = activations.row_words(self.strips.inputs);
        let rotated = grown(out, x.len() / self.in_features * words, 0);
        pool.run_chunks(rotated, ROTATE_ROWS * words, |i, out| {
            let first = i * ROTATE_ROWS * self.in_features;
            let x = &x[first..][..out.len() / words * self.in_features];
            let (in_features, suh) = (self.in_features, &self.suh[..]);
            self.s.enter(RotateIn { x, in_features, suh, activations, out });
        });
        rotated
    }

    /// Sums, `strides` apart from strip to strip and row to row, to outputs.
    fn rotate_out(
        &self,
        sums: &[f32],
        strides: [usize; 2],
        activations: Activations,
        out: &mut [f32],
        pool: &Pool,
    ) {
        let out_features = self.out_features;
        pool.run_chunks(out, ROTATE_ROWS * out_features, |i, out| {
            let first_row = i * ROTATE_ROWS;
            let svh = &self.svh[..];
            let job = RotateOut { sums, strides, first_row, activations, svh, out_features, out };
            self.s.enter(job);
        });
    }
}

impl<S: Isa> Panels for Exl3Kernel<S> {
    fn fill(&self, _: Amx, part: Part, bands: Range<usize>, start: usize, out: &mut [Tile]) {
        // A band is a half of a strip; tasks and steps are whole strips.
        let (strips, codebook, strip) = (&self.strips, self.codebook, bands.start / 2);
        assert!(bands == (2 * strip..2 * strip + 2) && start.is_multiple_of(amx::GRANULE));
        let first_block = start / amx::GRANULE;
        self.s.enter(Fill { strips, codebook, part, strip, first_block, out });
    }
}
