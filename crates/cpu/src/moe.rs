//! Mixture of experts: rows are grouped by the expert they chose, so that each expert's weights
//! are read once for all its rows. With at least as many chosen experts as threads an expert is
//! one task from gate to down, the fullest first; otherwise every matrix is split over threads.

use crate::backend::{Chosen, open};
use crate::kernel::LoadedLinear;
use crate::memory::{Arena, Buffer};
use crate::{Level, Pool, simd};
use marlin_tensor::{Activation, BackendError, Experts, Linear};
use std::sync::OnceLock;

/// Elements of the sum below which it is not worth a parallel region.
const SERIAL: usize = 1 << 14;

/// What every expert's task needs.
pub(crate) struct Moe<'a> {
    pub(crate) experts: &'a Experts,
    pub(crate) activation: Activation,
    pub(crate) level: Level,
    /// Leading rows that are tokens of answers.
    pub(crate) decode_rows: usize,
    pub(crate) arena: &'a Arena,
    pub(crate) pool: &'a Pool,
}

/// An expert and its entries, indices into [`Chosen::ids`].
struct Group {
    expert: usize,
    entries: Vec<u32>,
}

impl Moe<'_> {
    /// `out[row] = Σ weight · down(activation(gate(x)) · up(x))` over the row's chosen experts,
    /// best first. `x: [rows, hidden]`.
    ///
    /// # Errors
    /// When an expert's weights do not decode.
    pub(crate) fn run(&self, x: &[f32], chosen: &Chosen) -> Result<Buffer, BackendError> {
        let hidden = self.experts.gate[0].in_features;
        let columns = self.experts.down[0].out_features;
        let rows = x.len() / hidden;
        let top_k = chosen.ids.len() / rows.max(1);
        let groups = self.groups(chosen);
        let results: Vec<OnceLock<Result<Buffer, BackendError>>> =
            groups.iter().map(|_| OnceLock::new()).collect();
        let task = |i: usize| {
            let _ = results[i].set(self.expert(x, hidden, top_k, &groups[i]));
        };
        match groups.len() >= self.pool.threads() {
            true => self.pool.run(groups.len(), task),
            false => (0..groups.len()).for_each(task),
        }

        // Where each entry's output lies.
        let mut places: Vec<&[f32]> = vec![&[]; chosen.ids.len()];
        let mut blocks = Vec::with_capacity(groups.len());
        for result in results {
            blocks.push(result.into_inner().expect("every task ran")?);
        }
        for (group, block) in groups.iter().zip(&blocks) {
            for (&entry, output) in group.entries.iter().zip(block.chunks_exact(columns)) {
                places[entry as usize] = output;
            }
        }
        let mut out = self.arena.zeros(rows * columns);
        let serial = out.len() < SERIAL;
        let rows_per_task = if serial { rows } else { rows.div_ceil(4 * self.pool.threads()) };
        self.pool.run_chunks(&mut out, rows_per_task.max(1) * columns, |i, piece| {
            for (row, out) in (i * rows_per_task..).zip(piece.chunks_exact_mut(columns)) {
                let entries = row * top_k..(row + 1) * top_k;
                for (place, weight) in places[entries.clone()].iter().zip(&chosen.weights[entries])
                {
                    simd::add_scaled(self.level, out, place, *weight);
                }
            }
        });
        Ok(out)
    }

    /// Chosen experts, most entries first.
    fn groups(&self, chosen: &Chosen) -> Vec<Group> {
        let mut of_expert = vec![usize::MAX; self.experts.gate.len()];
        let mut groups: Vec<Group> = Vec::new();
        for (entry, &expert) in chosen.ids.iter().enumerate() {
            let expert = expert as usize;
            if of_expert[expert] == usize::MAX {
                of_expert[expert] = groups.len();
                groups.push(Group { expert, entries: Vec::new() });
            }
            groups[of_expert[expert]].entries.push(entry as u32);
        }
        groups.sort_by_key(|g| std::cmp::Reverse(g.entries.len()));
        groups
    }

    /// One expert on its rows: `[entries, columns]`.
    fn expert(
        &self,
        x: &[f32],
        hidden: usize,
        top_k: usize,
        group: &Group,
    ) -> Result<Buffer, BackendError> {
        let (count, i) = (group.entries.len(), group.expert);
        let Experts { gate, up, down } = self.experts;
        let of_answers = |entry: &u32| (*entry as usize / top_k) < self.decode_rows;
        let decode = group.entries.partition_point(of_answers);
        let gathered;
        let inputs: &[f32] = if x.len() == hidden {
            x
        } else {
            let mut rows = self.arena.take(count * hidden);
            for (to, &entry) in rows.chunks_exact_mut(hidden).zip(&group.entries) {
                to.copy_from_slice(&x[entry as usize / top_k * hidden..][..hidden]);
            }
            gathered = rows;
            &gathered
        };
        let linear = |linear: &Linear, x: &[f32]| -> Result<Buffer, BackendError> {
            let mut out = self.arena.take(count * linear.out_features);
            open::<LoadedLinear>(&linear.handle)?.apply(x, count, decode, &mut out, self.pool)?;
            Ok(out)
        };
        let mut inner = linear(&gate[i], inputs)?;
        let gating = linear(&up[i], inputs)?;
        simd::gated(self.level, &mut inner, &gating, self.activation);
        linear(&down[i], &inner)
    }
}
