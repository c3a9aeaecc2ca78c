//! What latent attention makes of its projections, in one launch: a cube per row and query head, and one for the keys of the row.

use crate::gpu::{Buffer, Gpu};
use cubecl::prelude::*;

/// Planes of a cube.
const PLANES: u32 = 4;

/// Columns that a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    /// Query heads.
    pub(crate) heads: u32,
    /// Of a query head without positions.
    pub(crate) nope: u32,
    /// Of a head with positions.
    pub(crate) rope: u32,
    /// Of a latent key.
    pub(crate) latent: u32,
    /// Pairs that rotate.
    pub(crate) pairs: u32,
    /// Whether the two of a pair are neighbours.
    pub(crate) interleaved: bool,
}

/// Queries without positions, rotated queries and keys of `rows` rows; `angles: [rows, pairs, 2]`, cosine and sine.
pub(crate) fn inputs(
    gpu: &Gpu,
    [q, kv, norm, angles]: [&Buffer; 4],
    eps: f32,
    rows: usize,
    shape: Shape,
) -> [Buffer; 3] {
    let heads = rows * shape.heads as usize;
    let nope = gpu.empty(heads * shape.nope as usize);
    let rotated = gpu.empty(heads * shape.rope as usize);
    let keys = gpu.empty(rows * (shape.latent + shape.rope) as usize);
    // SAFETY: a cube per row and head, and one per row.
    unsafe {
        inputs_kernel::launch_unchecked(
            &gpu.client,
            CubeCount::Static(rows as u32, shape.heads + 1, 1),
            gpu.planes(PLANES),
            q.arg(),
            kv.arg(),
            norm.arg(),
            angles.arg(),
            nope.arg(),
            rotated.arg(),
            keys.arg(),
            eps,
            shape,
        );
    }
    [nope, rotated, keys]
}

#[cube(launch_unchecked)]
fn inputs_kernel(
    q: &[f32],
    kv: &[f32],
    norm: &[f32],
    angles: &[f32],
    nope: &mut [f32],
    rotated: &mut [f32],
    keys: &mut [f32],
    eps: f32,
    #[comptime] shape: Shape,
) {
    let row = CUBE_POS_X;
    let head = CUBE_POS_Y;
    if head < comptime!(shape.heads) {
        let at = row * comptime!(shape.heads) + head;
        let from = at * comptime!(shape.nope + shape.rope);
        let mut column = UNIT_POS;
        while column < comptime!(shape.nope) {
            nope[(at * comptime!(shape.nope) + column) as usize] = q[(from + column) as usize];
            column += CUBE_DIM;
        }
        rotate(
            q,
            from + comptime!(shape.nope),
            angles,
            row,
            rotated,
            at * comptime!(shape.rope),
            shape,
        );
    } else {
        let from = row * comptime!(shape.latent + shape.rope);
        let mut squares = f32::new(0.0);
        let mut column = UNIT_POS;
        while column < comptime!(shape.latent) {
            let v = kv[(from + column) as usize];
            squares += v * v;
            column += CUBE_DIM;
        }
        let mut sums = Shared::<[f32]>::new_slice(comptime!(PLANES as usize));
        let part = plane_sum(squares);
        if UNIT_POS_X == 0 {
            sums[UNIT_POS_Y as usize] = part;
        }
        sync_cube();
        let mut total = f32::new(0.0);
        #[unroll]
        for p in 0..PLANES {
            total += sums[p as usize];
        }
        let scale = 1.0 / (total / f32::cast_from(comptime!(shape.latent)) + eps).sqrt();
        let mut column = UNIT_POS;
        while column < comptime!(shape.latent) {
            let at = (from + column) as usize;
            keys[at] = kv[at] * scale * norm[column as usize];
            column += CUBE_DIM;
        }
        let from = from + comptime!(shape.latent);
        rotate(kv, from, angles, row, keys, from, shape);
    }
}

/// Rotates the columns of a head that `from` is the first of, to `to`.
#[cube]
fn rotate(
    x: &[f32],
    from: u32,
    angles: &[f32],
    row: u32,
    out: &mut [f32],
    to: u32,
    #[comptime] shape: Shape,
) {
    let pairs = comptime!(shape.pairs);
    let mut i = UNIT_POS;
    while i < comptime!(shape.rope - shape.pairs) {
        if i < pairs {
            let angle = (row * pairs + i) * 2;
            let cos = angles[angle as usize];
            let sin = angles[(angle + 1) as usize];
            let first = if comptime!(shape.interleaved) { i * 2 } else { i };
            let second = if comptime!(shape.interleaved) { first + 1 } else { first + pairs };
            let a = x[(from + first) as usize];
            let b = x[(from + second) as usize];
            out[(to + first) as usize] = a * cos - b * sin;
            out[(to + second) as usize] = b * cos + a * sin;
        } else {
            // The others pass through.
            let column = i + pairs;
            out[(to + column) as usize] = x[(from + column) as usize];
        }
        i += CUBE_DIM;
    }
}
