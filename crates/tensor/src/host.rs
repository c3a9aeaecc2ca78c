//! Arrays in host memory. The bytes are reference-counted, so a tensor is usually a
//! view into a memory-mapped checkpoint and costs nothing to clone or slice.

use crate::DType;
use bytes::Bytes;
use half::{bf16, f16};

/// Why a host tensor cannot be built or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    /// The byte length does not match the shape.
    #[error("{dtype} tensor of shape {shape:?} needs {expected} bytes, found {found}")]
    Length {
        /// Element type.
        dtype: DType,
        /// Shape, slowest dimension first.
        shape: Vec<usize>,
        /// Bytes the shape calls for.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// The shape's product overflows the address space.
    #[error("tensor shape {shape:?} overflows")]
    Overflow {
        /// The offending shape.
        shape: Vec<usize>,
    },
    /// The element type cannot be read as asked.
    #[error("expected a {expected} tensor, found {found}")]
    Type {
        /// What the caller wanted.
        expected: &'static str,
        /// What is stored.
        found: DType,
    },
}

/// A dense array: little-endian elements, row-major, slowest dimension first.
#[derive(Debug, Clone)]
pub struct HostTensor {
    dtype: DType,
    shape: Vec<usize>,
    data: Bytes,
}

impl HostTensor {
    /// Wraps `data` as `shape` elements of `dtype`.
    ///
    /// # Errors
    /// When the byte length is not exactly what the shape needs.
    pub fn new(dtype: DType, shape: Vec<usize>, data: Bytes) -> Result<Self, TensorError> {
        let expected = shape
            .iter()
            .try_fold(dtype.size_bytes(), |n, &d| n.checked_mul(d))
            .ok_or_else(|| TensorError::Overflow { shape: shape.clone() })?;
        if expected != data.len() {
            return Err(TensorError::Length { dtype, shape, expected, found: data.len() });
        }
        Ok(Self { dtype, shape, data })
    }

    /// An f32 tensor from values.
    ///
    /// # Panics
    /// When `values` does not fill `shape`: a bug of the caller.
    pub fn from_f32(shape: Vec<usize>, values: &[f32]) -> Self {
        let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self::new(DType::F32, shape, data.into()).expect("values fill the shape")
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Dimensions, slowest first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Raw little-endian bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.data
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.data.len() / self.dtype.size_bytes()
    }

    /// Elements of the slowest dimension in `rows`, sharing the bytes.
    ///
    /// # Panics
    /// When `rows` is out of range: a bug of the caller.
    pub fn slice_rows(&self, rows: std::ops::Range<usize>) -> Self {
        let height = self.shape[0].max(1);
        let stride = self.data.len() / height;
        let mut shape = self.shape.clone();
        shape[0] = rows.len();
        let data = self.data.slice(rows.start * stride..rows.end * stride);
        Self { dtype: self.dtype, shape, data }
    }

    /// All elements widened to f32.
    ///
    /// # Errors
    /// When the type is not F16, BF16, F32 or F64.
    pub fn to_f32(&self) -> Result<Vec<f32>, TensorError> {
        let d = &self.data;
        Ok(match self.dtype {
            DType::F32 => d.as_chunks().0.iter().map(|&c| f32::from_le_bytes(c)).collect(),
            DType::F64 => d.as_chunks().0.iter().map(|&c| f64::from_le_bytes(c) as f32).collect(),
            DType::F16 => d.as_chunks().0.iter().map(|&c| f16::from_le_bytes(c).to_f32()).collect(),
            DType::BF16 => {
                d.as_chunks().0.iter().map(|&c| bf16::from_le_bytes(c).to_f32()).collect()
            }
            found => return Err(TensorError::Type { expected: "float", found }),
        })
    }

    /// All elements of a 16-bit integer or half tensor as raw bit patterns.
    ///
    /// # Errors
    /// When elements are not two bytes wide.
    pub fn to_u16_bits(&self) -> Result<Vec<u16>, TensorError> {
        if self.dtype.size_bytes() != 2 {
            return Err(TensorError::Type { expected: "16-bit", found: self.dtype });
        }
        Ok(self.data.as_chunks().0.iter().map(|&c| u16::from_le_bytes(c)).collect())
    }

    /// All elements of an I64 or I32 tensor.
    ///
    /// # Errors
    /// When the type is another one.
    pub fn to_i64(&self) -> Result<Vec<i64>, TensorError> {
        let d = &self.data;
        Ok(match self.dtype {
            DType::I64 => d.as_chunks().0.iter().map(|&c| i64::from_le_bytes(c)).collect(),
            DType::I32 => d.as_chunks().0.iter().map(|&c| i32::from_le_bytes(c).into()).collect(),
            found => return Err(TensorError::Type { expected: "I64 or I32", found }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn length_must_match_shape() {
        let short = HostTensor::new(DType::F16, vec![2, 3], Bytes::from(vec![0; 11]));
        assert!(matches!(short, Err(TensorError::Length { expected: 12, found: 11, .. })));
        let huge = HostTensor::new(DType::F64, vec![usize::MAX, 2], Bytes::new());
        assert!(matches!(huge, Err(TensorError::Overflow { .. })));
    }

    #[test]
    fn rows_share_bytes() {
        let t = HostTensor::from_f32(vec![3, 2], &[0., 1., 2., 3., 4., 5.]);
        let rows = t.slice_rows(1..3);
        assert_eq!(rows.shape(), [2, 2]);
        assert_eq!(rows.to_f32().unwrap(), [2., 3., 4., 5.]);
    }
}
