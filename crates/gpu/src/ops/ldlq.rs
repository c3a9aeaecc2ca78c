//! LDLQ: sixteen inputs after the other, last to first, each encoded as it compensates for the errors of those after it.
//!
//! ```text
//! T_g = W_g + Σ_{j>g} E_j L[j,g]        E = W − Q
//! ```
//!
//! The errors of a span of 128 inputs are kept turned, `[128, rows]`. Within a span a cube adds what its sixteen outputs get from
//! the groups before; at the end of it all earlier inputs get theirs in one product. Nothing waits for the host.

use super::elementwise;
use super::product::{Into, Part, product};
use super::viterbi;
use crate::gpu::{Buffer, Gpu};
use cubecl::prelude::*;
use marlin_quant::exl3::encode::{LdlqMatrix, MAX_TARGET};
use marlin_quant::exl3::ring::{TILE, TILE_COLUMN, TILE_ROW, TILE_SIDE};
use marlin_quant::exl3::{Codebook, Rate};

/// Inputs whose errors go to earlier spans in one product.
pub(crate) const SPAN: usize = 128;

/// A matrix that is being encoded, on the device.
pub(crate) struct Ldlq {
    /// Outputs, a multiple of sixteen.
    rows: usize,
    /// Inputs, a multiple of sixteen.
    k: usize,
    rate: Rate,
    codebook: Codebook,
    /// `W`, `[rows, k]`.
    weights: Buffer,
    /// `T` of the inputs that are not encoded, as far as it is known.
    targets: Buffer,
    /// `L: [k, k]`.
    factor: Buffer,
    /// Value of every state.
    values: Buffer,
    /// Output and input of every position of a tile, sixteen times the output and the input.
    places: Buffer,
    errors: Buffer,
    tiles: Buffer,
}

impl Ldlq {
    /// Bytes on the device of a matrix of `rows` by `k`, besides costs of the search.
    pub(crate) fn bytes(rows: usize, k: usize) -> u64 {
        4 * (2 * rows * k + k * k + (2 * SPAN + TILE_SIDE) * rows) as u64
    }

    pub(crate) fn new(gpu: &Gpu, matrix: &LdlqMatrix, rate: Rate, codebook: Codebook) -> Self {
        let k = matrix.k;
        let rows = matrix.weights.len() / k;
        let weights = gpu.floats(matrix.weights);
        let place =
            |p: usize| u32::from(TILE_COLUMN[p]) * TILE_SIDE as u32 + u32::from(TILE_ROW[p]);
        Self {
            rows,
            k,
            rate,
            codebook,
            targets: elementwise::copy_of(gpu, &weights, rows * k),
            weights,
            factor: gpu.floats(matrix.factor),
            values: gpu.floats(&codebook.table()),
            places: gpu.words(&std::array::from_fn::<u32, TILE, _>(place)),
            errors: gpu.empty(SPAN * rows),
            tiles: gpu.empty(TILE_SIDE * rows),
        }
    }

    /// Encodes the span that begins with input `first`, all after it being done: states `[span / 16, rows / 16, 256]`, one a word.
    /// Costs of the search take `bytes`.
    pub(crate) fn span(&self, gpu: &Gpu, first: usize, bytes: u64) -> Buffer {
        let Self { rows, k, .. } = *self;
        let end = (first + SPAN).min(k);
        let of_group = rows * TILE_SIDE;
        let states = gpu.empty((end - first) * rows);
        let group_states = |group: usize| states.after((group - first) / TILE_SIDE * of_group);
        for group in (first..end).step_by(TILE_SIDE).rev() {
            let after = group + TILE_SIDE;
            let known = (after < end).then(|| group_states(after));
            self.step(gpu, known.as_ref(), Some(group), first, end);
            let found = group_states(group);
            viterbi::search(
                gpu,
                &self.tiles,
                &found,
                of_group / TILE,
                self.rate,
                self.codebook,
                bytes,
            );
        }
        if first > 0 {
            self.step(gpu, Some(&group_states(first)), None, first, end);
            let errors = Part::whole(&self.errors, rows);
            let factor = self.factor.after(first * k);
            let factor = Part { buffer: &factor, columns: first, stride: k };
            product(gpu, errors, factor, end - first, (&self.targets, k), Into::Sum);
        }
        states
    }

    /// Takes in the states `known` of the group after `group`, and makes tiles of `group`; without one, `known` is of group `first`.
    fn step(
        &self,
        gpu: &Gpu,
        known: Option<&Buffer>,
        group: Option<usize>,
        first: usize,
        end: usize,
    ) {
        let kind = Step { takes: known.is_some(), makes: group.is_some() };
        let taken = group.map_or(first, |group| group + TILE_SIDE);
        let count = CubeCount::Static((self.rows / TILE_SIDE) as u32, 1, 1);
        let dim = gpu.planes(TILE as u32 / gpu.plane);
        let [weights, targets, factor] =
            [&self.weights, &self.targets, &self.factor].map(Buffer::arg);
        let [values, places, errors] = [&self.values, &self.places, &self.errors].map(Buffer::arg);
        let (known, tiles) = (known.unwrap_or(&gpu.none).arg(), self.tiles.arg());
        // SAFETY: a cube reads and writes what belongs to its sixteen outputs.
        unsafe {
            step_kernel::launch_unchecked(
                &gpu.client,
                count,
                dim,
                weights,
                targets,
                factor,
                values,
                places,
                known,
                errors,
                tiles,
                self.rows as u32,
                self.k as u32,
                first as u32,
                taken as u32,
                end as u32,
                kind,
            );
        }
    }
}

/// What a launch does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Step {
    /// Takes in the states of a group.
    takes: bool,
    /// Makes tiles of the group before.
    makes: bool,
}

#[cube(launch_unchecked)]
fn step_kernel(
    weights: &[f32],
    targets: &[f32],
    factor: &[f32],
    values: &[f32],
    places: &[u32],
    known: &[u32],
    errors: &mut [f32],
    tiles: &mut [f32],
    rows: u32,
    k: u32,
    first: u32,
    taken: u32,
    end: u32,
    #[comptime] kind: Step,
) {
    let place = places[UNIT_POS as usize];
    let output = CUBE_POS_X * 16 + place / 16;
    let input = place % 16;
    let own = CUBE_POS_X * 256 + UNIT_POS;
    if comptime!(kind.takes) {
        // A state has sixteen bits, whatever a device left that has not searched.
        let value = values[(known[own as usize] & 0xffffu32) as usize];
        let error = weights[(output * k + taken + input) as usize] - value;
        errors[((taken + input - first) * rows + output) as usize] = error;
        sync_cube();
        sync_storage();
    }
    if comptime!(kind.makes) {
        let column = taken - 16 + input;
        let mut target = targets[(output * k + column) as usize];
        for j in taken..end {
            let error = errors[((j - first) * rows + output) as usize];
            target = fma(error, factor[(j * k + column) as usize], target);
        }
        tiles[own as usize] =
            clamp(target, comptime!(-MAX_TARGET).runtime(), comptime!(MAX_TARGET).runtime());
    }
}
