//! Blocks of a model: a mixer and a feed-forward around the residual stream. [`Model`](crate::Model)
//! runs all of them; a converter loads and runs one at a time.

use crate::error::ModelError;
use crate::layers::{FeedForward, Gqa, Loader, Mla, Norm, Step};
use crate::spec::{BlockSpec, MixerSpec, ModelSpec};
use marlin_tensor::{Linear, Routing, Tensor};

type Result<T> = std::result::Result<T, ModelError>;

enum Mixer {
    Gqa(Box<Gqa>),
    Mla(Box<Mla>),
}

/// A decoder block on a backend.
pub struct Block {
    input_norm: Norm,
    mixer: Mixer,
    mixer_output_norm: Option<Norm>,
    feed_forward_norm: Norm,
    feed_forward: FeedForward,
    feed_forward_output_norm: Option<Norm>,
}

/// A multi-token-prediction layer on a backend.
pub struct Mtp {
    embedding_norm: Norm,
    hidden_norm: Norm,
    projection: Linear,
    block: Block,
    norm: Norm,
}

impl Block {
    /// Places the weights of `spec`.
    ///
    /// # Errors
    /// When a tensor is missing, shaped otherwise, in no known format, or does not fit.
    pub fn load(loader: &mut Loader, spec: &BlockSpec) -> Result<Self> {
        Ok(Self {
            input_norm: loader.norm(&spec.input_norm)?,
            mixer: match &spec.mixer {
                MixerSpec::Gqa(g) => Mixer::Gqa(Box::new(Gqa::load(loader, g)?)),
                MixerSpec::Mla(m) => Mixer::Mla(Box::new(Mla::load(loader, m)?)),
            },
            mixer_output_norm: loader.optional_norm(&spec.mixer_output_norm)?,
            feed_forward_norm: loader.norm(&spec.feed_forward_norm)?,
            feed_forward: FeedForward::load(loader, &spec.feed_forward)?,
            feed_forward_output_norm: loader.optional_norm(&spec.feed_forward_output_norm)?,
        })
    }

    /// `[rows, hidden] -> [rows, hidden]`, the residual stream; `layer` is the cache layer.
    /// Routings are appended to `routings` when asked for.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn forward(
        &self,
        step: &Step,
        layer: usize,
        x: Tensor,
        routings: &mut Option<Vec<Routing>>,
    ) -> Result<Tensor> {
        let (x, y) = self.forward_parts(step, layer, (x, None), routings)?;
        Ok(step.backend.add(x, &y)?)
    }

    /// As [`forward`](Self::forward), the last sum left to who normalizes it: the stream comes, and goes, as what is still to be added up.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn forward_parts(
        &self,
        step: &Step,
        layer: usize,
        (x, y): (Tensor, Option<Tensor>),
        routings: &mut Option<Vec<Routing>>,
    ) -> Result<(Tensor, Tensor)> {
        let b = step.backend;
        let (x, h) = self.input_norm.forward_parts(b, x, y.as_ref())?;
        let mut y = match &self.mixer {
            Mixer::Gqa(m) => m.forward(step, layer, &h)?,
            Mixer::Mla(m) => m.forward(step, layer, &h)?,
        };
        if let Some(norm) = &self.mixer_output_norm {
            y = norm.forward(b, &y)?;
        }
        let (x, h) = self.feed_forward_norm.forward_sum(b, x, &y)?;
        let mut y = self.feed_forward.forward(step, &h, routings)?;
        if let Some(norm) = &self.feed_forward_output_norm {
            y = norm.forward(b, &y)?;
        }
        Ok((x, y))
    }
}

impl Mtp {
    /// Places the layer when its projection is stored.
    ///
    /// # Errors
    /// As [`Block::load`].
    pub fn load(loader: &mut Loader, spec: &ModelSpec) -> Result<Option<Self>> {
        let Some(mtp) = spec.mtp.as_ref().filter(|_| loader.source.has_mtp(spec)) else {
            return Ok(None);
        };
        Ok(Some(Self {
            embedding_norm: loader.norm(&mtp.embedding_norm)?,
            hidden_norm: loader.norm(&mtp.hidden_norm)?,
            projection: loader.linear(&mtp.projection)?,
            block: Block::load(loader, &mtp.block)?,
            norm: loader.norm(&mtp.norm)?,
        }))
    }

    /// Rows of embedded next tokens and of the trunk's normed states to the layer's normed state.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn forward(
        &self,
        step: &Step,
        layer: usize,
        embedded: &Tensor,
        hidden: &Tensor,
    ) -> Result<Tensor> {
        let b = step.backend;
        let embedded = self.embedding_norm.forward(b, embedded)?;
        let joined = b.concat_heads(&embedded, &self.hidden_norm.forward(b, hidden)?, 1)?;
        let x = b.linear(&joined, &self.projection)?;
        let x = self.block.forward(step, layer, x, &mut None)?;
        self.norm.forward(b, &x)
    }
}
