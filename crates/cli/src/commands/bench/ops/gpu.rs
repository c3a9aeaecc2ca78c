//! Times operators of a device that works on while they have returned: many in a row, recorded as one launch where the
//! runtime can, and the copy of as many bytes in the same manner.

use super::cases::Case;
use super::{Row, median};
use anyhow::Result;
use marlin_tensor::{
    Backend, BackendError, Batch, Cache, CacheLayerSpec, CacheSpec, CacheType, Heads, Tensor,
};
use std::collections::BTreeMap;
use std::time::Instant;

/// Seconds that a measured run should take, so that what starts and ends it counts for little.
const RUN_SECONDS: f64 = 3e-3;
/// Most launches of a run.
const MOST_LAUNCHES: usize = 512;
/// Runs that are measured.
const RUNS: usize = 9;
/// Bytes that the large copy reads and writes on a GPU, and on a program that plays one or where only the table is wanted.
const COPY_BYTES: usize = 1 << 30;
const SMALL_COPY_BYTES: usize = 16 << 20;
/// Fewest bytes of a copy that is compared with.
const LEAST_COPY_BYTES: usize = 8 << 10;
/// Columns of what is copied.
const COLUMNS: usize = 1024;

/// Measures operators of a device.
pub struct Gpu<'a> {
    backend: &'a dyn Backend,
    runs: usize,
    /// What a recording gives, and what is waited for.
    small: Tensor,
    /// The batch and cache that recordings of operators without any are made of.
    batch: Batch,
    cache: Cache,
    /// Names recordings.
    owner: u64,
    large: usize,
    /// Bytes per second of copies, by their bytes.
    copies: BTreeMap<usize, f64>,
}

impl<'a> Gpu<'a> {
    /// Measures the large copy.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(backend: &'a dyn Backend, is_software: bool, quick: bool) -> Result<Self> {
        let layer = CacheLayerSpec { num_kv_heads: 1, key_head_dim: 64, value_head_dim: 64 };
        let spec = CacheSpec {
            layers: vec![layer],
            block_size: 16,
            num_blocks: 1,
            cache_type: CacheType::F32,
        };
        let mut batch = Batch::new(16);
        batch.push_decode(&[0], 0, &[0], 16, 1);
        let mut gpu = Self {
            backend,
            runs: if quick { 1 } else { RUNS },
            small: backend.upload(1, 4, vec![0.0; 4])?,
            batch,
            cache: backend.create_cache(&spec)?,
            owner: 0,
            large: if is_software || quick { SMALL_COPY_BYTES } else { COPY_BYTES },
            copies: BTreeMap::new(),
        };
        gpu.copy(gpu.large)?;
        Ok(gpu)
    }

    /// Bytes that the large copy reads and writes, and how many a second.
    pub fn large_copy(&self) -> (usize, f64) {
        (self.large, self.copies.get(&self.large).copied().unwrap_or_default())
    }

    /// Times one operator, and the copy of as many bytes if that was not timed yet.
    ///
    /// # Errors
    /// When the device fails.
    pub fn measure(&mut self, mut case: Case<'_>) -> Result<Row> {
        let mut seconds = self.time(&mut case)?;
        let bytes = case.working_set.next_power_of_two() as usize;
        let copied = self.copy(bytes.clamp(LEAST_COPY_BYTES, self.large))?;
        let share = case.bytes as f64 / copied / median(&mut seconds);
        Ok(Row::new(case, seconds, copied, share, "copy"))
    }

    /// Bytes per second, read and written, of a copy of `bytes` in all.
    fn copy(&mut self, bytes: usize) -> Result<f64> {
        if let Some(known) = self.copies.get(&bytes) {
            return Ok(*known);
        }
        let (backend, rows) = (self.backend, bytes.div_ceil(8 * COLUMNS));
        let x = backend.upload(rows, COLUMNS, vec![0.0; rows * COLUMNS])?;
        let heads = Heads { heads: 1, head_dim: COLUMNS };
        let moved = 8 * rows * COLUMNS;
        let mut case = Case::new("copy", String::new(), moved, 0, |_| {
            backend.slice_heads(&x, heads, 0, COLUMNS)?;
            Ok(())
        });
        let seconds = self.time(&mut case)?;
        let least = seconds.into_iter().fold(f64::INFINITY, f64::min);
        let found = moved as f64 / least;
        self.copies.insert(bytes, found);
        Ok(found)
    }

    /// Seconds of a launch, in each run.
    fn time(&mut self, case: &mut Case<'_>) -> Result<Vec<f64>> {
        const FEW: usize = 4;
        // The first compiles.
        (case.run)(0)?;
        self.finish()?;
        let start = Instant::now();
        (0..FEW).try_for_each(|i| (case.run)(i))?;
        self.finish()?;
        let about = start.elapsed().as_secs_f64() / FEW as f64;
        let launches = match case.waits {
            true => 1,
            false => (RUN_SECONDS / about).ceil().clamp(1.0, MOST_LAUNCHES as f64) as usize,
        };
        if case.waits {
            return (0..self.runs)
                .map(|turn| {
                    let start = Instant::now();
                    (case.run)(turn)?;
                    Ok(start.elapsed().as_secs_f64())
                })
                .collect();
        }
        self.owner += 1;
        let batch = case.batch.clone().unwrap_or_else(|| self.batch.clone());
        let mut seconds = Vec::with_capacity(self.runs);
        // The first records.
        for turn in 0..=self.runs {
            let start = Instant::now();
            self.backend.run_pass(self.owner, &batch, &self.cache, &mut || {
                let all = (0..launches).try_for_each(|i| (case.run)(i));
                let failed = |error: anyhow::Error| match error.downcast::<BackendError>() {
                    Ok(error) => error,
                    Err(error) => BackendError::Device(error.to_string()),
                };
                all.map(|()| self.small.clone()).map_err(failed)
            })?;
            self.finish()?;
            if turn > 0 {
                seconds.push(start.elapsed().as_secs_f64() / launches as f64);
            }
        }
        Ok(seconds)
    }

    /// Waits for what was launched.
    fn finish(&self) -> Result<()> {
        self.backend.download(&self.small)?;
        Ok(())
    }
}
