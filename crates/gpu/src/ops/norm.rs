//! Root-mean-square normalisation: one cube per group.

use crate::gpu::{Buffer, Gpu};
use cubecl::prelude::*;

/// Columns up to which a group is the work of two planes, and from which on it is that of as many as there may be.
const SMALL: usize = 512;
const LARGE: usize = 2048;

/// `x / sqrt(mean(x²) + eps) * weight` over each of `groups` runs of `len` values.
pub(crate) fn rms_norm(
    gpu: &Gpu,
    x: &Buffer,
    weight: &Buffer,
    eps: f32,
    groups: usize,
    len: usize,
) -> Buffer {
    launch(gpu, x, None, weight, eps, groups, len)
}

/// Adds `y` to `x` in place, and does the same to the sum.
pub(crate) fn add_norm(
    gpu: &Gpu,
    x: &Buffer,
    y: &Buffer,
    weight: &Buffer,
    eps: f32,
    groups: usize,
    len: usize,
) -> Buffer {
    launch(gpu, x, Some(y), weight, eps, groups, len)
}

fn launch(
    gpu: &Gpu,
    x: &Buffer,
    y: Option<&Buffer>,
    weight: &Buffer,
    eps: f32,
    groups: usize,
    len: usize,
) -> Buffer {
    let out = gpu.empty(groups * len);
    let most = gpu.client.properties().hardware.max_units_per_cube / gpu.plane;
    let planes = match len {
        0..=SMALL => 2,
        LARGE.. => most.min(32),
        _ => 8,
    };
    let cubes = groups as u32;
    let count = CubeCount::Static(cubes.min(32_768), cubes.div_ceil(32_768), 1);
    let (added, has_added) = (y.unwrap_or(&gpu.none).arg(), y.is_some());
    let (x, weight, to) = (x.arg(), weight.arg(), out.arg());
    // SAFETY: cubes past `groups` do nothing.
    unsafe {
        norm_kernel::launch_unchecked(
            &gpu.client,
            count,
            gpu.planes(planes),
            x,
            added,
            weight,
            to,
            eps,
            cubes,
            len as u32,
            planes,
            gpu.plane,
            has_added,
        );
    }
    out
}

#[cube(launch_unchecked)]
fn norm_kernel(
    x: &mut [f32],
    added: &[f32],
    weight: &[f32],
    out: &mut [f32],
    eps: f32,
    groups: u32,
    #[comptime] len: u32,
    #[comptime] planes: u32,
    #[comptime] plane: u32,
    #[comptime] has_added: bool,
) {
    let group = CUBE_POS as u32;
    if group >= groups {
        terminate!();
    }
    let base = group * len;
    // All are on their way before the first is needed.
    let own = comptime!(len.div_ceil(planes * plane));
    let mut values = Array::<f32>::new(comptime!(own as usize));
    #[unroll]
    for j in 0..own {
        let i = UNIT_POS + comptime!(j * planes * plane);
        let mut v = f32::new(0.0);
        if i < len {
            v = x[(base + i) as usize];
            if comptime!(has_added) {
                v += added[(base + i) as usize];
                x[(base + i) as usize] = v;
            }
        }
        values[comptime!(j as usize)] = v;
    }
    let mut squares = f32::new(0.0);
    #[unroll]
    for j in 0..own {
        let v = values[comptime!(j as usize)];
        squares += v * v;
    }
    let mut sums = Shared::<[f32]>::new_slice(comptime!(planes as usize));
    let part = plane_sum(squares);
    if UNIT_POS_X == 0 {
        sums[UNIT_POS_Y as usize] = part;
    }
    sync_cube();
    let mut total = f32::new(0.0);
    #[unroll]
    for p in 0..planes {
        total += sums[p as usize];
    }
    let scale = 1.0 / (total / f32::cast_from(len) + eps).sqrt();
    #[unroll]
    for j in 0..own {
        let i = UNIT_POS + comptime!(j * planes * plane);
        if i < len {
            out[(base + i) as usize] = values[comptime!(j as usize)] * scale * weight[i as usize];
        }
    }
}
