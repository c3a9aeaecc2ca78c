//! Rearrangements of rows and columns.

use super::tiles::{ABSENT, Entries, Rows};
use crate::gpu::{Buffer, Gpu};
use cubecl::prelude::*;
use marlin_tensor::Heads;

/// Columns `start .. start + len` of every head.
pub(crate) fn slice_heads(
    gpu: &Gpu,
    x: &Buffer,
    rows: usize,
    heads: Heads,
    start: usize,
    len: usize,
) -> Buffer {
    let total = rows * heads.heads * len;
    let out = gpu.empty(total);
    let (count, dim) = gpu.each(total);
    let (head_dim, start, len) = (heads.head_dim as u32, start as u32, len as u32);
    let (x, to) = (x.arg(), out.arg());
    // SAFETY: units past the end do nothing.
    unsafe {
        slice_kernel::launch_unchecked(
            &gpu.client,
            count,
            dim,
            x,
            to,
            head_dim,
            start,
            len,
            total as u32,
        );
    }
    out
}

/// Per head `[a | b]`, of `m` and `n` columns.
pub(crate) fn concat_heads(
    gpu: &Gpu,
    a: &Buffer,
    m: usize,
    b: &Buffer,
    n: usize,
    heads: usize,
) -> Buffer {
    let total = heads * (m + n);
    let out = gpu.empty(total);
    let (count, dim) = gpu.each(total);
    let (a, b, to) = (a.arg(), b.arg(), out.arg());
    // SAFETY: units past the end do nothing.
    unsafe {
        concat_kernel::launch_unchecked(
            &gpu.client,
            count,
            dim,
            a,
            b,
            to,
            m as u32,
            n as u32,
            total as u32,
        );
    }
    out
}

/// The rows of `indices`, in order.
pub(crate) fn gather_rows(gpu: &Gpu, x: &Buffer, columns: usize, indices: &[u32]) -> Buffer {
    let total = indices.len() * columns;
    let out = gpu.empty(total);
    let indices = gpu.words(indices);
    let (count, dim) = gpu.each(total);
    let (x, indices, to) = (x.arg(), indices.arg(), out.arg());
    // SAFETY: units past the end do nothing.
    unsafe {
        gather_kernel::launch_unchecked(
            &gpu.client,
            count,
            dim,
            x,
            indices,
            to,
            columns as u32,
            total as u32,
        );
    }
    out
}

/// Rows of `columns` values, padded with zeros to `padded`.
pub(crate) fn pad(gpu: &Gpu, x: &Buffer, rows: usize, columns: usize, padded: usize) -> Buffer {
    let total = rows * padded;
    let out = gpu.empty(total);
    let (count, dim) = gpu.each(total);
    let (x, to) = (x.arg(), out.arg());
    // SAFETY: units past the end do nothing.
    unsafe {
        pad_kernel::launch_unchecked(
            &gpu.client,
            count,
            dim,
            x,
            to,
            columns as u32,
            padded as u32,
            total as u32,
        );
    }
    out
}

/// The inputs of `rows`, each in the order of its matrix, `order: [matrices, columns]`; and how they are read then: entry by
/// entry.
pub(crate) fn reorder(
    gpu: &Gpu,
    x: &Buffer,
    columns: usize,
    order: &Buffer,
    rows: &Rows,
) -> (Buffer, Rows) {
    let total = rows.count() * columns;
    let out = gpu.empty(total);
    let (count, dim) = gpu.each(total);
    let (none, mut rows) = (gpu.none.clone(), rows.clone());
    let (ids, slots, divisor) = match &mut rows {
        Rows::Entries(Entries { ids, slots, divisor, .. }) => {
            (&*ids, &*slots, std::mem::replace(divisor, 1))
        }
        Rows::Dense { .. } | Rows::Heads { .. } => (&none, &none, 1),
    };
    let (x, order, to, ids, slots) = (x.arg(), order.arg(), out.arg(), ids.arg(), slots.arg());
    let several = matches!(rows, Rows::Entries(_));
    let (divisor, columns, total) = (divisor as u32, columns as u32, total as u32);
    // SAFETY: units past the end do nothing.
    unsafe {
        reorder_kernel::launch_unchecked(
            &gpu.client,
            count,
            dim,
            x,
            order,
            ids,
            slots,
            to,
            divisor,
            columns,
            total,
            several,
        );
    }
    (out, rows)
}

#[cube(launch_unchecked)]
fn reorder_kernel(
    x: &[f32],
    order: &[u32],
    ids: &[u32],
    slots: &[u32],
    out: &mut [f32],
    divisor: u32,
    columns: u32,
    total: u32,
    #[comptime] several: bool,
) {
    let i = ABSOLUTE_POS as u32;
    if i < total {
        let row = i / columns;
        let place = i % columns;
        if comptime!(several) {
            let slot = slots[ids[row as usize] as usize];
            if slot != comptime!(ABSENT) {
                let input = order[(slot * columns + place) as usize];
                out[i as usize] = x[(row / divisor * columns + input) as usize];
            }
        } else {
            out[i as usize] = x[(row * columns + order[place as usize]) as usize];
        }
    }
}

#[cube(launch_unchecked)]
fn slice_kernel(x: &[f32], out: &mut [f32], head_dim: u32, start: u32, len: u32, total: u32) {
    let i = ABSOLUTE_POS as u32;
    if i < total {
        out[i as usize] = x[(i / len * head_dim + start + i % len) as usize];
    }
}

#[cube(launch_unchecked)]
fn concat_kernel(a: &[f32], b: &[f32], out: &mut [f32], m: u32, n: u32, total: u32) {
    let i = ABSOLUTE_POS as u32;
    if i < total {
        let head = i / (m + n);
        let column = i % (m + n);
        if column < m {
            out[i as usize] = a[(head * m + column) as usize];
        } else {
            out[i as usize] = b[(head * n + column - m) as usize];
        }
    }
}

#[cube(launch_unchecked)]
fn gather_kernel(x: &[f32], indices: &[u32], out: &mut [f32], columns: u32, total: u32) {
    let i = ABSOLUTE_POS as u32;
    if i < total {
        out[i as usize] = x[(indices[(i / columns) as usize] * columns + i % columns) as usize];
    }
}

#[cube(launch_unchecked)]
fn pad_kernel(x: &[f32], out: &mut [f32], columns: u32, padded: u32, total: u32) {
    let i = ABSOLUTE_POS as u32;
    if i < total {
        let column = i % padded;
        if column < columns {
            out[i as usize] = x[(i / padded * columns + column) as usize];
        } else {
            out[i as usize] = 0.0;
        }
    }
}
