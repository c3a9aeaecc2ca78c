//! What a model is, as data. A [`ModelSpec`] is computed from the configuration alone, without
//! touching a weight; loading, the forward pass, memory planning and calibration all read it.
//! Keys are Hugging Face names without the `.weight` suffix; `source.rs` maps them to what a
//! container really calls them.

use marlin_tensor::{
    Activation, AttentionParams, CacheLayerSpec, CacheSpec, CacheType, Rope, Router,
};
use std::collections::BTreeMap;

/// A decoder-only language model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// `model_type` of the configuration.
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest context the model was made for, tokens.
    pub max_position_embeddings: usize,
    /// Token embedding.
    pub embedding: EmbeddingSpec,
    /// Decoder blocks in order.
    pub blocks: Vec<BlockSpec>,
    /// Final norm.
    pub norm: NormSpec,
    /// Output projection.
    pub head: HeadSpec,
    /// Multi-token-prediction layer; loaded when the checkpoint holds its tensors.
    pub mtp: Option<MtpSpec>,
    /// Ids that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// Id that starts a sequence.
    pub bos_token_id: Option<u32>,
    /// Configuration fields that were absent, and the default each took.
    pub defaults: BTreeMap<String, String>,
    /// Configuration fields that nothing here reads, and their values: they may change what the
    /// authors' implementation computes.
    pub unread: BTreeMap<String, String>,
}

/// Token embedding table `[vocab_size, hidden_size]`.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddingSpec {
    /// Checkpoint key.
    pub key: String,
    /// Multiplier of looked-up rows.
    pub scale: f32,
}

/// Output projection.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadSpec {
    /// The matrix `[vocab_size, hidden_size]`.
    pub linear: LinearSpec,
    /// Whether an absent matrix means the embedding table.
    pub tied: bool,
    /// `cap * tanh(logit / cap)`.
    pub softcap: Option<f32>,
}

/// RMS norm over the last dimension.
#[derive(Debug, Clone, PartialEq)]
pub struct NormSpec {
    /// Checkpoint key.
    pub key: String,
    /// Elements.
    pub size: usize,
    /// Added to the mean square.
    pub eps: f32,
    /// Added to the stored weight (1 for Gemma).
    pub offset: f32,
}

/// A matrix `[out_features, in_features]`.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearSpec {
    /// Checkpoint key.
    pub key: String,
    /// Output columns.
    pub out_features: usize,
    /// Input columns.
    pub in_features: usize,
    /// Whether `KEY.bias` must exist.
    pub bias: bool,
    /// Matrices that see the same input carry the same label: they share a Hessian.
    pub label: String,
    /// Where the rows lie when the container stores several matrices as one.
    pub fused: Option<FusedRows>,
}

/// Rows of a larger stored matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct FusedRows {
    /// Checkpoint key of the larger matrix.
    pub key: String,
    /// First row.
    pub start: usize,
    /// Rows of the larger matrix.
    pub total: usize,
}

/// One decoder block.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockSpec {
    /// Position in the stack.
    pub index: usize,
    /// Norm before the mixer.
    pub input_norm: NormSpec,
    /// Attention.
    pub mixer: MixerSpec,
    /// Norm of the mixer's output before it joins the residual stream.
    pub mixer_output_norm: Option<NormSpec>,
    /// Norm before the feed-forward.
    pub feed_forward_norm: NormSpec,
    /// Feed-forward.
    pub feed_forward: FeedForwardSpec,
    /// Norm of the feed-forward's output before it joins the residual stream.
    pub feed_forward_output_norm: Option<NormSpec>,
}

/// How tokens exchange information.
#[derive(Debug, Clone, PartialEq)]
pub enum MixerSpec {
    /// Grouped-query attention.
    Gqa(GqaSpec),
    /// Multi-head latent attention.
    Mla(MlaSpec),
}

/// Rotary embedding, and tensors that refine it.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Frequencies from the configuration.
    pub rope: Rope,
    /// Tensor of divisors of the frequencies that a GGUF may hold.
    pub divisors: Option<String>,
    /// The same for LongRoPE's second table.
    pub long_divisors: Option<String>,
}

/// Grouped-query attention.
#[derive(Debug, Clone, PartialEq)]
pub struct GqaSpec {
    /// Query projection.
    pub q: LinearSpec,
    /// Key projection.
    pub k: LinearSpec,
    /// Value projection.
    pub v: LinearSpec,
    /// Output projection.
    pub o: LinearSpec,
    /// Per-head norm of queries.
    pub q_norm: Option<NormSpec>,
    /// Per-head norm of keys.
    pub k_norm: Option<NormSpec>,
    /// Rotary embedding; `None` where a layer has no positions.
    pub rope: Option<RopeSpec>,
    /// Shape and masking.
    pub params: AttentionParams,
}

/// Multi-head latent attention, run in the absorbed form: one latent vector per token is cached.
#[derive(Debug, Clone, PartialEq)]
pub struct MlaSpec {
    /// How queries are made.
    pub query: MlaQuery,
    /// `hidden -> [latent | rotary key]`.
    pub kv_a: LinearSpec,
    /// Norm of the latent.
    pub kv_a_norm: NormSpec,
    /// `latent -> per head [key | value]`.
    pub kv_b: LinearSpec,
    /// Output projection.
    pub o: LinearSpec,
    /// Rotary embedding of the rotary columns.
    pub rope: RopeSpec,
    /// Heads.
    pub num_heads: usize,
    /// Latent width.
    pub kv_lora_rank: usize,
    /// Columns of a head without positions.
    pub qk_nope_head_dim: usize,
    /// Rotary columns of a head.
    pub qk_rope_head_dim: usize,
    /// Value columns of a head.
    pub v_head_dim: usize,
    /// Multiplier of scores.
    pub scale: f32,
}

impl MlaSpec {
    /// The attention that runs: absorbed, over one latent vector and one rotary key a token, which all heads share.
    pub fn attention(&self) -> AttentionParams {
        AttentionParams {
            num_heads: self.num_heads,
            num_kv_heads: 1,
            key_head_dim: self.kv_lora_rank + self.qk_rope_head_dim,
            value_head_dim: self.kv_lora_rank,
            scale: self.scale,
            window: None,
            softcap: None,
        }
    }
}

/// Query projection of latent attention.
#[derive(Debug, Clone, PartialEq)]
pub enum MlaQuery {
    /// One matrix.
    Full(LinearSpec),
    /// Down, norm, up.
    LowRank {
        /// Down projection.
        a: LinearSpec,
        /// Norm between.
        norm: NormSpec,
        /// Up projection.
        b: LinearSpec,
    },
}

/// Feed-forward part of a block.
#[derive(Debug, Clone, PartialEq)]
pub enum FeedForwardSpec {
    /// One gated feed-forward.
    Gated(Box<GatedSpec>),
    /// Mixture of experts.
    Moe(Box<MoeSpec>),
}

/// `down(activation(gate x) * up x)`.
#[derive(Debug, Clone, PartialEq)]
pub struct GatedSpec {
    /// Gate projection.
    pub gate: LinearSpec,
    /// Up projection.
    pub up: LinearSpec,
    /// Down projection.
    pub down: LinearSpec,
    /// Activation.
    pub activation: Activation,
}

/// Mixture of experts.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeSpec {
    /// Routing rule.
    pub router: Router,
    /// Router matrix `[num_experts, hidden_size]`, always computed in f32.
    pub gate: LinearSpec,
    /// Tensor added to scores when choosing.
    pub correction_bias: Option<String>,
    /// Routed experts by id.
    pub experts: Vec<GatedSpec>,
    /// Expert that every token uses.
    pub shared: Option<GatedSpec>,
}

/// Multi-token-prediction layer (DeepSeek-V3, GLM): predicts the token after the next one.
#[derive(Debug, Clone, PartialEq)]
pub struct MtpSpec {
    /// Norm of the next token's embedding.
    pub embedding_norm: NormSpec,
    /// Norm of the trunk's hidden state.
    pub hidden_norm: NormSpec,
    /// `[embedding | hidden] -> hidden`.
    pub projection: LinearSpec,
    /// An ordinary decoder block.
    pub block: BlockSpec,
    /// Norm before the head.
    pub norm: NormSpec,
}

impl MixerSpec {
    /// What this layer caches per token.
    pub fn cache_layer(&self) -> CacheLayerSpec {
        match self {
            Self::Gqa(g) => CacheLayerSpec {
                num_kv_heads: g.params.num_kv_heads,
                key_head_dim: g.params.key_head_dim,
                value_head_dim: g.params.value_head_dim,
            },
            Self::Mla(m) => CacheLayerSpec {
                num_kv_heads: 1,
                key_head_dim: m.attention().key_head_dim,
                value_head_dim: 0,
            },
        }
    }

    /// Every matrix of the layer.
    pub fn linears(&self) -> Vec<&LinearSpec> {
        match self {
            Self::Gqa(g) => vec![&g.q, &g.k, &g.v, &g.o],
            Self::Mla(m) => {
                let mut list = match &m.query {
                    MlaQuery::Full(q) => vec![q],
                    MlaQuery::LowRank { a, b, .. } => vec![a, b],
                };
                list.extend([&m.kv_a, &m.kv_b, &m.o]);
                list
            }
        }
    }

    fn norms(&self) -> Vec<&NormSpec> {
        match self {
            Self::Gqa(g) => g.q_norm.iter().chain(&g.k_norm).collect(),
            Self::Mla(m) => match &m.query {
                MlaQuery::Full(_) => vec![&m.kv_a_norm],
                MlaQuery::LowRank { norm, .. } => vec![norm, &m.kv_a_norm],
            },
        }
    }
}

impl GatedSpec {
    /// Its three matrices.
    pub fn linears(&self) -> [&LinearSpec; 3] {
        [&self.gate, &self.up, &self.down]
    }
}

impl BlockSpec {
    /// Every matrix of the block, routed experts included.
    pub fn linears(&self) -> Vec<&LinearSpec> {
        let mut list = self.mixer.linears();
        match &self.feed_forward {
            FeedForwardSpec::Gated(g) => list.extend(g.linears()),
            FeedForwardSpec::Moe(m) => {
                list.push(&m.gate);
                list.extend(m.experts.iter().flat_map(GatedSpec::linears));
                list.extend(m.shared.iter().flat_map(GatedSpec::linears));
            }
        }
        list
    }

    /// Every norm of the block.
    pub fn norms(&self) -> Vec<&NormSpec> {
        let mut list = self.mixer.norms();
        list.extend([&self.input_norm, &self.feed_forward_norm]);
        list.extend(&self.mixer_output_norm);
        list.extend(&self.feed_forward_output_norm);
        list
    }

    fn parameters(&self) -> u64 {
        let bias = match &self.feed_forward {
            FeedForwardSpec::Moe(m) if m.correction_bias.is_some() => m.router.num_experts as u64,
            _ => 0,
        };
        self.linears().iter().map(|l| l.parameters()).sum::<u64>()
            + self.norms().iter().map(|n| n.size as u64).sum::<u64>()
            + bias
    }

    /// Parameters of experts that a token does not use.
    fn idle_parameters(&self) -> u64 {
        match &self.feed_forward {
            FeedForwardSpec::Gated(_) => 0,
            FeedForwardSpec::Moe(m) => {
                let idle = m.router.num_experts - m.router.top_k;
                let one = m
                    .experts
                    .first()
                    .map_or(0, |e| e.linears().iter().map(|l| l.parameters()).sum::<u64>());
                idle as u64 * one
            }
        }
    }
}

impl LinearSpec {
    /// Weights and bias.
    pub fn parameters(&self) -> u64 {
        let bias = if self.bias { self.out_features as u64 } else { 0 };
        self.out_features as u64 * self.in_features as u64 + bias
    }
}

impl ModelSpec {
    /// Parameters of the trunk: embedding, blocks, final norm, and the head unless tied.
    pub fn parameters(&self) -> u64 {
        let head = if self.head.tied { 0 } else { self.head.linear.parameters() };
        self.embedding_parameters()
            + self.blocks.iter().map(BlockSpec::parameters).sum::<u64>()
            + self.norm.size as u64
            + head
    }

    /// Parameters that one token multiplies with: no embedding, only the chosen experts, and the head.
    pub fn active_parameters(&self) -> u64 {
        self.blocks.iter().map(|b| b.parameters() - b.idle_parameters()).sum::<u64>()
            + self.norm.size as u64
            + self.head.linear.parameters()
    }

    /// Parameters of the token embedding.
    pub fn embedding_parameters(&self) -> u64 {
        self.vocab_size as u64 * self.hidden_size as u64
    }

    /// Shape of a cache; the prediction layer, if it is to be there and there is one, caches last.
    pub fn cache_spec(
        &self,
        with_prediction: bool,
        num_blocks: usize,
        block_size: usize,
        cache_type: CacheType,
    ) -> CacheSpec {
        let prediction = self.mtp.as_ref().filter(|_| with_prediction).map(|mtp| &mtp.block);
        let blocks = self.blocks.iter().chain(prediction);
        let layers = blocks.map(|block| block.mixer.cache_layer()).collect();
        CacheSpec { layers, block_size, num_blocks, cache_type }
    }
}

impl From<GatedSpec> for FeedForwardSpec {
    fn from(spec: GatedSpec) -> Self {
        Self::Gated(Box::new(spec))
    }
}

impl From<MoeSpec> for FeedForwardSpec {
    fn from(spec: MoeSpec) -> Self {
        Self::Moe(Box::new(spec))
    }
}
