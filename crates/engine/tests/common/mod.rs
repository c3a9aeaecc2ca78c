//! A model whose logits are a hash of every token before them, as read back through the block
//! table. A wrong slot, a stale or shared block, a missed or repeated token: each changes all
//! logits after it, and a slot that holds another position's token panics at once.

#![allow(dead_code)] // Every test binary uses its own part.

pub mod user;

use marlin_engine::{
    Engine, EngineError, EngineOptions, Event, FinishReason, LanguageModel, Request, SequenceId,
};
use marlin_tensor::{
    Batch, BatchSequence, Cache, CacheLayerSpec, CacheSpec, CacheType, Draw, Drawn, Tensor,
};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Token and position of every slot.
type Slots = Mutex<Vec<Option<(u32, u32)>>>;

pub struct HashModel {
    pub vocab_size: usize,
    pub max_context: usize,
    /// Changes all logits.
    pub salt: u64,
    /// The position whose next-token logits contain a NaN.
    pub nan_at: Option<u32>,
    /// The forward pass that fails.
    pub fail_at: Option<usize>,
    pub passes: AtomicUsize,
    /// Rows of the largest batch.
    pub widest: AtomicUsize,
    /// Whether it draws tokens itself, as a device does.
    pub draws: bool,
    /// Times that logits were copied.
    pub downloads: AtomicUsize,
}

impl Default for HashModel {
    fn default() -> Self {
        Self {
            vocab_size: 50,
            max_context: 400,
            salt: 0,
            nan_at: None,
            fail_at: None,
            passes: AtomicUsize::new(0),
            widest: AtomicUsize::new(0),
            draws: false,
            downloads: AtomicUsize::new(0),
        }
    }
}

pub fn mix(a: u64, b: u64) -> u64 {
    let mut x = (a ^ b.wrapping_mul(0x9E37_79B9_7F4A_7C15)).wrapping_add(0x1234_5678_9ABC_DEF1);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

impl HashModel {
    /// Logits after `tokens`.
    pub fn logits(&self, tokens: &[u32]) -> Vec<f32> {
        let state = tokens.iter().fold(self.salt, |h, &t| mix(h, u64::from(t)));
        let mut logits: Vec<f32> = (0..self.vocab_size as u64)
            .map(|v| (mix(state, v) % 8192) as f32 / 1024.0 - 4.0)
            .collect();
        if self.nan_at == Some(tokens.len() as u32 - 1) {
            logits[3] = f32::NAN;
        }
        logits
    }

    fn read(slots: &[Option<(u32, u32)>], s: &BatchSequence, block_size: usize) -> Vec<u32> {
        let slot = |p: usize| s.block_table[p / block_size] as usize * block_size + p % block_size;
        (0..s.context_len)
            .map(|p| {
                let (token, position) = slots[slot(p)].expect("the slot was written");
                assert_eq!(position as usize, p, "slot {} holds another position", slot(p));
                token
            })
            .collect()
    }
}

impl LanguageModel for HashModel {
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn max_context(&self) -> usize {
        self.max_context
    }

    fn create_cache(
        &self,
        num_blocks: usize,
        block_size: usize,
        cache_type: CacheType,
    ) -> Result<Cache, EngineError> {
        let layer = CacheLayerSpec { num_kv_heads: 1, key_head_dim: 1, value_head_dim: 1 };
        let slots: Slots = Mutex::new(vec![None; num_blocks * block_size]);
        let spec = CacheSpec { layers: vec![layer], block_size, num_blocks, cache_type };
        Ok(Cache { spec, handle: Arc::new(slots) })
    }

    fn copy_blocks(&self, cache: &Cache, pairs: &[(u32, u32)]) -> Result<(), EngineError> {
        let mut slots = cache.handle.downcast_ref::<Slots>().unwrap().lock().unwrap();
        let size = cache.spec.block_size;
        for &(from, to) in pairs {
            let from = from as usize * size;
            slots.copy_within(from..from + size, to as usize * size);
        }
        Ok(())
    }

    fn forward(&self, batch: &Batch, cache: &Cache) -> Result<Tensor, EngineError> {
        let pass = self.passes.fetch_add(1, Ordering::Relaxed);
        self.widest.fetch_max(batch.rows(), Ordering::Relaxed);
        if self.fail_at == Some(pass) {
            return Err(EngineError::Forward("the device is on fire".into()));
        }
        let mut slots = cache.handle.downcast_ref::<Slots>().unwrap().lock().unwrap();
        for (row, &slot) in batch.slot_mapping.iter().enumerate() {
            slots[slot as usize] = Some((batch.tokens[row], batch.positions[row]));
        }
        let mut logits = Vec::new();
        for s in &batch.sequences {
            assert!(s.context_len <= s.max_context as usize);
            let tokens = Self::read(&slots, s, batch.block_size);
            for row in s.first_row..s.first_row + s.rows {
                if batch.output_rows.contains(&(row as u32)) {
                    logits.extend(self.logits(&tokens[..=batch.positions[row] as usize]));
                }
            }
        }
        let (rows, columns) = (batch.output_rows.len(), self.vocab_size);
        Ok(Tensor { rows, decode_rows: 0, columns, handle: Arc::new(logits) })
    }

    /// Two columns: the token, and how many have come.
    fn hidden(&self, batch: &Batch, _: &Cache) -> Result<Tensor, EngineError> {
        let rows = batch.tokens.iter().zip(&batch.positions);
        let states: Vec<f32> = rows.flat_map(|(t, p)| [*t as f32, *p as f32 + 1.0]).collect();
        let handle = Arc::new(states);
        Ok(Tensor { rows: batch.rows(), decode_rows: 0, columns: 2, handle })
    }

    fn draw(
        &self,
        logits: &Tensor,
        draws: &[Draw],
    ) -> Result<Option<Vec<Option<Drawn>>>, EngineError> {
        if !self.draws {
            return Ok(None);
        }
        let values = logits.handle.downcast_ref::<Vec<f32>>().unwrap();
        let row = |draw: &Draw| &values[draw.row * self.vocab_size..][..self.vocab_size];
        Ok(Some(draws.iter().map(|draw| marlin_testkit::draws::drawn(row(draw), draw)).collect()))
    }

    fn download(&self, logits: &Tensor) -> Result<Vec<f32>, EngineError> {
        self.downloads.fetch_add(1, Ordering::Relaxed);
        Ok(logits.handle.downcast_ref::<Vec<f32>>().unwrap().clone())
    }
}

pub fn engine(model: HashModel, options: EngineOptions) -> Engine {
    Engine::new(Arc::new(model), &options).unwrap()
}

/// Small blocks, an f32 cache, room for `max_batch` sequences at once.
pub fn options(max_batch: usize, prefill_chunk: usize) -> EngineOptions {
    EngineOptions {
        block_size: 4,
        num_blocks: Some(100 * max_batch),
        cache_type: CacheType::F32,
        prefill_chunk,
        mixed_chunk: prefill_chunk,
        max_batch,
        ..EngineOptions::default()
    }
}

/// Tokens and end of every sequence.
#[derive(Default)]
pub struct Outcome {
    pub tokens: BTreeMap<SequenceId, Vec<u32>>,
    pub finished: BTreeMap<SequenceId, FinishReason>,
}

impl Outcome {
    pub fn take(&mut self, events: Vec<Event>) {
        for event in events {
            match event {
                Event::Token { id, token, .. } => {
                    assert!(!self.finished.contains_key(&id), "a token after the end");
                    self.tokens.entry(id).or_default().push(token);
                }
                Event::Finished { id, reason, .. } => {
                    assert!(self.finished.insert(id, reason).is_none(), "finished twice");
                }
            }
        }
    }
}

/// Steps until nothing is left.
pub fn drain(engine: &mut Engine) -> Outcome {
    let mut outcome = Outcome::default();
    while !engine.is_idle() {
        outcome.take(engine.step());
    }
    outcome
}

/// The answers to `requests`, submitted together, in order.
pub fn answers(engine: &mut Engine, requests: &[Request]) -> Vec<Vec<u32>> {
    let limits = engine.limits();
    let ids: Vec<_> =
        requests.iter().map(|r| engine.submit(limits.validate(r.clone()).unwrap())).collect();
    let mut outcome = drain(engine);
    ids.iter().map(|id| outcome.tokens.remove(id).unwrap_or_default()).collect()
}
