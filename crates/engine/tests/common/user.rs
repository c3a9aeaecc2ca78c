//! A user who does anything, and a model that costs nothing.

use super::{Outcome, mix};
use marlin_engine::{
    Engine, EngineError, FinishReason, LanguageModel, Request, SamplingOptions, SamplingParams,
    SequenceId,
};
use marlin_tensor::{Batch, Cache, CacheLayerSpec, CacheSpec, CacheType, Tensor};
use std::sync::Arc;

/// Every token is equally likely, and nothing is computed.
pub struct NullModel;

pub const VOCAB: usize = 5;

impl LanguageModel for NullModel {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn max_context(&self) -> usize {
        64
    }

    fn create_cache(
        &self,
        num_blocks: usize,
        block_size: usize,
        cache_type: CacheType,
    ) -> Result<Cache, EngineError> {
        let layer = CacheLayerSpec { num_kv_heads: 1, key_head_dim: 1, value_head_dim: 1 };
        let spec = CacheSpec { layers: vec![layer], block_size, num_blocks, cache_type };
        Ok(Cache { spec, handle: Arc::new(()) })
    }

    fn copy_blocks(&self, _: &Cache, _: &[(u32, u32)]) -> Result<(), EngineError> {
        Ok(())
    }

    fn forward(&self, batch: &Batch, _: &Cache) -> Result<Tensor, EngineError> {
        let rows = batch.output_rows.len();
        Ok(Tensor { rows, decode_rows: 0, columns: VOCAB, handle: Arc::new(()) })
    }

    fn hidden(&self, batch: &Batch, cache: &Cache) -> Result<Tensor, EngineError> {
        self.forward(batch, cache)
    }

    fn download(&self, logits: &Tensor) -> Result<Vec<f32>, EngineError> {
        Ok(vec![0.0; logits.rows * VOCAB])
    }
}

/// Submits, cancels and steps as `choose` says.
pub struct User<'a> {
    /// A number for every turn.
    choose: Box<dyn FnMut() -> u64 + 'a>,
    open: Vec<SequenceId>,
    outcome: Outcome,
    submitted: usize,
}

impl<'a> User<'a> {
    pub fn new(choose: impl FnMut() -> u64 + 'a) -> Self {
        let (open, outcome) = Default::default();
        Self { choose: Box::new(choose), open, outcome, submitted: 0 }
    }

    /// The same whenever `seed` is.
    pub fn random(seed: u64) -> Self {
        let mut turn = 0;
        Self::new(move || {
            turn += 1;
            mix(seed, turn)
        })
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.choose)() % n
    }

    fn request(&mut self, engine: &Engine, vocab: u64, longest: u64) -> (Request, usize) {
        let prompt_len = 1 + self.below(longest) as usize;
        // Few beginnings, so that prompts share them.
        let beginning = self.below(3);
        let prompt = (0..prompt_len as u64)
            .map(|i| if i < 20 { mix(beginning, i) % vocab } else { self.below(vocab) } as u32)
            .collect();
        let seed = self.below(1 << 40);
        let sampling = SamplingParams::new(SamplingOptions { seed, ..Default::default() }).unwrap();
        let room = engine.limits().max_context - prompt_len;
        let n = if self.below(4) == 0 { 1 + self.below(4) as usize } else { 1 };
        let request = Request {
            max_tokens: Some(1 + self.below(room.min(30) as u64) as usize),
            priority: self.below(3) as i32 - 1,
            stop_tokens: if self.below(2) == 0 { vec![2] } else { vec![] },
            cache_name: (self.below(5) == 0).then(|| "tenant".into()),
            ..Request::new(prompt, sampling, vec![])
        };
        (request, n)
    }

    /// One operation.
    pub fn act(&mut self, engine: &mut Engine, vocab: u64, longest: u64) {
        match self.below(10) {
            0..=2 if self.open.len() < 40 => {
                let (request, n) = self.request(engine, vocab, longest);
                let request = engine.limits().validate(request).unwrap();
                self.open.extend(engine.submit_many(request, n));
                self.submitted += n;
            }
            3 if !self.open.is_empty() => {
                let at = self.below(self.open.len() as u64) as usize;
                let id = self.open.swap_remove(at);
                let known = self.outcome.finished.contains_key(&id);
                assert_eq!(engine.cancel(id), !known, "{id} is open exactly when it has not ended");
            }
            _ => {
                self.outcome.take(engine.step());
                let finished = &self.outcome.finished;
                self.open.retain(|id| !finished.contains_key(id));
            }
        }
    }

    pub fn finish(mut self, engine: &mut Engine, num_blocks: usize) {
        while !engine.is_idle() {
            self.outcome.take(engine.step());
        }
        assert_eq!(self.outcome.finished.len(), self.submitted, "every request ends, once");
        let failed = |r: &&FinishReason| matches!(r, FinishReason::Error(_));
        assert_eq!(self.outcome.finished.values().find(failed).map(|_| ()), None);
        assert_eq!(engine.free_blocks(), num_blocks, "no block is lost");
    }
}
