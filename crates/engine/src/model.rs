//! What the engine needs to know of a model: the seam at which tests put a fake one.

use crate::EngineError;
use marlin_models::Model;
use marlin_tensor::{Batch, Cache, CacheType, Draw, Drawn, Tensor};

/// A decoder-only model on its device.
pub trait LanguageModel: Send + Sync {
    /// Columns of the logits.
    fn vocab_size(&self) -> usize;

    /// Most tokens one sequence may hold.
    fn max_context(&self) -> usize;

    /// Allocates a cache of `num_blocks` blocks of `block_size` tokens.
    ///
    /// # Errors
    /// When it does not fit or the device cannot store `cache_type`.
    fn create_cache(
        &self,
        num_blocks: usize,
        block_size: usize,
        cache_type: CacheType,
    ) -> Result<Cache, EngineError>;

    /// Copies whole blocks, `(from, to)`, in order.
    ///
    /// # Errors
    /// When the device fails.
    fn copy_blocks(&self, cache: &Cache, pairs: &[(u32, u32)]) -> Result<(), EngineError>;

    /// Runs `batch`, writing its keys and values into `cache`.
    /// Returns logits `[batch.output_rows.len(), vocab_size]`, which may have no rows.
    ///
    /// # Errors
    /// When a layer fails.
    fn forward(&self, batch: &Batch, cache: &Cache) -> Result<Tensor, EngineError>;

    /// Runs `batch` as [`forward`](Self::forward) does; returns the states after the final norm of all its
    /// rows, `[rows, hidden_size]`.
    ///
    /// # Errors
    /// When a layer fails.
    fn hidden(&self, batch: &Batch, cache: &Cache) -> Result<Tensor, EngineError>;

    /// Copies logits or states to the host.
    ///
    /// # Errors
    /// When the device fails.
    fn download(&self, logits: &Tensor) -> Result<Vec<f32>, EngineError>;

    /// Copies rows of logits to the host.
    ///
    /// # Errors
    /// When the device fails.
    fn download_rows(&self, logits: &Tensor, rows: &[u32]) -> Result<Vec<f32>, EngineError> {
        let all = self.download(logits)?;
        let row = |&row: &u32| &all[row as usize * logits.columns..][..logits.columns];
        Ok(rows.iter().flat_map(row).copied().collect())
    }

    /// Draws tokens on the device, as [`Backend::draw`](marlin_tensor::Backend::draw) says.
    ///
    /// # Errors
    /// When the device fails.
    fn draw(
        &self,
        logits: &Tensor,
        draws: &[Draw],
    ) -> Result<Option<Vec<Option<Drawn>>>, EngineError> {
        let _ = (logits, draws);
        Ok(None)
    }
}

impl LanguageModel for Model {
    fn vocab_size(&self) -> usize {
        self.spec().vocab_size
    }

    fn max_context(&self) -> usize {
        self.spec().max_position_embeddings
    }

    fn create_cache(
        &self,
        num_blocks: usize,
        block_size: usize,
        cache_type: CacheType,
    ) -> Result<Cache, EngineError> {
        Ok(self.backend().create_cache(&self.cache_spec(num_blocks, block_size, cache_type))?)
    }

    fn copy_blocks(&self, cache: &Cache, pairs: &[(u32, u32)]) -> Result<(), EngineError> {
        Ok(self.backend().copy_blocks(cache, pairs)?)
    }

    fn forward(&self, batch: &Batch, cache: &Cache) -> Result<Tensor, EngineError> {
        Model::forward(self, batch, cache).map_err(|e| EngineError::Forward(Box::new(e)))
    }

    fn hidden(&self, batch: &Batch, cache: &Cache) -> Result<Tensor, EngineError> {
        let states = self.hidden_states(batch, cache);
        Ok(states.map_err(|e| EngineError::Forward(Box::new(e)))?.0)
    }

    fn download(&self, logits: &Tensor) -> Result<Vec<f32>, EngineError> {
        Ok(self.backend().download(logits)?)
    }

    fn download_rows(&self, logits: &Tensor, rows: &[u32]) -> Result<Vec<f32>, EngineError> {
        self.download(&self.backend().gather_rows(logits, rows)?)
    }

    fn draw(
        &self,
        logits: &Tensor,
        draws: &[Draw],
    ) -> Result<Option<Vec<Option<Drawn>>>, EngineError> {
        Ok(self.backend().draw(logits, draws)?)
    }
}
