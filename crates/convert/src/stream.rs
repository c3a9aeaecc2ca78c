//! Calibration rows streamed through the model one block at a time: only one block is in memory, and what
//! later blocks see comes out of the quantized ones before them.

use crate::calibration::Calibration;
use crate::capture::{Capture, tag};
use crate::error::ConvertError;
use crate::hessian::{Gathering, Hessian, Hessians};
use crate::origin::{Named, Origin, view};
use crate::states::States;
use marlin_models::{Block, BlockSpec, Loader, Mtp, Step};
use marlin_tensor::{Backend, Batch, Cache, CacheSpec, CacheType, Tensor};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

type Result<T> = std::result::Result<T, ConvertError>;

const BLOCK_SIZE: usize = 16;

/// What streams, and where it is kept in between.
pub struct Stream<'a> {
    /// The source.
    pub origin: &'a Origin<'a>,
    /// Where blocks run, with float activations.
    pub backend: Arc<dyn Backend>,
    /// Rows.
    pub calibration: &'a Calibration,
    /// Holds the hidden states.
    pub directory: &'a Path,
    /// Told the number of rows done; fails when the user stops the job.
    pub tick: &'a (dyn Fn(usize) -> Result<()> + Sync),
}

impl Stream<'_> {
    fn hidden(&self) -> usize {
        self.origin.output.hidden_size
    }

    /// States in front of `layer`.
    pub fn states(&self, layer: usize) -> States {
        States::at(self.directory, layer)
    }

    /// Whether the states in front of `layer` are kept.
    pub fn has(&self, layer: usize) -> bool {
        self.states(layer).exists(self.calibration.tokens(), self.hidden())
    }

    /// Embeds the rows, with the stored `table` or with the source's own: states in front of block 0.
    ///
    /// # Errors
    /// When the backend or the file system fails.
    pub fn embed(&self, table: Option<Vec<Named>>) -> Result<()> {
        let origin = self.origin;
        let spec = origin.embedding_spec();
        let weight = match table {
            Some(table) => {
                let view = view(self.directory, &origin.config, table);
                let key = origin.output_key(&spec);
                marlin_quant::load(&view, &key, spec.out_features, spec.in_features)?
            }
            None => origin.source.linear(&spec)?,
        };
        let table = self.backend.load_embedding(&weight)?;
        self.states(0).write(self.calibration.rows.len(), |row| {
            (self.tick)(row)?;
            let batch = batch(&self.calibration.rows[row], self.calibration.columns());
            let x = self.backend.embed(&table, &batch, origin.output.embedding.scale)?;
            Ok(self.backend.download(&x)?)
        })
    }

    /// Runs the rows through the source's block `layer` and gathers the second moments of `labels`.
    ///
    /// # Errors
    /// When a weight is missing, or the backend or the file system fails.
    pub fn capture(&self, layer: usize, labels: BTreeSet<String>) -> Result<Hessians> {
        let capture = Arc::new(Capture::new(self.backend.clone(), labels));
        let spec = &self.origin.spec.blocks[layer];
        let mut progress = |_| {};
        let mut loader =
            Loader::new(self.origin.source.checkpoint(), capture.clone(), &mut progress)
                .with_tag(&tag);
        let block = Block::load(&mut loader, spec)?;
        let cache = cache(capture.as_ref(), spec, self.calibration.columns())?;
        let mut states = self.states(layer).open(self.hidden())?;
        for (row, tokens) in self.calibration.rows.iter().enumerate() {
            (self.tick)(row)?;
            self.forward(capture.as_ref(), &block, &cache, tokens, states.row(tokens.len())?)?;
        }
        Ok(capture.take()?)
    }

    /// Runs the rows through block `layer` as it is in the output: states in front of the next one.
    /// `tensors` are all of the block's.
    ///
    /// # Errors
    /// As [`capture`](Self::capture).
    pub fn advance(&self, layer: usize, tensors: Vec<Named>) -> Result<()> {
        let view = view(self.directory, &self.origin.config, tensors);
        let spec = &self.origin.output.blocks[layer];
        let mut progress = |_| {};
        let mut loader = Loader::new(&view, self.backend.clone(), &mut progress);
        let block = Block::load(&mut loader, spec)?;
        let cache = cache(self.backend.as_ref(), spec, self.calibration.columns())?;
        let mut states = self.states(layer).open(self.hidden())?;
        self.states(layer + 1).write(self.calibration.rows.len(), |row| {
            (self.tick)(row)?;
            let tokens = &self.calibration.rows[row];
            let x = states.row(tokens.len())?;
            let x = self.forward(self.backend.as_ref(), &block, &cache, tokens, x)?;
            Ok(self.backend.download(&x)?)
        })
    }

    fn forward(
        &self,
        backend: &dyn Backend,
        block: &Block,
        cache: &Cache,
        tokens: &[u32],
        x: Vec<f32>,
    ) -> Result<Tensor> {
        let batch = batch(tokens, self.calibration.columns());
        let x = backend.upload(tokens.len(), self.hidden(), x)?;
        Ok(block.forward(&Step { backend, batch: &batch, cache }, 0, x, &mut None)?)
    }

    /// The rows after the last block and the final norm, one at a time.
    fn normed(&self, mut each: impl FnMut(&[u32], Tensor) -> Result<()>) -> Result<()> {
        let mut progress = |_| {};
        let checkpoint = self.origin.source.checkpoint();
        let mut loader = Loader::new(checkpoint, self.backend.clone(), &mut progress);
        let norm = loader.norm(&self.origin.spec.norm)?;
        let mut states = self.states(self.origin.spec.blocks.len()).open(self.hidden())?;
        for (row, tokens) in self.calibration.rows.iter().enumerate() {
            (self.tick)(row)?;
            let x = states.row(tokens.len())?;
            let x = self.backend.upload(tokens.len(), self.hidden(), x)?;
            each(tokens, norm.forward(self.backend.as_ref(), &x)?)?;
        }
        Ok(())
    }

    /// Second moments of the head's inputs.
    ///
    /// # Errors
    /// As [`capture`](Self::capture).
    pub fn head(&self) -> Result<Hessian> {
        let backend = self.backend.as_ref();
        let mut sum = Gathering::new(backend, self.hidden())?;
        self.normed(|_, x| Ok(sum.add(backend, &x)?))?;
        Ok(sum.finish(backend)?)
    }

    /// Second moments of the prediction layer's matrices: it reads the trunk's normed states beside the
    /// embeddings of the tokens that follow.
    ///
    /// # Errors
    /// As [`capture`](Self::capture).
    pub fn prediction(&self, labels: BTreeSet<String>) -> Result<Hessians> {
        let origin = self.origin;
        let Some(spec) = &origin.spec.mtp else { return Ok(Hessians::new()) };
        let capture = Arc::new(Capture::new(self.backend.clone(), labels));
        let checkpoint = origin.source.checkpoint();
        let mut progress = |_| {};
        let mut loader = Loader::new(checkpoint, capture.clone(), &mut progress).with_tag(&tag);
        let Some(mtp) = Mtp::load(&mut loader, &origin.spec)? else { return Ok(Hessians::new()) };
        let table =
            self.backend.load_embedding(&origin.source.linear(&origin.embedding_spec())?)?;
        let cache = cache(capture.as_ref(), &spec.block, self.calibration.columns())?;
        self.normed(|tokens, hidden| {
            let rows = tokens.len() - 1;
            if rows == 0 {
                return Ok(());
            }
            let batch = batch(&tokens[1..], self.calibration.columns());
            let keep: Vec<u32> = (0..rows as u32).collect();
            let hidden = self.backend.gather_rows(&hidden, &keep)?;
            let embedded = self.backend.embed(&table, &batch, origin.spec.embedding.scale)?;
            let step = Step { backend: capture.as_ref(), batch: &batch, cache: &cache };
            mtp.forward(&step, 0, &embedded, &hidden)?;
            Ok(())
        })?;
        Ok(capture.take()?)
    }
}

/// One row from an empty cache, of at most `columns` tokens.
pub fn batch(tokens: &[u32], columns: usize) -> Batch {
    let blocks: Vec<u32> = (0..tokens.len().div_ceil(BLOCK_SIZE) as u32).collect();
    let mut batch = Batch::new(BLOCK_SIZE);
    batch.push(tokens, 0, &blocks, columns as u32, 0);
    batch
}

/// A cache of one layer for one row of at most `columns` tokens.
///
/// # Errors
/// When it does not fit.
pub fn cache(backend: &dyn Backend, block: &BlockSpec, columns: usize) -> Result<Cache> {
    Ok(backend.create_cache(&CacheSpec {
        layers: vec![block.mixer.cache_layer()],
        block_size: BLOCK_SIZE,
        num_blocks: columns.div_ceil(BLOCK_SIZE),
        cache_type: CacheType::F32,
    })?)
}
