//! Rows of f32 to columns of f16: keys are cached transposed.
// Other processors run the scalar bodies until someone writes their registers.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]

use crate::Level;
use half::f16;

/// Rows that are transposed together.
#[cfg(target_arch = "x86_64")]
const ROWS: usize = 16;

/// `to[column * stride + row] = from[row * pitch + column]`, rounded to f16, for `rows` rows and `columns`
/// columns.
pub(crate) fn transpose_f16(
    level: Level,
    from: &[f32],
    pitch: usize,
    (rows, columns): (usize, usize),
    to: &mut [u16],
    stride: usize,
) {
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(columns <= pitch && (rows - 1) * pitch + columns <= from.len(), "rows of the input");
    assert!(rows <= stride && (columns - 1) * stride + rows <= to.len(), "columns of the output");
    #[cfg(target_arch = "x86_64")]
    if level >= Level::Avx512 && rows == ROWS {
        let whole = columns / ROWS * ROWS;
        // SAFETY: the backend refuses levels this machine lacks; sixteen rows of `whole` columns exist on
        // both sides.
        unsafe { sixteen_rows(from, pitch, whole, to, stride) };
        return scalar(
            &from[whole..],
            pitch,
            (rows, columns - whole),
            &mut to[whole * stride..],
            stride,
        );
    }
    let _ = level;
    scalar(from, pitch, (rows, columns), to, stride);
}

fn scalar(
    from: &[f32],
    pitch: usize,
    (rows, columns): (usize, usize),
    to: &mut [u16],
    stride: usize,
) {
    for row in 0..rows {
        for column in 0..columns {
            to[column * stride + row] = f16::from_f32(from[row * pitch + column]).to_bits();
        }
    }
}

/// Sixteen rows of `columns` columns, a multiple of sixteen.
///
/// # Safety
/// The processor has AVX-512; both sides hold the rows and columns.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn sixteen_rows(from: &[f32], pitch: usize, columns: usize, to: &mut [u16], stride: usize) {
    use super::avx512::Avx512;
    use super::isa::Isa;
    use std::arch::x86_64::{
        _MM_FROUND_TO_NEAREST_INT, _mm256_storeu_si256, _mm512_cvtps_ph, _mm512_loadu_ps,
        _mm512_setzero_ps,
    };
    for column in (0..columns).step_by(ROWS) {
        // SAFETY: the caller's.
        unsafe {
            let mut block = [_mm512_setzero_ps(); ROWS];
            for (row, block) in block.iter_mut().enumerate() {
                *block = _mm512_loadu_ps(from.as_ptr().add(row * pitch + column));
            }
            Avx512::<false>::new().transpose(&mut block);
            for (i, &block) in block.iter().enumerate() {
                let half = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(block);
                let to = to.as_mut_ptr().add((column + i) * stride);
                _mm256_storeu_si256(to.cast(), half);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_transposes_and_rounds_alike() {
        let from: Vec<f32> = (0..20 * 50).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        for level in Level::ALL.into_iter().filter(|l| l.is_supported()) {
            for (rows, columns, stride) in [(16, 48, 16), (16, 35, 32), (7, 50, 16), (1, 1, 1)] {
                let mut to = vec![0; (columns - 1) * stride + rows];
                transpose_f16(level, &from, 50, (rows, columns), &mut to, stride);
                for row in 0..rows {
                    for column in 0..columns {
                        let expected = f16::from_f32(from[row * 50 + column]).to_bits();
                        assert_eq!(to[column * stride + row], expected, "{level} {row} {column}");
                    }
                }
            }
        }
    }
}
