//! Both sides of the product: activations into the rotated basis, sums back out of it.
//!
//! Rotated activations of a block of 128 inputs are stored so that one 32-bit (integers) or
//! 64-bit (floats) load is what a vector of states needs: input `16·2g + r` of group `g` beside
//! input `16·(2g + 1) + r`.
//!
//! Integers have one scale per block of 128, `scale = max|a| / limit`, and as many bits as leave a
//! sum of products within 32 bits ([`Integers`]).

use super::isa::{Isa, Job};
use super::layout::{BLOCK, GROUPS, STRIP};
use marlin_quant::exl3::codebook::{MUL1_OFFSET, MUL1_SLOPE};
use marlin_quant::exl3::hadamard::BLOCK_SCALE;

/// Words of a block of integers: pairs, scale, start.
pub(super) const RECORD: usize = BLOCK / 2 + 2;
/// Word of the scale.
pub(super) const SCALE: usize = BLOCK / 2;
/// Word of the start.
pub(super) const START: usize = SCALE + 1;
/// Registers of a block: 128 floats of at least 8 lanes.
const REGISTERS: usize = 16;

/// Weights as integers, `w = slope·t + offset`, and the activations that go with them. A sum
/// `Σ q·(t − centre)` starts at `−centre·Σ q`, is computed modulo 2³² and read every `chunk`
/// pairs of inputs; what the centre leaves over, `(centre·slope + offset)·Σ a`, is one number
/// per row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Integers {
    limit: f32,
    centre: i32,
    slope: f32,
    offset: f32,
}

impl Integers {
    /// `mul1`: byte sums up to 1020. A block's sum is at most 128·32767·510 < 2³¹; the rounding of
    /// 15 bits is below that of fp16 arithmetic.
    pub(super) const MUL1: Self =
        Self { limit: 32767.0, centre: 510, slope: MUL1_SLOPE, offset: MUL1_OFFSET };
    /// `mcg` and `3inst`: values are multiples of 2⁻¹³ below 3.98. The sum of a quarter block is
    /// at most 32·2047·32602 < 2³¹.
    pub(super) const HALVES: Self =
        Self { limit: 2047.0, centre: 0, slope: 1.0 / 8192.0, offset: 0.0 };
}

/// How rotated activations are stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Activations {
    /// Records of [`RECORD`] words, then the row's constant.
    Integers(Integers),
    /// Floats.
    Floats,
}

impl Activations {
    /// Words of a row of `inputs` (padded) activations.
    pub(super) fn row_words(self, inputs: usize) -> usize {
        match self {
            Self::Integers(_) => inputs / BLOCK * RECORD + 1,
            Self::Floats => inputs,
        }
    }

    /// f32 sums a row has in a strip: lanes of a pair are added up in the instruction or later.
    pub(super) fn strip_sums(self) -> usize {
        match self {
            Self::Integers(_) => STRIP,
            Self::Floats => 2 * STRIP,
        }
    }
}

/// `a = (x ∘ suh) · P` for rows of `x`.
pub(super) struct RotateIn<'a> {
    /// `[rows, in_features]`.
    pub x: &'a [f32],
    pub in_features: usize,
    /// One scale per padded input.
    pub suh: &'a [f32],
    pub activations: Activations,
    /// `[rows, row_words]`.
    pub out: &'a mut [u32],
}

impl Job for RotateIn<'_> {
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let words = self.activations.row_words(self.suh.len());
        let rows = self.x.chunks_exact(self.in_features).zip(self.out.chunks_exact_mut(words));
        for (x, out) in rows {
            let mut constant = 0.0;
            let blocks = x.chunks(BLOCK).zip(self.suh.chunks_exact(BLOCK));
            for (block, (x, suh)) in blocks.enumerate() {
                let a = rotate_in(s, x, suh);
                match self.activations {
                    Activations::Integers(integers) => {
                        let out = &mut out[block * RECORD..][..RECORD];
                        constant += store_integers(s, integers, &a, out);
                    }
                    Activations::Floats => store_floats(s, &a, &mut out[block * BLOCK..][..BLOCK]),
                }
            }
            if matches!(self.activations, Activations::Integers(_)) {
                out[words - 1] = constant.to_bits();
            }
        }
    }
}

/// One block times its scales, rotated, without the factor `1/√128`.
#[inline(always)]
fn rotate_in<S: Isa>(s: S, x: &[f32], suh: &[f32]) -> [S::F; REGISTERS] {
    let mut padded = [0.0; BLOCK];
    let x = match <&[f32; BLOCK]>::try_from(x) {
        Ok(x) => x,
        Err(_) => {
            padded[..x.len()].copy_from_slice(x);
            &padded
        }
    };
    let mut v = [s.splat(0.0); REGISTERS];
    for (i, v) in v[..BLOCK / S::LANES].iter_mut().enumerate() {
        // SAFETY: `x` and `suh` hold 128 floats.
        let (x, suh) = unsafe {
            let at = i * S::LANES;
            (s.load_f32(x.as_ptr().add(at)), s.load_f32(suh[at..].as_ptr()))
        };
        *v = s.mul(x, suh);
    }
    hadamard(s, &mut v);
    v
}

/// `H_128 v`, natural order, over the first 128 lanes of `v`.
#[inline(always)]
fn hadamard<S: Isa>(s: S, v: &mut [S::F; REGISTERS]) {
    for v in &mut v[..BLOCK / S::LANES] {
        *v = s.butterfly(s.butterfly(s.butterfly(*v, 1), 2), 4);
        if S::LANES == 16 {
            *v = s.butterfly(*v, 8);
        }
    }
    add_sub::<S, 1>(s, v);
    add_sub::<S, 2>(s, v);
    add_sub::<S, 4>(s, v);
    add_sub::<S, 8>(s, v);
}

/// Sums and differences of registers `STEP` apart. Constant, so that all stay registers.
#[inline(always)]
fn add_sub<S: Isa, const STEP: usize>(s: S, v: &mut [S::F; REGISTERS]) {
    for i in 0..REGISTERS {
        if i & STEP == 0 && i + STEP < BLOCK / S::LANES {
            (v[i], v[i + STEP]) = (s.add(v[i], v[i + STEP]), s.sub(v[i], v[i + STEP]));
        }
    }
}

/// Rounds a block, writes its record and returns its part of the row's constant.
#[inline(always)]
fn store_integers<S: Isa>(s: S, integers: Integers, a: &[S::F; REGISTERS], out: &mut [u32]) -> f32 {
    let Integers { limit, centre, slope, offset } = integers;
    let registers = BLOCK / S::LANES;
    let mut largest = s.splat(0.0);
    for &v in &a[..registers] {
        largest = s.max_abs(v, largest);
    }
    let largest = s.max(largest);
    let inverse = limit / largest;
    // A block so small that its inverse overflows counts as zero; NaN stays NaN in the scale.
    let inverse = s.splat(if inverse.is_finite() { inverse } else { 0.0 });
    let mut q = [s.splat32(0); REGISTERS];
    let mut total = s.splat32(0);
    for i in 0..registers {
        q[i] = s.round(s.mul(a[i], inverse));
        total = s.add32(total, q[i]);
    }
    let half = 16 / S::LANES;
    for group in 0..GROUPS {
        for i in 0..half {
            let first = group * 2 * half + i;
            let at = group * 16 + i * S::LANES;
            // SAFETY: the record begins with 64 pairs, of which `LANES` are written at `at`.
            unsafe { s.store(out[at..].as_mut_ptr().cast(), s.pair(q[first], q[first + half])) };
        }
    }
    let total = s.sum32(total);
    let scale = largest * (BLOCK_SCALE / limit);
    out[SCALE] = (scale * slope).to_bits();
    out[START] = total.wrapping_mul(-centre) as u32;
    (centre as f32 * slope + offset) * scale * total as f32
}

#[inline(always)]
fn store_floats<S: Isa>(s: S, a: &[S::F; REGISTERS], out: &mut [u32]) {
    let mut flat = [0.0; BLOCK];
    for (i, &v) in a[..BLOCK / S::LANES].iter().enumerate() {
        let v = s.mul(v, s.splat(BLOCK_SCALE));
        // SAFETY: `flat` holds 128 floats.
        unsafe { s.store_f32(flat.as_mut_ptr().add(i * S::LANES), v) };
    }
    for (out, group) in out.chunks_exact_mut(STRIP).zip(flat.chunks_exact(STRIP)) {
        for r in 0..16 {
            out[2 * r] = group[r].to_bits();
            out[2 * r + 1] = group[16 + r].to_bits();
        }
    }
}

/// `y = (sums · P) ∘ svh` for rows of strip sums.
pub(super) struct RotateOut<'a> {
    /// Of every strip and row, `strip_sums` sums.
    pub sums: &'a [f32],
    /// From the sums of one strip to those of the next, and of one row to the next.
    pub strides: [usize; 2],
    /// The rows to write start here.
    pub first_row: usize,
    pub activations: Activations,
    /// One scale per padded output, the factor `1/√128` included.
    pub svh: &'a [f32],
    pub out_features: usize,
    /// `[rows, out_features]`.
    pub out: &'a mut [f32],
}

impl Job for RotateOut<'_> {
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let width = self.activations.strip_sums();
        for (i, out) in self.out.chunks_exact_mut(self.out_features).enumerate() {
            for (band, (out, svh)) in
                out.chunks_mut(BLOCK).zip(self.svh.chunks_exact(BLOCK)).enumerate()
            {
                let mut v = [s.splat(0.0); REGISTERS];
                for (j, v) in v[..BLOCK / S::LANES].chunks_exact_mut(STRIP / S::LANES).enumerate() {
                    let strip = band * (BLOCK / STRIP) + j;
                    let at = strip * self.strides[0] + (self.first_row + i) * self.strides[1];
                    gather(s, self.activations, &self.sums[at..][..width], v);
                }
                hadamard(s, &mut v);
                let mut ragged = [0.0; BLOCK];
                let whole = out.len() == BLOCK;
                let to = if whole { &mut *out } else { &mut ragged[..] };
                for (i, &v) in v[..BLOCK / S::LANES].iter().enumerate() {
                    // SAFETY: `to` and `svh` hold 128 floats.
                    unsafe {
                        let at = i * S::LANES;
                        let y = s.mul(v, s.load_f32(svh.as_ptr().add(at)));
                        s.store_f32(to.as_mut_ptr().add(at), y);
                    }
                }
                if !whole {
                    out.copy_from_slice(&ragged[..out.len()]);
                }
            }
        }
    }
}

/// Sums of a strip, `[half][tile][8 columns]` (floats: twice, to be added in pairs), in the order
/// of the columns, `[tile][half][8 columns]`.
#[inline(always)]
fn gather<S: Isa>(s: S, activations: Activations, sums: &[f32], out: &mut [S::F]) {
    let mut added = [0.0; STRIP];
    let sums = match activations {
        Activations::Integers(_) => sums,
        Activations::Floats => {
            for (added, pair) in added.iter_mut().zip(sums.as_chunks().0) {
                let [a, b]: [f32; 2] = *pair;
                *added = a + b;
            }
            &added
        }
    };
    let eight = |i: usize| sums[(i % 2 * 2 + i / 2) * 8..][..8].as_ptr();
    for (i, out) in out.iter_mut().enumerate() {
        // SAFETY: each holds eight floats, and a register has eight or twice as many.
        *out = unsafe {
            match S::LANES {
                16 => s.load_eights(eight(2 * i), eight(2 * i + 1)),
                _ => s.load_f32(eight(i)),
            }
        };
    }
}
