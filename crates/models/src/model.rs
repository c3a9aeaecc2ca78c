//! A loaded model: the layers of a [`ModelSpec`] on a backend, and the forward pass.

use crate::block::{Block, Mtp};
use crate::error::ModelError;
use crate::layers::{Loader, Norm, Step};
use crate::spec::ModelSpec;
use marlin_checkpoint::Checkpoint;
use marlin_tensor::{
    Backend, BackendError, Batch, Cache, CacheSpec, CacheType, Embedding, Linear, LinearOptions,
    Routing, Tensor, Weight,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

type Result<T> = std::result::Result<T, ModelError>;

/// Models loaded so far.
static LOADED: AtomicU64 = AtomicU64::new(0);

/// A model ready to run.
pub struct Model {
    /// Unlike that of any other model of this process.
    id: u64,
    spec: ModelSpec,
    backend: Arc<dyn Backend>,
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: Norm,
    head: Linear,
    mtp: Option<Mtp>,
    unused_tensors: Vec<String>,
}

impl Model {
    /// Loads every weight of `spec` from `checkpoint` onto `backend`. `progress` is told the
    /// stored bytes of each matrix as it is placed.
    ///
    /// # Errors
    /// When a tensor is missing, shaped otherwise, in no known format, or does not fit.
    pub fn load(
        checkpoint: &Checkpoint,
        spec: ModelSpec,
        backend: Arc<dyn Backend>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self> {
        let mut loader = Loader::new(checkpoint, backend.clone(), progress);
        let (embedding, embedding_weight) = load_embedding(&mut loader, &spec)?;
        let blocks = spec.blocks.iter().map(|b| Block::load(&mut loader, b));
        let blocks = blocks.collect::<Result<Vec<_>>>()?;
        let norm = loader.norm(&spec.norm)?;
        let head = load_head(&mut loader, &spec, &embedding_weight)?;
        let mtp = Mtp::load(&mut loader, &spec)?;
        let unused_tensors = loader.source.unused(spec.blocks.len());
        let id = LOADED.fetch_add(1, Ordering::Relaxed);
        Ok(Self { id, spec, backend, embedding, blocks, norm, head, mtp, unused_tensors })
    }

    /// The specification it was loaded from.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The backend that holds it.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// Stored tensors inside the blocks, or beside them, for which the specification has no place:
    /// they may belong to something the authors' implementation computes. Layers after the last,
    /// and encoders of other inputs, are not among them.
    pub fn unused_tensors(&self) -> &[String] {
        &self.unused_tensors
    }

    /// Whether a multi-token-prediction layer was found and loaded.
    pub fn has_mtp(&self) -> bool {
        self.mtp.is_some()
    }

    /// Shape of a cache for this model; the prediction layer, if loaded, caches last.
    pub fn cache_spec(
        &self,
        num_blocks: usize,
        block_size: usize,
        cache_type: CacheType,
    ) -> CacheSpec {
        self.spec.cache_spec(self.has_mtp(), num_blocks, block_size, cache_type)
    }

    /// Logits of `batch.output_rows`: `[output_rows, vocab_size]`.
    ///
    /// # Errors
    /// When a token is outside the vocabulary or the backend fails.
    pub fn forward(&self, batch: &Batch, cache: &Cache) -> Result<Tensor> {
        self.check_tokens(batch)?;
        let pass = || {
            let x = self.blocks(batch, cache, &mut None)?;
            let mut x = self.backend.gather_rows(&x, &batch.output_rows)?;
            if batch.most_outputs <= 1 {
                // What is chosen from them are tokens of answers.
                x.decode_rows = x.rows;
            }
            self.logits(&self.norm.forward(self.backend.as_ref(), &x)?)
        };
        let logits = self.backend.run_pass(self.id, batch, cache, &mut || {
            pass().map_err(|error| match error {
                ModelError::Backend(error) => error,
                other => BackendError::Device(other.to_string()),
            })
        });
        Ok(logits?)
    }

    /// Embedded tokens of `batch`, `[rows, hidden_size]`: what the first block reads.
    ///
    /// # Errors
    /// When a token is outside the vocabulary or the backend fails.
    pub fn embed(&self, batch: &Batch) -> Result<Tensor> {
        self.check_tokens(batch)?;
        Ok(self.backend.embed(&self.embedding, batch, self.spec.embedding.scale)?)
    }

    /// Block `layer` of the trunk.
    ///
    /// # Panics
    /// When there is no such block: a bug of the caller.
    pub fn block(&self, layer: usize) -> &Block {
        &self.blocks[layer]
    }

    /// Logits of the given rows of what the last block wrote, `x: [rows, hidden_size]`.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn logits_of(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        let x = self.backend.gather_rows(x, rows)?;
        self.logits(&self.norm.forward(self.backend.as_ref(), &x)?)
    }

    /// Hidden states after the final norm, `[rows, hidden_size]`, and the routing of every
    /// mixture-of-experts layer in order.
    ///
    /// # Errors
    /// When a token is outside the vocabulary or the backend fails.
    pub fn hidden_states(&self, batch: &Batch, cache: &Cache) -> Result<(Tensor, Vec<Routing>)> {
        let mut routings = Some(Vec::new());
        let x = self.blocks(batch, cache, &mut routings)?;
        Ok((self.norm.forward(self.backend.as_ref(), &x)?, routings.unwrap_or_default()))
    }

    /// Output projection of normed hidden states.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = self.backend.linear(hidden, &self.head)?;
        Ok(match self.spec.head.softcap {
            Some(cap) => self.backend.softcap(logits, cap)?,
            None => logits,
        })
    }

    /// One pass of the multi-token-prediction layer. Row `i` of `batch` holds the token that
    /// follows the one whose normed hidden state is row `i` of `hidden`. Returns the layer's
    /// normed state, to be fed to [`logits`](Self::logits): it predicts the token after.
    /// `None` when the model has no such layer.
    ///
    /// # Errors
    /// When a token is outside the vocabulary or the backend fails.
    pub fn predict_ahead(
        &self,
        batch: &Batch,
        hidden: &Tensor,
        cache: &Cache,
    ) -> Result<Option<Tensor>> {
        let Some(mtp) = &self.mtp else { return Ok(None) };
        let embedded = self.embed(batch)?;
        let step = Step { backend: self.backend.as_ref(), batch, cache };
        Ok(Some(mtp.forward(&step, self.blocks.len(), &embedded, hidden)?))
    }

    fn blocks(
        &self,
        batch: &Batch,
        cache: &Cache,
        routings: &mut Option<Vec<Routing>>,
    ) -> Result<Tensor> {
        let step = Step { backend: self.backend.as_ref(), batch, cache };
        let mut parts = (self.embed(batch)?, None);
        for (layer, block) in self.blocks.iter().enumerate() {
            let (x, y) = block.forward_parts(&step, layer, parts, routings)?;
            parts = (x, Some(y));
        }
        Ok(match parts {
            (x, Some(y)) => self.backend.add(x, &y)?,
            (x, None) => x,
        })
    }

    fn check_tokens(&self, batch: &Batch) -> Result<()> {
        let vocab_size = self.spec.vocab_size;
        match batch.tokens.iter().find(|&&t| t as usize >= vocab_size) {
            Some(&id) => Err(ModelError::Token { id, vocab_size }),
            None => Ok(()),
        }
    }
}

fn load_embedding(loader: &mut Loader, spec: &ModelSpec) -> Result<(Embedding, Weight)> {
    let table = crate::architecture::linear(
        spec.embedding.key.clone(),
        spec.vocab_size,
        spec.hidden_size,
        "embedding",
    );
    let weight = loader.source.linear(&table)?;
    let embedding = loader.backend.load_embedding(&weight);
    (loader.progress)(weight.bytes());
    let embedding =
        embedding.map_err(|source| ModelError::Load { key: table.key.clone(), source })?;
    Ok((embedding, weight))
}

/// The head's own matrix when it is stored, whatever the configuration says about tying.
fn load_head(loader: &mut Loader, spec: &ModelSpec, embedding: &Weight) -> Result<Linear> {
    let key = &spec.head.linear.key;
    if loader.source.has(key) || !spec.head.tied {
        return loader.linear(&spec.head.linear);
    }
    let linear = loader.backend.load_linear(embedding, None, LinearOptions::default());
    linear.map_err(|source| ModelError::Load { key: key.clone(), source })
}
