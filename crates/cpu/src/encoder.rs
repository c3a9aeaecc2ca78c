//! [`TileEncoder`] on the CPU.

use crate::{Level, Pool};
use marlin_quant::exl3::encode::{best_ring, target};
use marlin_quant::exl3::ring::TILE;
use marlin_quant::exl3::{Codebook, Rate, TileEncoder};
use marlin_tensor::BackendError;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use crate::simd::exl3::encode::Tiles;

/// Tiles of one task: some milliseconds, and a whole number of the groups kernels work on.
const TASK_TILES: usize = 4;

/// Encodes tiles on several threads: with 16-bit costs where the level has a kernel, else as the
/// [`ReferenceEncoder`](marlin_quant::exl3::ReferenceEncoder) does.
///
/// While it exists it keeps the memory of its searches: per thread 0.3 MB (8 bits per weight), 8 MB
/// (3 bits) or 34 MB (1 bit).
pub struct CpuEncoder {
    level: Level,
    pool: Pool,
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    tiles: Option<Tiles>,
}

impl CpuEncoder {
    /// For `level`, or the scalar one where the processor lacks it, on `threads` threads, the
    /// caller of [`encode`](TileEncoder::encode) being one of them.
    pub fn new(level: Level, threads: usize) -> Self {
        Self {
            level: if level.is_supported() { level.float() } else { Level::Scalar },
            pool: Pool::new(threads),
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            tiles: Tiles::new(level),
        }
    }
}

impl TileEncoder for CpuEncoder {
    fn name(&self) -> String {
        let threads = self.pool.threads();
        format!("{}, {threads} thread{}", self.level, if threads == 1 { "" } else { "s" })
    }

    fn encode(
        &self,
        tiles: &[f32],
        rate: Rate,
        codebook: Codebook,
        states: &mut [u16],
    ) -> Result<(), BackendError> {
        assert_eq!(tiles.len(), states.len(), "one state per value");
        let ((tiles, rest), (states, _)) = (tiles.as_chunks::<TILE>(), states.as_chunks_mut());
        assert!(rest.is_empty(), "whole tiles");
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        if let Some(kernel) = &self.tiles {
            let plan = kernel.plan(rate, codebook);
            self.pool.run_chunks(states, TASK_TILES, |i, states| {
                kernel.encode(&plan, &tiles[i * TASK_TILES..][..states.len()], states);
            });
            return Ok(());
        }
        let table = codebook.table();
        self.pool.run_chunks(states, 1, |i, states: &mut [[u16; TILE]]| {
            states[0] = best_ring(&tiles[i].map(target), rate, &table);
        });
        Ok(())
    }
}
