//! Rotary position embedding, from cosines and sines of the rows of the batch.

use crate::gpu::{Buffer, Gpu};
use cubecl::prelude::*;
use marlin_tensor::{Heads, RopeStyle};

/// Rotates `x: [rows, heads * head_dim]` in place. `angles: [rows, pairs, 2]`, cosine and sine.
pub(crate) fn rope(
    gpu: &Gpu,
    x: &Buffer,
    angles: &Buffer,
    rows: usize,
    heads: Heads,
    pairs: usize,
    style: RopeStyle,
) {
    let total = rows * heads.heads * pairs;
    let (count, dim) = gpu.each(total);
    let interleaved = style == RopeStyle::Interleaved;
    let (x, angles) = (x.arg(), angles.arg());
    let (heads, head_dim) = (heads.heads as u32, heads.head_dim as u32);
    // SAFETY: units past the end do nothing.
    unsafe {
        rope_kernel::launch_unchecked(
            &gpu.client,
            count,
            dim,
            x,
            angles,
            heads,
            head_dim,
            pairs as u32,
            total as u32,
            interleaved,
        );
    }
}

#[cube(launch_unchecked)]
fn rope_kernel(
    x: &mut [f32],
    angles: &[f32],
    heads: u32,
    head_dim: u32,
    pairs: u32,
    total: u32,
    #[comptime] interleaved: bool,
) {
    let i = ABSOLUTE_POS as u32;
    if i < total {
        let pair = i % pairs;
        let head = i / pairs;
        let angle = (head / heads * pairs + pair) * 2;
        let cos = angles[angle as usize];
        let sin = angles[(angle + 1) as usize];
        let base = head * head_dim;
        let first = if comptime!(interleaved) { base + pair * 2 } else { base + pair };
        let second = if comptime!(interleaved) { first + 1 } else { first + pairs };
        let a = x[first as usize];
        let b = x[second as usize];
        x[first as usize] = a * cos - b * sin;
        x[second as usize] = b * cos + a * sin;
    }
}
