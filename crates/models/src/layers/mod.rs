//! Loaded layers: each holds the handles of its weights and composes backend operators.

mod feed_forward;
mod gqa;
mod mla;

pub use feed_forward::FeedForward;
pub use gqa::Gqa;
pub use mla::Mla;

use crate::error::ModelError;
use crate::source::Source;
use crate::spec::{LinearSpec, NormSpec, RopeSpec};
use marlin_checkpoint::Checkpoint;
use marlin_tensor::{Backend, Batch, Cache, Linear, LinearOptions, RopeTable, Tensor, Vector};
use std::sync::Arc;

type Result<T> = std::result::Result<T, ModelError>;

/// What one forward pass hands to every layer.
pub struct Step<'a> {
    /// Operators.
    pub backend: &'a dyn Backend,
    /// Rows of this pass.
    pub batch: &'a Batch,
    /// Paged cache.
    pub cache: &'a Cache,
}

/// Wraps a placed matrix.
pub type Tag<'a> = dyn Fn(&LinearSpec, Linear) -> Linear + 'a;

/// Places the weights of a specification on a backend.
pub struct Loader<'a> {
    /// Where weights come from.
    pub source: Source<'a>,
    /// Where they go.
    pub backend: Arc<dyn Backend>,
    /// Called after every matrix with its stored bytes.
    pub progress: &'a mut dyn FnMut(u64),
    /// Rotary tables already placed: layers share them.
    ropes: Vec<(RopeSpec, RopeTable)>,
    /// Wraps every placed matrix, so that a backend can tell them apart.
    tag: Option<&'a Tag<'a>>,
}

impl<'a> Loader<'a> {
    /// Places weights of `checkpoint` on `backend`.
    pub fn new(
        checkpoint: &'a Checkpoint,
        backend: Arc<dyn Backend>,
        progress: &'a mut dyn FnMut(u64),
    ) -> Self {
        let source = Source::new(checkpoint);
        Self { source, backend, progress, ropes: Vec::new(), tag: None }
    }

    /// Every matrix placed from here on goes through `tag`.
    #[must_use]
    pub fn with_tag(mut self, tag: &'a Tag<'a>) -> Self {
        self.tag = Some(tag);
        self
    }

    /// A matrix with its bias.
    pub fn linear(&mut self, spec: &LinearSpec) -> Result<Linear> {
        self.linear_with(spec, LinearOptions::default())
    }

    /// A matrix loaded in a particular way.
    pub fn linear_with(&mut self, spec: &LinearSpec, options: LinearOptions) -> Result<Linear> {
        let weight = self.source.linear(spec)?;
        let bias = self.source.bias(spec)?;
        let loaded = self.backend.load_linear(&weight, bias.as_ref(), options);
        (self.progress)(weight.bytes());
        let loaded = loaded.map_err(|source| ModelError::Load { key: spec.key.clone(), source })?;
        Ok(match self.tag {
            Some(tag) => tag(spec, loaded),
            None => loaded,
        })
    }

    /// A norm.
    pub fn norm(&mut self, spec: &NormSpec) -> Result<Norm> {
        let weight = self.backend.load_vector(self.source.norm(spec)?)?;
        Ok(Norm { weight, eps: spec.eps })
    }

    /// A norm that may be absent from the specification.
    pub fn optional_norm(&mut self, spec: &Option<NormSpec>) -> Result<Option<Norm>> {
        spec.as_ref().map(|s| self.norm(s)).transpose()
    }

    /// A rotary table, refined by the tensors the checkpoint may hold.
    pub fn rope(&mut self, spec: &RopeSpec) -> Result<RopeTable> {
        if let Some((_, table)) = self.ropes.iter().find(|(s, _)| s == spec) {
            return Ok(table.clone());
        }
        let mut rope = spec.rope.clone();
        self.divide(&spec.divisors, &mut rope.inv_freq)?;
        if let Some(long) = &mut rope.long {
            self.divide(&spec.long_divisors, &mut long.inv_freq)?;
        }
        let table = self.backend.load_rope(&rope)?;
        self.ropes.push((spec.clone(), table.clone()));
        Ok(table)
    }

    fn divide(&self, key: &Option<String>, frequencies: &mut [f32]) -> Result<()> {
        let Some(key) = key else { return Ok(()) };
        if self.source.optional_vector(key)?.is_some() {
            let divisors = self.source.vector(key, frequencies.len())?;
            frequencies.iter_mut().zip(divisors).for_each(|(f, d)| *f /= d);
        }
        Ok(())
    }
}

/// RMS norm.
pub struct Norm {
    weight: Vector,
    eps: f32,
}

impl Norm {
    /// `x + y`, and that normalized.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn forward_sum(
        &self,
        backend: &dyn Backend,
        x: Tensor,
        y: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        Ok(backend.add_norm(x, y, &self.weight, self.eps)?)
    }

    /// The sum of the two, if there are two, and that normalized.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn forward_parts(
        &self,
        backend: &dyn Backend,
        x: Tensor,
        y: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        match y {
            Some(y) => self.forward_sum(backend, x, y),
            None => {
                let normed = self.forward(backend, &x)?;
                Ok((x, normed))
            }
        }
    }

    /// Normalizes each group of `weight.len` columns.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn forward(&self, backend: &dyn Backend, x: &Tensor) -> Result<Tensor> {
        Ok(backend.rms_norm(x, &self.weight, self.eps)?)
    }
}
