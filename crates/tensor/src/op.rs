//! Parameters of operators: plain data, validated where they are built.

/// Elementwise activation of a gated feed-forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU with the tanh approximation.
    GeluTanh,
    /// GELU with the error function.
    Gelu,
}

/// How a row divides into heads: `heads` groups of `head_dim` columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Number of groups.
    pub heads: usize,
    /// Columns of one group.
    pub head_dim: usize,
}

/// Which columns rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RopeStyle {
    /// Pairs `(i, i + rotary_dim / 2)`.
    HalfSplit,
    /// Pairs `(2 i, 2 i + 1)`.
    Interleaved,
}

/// Rotary position embedding, resolved to frequencies. The first [`rotary_dim`](Self::rotary_dim)
/// columns of a head rotate, the rest pass through.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Pairing of columns.
    pub style: RopeStyle,
    /// Angular frequency per pair, radians per position: `rotary_dim / 2` values.
    pub inv_freq: Vec<f32>,
    /// Multiplier of cosine and sine (YaRN's and LongRoPE's attention factor).
    pub magnitude: f32,
    /// Other frequencies for long sequences.
    pub long: Option<LongRope>,
}

impl Rope {
    /// Columns that rotate.
    pub fn rotary_dim(&self) -> usize {
        self.inv_freq.len() * 2
    }
}

/// LongRoPE's second table, used by every token of a sequence that may outgrow `threshold`.
#[derive(Debug, Clone, PartialEq)]
pub struct LongRope {
    /// Sequences with a larger `max_context` use this table.
    pub threshold: u32,
    /// Angular frequency per pair.
    pub inv_freq: Vec<f32>,
    /// Multiplier of cosine and sine.
    pub magnitude: f32,
}

/// Shape and masking of one attention call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionParams {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Columns of one query or key head.
    pub key_head_dim: usize,
    /// Columns of one value head.
    pub value_head_dim: usize,
    /// Multiplier of scores before softmax.
    pub scale: f32,
    /// Keys with `query_position - key_position >= window` are hidden.
    pub window: Option<u32>,
    /// `cap * tanh(score / cap)` before masking.
    pub softcap: Option<f32>,
}

/// How router logits become expert probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each expert.
    Sigmoid,
}

/// Mixture-of-experts routing. Experts are chosen by `score + bias`, weighted by `score`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Router {
    /// Scoring function over logits.
    pub scoring: Scoring,
    /// Number of routed experts.
    pub num_experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Experts form this many equal groups (1 = no grouping).
    pub num_groups: usize,
    /// Groups a token may use.
    pub top_k_groups: usize,
    /// A group's score is the sum of its best `group_score_experts` choices (1 = maximum).
    pub group_score_experts: usize,
    /// Divide chosen weights by their sum.
    pub normalize: bool,
    /// Multiplier of the final weights.
    pub scaling_factor: f32,
}
