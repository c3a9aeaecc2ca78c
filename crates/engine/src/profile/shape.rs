//! What tells calls of one operator apart.

use marlin_tensor::{Linear, Tensor};
use std::fmt;

/// Matrices of one call that are told apart; the last stands for the rest.
const MATRICES: usize = 4;

/// Shape class of a call: calls with the same one are one row of a profile. How long the context is
/// is not part of it, or every token would be a row of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Shape {
    /// Activations `[rows, columns]`.
    Rows { rows: usize, columns: usize },
    /// `[rows, in_features]` times one or several matrices; unused places are 0.
    Product { rows: usize, in_features: usize, out_features: [usize; MATRICES] },
    /// A matrix for each head.
    HeadProduct { rows: usize, heads: usize, in_features: usize, out_features: usize },
    /// `rows` queries.
    Attention { rows: usize, num_heads: usize, num_kv_heads: usize, key_head_dim: usize },
    /// Gated experts.
    Experts {
        rows: usize,
        columns: usize,
        top_k: usize,
        num_experts: usize,
        intermediate_size: usize,
    },
}

impl Shape {
    /// `x` times `weights`.
    pub(crate) fn product(x: &Tensor, weights: &[&Linear]) -> Self {
        let mut out_features = [0; MATRICES];
        for (i, weight) in weights.iter().enumerate() {
            out_features[i.min(MATRICES - 1)] += weight.out_features;
        }
        Self::Product { rows: x.rows, in_features: x.columns, out_features }
    }
}

/// `[512,576]x[576+192+192]`
impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Rows { rows, columns } => write!(f, "[{rows},{columns}]"),
            Self::Product { rows, in_features, out_features } => {
                let outs = out_features.iter().filter(|&&n| n > 0).map(usize::to_string);
                write!(f, "[{rows},{in_features}]x[{}]", outs.collect::<Vec<_>>().join("+"))
            }
            Self::HeadProduct { rows, heads, in_features, out_features } => {
                write!(f, "[{rows},{heads}x{in_features}]x[{heads}x{out_features}]")
            }
            Self::Attention { rows, num_heads, num_kv_heads, key_head_dim } => {
                write!(f, "[{rows}] {num_heads}/{num_kv_heads} heads of {key_head_dim}")
            }
            Self::Experts { rows, columns, top_k, num_experts, intermediate_size } => {
                write!(f, "[{rows},{columns}]x[{intermediate_size}] {top_k} of {num_experts}")
            }
        }
    }
}
