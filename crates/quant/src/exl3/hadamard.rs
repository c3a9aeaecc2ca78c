//! Orthonormal Hadamard rotation: Sylvester matrices in natural order,
//! `H[i][j] = (−1)^popcount(i & j)`, symmetric and its own inverse after scaling by `1/√n`.

/// Channels that rotate together in a linear layer.
pub const BLOCK: usize = 128;
/// `1/√128` as kernels of this format write it.
pub const BLOCK_SCALE: f32 = 0.088_388_35;

/// `H[i][j]`: 1 or −1.
pub fn sign(i: usize, j: usize) -> f32 {
    if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 }
}

/// `x ← H x` without scaling, in place.
///
/// # Panics
/// When the length is not a power of two: a bug of the caller.
pub fn sylvester(x: &mut [f32]) {
    assert!(x.len().is_power_of_two(), "length {} is not a power of two", x.len());
    let mut half = 1;
    while half < x.len() {
        for pair in x.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            butterfly(low, high);
        }
        half *= 2;
    }
}

/// `P x`: every aligned block of 128 rotated and scaled by `1/√128`, in place.
pub fn rotate(x: &mut [f32]) {
    for block in x.chunks_exact_mut(BLOCK) {
        sylvester(block);
        block.iter_mut().for_each(|v| *v *= BLOCK_SCALE);
    }
}

/// `P X` for 128 rows of `width` columns: mixes rows, column by column, in place.
///
/// # Panics
/// When `x` is not `[128, width]`: a bug of the caller.
pub fn rotate_rows(x: &mut [f32], width: usize) {
    assert_eq!(x.len(), BLOCK * width, "expected {BLOCK} rows of {width}");
    let mut half = width;
    while half < x.len() {
        for pair in x.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            butterfly(low, high);
        }
        half *= 2;
    }
    x.iter_mut().for_each(|v| *v *= BLOCK_SCALE);
}

fn butterfly(low: &mut [f32], high: &mut [f32]) {
    for (a, b) in low.iter_mut().zip(high) {
        (*a, *b) = (*a + *b, *a - *b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_the_definition() {
        for j in 0..BLOCK {
            let mut x = [0.0; BLOCK];
            x[j] = 1.0;
            rotate(&mut x);
            let mut rows: Vec<f32> =
                (0..BLOCK * 2).map(|i| if i == 2 * j + 1 { 1.0 } else { 0.0 }).collect();
            rotate_rows(&mut rows, 2);
            for (i, &value) in x.iter().enumerate() {
                let sign = if (i & j).count_ones() % 2 == 0 { 1.0 } else { -1.0 };
                assert_eq!(value, sign * BLOCK_SCALE, "row {i}, column {j}");
                assert_eq!(rows[2 * i..][..2], [0.0, value], "rows, row {i}, column {j}");
            }
        }
    }
}
