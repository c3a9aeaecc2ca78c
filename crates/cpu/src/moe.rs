//! Mixture of experts: rows are grouped by the expert they chose, so that each expert's weights
//! are read once for all its rows.

use crate::backend::{Chosen, LoadedLinear, open};
use crate::memory::{Arena, Buffer};
use crate::{Pool, reference};
use marlin_tensor::{Activation, BackendError, Experts};

/// `out[row] = Σ weight · down(activation(gate(x)) · up(x))` over the row's chosen experts,
/// added in order of expert id. `x: [rows, hidden]`.
///
/// # Errors
/// When an expert's weights do not decode.
pub(crate) fn experts(
    x: &[f32],
    chosen: &Chosen,
    experts: &Experts,
    activation: Activation,
    arena: &Arena,
    pool: &Pool,
) -> Result<Buffer, BackendError> {
    let hidden = experts.gate[0].in_features;
    let (inner, columns) = (experts.gate[0].out_features, experts.down[0].out_features);
    let rows = x.len() / hidden;
    let top_k = chosen.ids.len() / rows.max(1);
    let mut out = arena.zeros(rows * columns);
    for expert in 0..experts.gate.len() {
        let entries: Vec<usize> =
            (0..chosen.ids.len()).filter(|&i| chosen.ids[i] as usize == expert).collect();
        if entries.is_empty() {
            continue;
        }
        let mut inputs = arena.take(entries.len() * hidden);
        for (input, entry) in inputs.chunks_exact_mut(hidden).zip(&entries) {
            input.copy_from_slice(&x[entry / top_k * hidden..][..hidden]);
        }
        let mut gate = arena.take(entries.len() * inner);
        let mut up = arena.take(entries.len() * inner);
        let mut down = arena.take(entries.len() * columns);
        let linear = |l: &marlin_tensor::Linear, x: &[f32], out: &mut [f32]| {
            open::<LoadedLinear>(&l.handle)?.apply(x, entries.len(), out, pool)
        };
        linear(&experts.gate[expert], &inputs, &mut gate)?;
        linear(&experts.up[expert], &inputs, &mut up)?;
        reference::gated(&mut gate, &up, activation);
        linear(&experts.down[expert], &gate, &mut down)?;
        for (down, entry) in down.chunks_exact(columns).zip(&entries) {
            let out = &mut out[entry / top_k * columns..][..columns];
            for (y, d) in out.iter_mut().zip(down) {
                *y += chosen.weights[*entry] * d;
            }
        }
    }
    Ok(out)
}
